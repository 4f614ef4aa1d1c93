"""Each selection method against a case made by hand or a slow truth."""

import math

import pytest
import torch
from torch import Tensor

from icecache.errors import ConfigError
from icecache.evaluation.engine.attend import Selection, attend_all, attend_selected
from icecache.evaluation.engine.tokens import PromptTokens, Tokens
from icecache.evaluation.methods.arkvale import ArkVale
from icecache.evaluation.methods.base import SelectionMethod
from icecache.evaluation.methods.magicpig import MagicPIG
from icecache.evaluation.methods.omnikv import OmniKV
from icecache.evaluation.methods.pqcache import PQCache
from icecache.evaluation.methods.quest import Quest
from icecache.evaluation.methods.registry import METHODS
from icecache.evaluation.methods.snapkv import SnapKV, observed_scores
from icecache.evaluation.methods.streaming import Streaming
from icecache.evaluation.methods.topk import TopK
from tests.evaluation.support import RULE, chosen, grow, make_tokens, query, started

SELECTING = [
    method
    for method in METHODS.values()
    if issubclass(method, SelectionMethod) and method.has_budget
]
TIGHT = {"sink": 4, "window": 8}


@pytest.mark.parametrize("method", SELECTING, ids=lambda method: method.name)
def test_a_step_never_attends_more_than_its_budget(method: type[SelectionMethod]) -> None:
    budget, tokens = 40, make_tokens(90)
    policy = started(method(**TIGHT), tokens, budget)
    for step in range(60):
        grow(tokens, 1, seed=step)
        selection = policy.select(query(step), tokens, RULE)
        for head in range(2):
            positions = chosen(selection, head)
            assert len(positions) <= budget
            assert len(set(positions)) == len(positions)
            assert 0 <= positions[0] and positions[-1] == tokens.num_tokens - 1
            out = attend_selected(query(step), tokens, selection, RULE)
            assert torch.isfinite(out).all()
    # whole pages and samples may leave some of it
    least = {"magicpig": 13, "quest": 28, "arkvale": 28}.get(method.name, budget)
    assert selection.num_attended >= least


@pytest.mark.parametrize("method", SELECTING, ids=lambda method: method.name)
def test_a_prompt_shorter_than_sink_and_window_may_outgrow_the_budget(
    method: type[SelectionMethod],
) -> None:
    tokens = make_tokens(10, num_queries=10)
    policy = started(method(**TIGHT), tokens, 28)
    grow(tokens, 50)
    positions = chosen(policy.select(query(), tokens, RULE))
    assert len(positions) <= 28
    assert positions[-1] == 59


def test_topk_is_what_a_full_sort_of_the_votes_gives() -> None:
    tokens, asked = grow(make_tokens(60), 5), query()
    selection = started(TopK(**TIGHT), tokens, 20).select(asked, tokens, RULE)
    keys = tokens.keys(0, 65)
    for head in range(2):
        votes = (asked[head] @ keys[head].T * RULE.scaling).softmax(-1).sum(0)
        middle = sorted(range(4, 57), key=lambda at: -float(votes[at]))[:8]
        assert chosen(selection, head) == sorted([0, 1, 2, 3, *middle, *range(57, 65)])


def test_streaming_keeps_the_sink_and_the_latest() -> None:
    tokens = grow(make_tokens(60), 3)
    selection = started(Streaming(sink=4), tokens, 20).select(query(), tokens, RULE)
    assert chosen(selection) == [0, 1, 2, 3, *range(47, 63)]


def test_snapkv_scores_are_those_of_the_definition() -> None:
    tokens, window, kernel = make_tokens(30, num_queries=8), 4, 3
    scores = observed_scores(tokens, window, kernel)
    prompt = tokens.prompt
    for head in range(2):
        smooth = torch.zeros(26)
        for row in range(3):
            seen = torch.zeros(26)
            for step in range(window):
                end = 30 - window + step + 1
                asked = prompt.queries[head, row, 8 - window + step]
                seen += (prompt.keys[head, :end] @ asked * prompt.scaling).softmax(-1)[:26]
            padded = torch.cat([torch.zeros(1), seen, torch.zeros(1)])
            smooth += (padded[:-2] + padded[1:-1] + padded[2:]) / 3 / 3
        torch.testing.assert_close(scores[head, :26], smooth)
        assert scores[head, 26:].isinf().all()


