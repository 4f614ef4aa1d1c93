"""Results on the disk, their summary, and the report."""

import dataclasses
import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from icecache.errors import InputError
from icecache.evaluation.results.bootstrap import mean_interval, mean_of_means, ratio_interval
from icecache.evaluation.results.record import Record
from icecache.evaluation.results.report import write_report
from icecache.evaluation.results.store import ResultStore, load_results, load_sessions
from icecache.evaluation.results.tables import Results, summary_tables
from icecache.evaluation.settings import RunSettings

SETTINGS = RunSettings(model="m", tasks=("lcc",), methods=("topk",), budgets=(64,))
STAMP = {
    **{"icecache": "0", "commit": "c0ffee", "torch": "2", "transformers": "5"},
    **{"processor": "<fast & small>", "threads": 1, "started": "today", "prompts": "plain"},
}


def _record(
    method: str = "topk",
    budget: int | None = 64,
    *,
    task: str = "lcc",
    number: int = 0,
    **values: float,
) -> Record:
    given = {"kl": 0.5, "top1": 0.75, "attended": 60.0, "score": 0.25, **values}
    return Record(
        task=task,
        id=str(number),
        method=method,
        budget=budget,
        tokens=1000,
        mass=(0.5, 0.7),
        error=(0.1, 0.2),
        answer="x | y\n<b>",
        **given,  # type: ignore[arg-type]
    )


def _fill(folder: Path, records: list[Record]) -> None:
    with ResultStore.open(folder, SETTINGS, STAMP) as store:
        for record in records:
            store.add(record)


def _example() -> list[Record]:
    """Return two tasks of three samples; icecache always half as far as topk."""
    records = []
    for task, number in ((task, n) for task in ("lcc", "trec") for n in range(3)):
        at = {"task": task, "number": number}
        records.append(_record("full", None, **at, kl=0.0, top1=1.0, attended=1000.0, score=0.8))
        for budget in (64, 256):
            far = (number + 1) * 64 / budget
            records.append(_record("topk", budget, **at, kl=far, score=0.4))
            records.append(_record("icecache", budget, **at, kl=far / 2, score=0.6))
    return records


def test_results_come_back_as_they_were(tmp_path: Path) -> None:
    records = _example()
    _fill(tmp_path / "run", records)
    assert load_results(tmp_path / "run") == records
    assert [session["commit"] for session in load_sessions(tmp_path / "run")] == ["c0ffee"]


def test_a_result_is_never_overwritten(tmp_path: Path) -> None:
    with ResultStore.open(tmp_path, SETTINGS, STAMP) as store:
        store.add(_record())
        with pytest.raises(InputError, match="already"):
            store.add(_record(kl=0.9))
    assert load_results(tmp_path) == [_record()]


def test_wherever_a_write_was_cut_off_the_next_session_goes_on_from_the_last_line(
    tmp_path: Path,
) -> None:
    first, second = _record(number=0), _record(number=1)
    _fill(tmp_path, [first, second])
    path = tmp_path / "results.jsonl"
    whole = path.read_bytes()
    border = len(first.to_line().encode())
    for length in range(border, len(whole)):
        path.write_bytes(whole[:length])
        assert load_results(tmp_path) == [first]
        with ResultStore.open(tmp_path, SETTINGS, STAMP) as store:
            assert second.key not in store and first.key in store
            store.add(second)
        assert path.read_bytes() == whole


def test_a_line_that_is_no_result_names_file_and_line(tmp_path: Path) -> None:
    _fill(tmp_path, [_record()])
    path = tmp_path / "results.jsonl"
    for line in ('{"task": "lcc"}\n', "{broken\n", "[]\n"):
        path.write_text(_record().to_line() + line)
        with pytest.raises(InputError, match=r"results\.jsonl:2: not a result"):
            load_results(tmp_path)


@pytest.mark.parametrize("name", ["kl", "top1", "attended", "score"])
def test_numbers_that_are_none_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} is nan"):
        _record(**{name: math.nan}).to_line()


