"""bfloat16, vLLM's usual dtype: rounding may decide a close call, and nothing else differs."""

from functools import partial

import pytest
from conftest import Answers, Run, first_difference, num_alike, selected, work_of

# logits near 20 are 0.125 apart in bfloat16
CLOSE = 0.25


def mean_error(run: Answers, truth: Answers) -> float:
    """Return the mean error of the best log-probability while an answer is the float32 one."""
    errors = []
    for ours, full in zip(run["answers"], truth["answers"], strict=True):
        same = range(first_difference(ours, full))
        errors += [abs(ours["top"][step][0] - full["top"][step][0]) for step in same]
    assert len(errors) > 24
    return sum(errors) / len(errors)


@pytest.fixture(scope="module")
def run_short(run: Run, text: list[int]) -> Run:
    """Runs on eight short prompts, six beyond the budget: many processors have no bfloat16."""
    lengths = (400, 40, 411, 300, 340, 5, 380, 290)
    asked = [text[600 * i : 600 * i + length] for i, length in enumerate(lengths)]
    return partial(run, asked=asked)


@pytest.fixture(scope="module")
def truth(run_short: Run) -> Answers:
    """What vLLM answers in float32 without us."""
    answers: Answers = run_short({})["rounds"][0]
    return answers


@pytest.fixture(scope="module")
def rounded(run_short: Run) -> Answers:
    """What vLLM answers in bfloat16 without us."""
    answers: Answers = run_short({"dtype": "bfloat16"})["rounds"][0]
    return answers


def test_exact_mode_is_stock_but_for_rounding(
    run_short: Run, rounded: Answers, truth: Answers
) -> None:
    ours = run_short({"dtype": "bfloat16", **selected(budget=2048)})
    answers = ours["rounds"][0]
    assert num_alike(answers["answers"], rounded["answers"], CLOSE) >= 4
    assert 0 < mean_error(answers, truth) < 1.25 * mean_error(rounded, truth)
    work = work_of(ours)
    assert len(work) == 8 and all(w[0] == w[2] == 0 and w[1] >= 24 for w in work.values())


def test_a_budget_gives_what_it_gives_in_float32_but_for_rounding(run_short: Run) -> None:
    arguments = {"max_num_batched_tokens": 8192, **selected(budget=256)}
    exact, ours = run_short(arguments), run_short({"dtype": "bfloat16", **arguments})
    # rounded keys make other leaves, so what is estimated differs by more than rounding
    alike = num_alike(ours["rounds"][0]["answers"], exact["rounds"][0]["answers"], 2 * CLOSE)
    assert alike >= 4
    work, full = work_of(ours), work_of(exact)
    assert [work[n][:2] for n in range(8)] == [full[n][:2] for n in range(8)]
    # keys and values of two bytes for four; the index is the same
    ratios = [work[n][2] / full[n][2] for n in range(8) if full[n][2]]
    assert len(ratios) == 6 and all(0.4 < ratio < 0.8 for ratio in ratios)
