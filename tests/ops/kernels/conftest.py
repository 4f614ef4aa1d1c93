"""Triton decides between GPU and interpreter when it is imported, so that happens here."""

import os

import pytest
import torch

_INTERPRETED = not torch.cuda.is_available()
if _INTERPRETED:
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
import icecache.ops.triton  # noqa: E402, F401

if _INTERPRETED:
    if before is None:
        del os.environ["TRITON_INTERPRET"]
    else:
        os.environ["TRITON_INTERPRET"] = before


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run: compiled on a GPU if there is one, else interpreted on the CPU."""
    return torch.device("cpu" if _INTERPRETED else "cuda")