@pytest.mark.parametrize("name", ["mass", "error"])
def test_layers_that_are_no_number_are_refused(name: str) -> None:
    record = dataclasses.replace(_record(), **{name: (0.5, math.nan)})
    with pytest.raises(InputError, match=f"{name} of layer 1 is nan"):
        record.to_line()


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    _fill(tmp_path, [_record()])
    before = (tmp_path / "results.jsonl").read_bytes()
    other = RunSettings(model="n", tasks=("lcc",), methods=("topk",), budgets=(64,), steps=8)
    with (
        pytest.raises(InputError, match=r"model 'm', now 'n'; steps 32, now 8"),
        ResultStore.open(tmp_path, other, STAMP),
    ):
        pass
    assert (tmp_path / "results.jsonl").read_bytes() == before
    assert len(load_sessions(tmp_path)) == 1
    more = RunSettings(model="m", tasks=("trec",), methods=("quest",), budgets=(128,), limit=3)
    with ResultStore.open(tmp_path, more, STAMP) as store:
        assert _record().key in store


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with (
        pytest.raises(InputError, match="holds something else"),
        ResultStore.open(tmp_path, SETTINGS, STAMP),
    ):
        pass
    assert os.listdir(tmp_path) == ["thesis.txt"]
    with (
        pytest.raises(InputError, match="must be a folder"),
        ResultStore.open(tmp_path / "thesis.txt", SETTINGS, STAMP),
    ):
        pass


def test_a_run_killed_before_its_first_file_was_whole_begins_anew(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".run.json-x7").write_text('{"model"')
    _fill(tmp_path, [_record()])
    assert load_results(tmp_path) == [_record()]


def test_a_torn_session_is_cut_off(tmp_path: Path) -> None:
    _fill(tmp_path, [_record()])
    path = tmp_path / "sessions.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:20])
    assert len(load_sessions(tmp_path)) == 1
    _fill(tmp_path, [])
    assert path.read_bytes() == 2 * whole


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"sessions\.jsonl holds no session"),
        ('{"icecache": "0", "com', r"sessions\.jsonl holds no session"),
        ('{"icecache": "0", "com{}\n', r"sessions\.jsonl:1: not a session \(JSONDecodeError"),
        ("[]\n", r"sessions\.jsonl:1: not a session"),
        ('{"settings": {}}\n', r"sessions\.jsonl:1: not a session, it lacks icecache, .*seed"),
    ],
)
def test_a_report_without_a_whole_session_says_so(
    content: str, message: str, tmp_path: Path
) -> None:
    _fill(tmp_path, _example())
    (tmp_path / "sessions.jsonl").write_text(content)
    with pytest.raises(InputError, match=message):
        write_report(tmp_path)
    assert not (tmp_path / "report.md").exists()


def test_a_torn_only_session_is_replaced_by_the_next(tmp_path: Path) -> None:
    _fill(tmp_path, _example())
    path = tmp_path / "sessions.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    _fill(tmp_path, [])
    assert path.read_bytes() == whole
    write_report(tmp_path)


