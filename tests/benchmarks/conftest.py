"""The benchmarks are scripts that import each other by name, as `python benchmarks/x.py` does."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from decode_model import Subject
    from transformers import LlamaConfig

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


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Let torch have one: threads wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> "LlamaConfig":
    """A shape named "tiny", so that the command line finds it."""
    import decode_model
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
    )
    monkeypatch.setitem(decode_model.SHAPES, "tiny", config)
    return config


@pytest.fixture
def subject(tiny: "LlamaConfig") -> "Subject":
    """The model of that shape."""
    from decode_model import load_subject

    return load_subject("tiny", torch.float32)
