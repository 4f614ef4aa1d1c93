"""The benchmark of the engine's steps, on a model of two layers."""

import json
from pathlib import Path

import engine
import pytest
from transformers import LlamaConfig

pytestmark = pytest.mark.usefixtures("one_thread", "tiny")
TINY = ["--model", "tiny", "--dtype", "float32", "--context", "40"]


def test_both_kinds_of_steps_are_timed(
    tiny: LlamaConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # nobody ends early
    tiny.eos_token_id = None
    target = tmp_path / "engine.json"
    arguments = [*TINY, "--requests", "1", "3", "--steps", "4", "--set", "budget=64"]
    assert engine.main([*arguments, "--json", str(target)]) == 0
    assert "ratio" in capsys.readouterr().out
    report = json.loads(target.read_text())
    assert report["environment"]["commit"]
    assert [row["requests"] for row in report["rows"]] == [1, 3]
    for row in report["rows"]:
        assert row["native_ms"] > 0 and row["torch_ms"] > 0 and row["ratio"] > 0
        # of two turns, four timed steps and those before them
        assert row["native_steps"] >= 2 * 4 * row["requests"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--requests", "0"], "must be at least 1"),
        (["--set", "budgets=3"], "budgets"),
        (["--model", "nothing"], "--model must be one of"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        engine.main([*TINY, *arguments])
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err
