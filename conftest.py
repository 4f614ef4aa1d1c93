"""Without a GPU kernels are interpreted, and Triton must know that when it is first imported."""

import os

import torch

if not torch.cuda.is_available():
    # transformers imports it while the tests' own conftest is loaded
    os.environ["TRITON_INTERPRET"] = "1"