def test_snapkv_keeps_what_it_selected_and_grows_with_the_answer() -> None:
    tokens = make_tokens(60)
    policy = started(SnapKV(window=8, grows=True), tokens, 20)
    best = observed_scores(tokens, 8, 5)[0, :52].topk(12).indices.tolist()
    assert chosen(policy.select(query(), tokens, RULE)) == sorted([*best, *range(52, 60)])
    end = 60
    for count in (1, 4, 40):
        end += count
        grow(tokens, count)
        found = chosen(policy.select(query(), tokens, RULE))
        assert found == sorted([*best, *range(52, end)])


@pytest.mark.parametrize("length", [5, 15, 20])
def test_snapkv_drops_nothing_of_a_prompt_within_the_budget(length: int) -> None:
    tokens = make_tokens(length)
    policy = started(SnapKV(window=8, grows=True), tokens, 20)
    grow(tokens, 30)
    assert chosen(policy.select(query(), tokens, RULE)) == list(range(length + 30))


def test_snapkv_keeps_what_it_selected_while_its_window_slides() -> None:
    tokens = make_tokens(60)
    policy = started(SnapKV(window=8), tokens, 20)
    best = observed_scores(tokens, 8, 5)[0, :52].topk(12).indices.tolist()
    end = 60
    for count in (1, 4, 40):
        end += count
        grow(tokens, count)
        found = chosen(policy.select(query(), tokens, RULE))
        assert found == sorted([*best, *range(end - 8, end)])


def test_snapkv_leaves_what_a_short_prompt_does_not_use_to_the_window() -> None:
    tokens = make_tokens(15)
    policy = started(SnapKV(window=8), tokens, 20)
    grow(tokens, 6)
    assert chosen(policy.select(query(), tokens, RULE)) == [*range(7), *range(8, 21)]
    grow(tokens, 30)
    assert chosen(policy.select(query(), tokens, RULE)) == [*range(7), *range(38, 51)]


def _one_head(keys: Tensor) -> Tokens:
    prompt = PromptTokens(keys[None], torch.zeros(1, len(keys), 2), torch.zeros(1, 1, 4, 2), 1.0)
    return Tokens(prompt)


def test_quest_takes_the_page_with_the_highest_bound() -> None:
    # sink 1, pages of 2, window 1: [s][a a][b b][c c][w]
    keys = torch.tensor(
        [[0, 0], [1, 1], [1, 1], [3, -3], [-3, 3], [2, 0], [0, 1], [0, 0]], dtype=torch.float32
    )
    tokens, asked = _one_head(keys), torch.ones(1, 1, 2)
    method = {"sink": 1, "window": 1, "page_size": 2}
    rule = RULE._replace(scaling=1.0)
    # bounds of page b: [-3..3, -3..3], so 6, though none of its keys gives more than 0
    selection = started(Quest(**method), tokens, 4).select(asked, tokens, rule)
    assert chosen(selection) == [0, 3, 4, 7]
    # ArkVale's box of page b is as wide (mean distance 3), that of page c gives 3, of page a 2
    selection = started(ArkVale(**method), tokens, 6).select(asked, tokens, rule)
    assert chosen(selection) == [0, 3, 4, 5, 6, 7]


