"""The index benchmark at small sizes: what a row holds, and its yardsticks by hand."""

import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import index
import index_case
import index_measure
import index_peers
import numpy as np
import pytest
import torch
from baseline import attention_logits, topk_mask
from common import attend_steps, prefilled_layer
from index_case import Case, Shape, layer_around, split, synthetic_jobs
from index_measure import Settings, build, measure, time_inserts
from index_peers import Found, merge
from index_twin import Scan, measure_quality, scan_of
from synthetic import clustered_record

from icecache import IceCacheConfig
from icecache.errors import BackendUnavailable, HostMemoryExceeded

CONFIG = IceCacheConfig(budget=128)
FIELDS = {
    "tokens",
    "kv_heads",
    "head_dim",
    "q_heads",
    "build_s",
    "search_ms",
    "search_warm_ms",
    "search_cold_ms",
    "exact_scan_ms",
    "insert_ms",
    "bytes_per_token",
    "nodes_scored",
    "error_ratio",
}
SMALL = ["--heads", "2", "--head-dim", "16", "--steps", "2", "--inserts", "12", "--budget", "128"]


def small_case(tokens: int = 600) -> Case:
    jobs = synthetic_jobs(
        [Shape(2, 16, 3)], [tokens], steps=3, inserts=12, dtype="auto", config=CONFIG
    )
    return jobs[0].make()


