"""Samples of local files, of the hub's library, and made ones."""

import zipfile
from pathlib import Path
from typing import Any

import datasets
import pytest

from icecache.errors import InputError
from icecache.evaluation.tasks.gsm8k import SHOTS
from icecache.evaluation.tasks.registry import all_tasks, find_tasks, task_groups
from icecache.evaluation.tasks.rows import Hub, read_jsonl
from tests.evaluation.loading import load, source_of, write


def test_longbench_has_its_21_sets() -> None:
    groups = task_groups()
    assert (len(groups["longbench"]), len(groups["longbench_zh"])) == (21, 5)
    assert set(groups["longbench_en"]) | set(groups["longbench_zh"]) == set(groups["longbench"])
    assert len(groups["ruler"]) == 14


def test_longbench_rows_are_put_in_the_published_prompt(tmp_path: Path) -> None:
    row = {"context": "A text.", "input": "Who?", "answers": ["Me", "I"], "_id": "x"}
    write(tmp_path / "longbench" / "multifieldqa_en.jsonl", row)
    (sample,) = load("multifieldqa_en", source_of(None, data=tmp_path))
    assert sample.prompt == (
        "Read the following text and answer briefly.\n\nA text.\n\nNow, answer the following "
        "question based on the above text, only give me the answer and do not output any other "
        "words.\n\nQuestion: Who?\nAnswer:"
    )
    assert (sample.id, sample.answers) == ("x", ("Me", "I"))
    assert all_tasks()["multifieldqa_en"].score("It was me", sample) == pytest.approx(0.5)