def test_arkvale_tightens_the_box_to_the_mean_distance() -> None:
    # one far key among four: bounds 0..4, middle 2, mean distance 2; the lone key 3.9 loses
    keys = torch.tensor([[0.0], [4.0], [0.1], [0.1], [0.1], [3.0], [3.0], [3.0], [3.0], [0.0]])
    keys = torch.cat([keys, torch.zeros_like(keys)], 1)
    tokens, asked = _one_head(keys), torch.tensor([[[1.0, 0.0]]])
    method = {"sink": 1, "window": 1, "page_size": 4}
    rule = RULE._replace(scaling=1.0)
    # Quest: 4 against 3; ArkVale: 2.05 + 1.95 = 4 - 0: centre (4 + .1) / 2, distance 1.95
    assert chosen(started(Quest(**method), tokens, 6).select(asked, tokens, rule))[1] == 1
    low, high = started(ArkVale(**method), tokens, 6).box(keys[None, None, 1:5])  # type: ignore[attr-defined]
    torch.testing.assert_close(high[0, 0, 0], torch.tensor(2.05 + 1.95))
    torch.testing.assert_close(low[0, 0, 0], torch.tensor(2.05 - 1.95))
    uneven = torch.tensor([[0.0, 0], [4, 0], [2, 0], [2, 0]])[None, None]
    low, high = started(ArkVale(**method), tokens, 6).box(uneven)  # type: ignore[attr-defined]
    assert (low[0, 0, 0], high[0, 0, 0]) == (1.0, 3.0)


@pytest.mark.parametrize("looks_each_step", [True, False])
def test_pages_that_fill_up_while_generating_are_those_of_a_prompt(looks_each_step: bool) -> None:
    method = Quest(sink=4, window=8, page_size=4)
    prompt = make_tokens(80).prompt
    parts = Tokens(prompt._replace(keys=prompt.keys[:, :50], values=prompt.values[:, :50]))
    policy = started(method, parts, 40)
    for at in range(50, 80):
        parts.append(prompt.keys[:, at : at + 1], prompt.values[:, at : at + 1])
        if looks_each_step:
            policy.select(query(), parts, RULE)
    expected = started(method, make_tokens(80), 40).select(query(), make_tokens(80), RULE)
    for head in range(2):
        assert chosen(policy.select(query(), parts, RULE), head) == chosen(expected, head)


def test_pqcache_with_a_centroid_for_each_key_is_exact_topk() -> None:
    # 48 keys between sink and window, 64 centroids
    tokens, asked = make_tokens(60), query()
    exact = started(TopK(**TIGHT), tokens, 24).select(asked, tokens, RULE)
    found = started(PQCache(**TIGHT, bits=6), tokens, 24).select(asked, tokens, RULE)
    for head in range(2):
        assert chosen(found, head) == chosen(exact, head)


def test_pqcache_estimates_a_generated_token_by_its_nearest_centroids() -> None:
    tokens, asked = grow(make_tokens(60), 1), query()
    policy = started(PQCache(**TIGHT, bits=2), make_tokens(60), 24)
    estimate = policy.estimate(asked, tokens, RULE)  # type: ignore[attr-defined]
    assert estimate.shape == (2, 3, 49)
    codes = policy._codes  # type: ignore[attr-defined]
    centroids = policy._centroids  # type: ignore[attr-defined]
    new = tokens.keys(52, 53).view(2, 2, 8).flatten(0, 1)
    distance = (centroids - new[:, None]).norm(dim=-1)
    assert torch.equal(codes[:, -1], distance.argmin(-1))
    reconstructed = centroids[torch.arange(4), codes[:, -1]].view(2, 1, 16)
    expected = (asked * reconstructed).sum(-1) * RULE.scaling
    torch.testing.assert_close(estimate[..., -1], expected)


def test_pqcache_refuses_parts_that_do_not_divide_the_keys() -> None:
    with pytest.raises(ValueError, match="parts must divide the model's head dimension 16, got 3"):
        started(PQCache(parts=3, **TIGHT), make_tokens(60), 24)


