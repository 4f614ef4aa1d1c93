import json
import math
from pathlib import Path
from typing import Any

import fidelity
import memory
import pytest
import torch
from common import read_records
from memory_codes import CODES, Codes, narrowed, requantise, saved_bytes

from icecache import IceCacheConfig

LEAVES = memory.Sweep(leaf_sizes=(8,), fan_outs=(), fields=())


@pytest.fixture
def kv_shape(kv_shape: Any) -> Any:
    """Long enough for a level of nodes."""
    return kv_shape._replace(prompt=1000, layers=(5,))


@pytest.fixture
def leaf_rows(kv_folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = memory.run(kv_folder, [128], LEAVES, steps=2)["leaf_rows"]
    return rows


def test_requantise_by_hand() -> None:
    codes = torch.tensor([[112, -56, 8, -112], [0, 0, 0, 0], [16, 48, -80, 127]]).char()
    scale = torch.tensor([0.0625, 0.0, 0.5]).bfloat16()
    narrow, step = requantise(codes, scale)
    # means 7, -3.5, 0.5, -7 by 1; then 8, 24, -40, 63.5 by 63.5 / 7 = 9.07 as a bfloat16
    assert step.tolist() == [1.0, 0.0, 9.0625]
    assert narrow.tolist() == [[7, -4, 0, -7], [0, 0, 0, 0], [1, 3, -4, 7]]
    assert narrow.dtype == torch.int8 and step.dtype == torch.bfloat16


def test_requantised_means_are_off_by_half_a_step() -> None:
    codes = torch.randint(-127, 128, (50, 64)).char()
    scale = torch.rand(50).bfloat16()
    narrow, step = requantise(codes, scale)
    off = narrow.float() * step.float()[:, None] - codes.float() * scale.float()[:, None]
    assert narrow.abs().max() == 7
    # a step rounded down to bfloat16 leaves the largest mean a little beyond the last level
    assert (off.abs() <= 0.52 * step.float()[:, None]).all()


@pytest.mark.parametrize("codes", [Codes(4, 8), Codes(8, 4), Codes(4, 4), Codes(8, 0)])
def test_narrowed_lasts_as_long_as_the_block(kv_folder: Path, codes: Codes) -> None:
    record = next(read_records(kv_folder / "synthetic.safetensors"))
    tree = memory.tree_of(memory.built_layer(record, IceCacheConfig(fan_out=4)))
    assert len(tree.levels) > 1
    names = ("key_mean", "key_scale", "value_mean", "value_scale", "spread")
    before = [[level.array(name).clone() for name in names] for level in tree.levels]
    with narrowed(tree, codes):
        for level, (*_, key_scale, _, _, spread) in zip(tree.levels, before):
            parts = {"key": codes.keys, "value": codes.values}
            for part, bits in parts.items():
                assert level.array(f"{part}_mean").abs().max() == (7 if bits == 4 else 127)
            scales = level.array("key_scale").float().square() - key_scale.float().square()
            grown = spread.float() + scales * record.keys.shape[-1] / 12
            assert torch.allclose(level.array("spread").float(), grown, rtol=1e-2)
    for level, kept in zip(tree.levels, before):
        assert all(level.array(name).equal(array) for name, array in zip(names, kept))


@pytest.mark.parametrize(
    ("codes", "head_dim", "saved"),
    [
        (Codes(8, 8), 64, 0),
        (Codes(4, 8), 64, 32),
        (Codes(4, 4), 128, 128),
        (Codes(8, 0), 64, 66),
        (Codes(4, 0), 64, 98),
        (Codes(4, 8), 5, 2),
    ],
)
def test_saved_bytes_by_hand(codes: Codes, head_dim: int, saved: int) -> None:
    assert saved_bytes(codes, head_dim, entries=10) == 10 * saved


def test_bytes_follow_the_formula(leaf_rows: list[dict[str, Any]], kv_shape: Any) -> None:
    config = IceCacheConfig()
    dim, tokens = 32, kv_shape.prompt - config.sink - config.window
    for row in leaf_rows:
        codes = CODES[row["codes"]]
        saved = dim * (16 - codes.keys - codes.values) / 8 + (0 if codes.values else 2)
        leaf = 2 * dim + 15 + math.ceil(row["page_size"] / 8) - saved
        node = 2 * dim + 18 - saved
        once = 4 * (row["page_size"] + 1) + 4 * dim
        entries = leaf / row["mean_leaf"] + node * row["nodes_per_token"]
        formula = entries + 13 / row["tokens_per_page"] + once / tokens
        assert row["bytes_per_token"] == pytest.approx(formula)
        assert row["simulated"] == (row["codes"] != "int8")


def test_plain_rows_are_those_of_the_fidelity_benchmark(
    kv_folder: Path, leaf_rows: list[dict[str, Any]]
) -> None:
    plain = fidelity.run(kv_folder, [128], steps=2)["rows"][0]
    found = next(row for row in leaf_rows if row["codes"] == "int8")
    assert [found[name] for name in ("error", "ratio")] == pytest.approx(
        [plain[name] for name in ("error", "ratio")]
    )


def test_a_common_offset_of_keys_costs_no_codes(kv_folder: Path) -> None:
    record = next(read_records(kv_folder / "synthetic.safetensors"))
    config = IceCacheConfig(budget=64)

    def errors() -> dict[str, float]:
        rows = memory.leaf_rows([memory.case_of(record, config)], config)
        return {row["codes"]: row["error"] for row in rows}

    without = errors()
    record.keys[..., 0] += 200.0
    assert errors() == pytest.approx(without, rel=0.03)


def test_a_wide_field_of_view_is_the_flat_scan(kv_folder: Path) -> None:
    fields = memory.Sweep(leaf_sizes=(), fan_outs=(4,), fields=(4, 512))
    narrow, wide = memory.run(kv_folder, [128], fields)["field_means"]
    assert (narrow["field_of_view"], wide["field_of_view"]) == (4, 512)
    assert wide["error_over_flat"] == pytest.approx(1.0, abs=1e-3)
    assert wide["scored"] >= wide["scored_flat"] > narrow["scored"]
    assert narrow["error_over_flat"] > 1.0


def test_leaves_that_a_budget_has_no_room_for_are_left_out(kv_folder: Path) -> None:
    report = memory.run(kv_folder, [128, 64], memory.Sweep((32,), (), ()), steps=1)
    assert {row["budget"] for row in report["leaf_rows"]} == {128}
    assert {row["page_size"] for row in report["leaf_rows"]} == {32}


def test_leaf_targets() -> None:
    config = IceCacheConfig(budget=128)
    found = [memory.with_leaves(config, size) for size in memory.Sweep().leaf_sizes]
    assert [one.leaf_target for one in found if one] == [3, 4, 5, 8, 10, 20]
    assert found[2] == config


def test_means_are_over_files() -> None:
    rows = [{"file": name, "size": 8, "ratio": ratio} for name, ratio in (("a", 0.5), ("b", 0.7))]
    assert memory.means(rows, ("size",)) == [{"size": 8, "ratio": pytest.approx(0.6), "files": 2}]


def test_json_on_stdout_and_a_picture(
    kv_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "memory.png"
    base = ["--kv", str(kv_folder), "--steps", "1", "--leaf-size", "8", "--fan-out", "12"]
    base += ["--field-of-view", "64"]
    memory.main([*base, "--json", "-", "--png", str(picture)])
    report = json.loads(capsys.readouterr().out)
    assert report["benchmark"] == "memory"
    assert len(report["leaf_means"]) == 2 * len(CODES)
    assert picture.read_bytes().startswith(b"\x89PNG")
    memory.main([*base, "--budget", "64"])
    assert "bytes_per_token" in capsys.readouterr().out.replace("…", "")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--set", "leaf_size=4"], "leaf_size"),
        (["--set", "leaf_sise=8"], "leaf_sise"),
        (["--budget", "4096"], "1000 tokens"),
        (["--png", "nowhere/x.png"], "existing folders"),
    ],
)
def test_bad_options_are_one_clear_line(
    kv_folder: Path, capsys: pytest.CaptureFixture[str], extra: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        memory.main(["--kv", str(kv_folder), "--json", "-", *extra])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
