import json
from pathlib import Path
from typing import Any

import fidelity
import pytest
from common import parse_overrides, read_records


def test_report_has_its_fields(kv_folder: Path, kv_shape: Any) -> None:
    report = fidelity.run(kv_folder, [128, 64])
    assert [row["budget"] for row in report["rows"]] == [128, 64]
    for row in report["rows"]:
        assert row["file"] == "synthetic"
        assert row["tokens"] == kv_shape.prompt
        assert row["steps"] == kv_shape.decoded
        assert row["layers"] == list(kv_shape.layers)
        assert row["ratio"] == pytest.approx(row["error"] / row["topk_error"])
        assert row["sparse_steps"] == (1 + kv_shape.decoded) * len(kv_shape.layers)
        assert row["dense_steps"] == 0
        assert 0 < row["error"] < 1
    assert report["mean_ratio"].keys() == {"128", "64"}
    assert report["rows"][0]["error"] < report["rows"][1]["error"]
    assert {"commit", "torch", "cpu", "threads", "date"} <= report["environment"].keys()
    json.dumps(report)


def test_budget_above_the_context_is_full_attention(kv_folder: Path, kv_shape: Any) -> None:
    report = fidelity.run(kv_folder, [kv_shape.prompt, 4096])
    assert all(row["error"] < 1e-5 for row in report["rows"])
    assert report["mean_ratio"] == {"600": None, "4096": None} or all(
        row["topk_error"] < 1e-12 for row in report["rows"]
    )


def test_exact_variant_is_the_topk_baseline(kv_folder: Path) -> None:
    report = fidelity.run(kv_folder, [128], variant="exact")
    assert report["mean_ratio"]["128"] == pytest.approx(1.0, abs=0.02)


def test_paper_variant_runs(kv_folder: Path) -> None:
    report = fidelity.run(kv_folder, [128], variant="paper")
    assert report["variant"] == "paper"
    assert 0 < report["rows"][0]["error"] < 2


def test_overrides_reach_the_config_and_the_baseline(kv_folder: Path) -> None:
    report = fidelity.run(kv_folder, [128], overrides={"sink": 4, "window": 8})
    assert report["sink_window"] == {"128": [4, 8]}
    plain = fidelity.run(kv_folder, [128])
    assert report["rows"][0]["topk_error"] != plain["rows"][0]["topk_error"]


def test_the_device_path_says_what_travels(kv_folder: Path) -> None:
    """Leaves lie in more pages than whole pages do; nearly all of both are there at the next step
    of a context of so few."""
    rows = {}
    for unit in ("leaf", "page"):
        overrides = {"backend": "twin", "unit": unit}
        rows[unit] = fidelity.run(kv_folder, [128], overrides=overrides)["rows"][0]
    # 80 tokens beside sink and window, 16 a page, three pages for each that they fill
    assert 5 <= rows["page"]["pages_per_step"] < rows["leaf"]["pages_per_step"] <= 15
    assert rows["leaf"]["error"] < rows["page"]["error"]
    for row in rows.values():
        assert 0 < row["fetched_per_step"] < row["pages_per_step"]
        assert 2 < row["mean_leaf"] <= 8
    in_place = fidelity.run(kv_folder, [128])["rows"][0]
    assert in_place["pages_per_step"] == in_place["fetched_per_step"] == 0


def test_records_are_cut_to_the_prompt_and_spaced(kv_folder: Path, kv_shape: Any) -> None:
    records = list(read_records(kv_folder / "synthetic.safetensors", steps=2))
    assert [record.layer for record in records] == list(kv_shape.layers)
    assert all(record.keys.shape[1] == kv_shape.prompt for record in records)
    every = next(read_records(kv_folder / "synthetic.safetensors"))
    assert records[0].queries.equal(every.queries[[0, 2]])


def test_json_goes_to_stdout_alone(kv_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--kv", str(kv_folder), "--budget", "64", "--steps", "1", "--json", "-"]
    assert fidelity.main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["benchmark"] == "fidelity"


def test_json_to_a_file_and_a_table_without(
    kv_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    base = ["--kv", str(kv_folder), "--budget", "64", "--steps", "1"]
    fidelity.main([*base, "--json", str(out)])
    assert json.loads(out.read_text())["rows"]
    assert capsys.readouterr().out == ""
    fidelity.main(base)
    assert "mean ratio to exact top-k at 64" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--set", "leaf_sise=8"], "leaf_sise"),
        (["--set", "leaf_size"], "key=value"),
        (["--budget", "3"], "budget"),
    ],
)
def test_bad_options_are_one_clear_line(
    kv_folder: Path, capsys: pytest.CaptureFixture[str], extra: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        fidelity.main(["--kv", str(kv_folder), "--json", "-", *extra])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_folder_without_files_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        fidelity.main(["--kv", str(tmp_path)])
    assert "no *.safetensors" in capsys.readouterr().err


def test_override_literals() -> None:
    found = parse_overrides(["a=8", "b=false", "c=None", "d=exact", "e=0.5"])
    assert found == {"a": 8, "b": False, "c": None, "d": "exact", "e": 0.5}
