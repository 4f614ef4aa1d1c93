"""`import icecache` is light: neither transformers nor triton nor the command line comes along."""

import subprocess
import sys

import pytest

HEAVY = (
    "transformers",
    "accelerate",
    "triton",
    "typer",
    "click",
    "rich",
    "matplotlib",
    "fastapi",
    "vllm",
)


CODE = """
import sys, numpy, torch
before = set(sys.modules)
import icecache
print(*{name.split(".")[0] for name in set(sys.modules) - before})
config = icecache.IceCacheConfig(budget=64)
layer = icecache.IceCacheLayer(config, num_kv_heads=1, head_dim=64, dtype=torch.float32)
x = torch.ones(1, 1, 100, 64)
layer.prefill(x, x)
layer.attend(x[:, :, :1])
print(layer.stats().sparse_steps)
print(*{name.split(".")[0] for name in set(sys.modules) - before})
"""


def test_neither_the_import_nor_a_layer_pulls_in_a_heavy_package() -> None:
    # torch brings some of them itself: only what icecache adds counts
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    after_import, steps, after_use = done.stdout.splitlines()
    assert "icecache" in after_import.split()
    assert not set(after_import.split()) & set(HEAVY)
    assert steps == "1"
    # what a step of torch's own loads lazily is torch's affair
    assert not set(after_use.split()) & (set(HEAVY) - {"triton"})


def test_an_unknown_name_is_an_attribute_error() -> None:
    import icecache

    with pytest.raises(AttributeError, match="no attribute 'IceCach'"):
        _ = icecache.IceCach  # type: ignore[attr-defined]


def test_everything_in_all_is_there() -> None:
    import icecache

    missing = [name for name in icecache.__all__ if not hasattr(icecache, name)]
    assert missing == []
