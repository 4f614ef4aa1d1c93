"""Every kind of bad input ends in one line on stderr and a non-zero code, never in a traceback."""

import os
from pathlib import Path

import pytest
from transformers import AutoTokenizer, DeepseekV3Config, DeepseekV3ForCausalLM, T5Config

from icecache.cli.inputs import MAX_PROMPT_BYTES
from tests.cli.running import Cli, Result


def assert_one_line(result: Result, *words: str) -> None:
    assert result.code == 1
    assert result.out == ""
    lines = result.err.splitlines()
    assert len(lines) == 1, result.err
    assert lines[0].startswith("icecache: ")
    for word in words:
        assert word in lines[0]


def ask(cli: Cli, prompt: Path, *more: str | Path) -> Result:
    return cli("generate", "--prompt-file", prompt, "--question", "What was mended?", *more)


def test_missing_prompt_file(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "nowhere.txt"
    assert_one_line(ask(cli, path), "does not exist", str(path))


def test_prompt_file_is_a_folder(cli: Cli, tmp_path: Path) -> None:
    assert_one_line(ask(cli, tmp_path), "not a file")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty"),
        (b" \n\t\n", "empty"),
        (b"\xff\xfe\x00\x80 abc", "not UTF-8 text"),
        (b"caf\xe9", "at byte 3"),
        (b"text\x00with a NUL", "NUL"),
    ],
)
def test_prompt_file_without_text(cli: Cli, tmp_path: Path, content: bytes, word: str) -> None:
    path = tmp_path / "prompt"
    path.write_bytes(content)
    assert_one_line(ask(cli, path), word, str(path))


def test_prompt_file_too_large(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "large.txt"
    with path.open("wb") as file:
        os.truncate(file.fileno(), MAX_PROMPT_BYTES + 1)
    assert_one_line(ask(cli, path), "too large", f"{MAX_PROMPT_BYTES:,}")


def test_missing_model(cli: Cli, log_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "no-model"
    assert_one_line(ask(cli, log_file, "--model", path), "model path does not exist", str(path))


def test_model_folder_without_config(cli: Cli, log_file: Path, tmp_path: Path) -> None:
    assert_one_line(ask(cli, log_file, "--model", tmp_path), "config.json")


def test_model_with_torn_weights(
    cli: Cli, log_file: Path, tiny_model: Path, tmp_path: Path
) -> None:
    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert_one_line(ask(cli, log_file, "--model", tmp_path), "no readable model")


def test_model_that_is_no_causal_decoder(cli: Cli, log_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    T5Config().save_pretrained(folder)
    assert_one_line(ask(cli, log_file, "--model", folder), "'t5'", "not a causal language model")


def test_model_that_icecache_does_not_support(
    cli: Cli, log_file: Path, tiny_model: Path, tmp_path: Path
) -> None:
    config = DeepseekV3Config(
        vocab_size=49152,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=1,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    DeepseekV3ForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    assert_one_line(ask(cli, log_file, "--model", tmp_path), "MLA")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--budget", "40"), ("budget", "40")),
        (("--budget", "-1"), ("budget", "-1")),
        (("--leaf-size", "0"), ("leaf_size", "0")),
        (("--window", "99999999999"), ("window", "99999999999")),
        (("--selection", "exact", "--remainder"), ("remainder",)),
        (("--dtype", "int8"), ("dtype", "int8")),
    ],
)
def test_bad_settings(
    cli: Cli, log_file: Path, flags: tuple[str, ...], words: tuple[str, ...]
) -> None:
    assert_one_line(ask(cli, log_file, *flags), *words)


def test_empty_question(cli: Cli, log_file: Path, tiny_model: Path) -> None:
    result = cli("generate", "--prompt-file", log_file, "--question", " ", "--model", tiny_model)
    assert_one_line(result, "question is empty")


def test_prompt_longer_than_the_models_context(cli: Cli, log_file: Path, tiny_model: Path) -> None:
    log_file.write_text(log_file.read_text() * 5)
    assert_one_line(ask(cli, log_file, "--model", tiny_model), "context of 2,048")


def test_wrong_usage_has_code_2(cli: Cli) -> None:
    result = cli("generate", "--no-such-flag")
    assert result.code == 2
    assert "no-such-flag" in result.err
    assert "Traceback" not in result.err