def test_json_on_stdout_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert index.main([*SMALL, "--sizes", "300", "700", "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["skipped"] == []
    assert [row["tokens"] for row in report["rows"]] == [300, 700]
    for row in report["rows"]:
        assert row.keys() >= FIELDS
        assert (row["kv_heads"], row["head_dim"], row["q_heads"]) == (2, 16, 8)
        assert row["error_ratio"] == pytest.approx(1.0)
        assert row["topk_ratio"] == pytest.approx(row["error"] / row["topk_error"])
        assert 0 < row["recall"] <= 1
        assert row["leaves_scored"] > row["tokens"] / CONFIG.leaf_size / 2
        assert min(row[name] for name in FIELDS if name.endswith(("_s", "_ms"))) > 0


def test_recorded_layers_and_what_they_are_too_short_for(kv_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    base = ["--kv", str(kv_folder), "--steps", "2", "--inserts", "100", "--budget", "128"]
    assert index.main([*base, "--sizes", "500", "501", "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    found = [(row["source"], row["layer"], row["tokens"]) for row in report["rows"]]
    assert found == [("synthetic", 1, 500), ("synthetic", 5, 500)]
    assert [one["tokens"] for one in report["skipped"]] == [501, 501]
    assert "holds 500 tokens beside 100 to insert" in report["skipped"][0]["reason"]


def test_a_table_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "index.png"
    index.main([*SMALL, "--sizes", "300", "--png", str(picture)])
    out = capsys.readouterr().out
    assert "bytes of the index" in out and "2 x 16" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_shapes_are_those_of_the_models_unless_given() -> None:
    def shapes(*arguments: str) -> list[Shape]:
        return index.shapes_of(index.make_parser().parse_args(arguments))

    assert shapes() == [Shape(2, 64, 7), Shape(8, 128, 4)]
    assert shapes("--heads", "2", "--head-dim", "64") == [Shape(2, 64, 7)]
    assert shapes("--heads", "1", "--head-dim", "64", "--group", "3") == [Shape(1, 64, 3)]


def test_a_layer_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(case: Case, config: IceCacheConfig) -> None:
        if case.tokens > 400:
            raise HostMemoryExceeded(2, 1)

    monkeypatch.setattr(index_measure, "check_memory", refuse)
    jobs = synthetic_jobs(
        [Shape(1, 16, 2)], [300, 500], steps=1, inserts=4, dtype="auto", config=CONFIG
    )
    report = index.run(jobs, Settings(CONFIG, [], 0))
    assert [row["tokens"] for row in report["rows"]] == [300]
    assert [one["tokens"] for one in report["skipped"]] == [500]
    assert "2 bytes needed" in report["skipped"][0]["reason"]


def test_exact_scan_by_hand() -> None:
    # head 0 is sure of token 0; head 1 has larger logits but spreads its share over 1, 2 and 3
    keys = torch.tensor([[[6.0, 0.0], [0.0, 9.0], [0.0, 9.0], [0.0, 9.1], [0.0, 0.0]]])
    query = torch.eye(2)
    nothing = torch.zeros(1, 1, 2)
    assert Scan(keys, nothing, 1.0, 2).search(query).tolist() == [[0, 3]]
    assert Scan(keys, nothing, 1.0, 9).search(query).shape == (1, 5)
    # a sink that takes all of head 0's attention leaves the choice to head 1
    sink = torch.tensor([[[90.0, 0.0]]])
    assert Scan(keys, sink, 1.0, 1).search(query).tolist() == [[3]]


def test_exact_scan_chooses_what_the_yardstick_chooses() -> None:
    case = small_case()
    scan = scan_of(case, CONFIG)
    for step, query in enumerate(case.queries):
        found = scan.search(query) + case.sink
        for head in range(case.kv_heads):
            keys, _ = case.head(head)
            which = case.queries[step : step + 1, 3 * head : 3 * head + 3].double()
            logits = attention_logits(which, keys, case.scaling)
            mask = topk_mask(logits, CONFIG.budget, CONFIG.sink, CONFIG.window)[0, 0]
            mask[: case.sink] = False
            mask[-CONFIG.window :] = False
            assert set(found[head].tolist()) == set(mask.nonzero()[:, 0].tolist())


def test_quality_of_full_attention_and_of_the_exact_choice() -> None:
    case = small_case()
    scan = scan_of(case, CONFIG)
    full = torch.cat(
        [
            torch.nn.functional.scaled_dot_product_attention(
                case.queries[:, 3 * head : 3 * head + 3].double(),
                *(part.expand(3, -1, -1) for part in case.head(head)),
                scale=case.scaling,
            )
            for head in range(case.kv_heads)
        ],
        1,
    )
    exact = [scan.search(query) + case.sink for query in case.queries]
    none = [torch.full((2, 4), -1, dtype=torch.int32)] * 3
    found = measure_quality(case, CONFIG, {"full": full}, {"exact": exact, "none": none})
    assert found.errors["full"] < 1e-10 < found.topk_error
    assert found.recalls == {"exact": pytest.approx(1.0), "none": 0.0}


def test_a_context_keeps_sink_and_latest_tokens() -> None:
    record = clustered_record(300, num_kv_heads=2, head_dim=16)
    case = split(record, "x", tokens=200, inserts=30, config=CONFIG, dtype=torch.float32)
    sink = CONFIG.sink
    expected = torch.cat([record.keys[:, :sink], record.keys[:, 300 - 200 + sink :]], 1)
    assert torch.equal(case.head(1)[0][0], expected[1].double())
    assert torch.equal(case.extra_values, record.values[:, sink : sink + 30])
    assert (case.tokens, case.inserts) == (200, 30)


def test_the_layer_around_an_index_is_the_prefilled_layer() -> None:
    case = small_case()
    indexed, seconds = build(case, CONFIG)
    layer = layer_around(case, CONFIG, indexed)
    layer.check_integrity()
    keys, values = (
        torch.cat([case.head(head)[part] for head in range(2)]).float() for part in (0, 1)
    )
    expected = attend_steps(prefilled_layer(CONFIG, keys, values), case.queries, case.scaling)
    torch.testing.assert_close(attend_steps(layer, case.queries, case.scaling), expected)
    assert 1 <= len(seconds) <= 5
    assert len(time_inserts(indexed, case)) == 4
    assert indexed.lens == [600 - 48 + 12] * 2


def test_large_layers_are_held_in_bfloat16() -> None:
    choose = index_case.choose_dtype
    assert choose("auto", 8, 128, 1 << 18) == torch.float32
    assert choose("auto", 8, 128, 1 << 20) == torch.bfloat16
    assert choose("auto", 2, 64, 1 << 20) == torch.float32
    assert choose("float32", 8, 128, 1 << 20) == torch.float32
    case = synthetic_jobs(
        [Shape(1, 16, 2)], [300], steps=1, inserts=4, dtype="bfloat16", config=CONFIG
    )[0].make()
    row = measure(case, Settings(CONFIG, [], 0))
    assert row["dtype"] == "bfloat16"
    assert 0 < row["error"] < 1


class BruteForce:
    """hnswlib's interface over a scan of everything."""

    def __init__(self, space: str, dim: int) -> None:
        assert space == "ip"

    def init_index(self, **settings: int) -> None:
        assert settings["M"] == 16 and settings["ef_construction"] == 200

    def set_num_threads(self, threads: int) -> None:
        pass

    def set_ef(self, ef: int) -> None:
        assert ef >= 80

    def add_items(self, keys: np.ndarray, num_threads: int) -> None:
        self.keys = keys

    def knn_query(
        self, queries: np.ndarray, k: int, num_threads: int
    ) -> tuple[np.ndarray, np.ndarray]:
        distance = 1.0 - queries @ self.keys.T
        ids = distance.argsort(1)[:, :k]
        return ids.astype(np.uint64), np.take_along_axis(distance, ids, 1)


def test_peers_answer_the_same_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    library = ModuleType("hnswlib")
    library.Index = BruteForce  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hnswlib", library)
    row = measure(small_case(), Settings(CONFIG, ["hnswlib"], 600))
    assert row["peers"]["hnswlib"]["recall"] == pytest.approx(1.0, abs=0.02)
    assert row["peers"]["hnswlib"]["settings"]["ef"] == 80
    longer = measure(small_case(), Settings(CONFIG, ["hnswlib"], 599))
    assert (longer["peers"], longer["peers_left_out"]) == ({}, ["hnswlib"])


def test_what_query_heads_found_is_merged_by_their_shares() -> None:
    # head 0 has 0.5 on tokens 7 and 3 each, head 1 has nearly all on token 5
    ids = np.array([[7, 3, -1], [5, 3, 9]])
    products = np.array([[1.0, 1.0, 9.0], [8.0, 1.0, 0.0]], dtype=np.float32)
    found = merge([Found(ids, products)], 1.0, 3)
    assert found.tolist() == [[5, 3, 7]]
    few = merge([Found(np.array([[4, -1]]), np.array([[1.0, -math.inf]]))], 1.0, 3)
    assert few.tolist() == [[4, -1, -1]]


@pytest.mark.parametrize("name", ["hnswlib", "faiss"])
def test_a_peer_that_is_missing_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BackendUnavailable, match=f"pip install {index_peers.PACKAGES[name]}"):
        index_peers.load(name)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--sizes", "128"], "--sizes must be from 129"),
        (["--sizes", "100000000"], "got 100000000"),
        (["--heads", "0"], "--heads must be from 1 to 256, got 0"),
        (["--threads", "0"], "--threads must be from 1"),
        (["--inserts", "0"], "--inserts must be from 1"),
        (["--budget", "3"], "budget must be"),
        (["--set", "leaf_sise=8"], "leaf_sise"),
        (["--png", "no/such/folder/a.png"], "existing folders"),
        (["--json", "no/such/folder/a.json"], "existing folders"),
        (["--kv", "nowhere"], "--heads is of random keys"),
        (["--kv", "nowhere", "--synthetic"], "no *.safetensors"),
    ],
)
def test_bad_options_are_one_clear_line(
    capsys: pytest.CaptureFixture[str], extra: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        index.main([*SMALL, *extra])
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err.splitlines()[-1]
    assert captured.out == ""


def test_heads_without_their_size_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        index.main(["--heads", "2", "--sizes", "300"])
    assert "--head-dim" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("tokens", [4096, 65536])
def test_synthetic_keys_have_the_traits_of_recorded_ones(tokens: int) -> None:
    record = clustered_record(tokens, num_kv_heads=1)
    keys = record.keys[0] - record.keys[0].mean(0)
    variance = torch.linalg.eigvalsh(keys.T @ keys).flip(0)
    assert 0.25 < variance[:8].sum() / variance.sum() < 0.65
    logits = attention_logits(record.queries, record.keys, record.scaling)
    assert 2.5 < logits.std(-1).mean() < 5.5
    mask = topk_mask(logits, 256, 16, 32)
    assert (logits.softmax(-1) * mask[:, None]).sum(-1).mean() > 0.75


def test_synthetic_keys_are_the_same_in_every_dtype_but_for_rounding() -> None:
    exact, rounded = (clustered_record(200, dtype=d) for d in (torch.float32, torch.bfloat16))
    assert torch.equal(exact.keys.bfloat16(), rounded.keys)
    assert torch.equal(exact.queries, rounded.queries)


def test_the_report_says_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    index.main([*SMALL, "--sizes", "300", "--set", "leaf_size=6", "--json", "-"])
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert report["config"]["leaf_size"] == 6
    assert {"commit", "torch", "cpu", "threads", "date"} <= report["environment"].keys()
