import json
from pathlib import Path
from typing import Any

import growth
import pytest
from common import step_times
from synthetic import clustered_record


def check_rows(report: dict[str, Any], start: int, tokens: int) -> None:
    for row in report["rows"]:
        assert (row["start"], row["tokens"]) == (start, tokens)
        assert row["tokens_held"] == tokens
        assert row["dense_error"] < 1e-5
        assert 0 < row["error"] < 1
        assert row["ratio"] == pytest.approx(row["error"] / row["error_at_once"])
        assert 0 < row["fill_grown"] <= 1
        assert 0 < row["fill_built"] <= 1
        for part in ("append", "step", "step_cpu"):
            assert row[part]["median_ms"] <= row[part]["p99_ms"] <= row[part]["max_ms"]
    assert report["tokens_lost"] == 0
    json.dumps(report)


def test_recorded_keys_grow_to_the_end_of_the_prompt(kv_folder: Path, kv_shape: Any) -> None:
    sources = list(growth.recorded(kv_folder, None))
    report = growth.run(sources, budget=128, start=400, tokens=4096)
    assert [row["layer"] for row in report["rows"]] == list(kv_shape.layers)
    check_rows(report, start=400, tokens=kv_shape.prompt)


def test_synthetic_keys() -> None:
    report = growth.run([("synthetic", clustered_record(900))], budget=128, start=500, tokens=300)
    check_rows(report, start=500, tokens=800)
    assert report["mean_ratio"] < 2


def test_nothing_to_append_is_refused(kv_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        growth.main(["--kv", str(kv_folder), "--start", "600"])
    assert "none to append" in capsys.readouterr().err


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--synthetic", "--start", "400", "--tokens", "60", "--json", "-"]
    assert growth.main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["benchmark"] == "growth"
    assert len(report["rows"]) == 1


def test_step_times() -> None:
    found = step_times([0.001] * 99 + [0.004])
    assert found["median_ms"] == pytest.approx(1.0)
    assert found["max_over_median"] == pytest.approx(4.0)
