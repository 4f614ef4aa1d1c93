"""`IceCacheLayer.step` beside `append` and `attend`: the same answers and the same layer after."""

import copy
import math

import pytest
import torch

from icecache import IceCacheConfig, IceCacheLayer
from icecache.cache import fused
from icecache.errors import HostMemoryExceeded, InputError
from icecache.ops.native import load
from tests.helpers import clustered

Tokens = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def make_layer(
    dtype: torch.dtype = torch.float32, dim: int = 64, **settings: object
) -> IceCacheLayer:
    config = IceCacheConfig.from_kwargs(**{"backend": "native", **settings})
    return IceCacheLayer(config, num_kv_heads=3, head_dim=dim, dtype=dtype)


def make_tokens(num: int, batch: int, dtype: torch.dtype, dim: int = 64) -> Tokens:
    """Queries, keys and values: [batch, heads, num, dim]."""
    keys, values = (
        clustered(s, batch * 3 * num, dim, centres=30).view(batch, 3, num, dim) for s in (1, 2)
    )
    queries = clustered(3, batch * 9 * num, dim, centres=30).view(batch, 9, num, dim)
    return queries.to(dtype), keys.to(dtype), values.to(dtype)


def one(tokens: Tokens, at: int) -> Tokens:
    return tuple(part[:, :, at : at + 1] for part in tokens)  # type: ignore[return-value]


