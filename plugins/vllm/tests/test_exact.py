"""With a budget as long as the context vLLM gives the tokens it gives without us."""

import re

from conftest import Answers, Run, selected


def tokens_of(run: Answers) -> list[list[int]]:
    return [answer["tokens"] for answer in run["answers"]]


def test_tokens_of_mixed_prompts_are_stock(run: Run, stock: Answers) -> None:
    ours = run(selected(budget=2048))
    assert max(len(answer) for answer in tokens_of(stock)) == 24
    assert tokens_of(ours) == tokens_of(stock)
    assert ours["steps"] == stock["steps"] >= 24 + 6292 // 256
    assert all(answer["cached"] == 0 for answer in ours["answers"])
    ends = re.findall(r"(\d+) sparse and (\d+) dense steps; (\d+) host", ours["output"])
    assert len(ends) == 8
    assert all(sparse == "0" and host == "0" for sparse, _, host in ends)


def test_a_preempted_request_starts_again_and_ends_the_same(run: Run, stock: Answers) -> None:
    ours = run(selected(budget=2048), preempt_at=[3, 20, 40])
    assert ours["steps"] > stock["steps"]
    assert tokens_of(ours) == tokens_of(stock)


def test_three_ranks_share_the_heads(run: Run, stock: Answers) -> None:
    arguments = {"tensor_parallel_size": 3, "kv_cache_memory_bytes": 1 << 29}
    ours = run({**arguments, **selected(budget=2048)}, one_process=False)
    assert tokens_of(ours) == tokens_of(stock)
