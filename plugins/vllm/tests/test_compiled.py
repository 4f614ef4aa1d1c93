"""Without ``enforce_eager`` vLLM compiles the model, and IceCache's layers stay outside of that."""

import re

from conftest import Answers, Run, num_alike, selected, work_of


def test_a_compiled_model_answers_as_an_eager_one(run: Run, sparse: Answers) -> None:
    arguments = {"enforce_eager": False, "max_num_batched_tokens": 8192}
    ours = run({**arguments, **selected(budget=256)}, {}, {"at_once": 256})
    assert len(re.findall("saved AOT compiled function", ours["output"])) == 1
    assert "saved AOT compiled function" not in sparse["output"]
    for mine, eager in zip(ours["rounds"], sparse["rounds"], strict=True):
        assert num_alike(mine["answers"], eager["answers"], 0.05) >= 7
    steps, eager_steps = ({n: w[:2] for n, w in work_of(each).items()} for each in (ours, sparse))
    assert steps == eager_steps
    assert sum(sparse > 0 for sparse, _ in steps.values()) == 12
