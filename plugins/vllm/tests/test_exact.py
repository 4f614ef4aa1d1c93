"""With a budget as long as the context vLLM gives the tokens it gives without us."""

import pytest
from conftest import Answers, Run, selected, tokens_of, work_of


@pytest.fixture(scope="module")
def exact(run: Run) -> Answers:
    """One round left alone, and one in which all running requests start again three times."""
    return run(selected(budget=2048), {}, {"preempt_at": [3, 20, 40]})


def test_tokens_of_mixed_prompts_are_stock(exact: Answers, stock: Answers) -> None:
    ours, theirs = exact["rounds"][0], stock["rounds"][0]
    assert max(len(tokens) for tokens in tokens_of(stock)) == 24
    assert tokens_of(exact) == tokens_of(stock)
    assert ours["steps"] == theirs["steps"] >= 24 + 6292 // 256
    assert all(answer["cached"] == 0 for answer in ours["answers"])
    work = work_of(exact)
    assert [(work[n][0], work[n][2]) for n in range(8)] == [(0, 0)] * 8
    assert min(work[n][1] for n in range(8)) >= 24


def test_a_preempted_request_starts_again_and_ends_the_same(exact: Answers, stock: Answers) -> None:
    assert exact["rounds"][1]["steps"] > stock["rounds"][0]["steps"]
    assert tokens_of(exact, 1) == tokens_of(stock)


def test_three_ranks_share_the_heads(run: Run, stock: Answers) -> None:
    arguments = {"tensor_parallel_size": 3, "kv_cache_memory_bytes": 1 << 29}
    ours = run({**arguments, **selected(budget=2048)}, one_process=False)
    assert tokens_of(ours) == tokens_of(stock)
    assert ours["output"].count("IceCache: 30 layers") == 1
