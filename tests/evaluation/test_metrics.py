"""Each metric against cases worked out by hand."""

import pytest

from icecache.evaluation.metrics.exact import (
    classification,
    code_similarity,
    contains_all,
    contains_any,
    counted,
    final_number,
    retrieved,
)
from icecache.evaluation.metrics.text import f1, f1_zh, rouge_l, rouge_l_zh


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("The cat sat.", "a cat sat", 1.0),  # articles, case and signs do not count
        ("cat dog", "cat", 2 * (1 / 2) * 1 / (1 / 2 + 1)),
        ("the the cat", "cat cat", 2 * 1 * (1 / 2) / (1 + 1 / 2)),  # a word counts once each
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("the", "a", 0.0),  # nothing is left of either
    ],
)
def test_f1(prediction: str, answer: str, expected: float) -> None:
    assert f1(prediction, answer) == pytest.approx(expected)


def test_f1_zh_splits_words_and_drops_signs() -> None:
    assert f1_zh("北京。", "北京") == 1.0
    # 我 / 喜欢 / 北京 against 北京: one of three, one of one
    assert f1_zh("我喜欢北京！", "北京") == pytest.approx(2 * (1 / 3) / (1 / 3 + 1))
    assert f1_zh("上海", "北京") == 0.0


def test_rouge_l_is_the_longest_common_subsequence() -> None:
    # longest common subsequence of "a b c d" and "a x c d": 3 of 4 on both sides
    assert rouge_l("one two three four", "one x three four") == pytest.approx(0.75)
    assert rouge_l("four three two one", "one two three four") == pytest.approx(0.25)
    assert rouge_l("", "one two") == 0.0


def test_rouge_l_zh_counts_words() -> None:
    # 我 喜欢 北京 against 我 喜欢 上海: 2 of 3 on both sides
    assert rouge_l_zh("我喜欢北京", "我喜欢上海") == pytest.approx(2 / 3)


def test_classification_shares_the_point_among_classes_named() -> None:
    classes = ["Date", "Other location", "Location", "City"]
    assert classification("Type: Date", "Date", classes) == 1.0
    assert classification("Date or City", "Date", classes) == 0.5
    assert classification("City", "Date", classes) == 0.0
    assert classification("nothing", "Date", classes) == 0.0
    # a name within the right one's is not held against it
    assert classification("Other location", "Other location", ["location", "Other location"]) == 1.0
    # but the right one within another is
    assert classification("Other location", "location", ["location", "Other location"]) == 0.5


def test_numbers_named() -> None:
    assert counted("There are 46.", "46") == 1.0
    assert counted("46 or 47", "46") == 0.5
    assert counted("none", "46") == 0.0
    assert counted("146", "46") == 0.0
    assert retrieved("Paragraph 7", "Paragraph 7") == 1.0
    assert retrieved("段落7，段落8", "段落7") == 0.5


def test_code_similarity_takes_the_first_line_of_code() -> None:
    assert code_similarity("\n# comment\nx = 1\ny = 2", "x = 1") == 1.0
    # 2 * matching / total characters: "abcd" and "abxd" share 3 of 4
    assert code_similarity("abcd", "abxd") == pytest.approx(0.75)
    assert code_similarity("# only\n// comments", "x = 1") == 0.0


def test_contained_answers() -> None:
    assert contains_all("Apple, pear", ["apple", "plum"]) == 0.5
    assert contains_any("Apple, pear", ["apple", "plum"]) == 1.0
    assert contains_any("kiwi", ["apple", "plum"]) == 0.0


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("16 - 7 = 9, so 9 * 2 = 18\n#### 18", 1.0),
        ("#### 18 dollars, not 19", 1.0),
        ("She makes 18.", 1.0),
        ("She makes $1,018.", 0.0),
        ("18 is wrong, it is 20", 0.0),
        ("no number", 0.0),
        ("it is 18.0", 1.0),
    ],
)
def test_final_number(prediction: str, expected: float) -> None:
    assert final_number(prediction, "18") == expected


def test_final_number_reads_thousands() -> None:
    assert final_number("#### 1,250", "1250") == 1.0
    assert final_number("#### -5", "-5") == 1.0
