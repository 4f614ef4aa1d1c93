"""Caches that take their steps as one batch of the model."""

import pytest
import torch
from transformers import PreTrainedModel

from icecache.evaluation.engine.attention import evaluation_attention
from icecache.evaluation.engine.decode import Forced, Reference, Row, answer_freely, force
from icecache.evaluation.engine.fidelity import LayerProbe
from icecache.evaluation.engine.prefill import Prefill
from icecache.evaluation.engine.rows import step_rows
from icecache.evaluation.methods.full import Full
from icecache.evaluation.methods.icecache import IceCacheMethod
from tests.evaluation.small import ICE, IDS, RUNNABLE, small_method
from tests.evaluation.support import full_answer, steps
from tests.integrations.zoo import ZOO, Family, build, family

BUDGET = 20


def _forced(
    model: PreTrainedModel, prefill: Prefill, reference: Reference, names: list[str]
) -> tuple[list[Forced], list[LayerProbe]]:
    with torch.inference_mode(), evaluation_attention(model):
        runs = [small_method(name).open(model, prefill, BUDGET) for name in names]
        probes = [LayerProbe(prefill, run.attended) for run in runs]
        rows = [Row(x.cache, x.num_attended, probe) for x, probe in zip(runs, probes)]
        forced = force(model, reference, rows, 2)
        for run in runs:
            run.close()
    return forced, probes


@pytest.mark.parametrize("member", [f for f in ZOO if f.managed], ids=lambda f: f.name)
def test_methods_beside_each_other_see_what_they_see_alone(member: Family) -> None:
    model = build(member)
    prefill, reference = full_answer(model, IDS, steps(4))
    together, probes = _forced(model, prefill, reference, RUNNABLE)
    for name, found, probe in zip(RUNNABLE, together, probes):
        (alone,), (lone,) = _forced(model, prefill, reference, [name])
        torch.testing.assert_close(found.log_probs, alone.log_probs, atol=1e-4, rtol=1e-4)
        assert found.best == alone.best, name
        assert found.num_attended == alone.num_attended, name
        assert probe.mass == pytest.approx(lone.mass, rel=1e-3), name
        assert probe.error == pytest.approx(lone.error, rel=1e-3, abs=1e-5), name


def test_answers_beside_each_other_end_where_they_end_alone() -> None:
    model = build(family("llama"))
    names = ["full", "streaming", "snapkv", "icecache"]
    prefill, reference = full_answer(model, IDS, steps(4))
    # the full cache's fourth token ends answers: others go on without it, or end elsewhere
    model.generation_config.eos_token_id = reference.tokens[3]
    with torch.inference_mode(), evaluation_attention(model):

        def answers(asked: list[str]) -> list[list[int]]:
            caches = [small_method(name).open(model, prefill, 16).cache for name in asked]
            return answer_freely(model, prefill, caches, steps(1, longest=9))

        together = answers(names)
        alone = [answers([name])[0] for name in names]
    assert together == alone
    assert len({len(answer) for answer in together}) > 1


def test_rows_take_tokens_of_their_own() -> None:
    model = build(family("llama"))
    prefill, _ = full_answer(model, IDS, steps(1))
    with torch.inference_mode(), evaluation_attention(model):

        def logits(tokens: list[int]) -> torch.Tensor:
            methods = [Full(), IceCacheMethod(ICE)][: len(tokens)]
            caches = [method.open(model, prefill, BUDGET).cache for method in methods]
            return step_rows(model, caches, tokens, [None] * len(tokens))

        pair = logits([5, 9])
        torch.testing.assert_close(pair[0], logits([5])[0])
        assert (pair[1] - logits([5, 5])[1]).abs().max() > 1e-3


def test_every_step_of_icecache_in_a_row_is_sparse() -> None:
    model = build(family("llama"))
    prefill, reference = full_answer(model, IDS, steps(5))
    with torch.inference_mode(), evaluation_attention(model):
        runs = [Full().open(model, prefill, 0), IceCacheMethod(ICE).open(model, prefill, BUDGET)]
        force(model, reference, [Row(run.cache, run.num_attended) for run in runs])
        assert runs[1].cache.stats().sparse_steps == 4 * 5  # type: ignore[attr-defined]