def twin_step(layer: IceCacheLayer, token: Tokens, **asked: float) -> torch.Tensor:
    query, keys, values = token
    layer.append(keys, values)
    out = layer.attend(query, **asked)
    layer._settle(layer.config.window - 1)
    return out


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each step was one compiled call."""
    made: list[bool] = []
    run = fused.FusedStep.run

    def counted(self: fused.FusedStep, *args: object) -> torch.Tensor | None:
        out = run(self, *args)  # type: ignore[arg-type]
        made.append(out is not None)
        return out

    monkeypatch.setattr(fused.FusedStep, "run", counted)
    return made


@pytest.mark.parametrize(("prompt", "steps"), [(1, 20), (200, 120), (900, 150)])
@pytest.mark.parametrize(
    ("dtype", "dim", "tolerance"),
    [(torch.float32, 80, 2e-6), (torch.bfloat16, 64, 8e-3), (torch.float16, 128, 1e-3)],
)
def test_a_step_is_append_and_attend(
    prompt: int, steps: int, dtype: torch.dtype, dim: int, tolerance: float, calls: list[bool]
) -> None:
    tokens = make_tokens(prompt + steps, 2, dtype, dim)
    ours, twin = (make_layer(dtype, dim) for _ in range(2))
    for layer in (ours, twin):
        layer.prefill(tokens[1][:, :, :prompt], tokens[2][:, :, :prompt])
        layer.attend(tokens[0][:, :, :1])
    for at in range(prompt, prompt + steps):
        out, expected = ours.step(*one(tokens, at)), twin_step(twin, one(tokens, at))
        assert out.shape == expected.shape and out.dtype == dtype
        torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    assert ours.stats() == twin.stats()
    ours.check_integrity()
    # the one that starts the index is the twin's
    assert calls.count(False) == int(prompt <= 256 < prompt + steps)


def test_softcap_scaling_and_a_strided_query() -> None:
    tokens = make_tokens(400, 1, torch.float32)
    ours, twin = make_layer(), make_layer()
    for layer in (ours, twin):
        layer.prefill(tokens[1][:, :, :390], tokens[2][:, :, :390])
        layer.attend(tokens[0][:, :, :1])
    for at in range(390, 400):
        asked = {"softcap": 3.0, "scaling": 0.3 + at / 1000}
        query, keys, values = one(tokens, at)
        apart = torch.zeros(1, 9, 1, 128)[..., ::2].copy_(query)
        out = ours.step(apart if at == 395 else query, keys, values, **asked)
        torch.testing.assert_close(out, twin_step(twin, (query, keys, values), **asked))


def test_whatever_changes_the_context_is_seen(calls: list[bool]) -> None:
    tokens = make_tokens(700, 2, torch.float32)
    ours, twin = make_layer(), make_layer()
    at = 0

    def take(num: int) -> None:
        nonlocal at
        for layer in (ours, twin):
            layer.append(tokens[1][:, :, at : at + num], tokens[2][:, :, at : at + num])
            layer.attend(tokens[0][:, :, at : at + num])
        at += num

    def step(num: int = 1) -> None:
        nonlocal at
        for _ in range(num):
            torch.testing.assert_close(
                ours.step(*one(tokens, at)), twin_step(twin, one(tokens, at))
            )
            at += 1

    take(100)
    step(3)
    for prepare in (
        lambda layer: layer.crop(2),
        lambda layer: layer.reorder(torch.tensor([1, 0])),
        lambda layer: layer.reorder(torch.tensor([0, 0])),
    ):
        for layer in (ours, twin):
            prepare(layer)
        step(3)
    take(300)
    step(3)
    for layer in (ours, twin):
        layer.crop(5)
    step(9)
    for layer in (ours, twin):
        layer.reorder(torch.tensor([1, 1]))
    step(3)
    take(20)
    step(5)
    assert ours.stats() == twin.stats()
    ours.check_integrity()
    assert True in calls and False in calls


def test_rows_of_unequal_lengths(calls: list[bool]) -> None:
    tokens = make_tokens(600, 2, torch.float32)
    mask = torch.ones(2, 500, dtype=torch.bool)
    mask[1, :480] = False
    ours, twin = make_layer(), make_layer()
    for layer in (ours, twin):
        layer.prefill(tokens[1][:, :, :500], tokens[2][:, :, :500], mask)
    for at in range(500, 600):
        torch.testing.assert_close(ours.step(*one(tokens, at)), twin_step(twin, one(tokens, at)))
    assert ours.stats() == twin.stats()
    # the short row's sink and window were not full yet at first
    assert not calls[0] and calls[-1]


@pytest.mark.parametrize("prompt", [100, 400])
@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_no_number_is_refused_and_nothing_changes(
    prompt: int, part: int, wrong: float
) -> None:
    tokens = make_tokens(prompt + 4, 1, torch.bfloat16)
    ours, twin = make_layer(torch.bfloat16), make_layer(torch.bfloat16)
    for layer in (ours, twin):
        layer.prefill(tokens[1][:, :, :prompt], tokens[2][:, :, :prompt])
        layer.attend(tokens[0][:, :, :1])
    torch.testing.assert_close(
        ours.step(*one(tokens, prompt)), twin_step(twin, one(tokens, prompt))
    )
    broken = [x.clone() for x in one(tokens, prompt + 1)]
    broken[part][0, 1, 0, 5] = wrong
    with pytest.raises(InputError, match="must be finite"):
        ours.step(*broken)
    assert ours.num_tokens == prompt + 1
    for at in (prompt + 1, prompt + 2):
        out, expected = ours.step(*one(tokens, at)), twin_step(twin, one(tokens, at))
        torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("prompt", [100, 400])
def test_an_overflow_is_told_and_the_token_goes(prompt: int) -> None:
    tokens = make_tokens(prompt + 3, 1, torch.float32)
    layer = make_layer()
    layer.prefill(tokens[1][:, :, :prompt], tokens[2][:, :, :prompt])
    layer.attend(tokens[0][:, :, :1])
    layer.step(*one(tokens, prompt))
    query, keys, values = one(tokens, prompt + 1)
    with pytest.raises(InputError, match="overflowed"):
        layer.step(query.sign() * 1e20, keys.sign() * 1e20, values)
    assert layer.num_tokens == prompt + 1
    assert layer.step(query, keys, values).isfinite().all()


def test_no_memory_in_the_tree_is_an_error_that_asks_for_a_reset(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokens = make_tokens(420, 1, torch.float32)
    layer = make_layer()
    layer.prefill(tokens[1][:, :, :400], tokens[2][:, :, :400])
    layer.attend(tokens[0][:, :, :1])
    layer.step(*one(tokens, 400))
    assert layer._fused is not None
    fused_step = layer._fused

    def lack_memory_in_the_second_row(*parts: object) -> int:
        fused_step._stopped.value = 1
        return 3

    monkeypatch.setattr(fused_step, "_call", lack_memory_in_the_second_row)
    with pytest.raises(HostMemoryExceeded):
        layer.step(*one(tokens, 401))
    with pytest.raises(Exception, match="reset"):
        layer.step(*one(tokens, 402))


def test_a_copy_goes_its_own_way() -> None:
    tokens = make_tokens(420, 1, torch.float32)
    layer = make_layer()
    layer.prefill(tokens[1][:, :, :400], tokens[2][:, :, :400])
    layer.attend(tokens[0][:, :, :1])
    layer.step(*one(tokens, 400))
    other = copy.deepcopy(layer)
    for at in range(401, 410):
        torch.testing.assert_close(layer.step(*one(tokens, at)), other.step(*one(tokens, at)))
    other.step(*one(tokens, 410))
    assert (layer.num_tokens, other.num_tokens) == (410, 411)
    layer.check_integrity()


@pytest.mark.parametrize("prompt", [3000, 20000])
def test_two_threads_give_the_same_bits(prompt: int) -> None:
    budget = 256 if prompt == 20000 else 4096
    tokens = make_tokens(prompt + 3, 1, torch.bfloat16)
    layers = [make_layer(torch.bfloat16, budget=budget) for _ in range(2)]
    threads = torch.get_num_threads()
    for layer in layers:
        layer.prefill(tokens[1][:, :, :prompt], tokens[2][:, :, :prompt])
        layer.attend(tokens[0][:, :, :1])
    try:
        for at in range(prompt, prompt + 3):
            outs = []
            for num, layer in enumerate(layers, 1):
                torch.set_num_threads(num)
                outs.append(layer.step(*one(tokens, at)))
            assert torch.equal(*outs)
    finally:
        torch.set_num_threads(threads)


def test_all_finite_halves_come_back_as_they_were() -> None:
    """A window of one value attended alone: the output is that value, through float32 and back."""
    load()
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        values = bits.view(dtype)
        values = values[values.isfinite()].view(-1, 64)
        for row in values[:: 37 if dtype == torch.bfloat16 else 1]:
            layer = make_layer(dtype)
            zero = torch.zeros(1, 3, 1, 64, dtype=dtype)
            query = torch.zeros(1, 9, 1, 64, dtype=dtype)
            layer.step(query, zero, row.expand(1, 3, 1, 64))
            layer.crop(1)
            out = layer.step(query, zero, row.expand(1, 3, 1, 64).contiguous())
            assert torch.equal(out[0, 0, 0], row)
