import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

import icecache
from icecache import IceCacheConfig
from icecache.cli import session
from icecache.integrations.embedded import load
from tests.cli.running import Cli


def test_json_holds_both_rows_and_the_divergence(
    cli: Cli, log_file: Path, tiny_model: Path
) -> None:
    result = cli(
        *("generate", "--prompt-file", log_file, "--question", "What?", "--model", tiny_model),
        *("--max-new-tokens", 6, "--budget", 64, "--dtype", "float32", "--compare", "--json"),
    )
    assert result.code == 0, result.err
    record = json.loads(result.out)
    ice, full = record["rows"]
    assert (ice["name"], full["name"]) == ("IceCache", "full cache")
    assert ice["attended"] <= 64 < ice["tokens"] == full["tokens"]
    assert full["attended"] >= full["tokens"]
    # 2 layers, keys and values, 2 KV heads of 16 float32 numbers
    assert full["total_bytes"] == full["attended"] * 2 * 2 * 2 * 16 * 4
    assert ice["total_bytes"] == ice["exact_bytes"] + ice["summary_bytes"]
    assert ice["summary_bytes"] > 0
    assert 0 < record["divergence"] < 1
    assert record["settings"]["budget"] == 64


def test_budget_above_the_context_gives_the_full_caches_answer(
    cli: Cli, log_file: Path, tiny_model: Path
) -> None:
    result = cli(
        *("generate", "--prompt-file", log_file, "--question", "What?", "--model", tiny_model),
        *("--max-new-tokens", 6, "--budget", 4096, "--dtype", "float32", "--compare", "--json"),
    )
    record = json.loads(result.out)
    assert record["rows"][0]["answer"] == record["rows"][1]["answer"]
    assert record["divergence"] == pytest.approx(0.0, abs=1e-6)


def test_table_streams_the_answer_once_without_compare(
    cli: Cli, log_file: Path, tiny_model: Path
) -> None:
    result = cli(
        *("generate", "--prompt-file", log_file, "--question", "What?", "--model", tiny_model),
        *("--max-new-tokens", 4),
    )
    assert result.code == 0, result.err
    assert "IceCache" in result.out
    assert "MiB" in result.out
    assert "KL" not in result.out


def test_flags_take_names_and_defaults_from_the_config(cli: Cli) -> None:
    result = cli("generate", "--help")
    assert result.code == 0
    words = result.out.split()
    for name in IceCacheConfig.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in words
    assert f"{IceCacheConfig().budget}]" in result.out


def test_version(cli: Cli) -> None:
    result = cli("--version")
    assert (result.code, result.out) == (0, f"icecache {icecache.__version__}\n")


def test_prefill_in_chunks_is_the_whole_prompt(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load(tiny_model, torch.float32)
    ids = torch.randint(1000, (1, 100))
    moved: list[float] = []
    monkeypatch.setattr(session, "PREFILL_CHUNK", 33)
    found = session.prefill(model, ids, DynamicCache(config=model.config), moved.append)
    torch.testing.assert_close(found, model(ids).logits[:, -1])
    # two layers, four chunks
    assert len(moved) == 8
    assert sum(moved) == pytest.approx(100)
    assert not any(module._forward_hooks for module in model.modules())


def test_divergence_leaves_the_prefill_out_and_is_not_symmetric() -> None:
    full = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.5, 0.5]]).log()
    other = torch.tensor([[0.1, 0.9], [0.5, 0.5], [0.5, 0.5]]).log()
    expected = (0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)) / 2
    assert session.mean_divergence(full, other) == pytest.approx(expected)
    assert session.mean_divergence(full[:1], other[:1]) == 0.0


def test_import_is_light() -> None:
    code = (
        "import sys, icecache; "
        "print([m for m in ('transformers', 'triton', 'typer', 'rich') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
