"""Intervals, tables and the pages of a report."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from icecache.errors import InputError
from icecache.evaluation.results.bootstrap import mean_interval, mean_of_means, ratio_interval
from icecache.evaluation.results.record import Record
from icecache.evaluation.results.report import write_report
from icecache.evaluation.results.tables import Results, summary_tables
from tests.evaluation.records import example, fill, make_record


def test_intervals_cover_what_they_should() -> None:
    random = np.random.default_rng(1)
    covered = 0
    for seed in range(200):
        found = mean_interval(random.normal(3.0, 1.0, 30).tolist(), seed)
        assert found.low <= found.value <= found.high
        covered += found.low <= 3.0 <= found.high
    # 95 % of 200, the bootstrap of 30 samples being a little narrow
    assert 175 <= covered <= 199
    assert mean_interval([1.0, 2.0]) == mean_interval([1.0, 2.0])


def test_a_mean_of_means_weighs_tasks_alike() -> None:
    found = mean_of_means([[1.0] * 9, [0.0] * 2])
    assert found == (0.5, 0.5, 0.5)


def test_fewer_than_two_samples_have_no_interval(tmp_path: Path) -> None:
    assert mean_interval([2.0]) == (2.0, None, None)
    assert mean_of_means([[1.0, 2.0], [0.5]]) == (1.0, None, None)
    assert ratio_interval([3.0], [2.0]) == (1.5, None, None)
    records = [record for record in example() if record.id == "0" and record.task == "lcc"]
    tables = {table.title: table.rows for table in summary_tables(Results(records))}
    assert tables["Distance from the full cache"][0] == ["topk", "1", "0.25"]
    assert tables["Scores at 64 tokens"][0][3:] == ["40.0 0.50", "60.0 0.75"]
    fill(tmp_path, records)
    assert len(write_report(tmp_path)) == 2


@pytest.mark.parametrize(("count", "says"), [(9, True), (10, False)])
def test_a_report_says_that_intervals_of_few_samples_are_too_narrow(
    count: int, says: bool, tmp_path: Path
) -> None:
    full = {"kl": 0.0, "attended": 1000.0}
    for number in range(count):
        fill(
            tmp_path, [make_record("full", None, number=number, **full), make_record(number=number)]
        )
    text = write_report(tmp_path)[0].read_text(encoding="utf-8")
    assert ("fewer than 10 samples are too narrow" in text) is says


def test_ratios_are_resampled_in_pairs() -> None:
    ours = [0.1, 1.0, 10.0, 100.0]
    found = ratio_interval([2 * value for value in ours], ours)
    assert found is not None
    assert found == pytest.approx((2.0, 2.0, 2.0))
    assert ratio_interval([1.0], [0.0]) is None


def test_only_samples_that_every_method_has_are_summed_up() -> None:
    records = example()
    results = Results(records[:-1])
    assert (results.num_samples, results.num_partial) == (5, 1)
    assert results.budgets == [64, 256]
    assert [record.id for record in results.of(("icecache", 256), "trec")] == ["0", "1"]


def test_tables_hold_the_means() -> None:
    tables = {table.title: table for table in summary_tables(Results(example()))}
    far = tables["Distance from the full cache"]
    assert far.header == ["method", "64", "256"]
    rows = {row[0]: row[1:] for row in far.rows}
    assert rows["topk"][0].startswith("2 (")
    assert rows["icecache"][1].startswith("0.25 (")
    ratio = tables["Distance over that of icecache"]
    assert ratio.rows == [["topk", "2 (2-2)", "2 (2-2)"]]
    scores = tables["Scores at 64 tokens"].rows
    assert scores[0] == ["lcc", "3", "80.0", "40.0 (40.0-40.0) 0.50", "60.0 (60.0-60.0) 0.75"]
    assert scores[-1][0] == "mean of tasks"
    quoted = {(row[0], row[1]): row[2:] for row in tables["Beside the paper's figures"].rows}
    assert quoted["topk", "256"] == ["49.8", "1.006", "0.500"]
    assert quoted["icecache-paper", "64"] == ["47.8", "0.966", "-"]
    names = {"lcc": "passkey@700", "trec": "vcsum"}
    far_from = [dataclasses.replace(record, task=names[record.task]) for record in example()]
    rows_without = summary_tables(Results(far_from))[-1].rows
    assert {row[-1] for row in rows_without} == {"-"}
    mixed = [*example(), *(dataclasses.replace(r, score=0.8) for r in far_from)]
    rows_with = {(row[0], row[1]): row[2:] for row in summary_tables(Results(mixed))[-1].rows}
    assert rows_with["topk", "256"] == quoted["topk", "256"]
    assert "quoted" in tables["Beside the paper's figures"].note.lower()


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href", "data")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_needs_nothing_beside_it(tmp_path: Path) -> None:
    fill(tmp_path, example())
    markdown, page = write_report(tmp_path)
    parsed = _Page()
    parsed.feed(page.read_text(encoding="utf-8"))
    assert not {"script", "link", "img", "iframe"} & set(parsed.tags)
    # within a drawing, parts refer to each other
    assert all(address.startswith("#") for address in parsed.addresses)
    assert "url(http" not in page.read_text(encoding="utf-8")
    text = " ".join(parsed.text)
    # distance, two ratios of scores, mass, error
    assert parsed.tags.count("svg") == 5
    assert "<fast & small>" in text
    assert "topk, quoted" in text
    assert "arXiv 2604.10539" in text
    assert markdown.read_text(encoding="utf-8").count("\n## ") == 10


def test_every_row_of_the_markdown_has_the_columns_of_its_table(tmp_path: Path) -> None:
    fill(tmp_path, example())
    markdown, _ = write_report(tmp_path)
    columns = 0
    for line in markdown.read_text(encoding="utf-8").splitlines():
        if line.startswith("|"):
            found = len(re.findall(r"(?<!\\)\|", line))
            assert columns in (0, found)
            columns = found
        else:
            columns = 0


def test_a_report_is_the_same_again(tmp_path: Path) -> None:
    fill(tmp_path, example())
    first = [path.read_bytes() for path in write_report(tmp_path)]
    assert [path.read_bytes() for path in write_report(tmp_path)] == first


def test_a_report_of_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no results"):
        write_report(tmp_path)
    fill(tmp_path, [])
    (tmp_path / "results.jsonl").touch()
    with pytest.raises(InputError, match="holds no results yet"):
        write_report(tmp_path)
    fill(tmp_path, [make_record()])
    with pytest.raises(InputError, match="no sample yet that every method has answered"):
        write_report(tmp_path)


def test_a_run_without_answers_has_no_scores(tmp_path: Path) -> None:
    records = []
    for record in example():
        fields = json.loads(record.to_line())
        bare = {"score": None, "answer": None, "mass": (), "error": ()}
        records.append(Record.from_json({**fields, **bare}))
    fill(tmp_path, records)
    markdown, page = write_report(tmp_path)
    assert "Scores at" not in markdown.read_text(encoding="utf-8")
    assert page.read_text(encoding="utf-8").count("<svg") == 1