def test_complete_prompts_and_nested_answers_are_taken_as_they_are(tmp_path: Path) -> None:
    answers = {"answers": ["Date"], "all_classes": ["Date", "City"]}
    write(tmp_path / "trec.jsonl", {"id": "trec-0", "prompt": "Type:", "answers": answers})
    (sample,) = load("trec", source_of(None, data=tmp_path))
    assert (sample.prompt, sample.answers, sample.classes) == ("Type:", ("Date",), ("Date", "City"))
    task = all_tasks()["trec"]
    assert task.score("Date or City", sample) == 0.5
    assert task.trim("\nDate\nQuestion: more") == "Date"
    assert task.is_done("\n Date\n") and not task.is_done("\n Date")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"prompt": "a", "answers": ["b"]}\n{broken\n', r"lcc\.jsonl:2: not a line of JSON"),
        ("[1, 2]\n", r"lcc\.jsonl:1: not a JSON object, but list"),
        ('{"prompt": "a"}\n', r"lcc\.jsonl:1: field 'answers' must be a list"),
        ('{"prompt": "a", "answers": []}\n', r"lcc\.jsonl:1: field 'answers' must be a list"),
        ('\n{"context": "a", "answers": ["b"]}\n', r"lcc\.jsonl:2: field 'input' .* is missing"),
        ('{"prompt": "a", "answers": [null]}\n', r"lcc\.jsonl:1: field 'answers' .*got \[None\]"),
        (
            '{"prompt": "a", "answers": ["b"], "all_classes": 3}\n',
            r"lcc\.jsonl:1: field 'all_classes' must be a list of texts, got 3",
        ),
        ('{"prompt": 3, "answers": ["b"]}\n', r"lcc\.jsonl:1: field 'prompt' .* it is int"),
    ],
)
def test_a_bad_line_names_file_and_line(tmp_path: Path, lines: str, message: str) -> None:
    (tmp_path / "lcc.jsonl").write_text(lines, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        load("lcc", source_of(None, data=tmp_path))


@pytest.mark.parametrize(
    ("task", "answer", "message"),
    [
        ("trec", "Date", r"trec\.jsonl:1: field 'all_classes' must be a list of texts, trec needs"),
        ("lsht", "Date", r"lsht\.jsonl:1: field 'all_classes' must be"),
        ("passage_retrieval_en", "Paragraph x", r"en\.jsonl:1: .* a number, got 'Paragraph x'"),
    ],
)
def test_answers_that_a_metric_cannot_take_are_refused(
    task: str, answer: str, message: str, tmp_path: Path
) -> None:
    write(tmp_path / f"{task}.jsonl", {"prompt": "a", "answers": [answer]})
    with pytest.raises(InputError, match=message):
        load(task, source_of(None, data=tmp_path))


def test_a_line_that_is_not_utf8_names_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "lcc.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(InputError, match=r"lcc\.jsonl:1"):
        list(read_jsonl(tmp_path / "lcc.jsonl"))


def test_a_missing_file_or_folder_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none of: longbench/lcc\.jsonl, lcc\.jsonl"):
        load("lcc", source_of(None, data=tmp_path))
    with pytest.raises(InputError, match="data folder does not exist"):
        load("lcc", source_of(None, data=tmp_path / "no"))


def test_the_hub_is_asked_for_the_published_archive(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, **settings: str) -> list[dict[str, Any]]:
        asked.append((path, settings))
        return [{"context": "c", "input": "i", "answers": ["a"], "all_classes": None, "_id": "7"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (sample,) = load("lcc", source_of(None))
    assert sample.prompt == "Please complete the code given below. \ncNext line of code:\n"
    archive = "zip://data/lcc.jsonl::hf://datasets/zai-org/LongBench/data.zip"
    assert asked == [("json", {"data_files": archive, "split": "train"})]


def test_the_library_reads_a_jsonl_file_out_of_an_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the same chained address as the hub's, on a local archive
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/lcc.jsonl", '{"context": "c", "answers": ["a"]}\n')
    hub = Hub(
        "json",
        data_files=f"zip://data/lcc.jsonl::{tmp_path / 'data.zip'}",
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert list(hub.rows()) == [{"context": "c", "answers": ["a"]}]


def test_an_unreachable_hub_says_to_pass_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, **settings: str) -> None:
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match=r"openai/gsm8k.*offline.*pass a local folder with --data"):
        load("gsm8k", source_of(None))


def test_gsm8k_shows_the_last_rows_and_asks_the_others(tmp_path: Path) -> None:
    rows = [
        {"question": f"Q{n}?", "answer": f"It is <<1+1=2>>{n}.\n#### 1,00{n}"} for n in range(11)
    ]
    write(tmp_path / "gsm8k_test.jsonl", *rows)
    samples = load("gsm8k", source_of(None, data=tmp_path), 20)
    assert [sample.answers for sample in samples] == [("1,000",), ("1,001",), ("1,002",)]
    assert samples[0].prompt.endswith("#### 1,0010\n\nQuestion: Q0?\nAnswer:")
    assert samples[0].prompt.startswith("Question: Q3?\nAnswer: It is 3.\n#### 1,003\n\n")
    task = all_tasks()["gsm8k"]
    answer = task.trim(" It is 1000.\n#### 1000\n\nQuestion: Q8?\nAnswer: 8")
    assert task.score(answer, samples[0]) == 1.0
    write(tmp_path / "gsm8k_test.jsonl", {"question": "Q?", "answer": "#### abc"}, *rows)
    with pytest.raises(InputError, match=r"gsm8k_test\.jsonl:1: .* NUMBER, it ends in '#### abc'"):
        load("gsm8k", source_of(None, data=tmp_path))
    write(tmp_path / "gsm8k_test.jsonl", *rows[:SHOTS])
    with pytest.raises(InputError, match="more than 8 rows"):
        load("gsm8k", source_of(None, data=tmp_path))


def test_unknown_tasks_list_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"unknown task 'lc'; known: narrativeqa, .*groups: longb"):
        find_tasks(["lc"])
    with pytest.raises(InputError, match="no task given"):
        find_tasks([])
    assert [task.name for task in find_tasks(["lcc", "longbench_zh", "lcc"])][:2] == [
        "lcc",
        "multifieldqa_zh",
    ]
