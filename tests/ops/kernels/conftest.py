"""Without a GPU, kernels are interpreted: Triton must know when it is imported and when it runs."""

from importlib import import_module

import pytest
import torch

_INTERPRETED = not torch.cuda.is_available()


def _interpret(patch: pytest.MonkeyPatch) -> None:
    if _INTERPRETED:
        patch.setenv("TRITON_INTERPRET", "1")


# before a test anywhere imports triton to compile
with pytest.MonkeyPatch.context() as _patch:
    _interpret(_patch)
    import_module("icecache.ops.triton")


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    _interpret(monkeypatch)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run: compiled on a GPU if there is one, else interpreted on the CPU."""
    return torch.device("cpu" if _INTERPRETED else "cuda")
