"""Which ops run, and what is said where the compiled ones are missing."""

from collections.abc import Iterator

import pytest

from icecache.errors import BackendUnavailable, ConfigError
from icecache.ops import batched, dispatch, native, reference


@pytest.fixture
def _not_built(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(native, "_library_path", lambda: None)
    native.load.cache_clear()
    yield
    native.load.cache_clear()


@pytest.mark.usefixtures("_not_built")
def test_without_the_compiled_ops() -> None:
    assert dispatch.resolve_backend("auto") == "torch"
    with pytest.raises(BackendUnavailable, match=r"C compiler.*pip install"):
        dispatch.resolve_backend("native")


def test_each_backend_has_its_module() -> None:
    assert dispatch.ops_for("reference") is reference
    assert dispatch.ops_for("torch") is batched
    assert dispatch.resolve_backend("reference") == "reference"


def test_an_unknown_backend() -> None:
    with pytest.raises(ConfigError, match=r"backend must be one of .*, got 'cuda'"):
        dispatch.resolve_backend("cuda")
