"""The benchmarks are scripts that import each other by name, as `python benchmarks/x.py` does."""

import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))


class KVShape(NamedTuple):
    """What the folder of `kv_folder` holds."""

    prompt: int = 600
    decoded: int = 4
    layers: tuple[int, ...] = (1, 5)


@pytest.fixture
def kv_shape() -> KVShape:
    return KVShape()


@pytest.fixture
def kv_folder(tmp_path: Path, kv_shape: KVShape) -> Path:
    """Two recorded layers in the layout of the benchmarks' KV files, generated tokens included."""
    from synthetic import clustered_record

    folder = tmp_path / "kv"
    folder.mkdir()
    tensors = {}
    for layer in kv_shape.layers:
        tokens = kv_shape.prompt + kv_shape.decoded
        record = clustered_record(tokens, steps=kv_shape.decoded, head_dim=32, seed=layer)
        tensors[f"layer{layer}.keys"] = record.keys.bfloat16().contiguous()
        tensors[f"layer{layer}.values"] = record.values.bfloat16().contiguous()
        tensors[f"layer{layer}.queries"] = record.queries.contiguous()
    meta = {"layers": ",".join(map(str, kv_shape.layers)), "prompt_len": str(kv_shape.prompt)}
    save_file(tensors, folder / "synthetic.safetensors", metadata=meta)
    return folder


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
