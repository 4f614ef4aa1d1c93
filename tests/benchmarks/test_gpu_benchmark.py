"""`benchmarks/gpu.py --smoke`: the whole of its logic on a CPU, with the kernels' twins."""

import json
from pathlib import Path
from typing import Any

import gpu
import gpu_measure
import pytest


def test_smoke_measures_every_case(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    assert gpu.main(["--smoke", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert report["left_out"] == []
    assert all(row["passed"] for row in report["kernels"]) and report["gather"]
    rows = {(row["case"], row["context"]): row for row in report["rows"]}
    decoded = [key for key in rows if not key[0].startswith("prefill")]
    assert len(decoded) == len(gpu.SMOKE.caches) * len(gpu.SMOKE.contexts)
    assert len(rows) == len(decoded) + 2 * len(gpu.SMOKE.prefills)
    for key in decoded:
        row = rows[key]
        assert row["tpot_ms"] > 0 < row["floor_ms"]
        assert row["graph_steps"] is None
        assert row["over_floor"] == pytest.approx(row["tpot_ms"] / row["floor_ms"])
    host, none = rows["icecache:host", 700], rows["icecache:none", 700]
    assert host["fetched_bytes_per_step"] > 0 == none["fetched_bytes_per_step"]
    assert none["host_bytes"] == 0 < host["host_bytes"]
    assert rows["icecache:int8", 700]["host_bytes"] < host["host_bytes"] / 2
    assert rows["dynamic", 700]["host_bytes"] == 2 * 2 * 2 * 16 * 4 * (700 + 10)


def test_a_cache_that_is_not_recorded_fails_its_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "gpu.json"
    case = ["--smoke", "--json", str(path), "--caches", "icecache:none", "--contexts", "100"]
    monkeypatch.setattr(gpu_measure.Player, "graph_steps", lambda self: self.position)
    monkeypatch.delattr("gpu_caches.Ice.graph_steps")
    assert gpu.main(case) == 0
    row = json.loads(path.read_text())["rows"][0]
    assert row["graph_steps"] == 4 * max(1, gpu.SMOKE.steps // 4)
    monkeypatch.setattr(gpu_measure.Player, "graph_steps", lambda self: 0)
    assert gpu.main(case) == 3
    reasons = [row["reason"] for row in json.loads(path.read_text())["left_out"]]
    assert reasons == ["RuntimeError: no step ran from a CUDA graph: the times are of other steps"]


def test_what_there_is_no_time_for_is_named(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    assert gpu.main(["--smoke", "--json", str(path), "--seconds", "1"]) == 3
    report = json.loads(path.read_text())
    assert report["rows"] == []
    cases = {(row["case"], row["context"]) for row in report["left_out"]}
    assert len(cases) == len(report["left_out"]) == 12
    assert all(row["reason"].endswith("s left") for row in report["left_out"])


def test_a_cache_that_fails_is_left_out_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(name: str, *args: Any) -> Any:
        if name == "dynamic":
            raise RuntimeError("out of memory")
        return made(name, *args)

    made = gpu.make_player
    monkeypatch.setattr(gpu, "make_player", fail)
    path = tmp_path / "gpu.json"
    caches = ["--caches", "dynamic", "icecache:none", "--contexts", "100"]
    assert gpu.main(["--smoke", "--json", str(path), *caches]) == 3
    assert capsys.readouterr().err.endswith("2 of 4 cases were left out\n")
    report = json.loads(path.read_text())
    assert [row["case"] for row in report["rows"]] == ["icecache:none", "prefill icecache:host"]
    reasons = [row["reason"] for row in report["left_out"]]
    assert reasons == ["RuntimeError: out of memory"] * 2


def test_what_the_command_ends_with(capsys: pytest.CaptureFixture[str]) -> None:
    right, wrong = {"passed": True}, {"passed": False}
    content: dict[str, Any] = {"kernels": [right, right], "rows": [{}], "left_out": []}
    assert gpu.outcome(content) == 0
    assert capsys.readouterr().err == ""
    assert gpu.outcome({**content, "left_out": [{}, {}]}) == 3
    # whatever is missing beside it
    assert gpu.outcome({**content, "left_out": [{}], "kernels": [right, wrong]}) == 1
    said = capsys.readouterr().err.splitlines()
    assert said == ["2 of 3 cases were left out", "1 kernel checks failed: no figure counts"]


def test_settings_of_the_command_line() -> None:
    assert gpu._setting("budget=128") == ("budget", 128)
    assert gpu._setting("offload=host") == ("offload", "host")
    assert gpu._setting("remainder=false") == ("remainder", False)
