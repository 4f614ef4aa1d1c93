"""Samples of local files, of the hub's library, and made ones."""

import json
import re
import zipfile
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerBase

from icecache.errors import InputError
from icecache.evaluation.tasks.base import Sample, Source
from icecache.evaluation.tasks.fit import Draft, all_words, fitted_samples
from icecache.evaluation.tasks.gsm8k import SHOTS
from icecache.evaluation.tasks.registry import all_tasks, find_tasks, task_groups
from icecache.evaluation.tasks.rows import Hub, read_jsonl
from tests.conftest import SmolLM2

GENERATED = task_groups()["generated"]


@pytest.fixture(scope="module")
def tokenizer(smollm2: SmolLM2) -> PreTrainedTokenizerBase:
    return smollm2[1]


def _source(tokenizer: PreTrainedTokenizerBase | None, **settings: Any) -> Source:
    given = {"data": None, "haystack": None, "length": 1000, "tokenizer": tokenizer}
    return Source(**{**given, **settings})


def _load(name: str, source: Source, count: int = 3) -> list[Sample]:
    return list(islice(all_tasks()[name].load(source), count))


def _write(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_longbench_has_its_21_sets() -> None:
    groups = task_groups()
    assert (len(groups["longbench"]), len(groups["longbench_zh"])) == (21, 5)
    assert set(groups["longbench_en"]) | set(groups["longbench_zh"]) == set(groups["longbench"])
    assert len(groups["ruler"]) == 14


def test_longbench_rows_are_put_in_the_published_prompt(tmp_path: Path) -> None:
    row = {"context": "A text.", "input": "Who?", "answers": ["Me", "I"], "_id": "x"}
    _write(tmp_path / "longbench" / "multifieldqa_en.jsonl", row)
    (sample,) = _load("multifieldqa_en", _source(None, data=tmp_path))
    assert sample.prompt == (
        "Read the following text and answer briefly.\n\nA text.\n\nNow, answer the following "
        "question based on the above text, only give me the answer and do not output any other "
        "words.\n\nQuestion: Who?\nAnswer:"
    )
    assert (sample.id, sample.answers) == ("x", ("Me", "I"))
    assert all_tasks()["multifieldqa_en"].score("It was me", sample) == pytest.approx(0.5)


def test_complete_prompts_and_nested_answers_are_taken_as_they_are(tmp_path: Path) -> None:
    answers = {"answers": ["Date"], "all_classes": ["Date", "City"]}
    _write(tmp_path / "trec.jsonl", {"id": "trec-0", "prompt": "Type:", "answers": answers})
    (sample,) = _load("trec", _source(None, data=tmp_path))
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
        _load("lcc", _source(None, data=tmp_path))


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
    _write(tmp_path / f"{task}.jsonl", {"prompt": "a", "answers": [answer]})
    with pytest.raises(InputError, match=message):
        _load(task, _source(None, data=tmp_path))


def test_a_line_that_is_not_utf8_names_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "lcc.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(InputError, match=r"lcc\.jsonl:1"):
        list(read_jsonl(tmp_path / "lcc.jsonl"))


def test_a_missing_file_or_folder_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none of: longbench/lcc\.jsonl, lcc\.jsonl"):
        _load("lcc", _source(None, data=tmp_path))
    with pytest.raises(InputError, match="data folder does not exist"):
        _load("lcc", _source(None, data=tmp_path / "no"))


def test_the_hub_is_asked_for_the_published_archive(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, **settings: str) -> list[dict[str, Any]]:
        asked.append((path, settings))
        return [{"context": "c", "input": "i", "answers": ["a"], "all_classes": None, "_id": "7"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (sample,) = _load("lcc", _source(None))
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
        _load("gsm8k", _source(None))


@pytest.mark.parametrize("name", GENERATED)
def test_generated_prompts_fill_the_length_and_are_the_same_again(
    name: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    task = all_tasks()[name]
    first, again = (_load(name, _source(tokenizer), 2) for _ in range(2))
    assert first == again
    assert first[0].prompt != first[1].prompt
    other = _load(name, _source(tokenizer, seed=1), 1)
    assert other[0].prompt != first[0].prompt
    for sample in first:
        used = len(tokenizer(sample.prompt + sample.prefix)["input_ids"]) + task.max_new_tokens
        assert 0.85 * 1000 < used <= 1000
        assert all(answer in sample.prompt for answer in sample.answers)
        assert task.score("; ".join(sample.answers), sample) == 1.0
        assert task.score("nothing of it", sample) == 0.0


@pytest.mark.parametrize(
    ("name", "answers"),
    [("ruler_niah_single_1", 1), ("ruler_niah_multivalue", 4), ("ruler_niah_multiquery", 4)],
)
def test_needles_say_what_is_asked(
    name: str, answers: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    for sample in _load(name, _source(tokenizer)):
        assert len(set(sample.answers)) == answers
        query = sample.prompt.rsplit(" for ", 1)[1].split(" mentioned")[0]
        for value in sample.answers:
            (key,) = re.findall(rf"for (\S+) is: {value}\.", sample.prompt)
            assert key in query
        assert sample.prefix.endswith("is" if answers == 1 else "are")


def test_multikey_needles_hide_the_one_among_others(tokenizer: PreTrainedTokenizerBase) -> None:
    (four,) = _load("ruler_niah_multikey_1", _source(tokenizer), 1)
    assert four.prompt.count("One of the special magic numbers for") == 4
    (many,) = _load("ruler_niah_multikey_3", _source(tokenizer), 1)
    assert many.prompt.count("One of the special magic uuids for") > 5
    assert "The grass is green" not in many.prompt


def test_an_essay_haystack_is_the_file_given(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    essay = tmp_path / "essay.txt"
    essay.write_text("Whales sing at night. They do. " * 20, encoding="utf-8")
    (sample,) = _load("ruler_niah_single_2", _source(tokenizer, haystack=essay), 1)
    assert sample.prompt.count("Whales sing") > 20
    assert "The grass" not in sample.prompt
    (noise,) = _load("ruler_niah_single_2", _source(tokenizer), 1)
    assert "The grass" in noise.prompt
    essay.write_text(" \n")
    with pytest.raises(InputError, match="haystack is empty"):
        _load("ruler_niah_single_2", _source(tokenizer, haystack=essay))


def test_common_words_are_the_ten_most_frequent(tokenizer: PreTrainedTokenizerBase) -> None:
    for length, often, seldom in ((1000, 6, 1), (5000, 30, 3)):
        (sample,) = _load("ruler_cwe", _source(tokenizer, length=length), 1)
        asked = sample.prompt.rsplit("Below is a numbered list", 1)[1]
        counts = Counter(re.findall(r"\d+\. (\S+(?: \D\S*)?)(?= \d+\.|\n)", asked))
        assert {word for word, _ in counts.most_common(10)} == set(sample.answers)
        assert set(counts.values()) == {often, seldom}
        assert set(sample.answers) <= set(all_words())


def test_a_template_takes_of_the_room_but_does_not_change_the_task(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    whole, less = (
        _load("ruler_cwe", _source(tokenizer, length=4096, reserved=reserved), 1)[0]
        for reserved in (0, 80)
    )
    for sample, most in ((whole, 4096), (less, 4016)):
        used = len(tokenizer(sample.prompt + sample.prefix)["input_ids"]) + 120
        assert 0.85 * 4096 < used <= most
        asked = sample.prompt.rsplit("Below is a numbered list", 1)[1]
        counts = Counter(re.findall(r"\d+\. (\S+(?: \D\S*)?)(?= \d+\.|\n)", asked))
        assert set(counts.values()) == {30, 3}
    for name in ("passkey", "ruler_niah_single_1", "ruler_niah_multikey_1", "ruler_vt"):
        whole, less = (
            _load(name, _source(tokenizer, reserved=reserved), 1)[0] for reserved in (0, 80)
        )
        assert whole.answers == less.answers
        assert len(less.prompt) < len(whole.prompt)


def test_frequent_words_are_the_three_most_frequent(tokenizer: PreTrainedTokenizerBase) -> None:
    (sample,) = _load("ruler_fwe", _source(tokenizer, length=3000), 1)
    words = sample.prompt.split("coded words. ", 1)[1].split("\nQuestion", 1)[0].split()
    counts = Counter(words)
    assert [word for word, _ in counts.most_common(4)] == ["...", *sample.answers]
    assert counts["..."] == pytest.approx(4 * counts[sample.answers[0]], abs=4)


def test_variables_are_all_that_the_chain_gives(tokenizer: PreTrainedTokenizerBase) -> None:
    for sample in _load("ruler_vt", _source(tokenizer)):
        asked = sample.prompt.rsplit("Memorize and track", 1)[1]
        value = re.findall(r"assigned the value (\d+)", asked)[-1]
        known: dict[str, str] = {}
        for name, right in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", asked):
            known[name] = known.get(right, right)
        assert {name for name, found in known.items() if found == value} == set(sample.answers)
        assert len(sample.answers) == 5
        # the example before it is solved
        assert sample.prompt.count("Memorize and track") == 2


def test_squad_and_hotpotqa_put_the_answering_documents_among_others(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    def entry(number: int) -> dict[str, Any]:
        answers = [{"text": f"answer{number}"}]
        return {
            "context": f"Text {number} says answer{number} and little more.",
            "qas": [
                {"question": f"What {number}?", "answers": answers, "is_impossible": False},
                {"question": "Never?", "answers": [], "is_impossible": True},
            ],
        }

    squad = {"data": [{"paragraphs": [entry(number) for number in range(30)]}]}
    (tmp_path / "squad.json").write_text(json.dumps(squad))
    hotpot = [
        {
            "question": f"Who {n}?",
            "answer": f"person{n}",
            "context": [[f"Title {n}", ["One. ", f"person{n}."]], [f"Other {n}", ["Two."]]],
        }
        for n in range(30)
    ]
    (tmp_path / "hotpotqa.json").write_text(json.dumps(hotpot))
    for name, first in (("ruler_qa_1", "answer0"), ("ruler_qa_2", "person0")):
        samples = _load(name, _source(tokenizer, data=tmp_path, length=400), 40)
        assert len(samples) == 30
        assert samples[0].answers == (first,)
        for sample in samples:
            assert sample.answers[0] in sample.prompt
            assert sample.prompt.count("Document ") > 8
            used = len(tokenizer(sample.prompt + sample.prefix)["input_ids"]) + 32
            assert used <= 400
    with pytest.raises(InputError, match=r"squad\.json"):
        _load("ruler_qa_1", _source(tokenizer, data=tmp_path / "no"))


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        ("ruler_qa_1", {}, r"squad\.json: data must be a list that is not empty, got None"),
        ("ruler_qa_1", [], r"squad\.json must be an object, got \[\]"),
        ("ruler_qa_1", {"data": [3]}, r"squad\.json: data\[0\] must be an object, got 3"),
        ("ruler_qa_2", [], r"hotpotqa\.json must be a list that is not empty, got \[\]"),
        ("ruler_qa_2", [{}], r"hotpotqa\.json\[0\]: question must be text, got None"),
        (
            "ruler_qa_2",
            [{"question": "q", "answer": "a", "context": [["title"]]}],
            r"hotpotqa\.json\[0\]: context\[0\] must be a title and its sentences, got \['title'\]",
        ),
        (
            "ruler_qa_2",
            [{"question": "q", "answer": "a", "context": [["title", ["text"]]]}],
            "ruler_qa_2: question 0 of the data set must have documents of other questions",
        ),
    ],
)
def test_a_bad_file_of_questions_names_the_place(
    task: str, content: Any, message: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    for name in ("squad", "hotpotqa"):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        _load(task, _source(tokenizer, data=tmp_path))


def test_a_length_too_short_for_the_task_is_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match=r"ruler_cwe: a prompt of 200 tokens.* raise --lengths"):
        _load("ruler_cwe", _source(tokenizer, length=200))


def test_a_context_that_does_not_grow_is_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    drafts = fitted_samples("empty", _source(tokenizer), lambda r, n: Draft("same", "", ()), 1, 9)
    with pytest.raises(InputError, match=r"empty: .* it does not grow"):
        next(drafts)


def test_gsm8k_shows_the_last_rows_and_asks_the_others(tmp_path: Path) -> None:
    rows = [
        {"question": f"Q{n}?", "answer": f"It is <<1+1=2>>{n}.\n#### 1,00{n}"} for n in range(11)
    ]
    _write(tmp_path / "gsm8k_test.jsonl", *rows)
    samples = _load("gsm8k", _source(None, data=tmp_path), 20)
    assert [sample.answers for sample in samples] == [("1,000",), ("1,001",), ("1,002",)]
    assert samples[0].prompt.endswith("#### 1,0010\n\nQuestion: Q0?\nAnswer:")
    assert samples[0].prompt.startswith("Question: Q3?\nAnswer: It is 3.\n#### 1,003\n\n")
    task = all_tasks()["gsm8k"]
    answer = task.trim(" It is 1000.\n#### 1000\n\nQuestion: Q8?\nAnswer: 8")
    assert task.score(answer, samples[0]) == 1.0
    _write(tmp_path / "gsm8k_test.jsonl", {"question": "Q?", "answer": "#### abc"}, *rows)
    with pytest.raises(InputError, match=r"gsm8k_test\.jsonl:1: .* NUMBER, it ends in '#### abc'"):
        _load("gsm8k", _source(None, data=tmp_path))
    _write(tmp_path / "gsm8k_test.jsonl", *rows[:SHOTS])
    with pytest.raises(InputError, match="more than 8 rows"):
        _load("gsm8k", _source(None, data=tmp_path))


def test_unknown_tasks_list_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"unknown task 'lc'; known: narrativeqa, .*groups: longb"):
        find_tasks(["lc"])
    with pytest.raises(InputError, match="no task given"):
        find_tasks([])
    assert [task.name for task in find_tasks(["lcc", "longbench_zh", "lcc"])][:2] == [
        "lcc",
        "multifieldqa_zh",
    ]