def test_magicpig_samples_with_the_probability_it_divides_by() -> None:
    tokens, asked = make_tokens(200, seed=3), query(4)
    drawn, expected = torch.zeros(2, 3, 188), torch.zeros(2, 3, 188)
    runs = 150
    for seed in range(runs):
        policy = started(MagicPIG(bits=4, tables=20, seed=seed, **TIGHT), tokens, 200)
        selection = policy.select(asked, tokens, RULE)
        assert selection is not None and selection.bias is not None and selection.valid is not None
        for head in range(2):
            there = selection.valid[head, 12:]
            at = selection.positions[head, 12:][there] - 4
            bias = selection.bias[head, :, 12:][:, there]
            drawn[head][:, at] += (bias > -math.inf).float()
            expected[head][:, at] = (
                bias.neg().exp().clamp(max=1.0).where(bias > -math.inf, expected[head][:, at])
            )
    seen = (drawn / runs)[expected > 0]
    chance = expected[expected > 0]
    # standard error of a share over 150 draws is at most 0.041
    assert (seen - chance).abs().mean() < 0.03
    assert abs(float((seen - chance).mean())) < 0.01


def test_magicpig_is_full_attention_where_everything_is_sampled_for_sure() -> None:
    tokens, asked = make_tokens(60), 0.05 * query()
    policy = started(MagicPIG(bits=1, tables=75, **TIGHT), tokens, 60)
    selection = policy.select(asked, tokens, RULE)
    out = attend_selected(asked, tokens, selection, RULE)
    torch.testing.assert_close(out, attend_all(asked, tokens, RULE), atol=0.02, rtol=0.02)


def test_omnikv_followers_attend_what_the_filter_before_them_found() -> None:
    tokens, others = make_tokens(60, seed=5), make_tokens(60, seed=6)
    policies = OmniKV(**TIGHT).policies(20, 32)
    found = policies[8].select(query(), tokens, RULE)
    votes = torch.zeros(60)
    for head in range(2):
        votes += (query()[head] @ tokens.keys(0, 60)[head].T * RULE.scaling).softmax(-1).sum(0)
    middle = sorted(range(4, 52), key=lambda at: -float(votes[at]))[:8]
    expected = sorted([0, 1, 2, 3, *middle, *range(52, 60)])
    assert chosen(found, 0) == chosen(found, 1) == expected
    # another layer, other keys, another query: the same tokens
    for layer in (9, 17):
        assert chosen(policies[layer].select(query(9), others, RULE)) == expected
    # the next filter looks for itself
    assert chosen(policies[18].select(query(9), others, RULE)) != expected
    assert chosen(policies[19].select(query(), tokens, RULE)) != expected


def test_omnikv_full_filters_attend_to_everything() -> None:
    tokens = make_tokens(60)
    policies = OmniKV(full_filters=True, **TIGHT).policies(20, 32)
    kinds = [policy.select(query(), tokens, RULE) is None for policy in policies]
    assert [layer for layer, is_full in enumerate(kinds) if is_full] == [0, 1, 2, 8, 18]


def test_a_selection_says_how_many_it_attends() -> None:
    positions = torch.arange(6).view(2, 3)
    assert Selection(positions).num_attended == 3
    valid = torch.tensor([[True, True, True], [True, False, False]])
    assert Selection(positions, valid).num_attended == 2


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_every_method_states_its_paper_budget_and_memory(method: type) -> None:
    text = method.__doc__ or ""
    assert "udget" in text
    assert "xtra memory" in text
    assert "arXiv" in text or "NeurIPS" in text or "ICLR" in text or method.name == "full"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SnapKV(kernel=4), "kernel must be odd, got 4"),
        (lambda: SnapKV(window=65), "window must be at most 64"),
        (lambda: MagicPIG(bits=9), "bits must be at most 8"),
        (lambda: MagicPIG(tables=1), "tables must be at least 2"),
        (lambda: Quest(page_size=0), "page_size must be an integer >= 1, got 0"),
        (lambda: TopK(sink=-1), "sink must be an integer >= 0, got -1"),
        (lambda: Quest().check(63), r"at least sink \+ window \+ 16 = 64 tokens, got 63"),
        (lambda: TopK().check(48), r"at least sink \+ window \+ 1 = 49 tokens, got 48"),
    ],
)
def test_bad_parameters_name_the_rule(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()  # type: ignore[operator]
