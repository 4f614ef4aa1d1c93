"""Results on the disk, their summary, and the report."""

import dataclasses
import math
import os
from pathlib import Path

import pytest

from icecache.errors import InputError
from icecache.evaluation.results.report import write_report
from icecache.evaluation.results.store import ResultStore, load_results, load_sessions
from icecache.evaluation.settings import RunSettings
from tests.evaluation.records import SETTINGS, STAMP, example, fill, make_record


def test_results_come_back_as_they_were(tmp_path: Path) -> None:
    records = example()
    fill(tmp_path / "run", records)
    assert load_results(tmp_path / "run") == records
    assert [session["commit"] for session in load_sessions(tmp_path / "run")] == ["c0ffee"]


def test_a_result_is_never_overwritten(tmp_path: Path) -> None:
    with ResultStore.open(tmp_path, SETTINGS, STAMP) as store:
        store.add(make_record())
        with pytest.raises(InputError, match="already"):
            store.add(make_record(kl=0.9))
    assert load_results(tmp_path) == [make_record()]


def test_wherever_a_write_was_cut_off_the_next_session_goes_on_from_the_last_line(
    tmp_path: Path,
) -> None:
    first, second = make_record(number=0), make_record(number=1)
    fill(tmp_path, [first, second])
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
    fill(tmp_path, [make_record()])
    path = tmp_path / "results.jsonl"
    for line in ('{"task": "lcc"}\n', "{broken\n", "[]\n"):
        path.write_text(make_record().to_line() + line)
        with pytest.raises(InputError, match=r"results\.jsonl:2: not a result"):
            load_results(tmp_path)


@pytest.mark.parametrize("name", ["kl", "top1", "attended", "score"])
def test_numbers_that_are_none_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} is nan"):
        make_record(**{name: math.nan}).to_line()


@pytest.mark.parametrize("name", ["mass", "error"])
def test_layers_that_are_no_number_are_refused(name: str) -> None:
    record = dataclasses.replace(make_record(), **{name: (0.5, math.nan)})
    with pytest.raises(InputError, match=f"{name} of layer 1 is nan"):
        record.to_line()


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    fill(tmp_path, [make_record()])
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
        assert make_record().key in store


def test_results_of_another_version_are_refused_unless_mixed(tmp_path: Path) -> None:
    later = {**STAMP, "commit": "beef", "torch": "3"}
    with ResultStore.open(tmp_path, SETTINGS, STAMP) as store:
        store.add(make_record(number=1))
    message = r"commit c0ffee, now beef; torch 2, now 3\); use another --out, or --mix"
    with pytest.raises(InputError, match=message), ResultStore.open(tmp_path, SETTINGS, later):
        raise AssertionError("it opened")
    assert len(load_sessions(tmp_path)) == 1
    with ResultStore.open(tmp_path, SETTINGS, {**STAMP, "started": "later"}) as store:
        assert len(store.records) == 1
    with ResultStore.open(tmp_path, SETTINGS, later, mix=True) as store:
        store.add(make_record(number=2))
    assert [each["commit"] for each in load_sessions(tmp_path)][-2:] == ["c0ffee", "beef"]
    # it holds results of both now
    for either in (STAMP, later):
        with pytest.raises(InputError, match="--mix"), ResultStore.open(tmp_path, SETTINGS, either):
            raise AssertionError("it opened")


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
    fill(tmp_path, [make_record()])
    assert load_results(tmp_path) == [make_record()]


def test_a_torn_session_is_cut_off(tmp_path: Path) -> None:
    fill(tmp_path, [make_record()])
    path = tmp_path / "sessions.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:20])
    assert len(load_sessions(tmp_path)) == 1
    fill(tmp_path, [])
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
    fill(tmp_path, example())
    (tmp_path / "sessions.jsonl").write_text(content)
    with pytest.raises(InputError, match=message):
        write_report(tmp_path)
    assert not (tmp_path / "report.md").exists()


def test_a_torn_only_session_is_replaced_by_the_next(tmp_path: Path) -> None:
    fill(tmp_path, example())
    path = tmp_path / "sessions.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    fill(tmp_path, [])
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
        store.add(make_record())
    with ResultStore.open(tmp_path, SETTINGS, STAMP) as store:
        assert make_record().key in store


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
