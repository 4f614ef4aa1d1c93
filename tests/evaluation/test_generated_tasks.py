"""Tasks that are generated: as long as asked, the same again, and what they ask is in them."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from icecache.errors import InputError
from icecache.evaluation.tasks.fit import Draft, all_words, fitted_samples
from icecache.evaluation.tasks.registry import all_tasks
from tests.evaluation.loading import GENERATED, load, source_of


@pytest.mark.parametrize("name", GENERATED)
def test_generated_prompts_fill_the_length_and_are_the_same_again(
    name: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    task = all_tasks()[name]
    first, again = (load(name, source_of(tokenizer), 2) for _ in range(2))
    assert first == again
    assert first[0].prompt != first[1].prompt
    other = load(name, source_of(tokenizer, seed=1), 1)
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
    for sample in load(name, source_of(tokenizer)):
        assert len(set(sample.answers)) == answers
        query = sample.prompt.rsplit(" for ", 1)[1].split(" mentioned")[0]
        for value in sample.answers:
            (key,) = re.findall(rf"for (\S+) is: {value}\.", sample.prompt)
            assert key in query
        assert sample.prefix.endswith("is" if answers == 1 else "are")


def test_multikey_needles_hide_the_one_among_others(tokenizer: PreTrainedTokenizerBase) -> None:
    (four,) = load("ruler_niah_multikey_1", source_of(tokenizer), 1)
    assert four.prompt.count("One of the special magic numbers for") == 4
    (many,) = load("ruler_niah_multikey_3", source_of(tokenizer), 1)
    assert many.prompt.count("One of the special magic uuids for") > 5
    assert "The grass is green" not in many.prompt


def test_an_essay_haystack_is_the_file_given(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    essay = tmp_path / "essay.txt"
    essay.write_text("Whales sing at night. They do. " * 20, encoding="utf-8")
    (sample,) = load("ruler_niah_single_2", source_of(tokenizer, haystack=essay), 1)
    assert sample.prompt.count("Whales sing") > 20
    assert "The grass" not in sample.prompt
    (noise,) = load("ruler_niah_single_2", source_of(tokenizer), 1)
    assert "The grass" in noise.prompt
    essay.write_text(" \n")
    with pytest.raises(InputError, match="haystack is empty"):
        load("ruler_niah_single_2", source_of(tokenizer, haystack=essay))


def test_common_words_are_the_ten_most_frequent(tokenizer: PreTrainedTokenizerBase) -> None:
    for length, often, seldom in ((1000, 6, 1), (5000, 30, 3)):
        (sample,) = load("ruler_cwe", source_of(tokenizer, length=length), 1)
        asked = sample.prompt.rsplit("Below is a numbered list", 1)[1]
        counts = Counter(re.findall(r"\d+\. (\S+(?: \D\S*)?)(?= \d+\.|\n)", asked))
        assert {word for word, _ in counts.most_common(10)} == set(sample.answers)
        assert set(counts.values()) == {often, seldom}
        assert set(sample.answers) <= set(all_words())


def test_a_template_takes_of_the_room_but_does_not_change_the_task(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    whole, less = (
        load("ruler_cwe", source_of(tokenizer, length=4096, reserved=reserved), 1)[0]
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
            load(name, source_of(tokenizer, reserved=reserved), 1)[0] for reserved in (0, 80)
        )
        assert whole.answers == less.answers
        assert len(less.prompt) < len(whole.prompt)


def test_frequent_words_are_the_three_most_frequent(tokenizer: PreTrainedTokenizerBase) -> None:
    (sample,) = load("ruler_fwe", source_of(tokenizer, length=3000), 1)
    words = sample.prompt.split("coded words. ", 1)[1].split("\nQuestion", 1)[0].split()
    counts = Counter(words)
    assert [word for word, _ in counts.most_common(4)] == ["...", *sample.answers]
    assert counts["..."] == pytest.approx(4 * counts[sample.answers[0]], abs=4)


def test_variables_are_all_that_the_chain_gives(tokenizer: PreTrainedTokenizerBase) -> None:
    for sample in load("ruler_vt", source_of(tokenizer)):
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
        samples = load(name, source_of(tokenizer, data=tmp_path, length=400), 40)
        assert len(samples) == 30
        assert samples[0].answers == (first,)
        for sample in samples:
            assert sample.answers[0] in sample.prompt
            assert sample.prompt.count("Document ") > 8
            used = len(tokenizer(sample.prompt + sample.prefix)["input_ids"]) + 32
            assert used <= 400
    with pytest.raises(InputError, match=r"squad\.json"):
        load("ruler_qa_1", source_of(tokenizer, data=tmp_path / "no"))


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
        load(task, source_of(tokenizer, data=tmp_path))


def test_a_length_too_short_for_the_task_is_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match=r"ruler_cwe: a prompt of 200 tokens.* raise --lengths"):
        load("ruler_cwe", source_of(tokenizer, length=200))


def test_a_context_that_does_not_grow_is_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    drafts = fitted_samples("empty", source_of(tokenizer), lambda r, n: Draft("same", "", ()), 1, 9)
    with pytest.raises(InputError, match=r"empty: .* it does not grow"):
        next(drafts)