def test_settings_that_are_no_object_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("[]")
    with (
        pytest.raises(InputError, match=r"run\.json: must be an object of settings, got list"),
        ResultStore.open(tmp_path, SETTINGS, STAMP),
    ):
        pass


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(InputError, match=r"--out must be a folder that can be .*file/run \(Not a d"),
        ResultStore.open(tmp_path / "file" / "run", SETTINGS, STAMP),
    ):
        pass


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    with ResultStore.open(tmp_path, SETTINGS, STAMP) as store:
        with (
            pytest.raises(InputError, match="another process is writing"),
            ResultStore.open(tmp_path, SETTINGS, STAMP),
        ):
            pass
        store.add(_record())
    with ResultStore.open(tmp_path, SETTINGS, STAMP) as store:
        assert _record().key in store


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budgets": ()}, "--budgets must not be empty"),
        ({"budgets": (64, 0)}, "--budgets 0 must be at least 1"),
        ({"budgets": (64, 64)}, "--budgets has a value twice"),
        ({"limit": 0}, "--limit must be at least 1, got 0"),
        ({"steps": 0}, "--steps must be at least 1"),
        ({"lengths": (-1,)}, "--lengths -1 must be at least 1"),
        ({"overlong": "left"}, "--overlong must be middle or skip, got 'left'"),
    ],
)
def test_bad_settings_name_the_option(changes: dict[str, object], message: str) -> None:
    given = {"model": "m", "tasks": ("lcc",), "methods": ("topk",), "budgets": (64,), **changes}
    with pytest.raises(InputError, match=message):
        RunSettings(**given)  # type: ignore[arg-type]


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
    records = [record for record in _example() if record.id == "0" and record.task == "lcc"]
    tables = {table.title: table.rows for table in summary_tables(Results(records))}
    assert tables["Distance from the full cache"][0] == ["topk", "1", "0.25"]
    assert tables["Scores at 64 tokens"][0][3:] == ["40.0 0.50", "60.0 0.75"]
    _fill(tmp_path, records)
    assert len(write_report(tmp_path)) == 2


@pytest.mark.parametrize(("count", "says"), [(9, True), (10, False)])
def test_a_report_says_that_intervals_of_few_samples_are_too_narrow(
    count: int, says: bool, tmp_path: Path
) -> None:
    full = {"kl": 0.0, "attended": 1000.0}
    for number in range(count):
        _fill(tmp_path, [_record("full", None, number=number, **full), _record(number=number)])
    text = write_report(tmp_path)[0].read_text(encoding="utf-8")
    assert ("fewer than 10 samples are too narrow" in text) is says


def test_ratios_are_resampled_in_pairs() -> None:
    ours = [0.1, 1.0, 10.0, 100.0]
    found = ratio_interval([2 * value for value in ours], ours)
    assert found is not None
    assert found == pytest.approx((2.0, 2.0, 2.0))
    assert ratio_interval([1.0], [0.0]) is None


def test_only_samples_that_every_method_has_are_summed_up() -> None:
    records = _example()
    results = Results(records[:-1])
    assert (results.num_samples, results.num_partial) == (5, 1)
    assert results.budgets == [64, 256]
    assert [record.id for record in results.of(("icecache", 256), "trec")] == ["0", "1"]


def test_tables_hold_the_means() -> None:
    tables = {table.title: table for table in summary_tables(Results(_example()))}
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
    far_from = [dataclasses.replace(record, task=names[record.task]) for record in _example()]
    rows_without = summary_tables(Results(far_from))[-1].rows
    assert {row[-1] for row in rows_without} == {"-"}
    mixed = [*_example(), *(dataclasses.replace(r, score=0.8) for r in far_from)]
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
    _fill(tmp_path, _example())
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
    _fill(tmp_path, _example())
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
    _fill(tmp_path, _example())
    first = [path.read_bytes() for path in write_report(tmp_path)]
    assert [path.read_bytes() for path in write_report(tmp_path)] == first


def test_a_report_of_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no results"):
        write_report(tmp_path)
    _fill(tmp_path, [])
    (tmp_path / "results.jsonl").touch()
    with pytest.raises(InputError, match="holds no results yet"):
        write_report(tmp_path)
    _fill(tmp_path, [_record()])
    with pytest.raises(InputError, match="no sample yet that every method has answered"):
        write_report(tmp_path)


def test_a_run_without_answers_has_no_scores(tmp_path: Path) -> None:
    records = []
    for record in _example():
        fields = json.loads(record.to_line())
        bare = {"score": None, "answer": None, "mass": (), "error": ()}
        records.append(Record.from_json({**fields, **bare}))
    _fill(tmp_path, records)
    markdown, page = write_report(tmp_path)
    assert "Scores at" not in markdown.read_text(encoding="utf-8")
    assert page.read_text(encoding="utf-8").count("<svg") == 1
