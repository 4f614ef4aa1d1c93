"""Bad input is refused in one line with name, rule and value, and changes nothing."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from icecache import IceCacheConfig, IceCacheLayer
from icecache.errors import ConfigError, IceCacheError, InputError
from tests.helpers import KeysValues, left_padded, make_query, make_tokens, small_layer

PROMPTS = {"short": 12, "long": 60}
Bad = Callable[[IceCacheLayer], object]


def _with(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x[1, 1, 2, 3] = value
    return x


def _tokens(num: int = 4, **kwargs: Any) -> KeysValues:
    return make_tokens(3, 2, num, **kwargs)


def _append(keys: Any, values: Any, mask: Any = None) -> Bad:
    return lambda layer: layer.append(keys, values, mask)


def _spoiled(name: str, value: float) -> list[Tensor]:
    return [_with(x, value) if n == name else x for n, x in GOOD._asdict().items()]


GOOD = _tokens()
# their sum is NaN, not infinite
_BOTH = _with(GOOD.keys, torch.inf).index_fill(2, torch.tensor([1]), -torch.inf)
SEVERAL_BAD: list[tuple[str, Bad, str]] = [
    ("no tensor", _append(None, None), "keys must be a torch.Tensor, got NoneType"),
    ("list", _append(GOOD.keys, [1]), "values must be a torch.Tensor, got list"),
    (
        "3-D",
        _append(GOOD.keys[0], GOOD.values[0]),
        "keys must be [batch, num_kv_heads, tokens, head_dim], got (2, 4, 16)",
    ),
    (
        "no token",
        _append(*_tokens(0)),
        "keys must hold at least one row and one token, got (2, 2, 0, 16)",
    ),
    (
        "no row",
        _append(*GOOD[:0]),
        "keys must hold at least one row and one token, got (0, 2, 4, 16)",
    ),
    (
        "heads",
        _append(*_tokens(heads=3)),
        "keys must have 2 KV heads of head_dim 16, got (2, 3, 4, 16)",
    ),
    (
        "head_dim",
        _append(*_tokens(dim=8)),
        "keys must have 2 KV heads of head_dim 16, got (2, 2, 4, 8)",
    ),
    (
        "values' head_dim",
        _append(GOOD.keys, _tokens(dim=8).values),
        "values must have 2 KV heads of head_dim 16, got (2, 2, 4, 8)",
    ),
    (
        "keys' dtype",
        _append(GOOD.keys.double(), GOOD.values),
        "keys must be torch.float32, got torch.float64",
    ),
    (
        "values' dtype",
        _append(GOOD.keys, GOOD.values.bfloat16()),
        "values must be torch.float32, got torch.bfloat16",
    ),
    ("device", _append(GOOD.keys.to("meta"), GOOD.values), "keys must be on cpu, got meta"),
    (
        "lengths",
        _append(GOOD.keys, GOOD.values[:, :, :3]),
        "keys and values must agree, got (2, 2, 4, 16) and (2, 2, 3, 16)",
    ),
    (
        "batch",
        _append(*make_tokens(3, 3, 4)),
        "batch must stay 2 until reset() or reorder(), got 3 rows",
    ),
    *(
        (f"{value} in {name}", _append(*_spoiled(name, value)), f"{name} must be finite, got NaN")
        for name in KeysValues._fields
        for value in (torch.nan, torch.inf, -torch.inf)
    ),
    ("both infinities", _append(_BOTH, GOOD.values), "keys must be finite, got NaN"),
    ("mask's type", _append(*GOOD, [[True] * 4] * 2), "mask must be a torch.Tensor, got list"),
    (
        "mask's dtype",
        _append(*GOOD, torch.ones(2, 4)),
        "mask must be torch.bool, True = token, got torch.float32",
    ),
    (
        "mask's shape",
        _append(*GOOD, left_padded([4, 5])),
        "mask must be [batch, tokens] = (2, 4), got (2, 5)",
    ),
    (
        "pads on the right",
        _append(*GOOD, left_padded([4, 3]).flip(1)),
        "mask must be padded on the left",
    ),
    (
        "pads in the middle",
        _append(*GOOD, torch.tensor([[True, False, True, True]] * 2)),
        "mask must be padded on the left",
    ),
]


def _attend(query: Any, **kwargs: Any) -> Bad:
    return lambda layer: layer.attend(query, **kwargs)


QUERY = make_query(5, 2, 4)
ATTEND_BAD: list[tuple[str, Bad, str]] = [
    ("no tensor", _attend(None), "query must be a torch.Tensor, got NoneType"),
    ("3-D", _attend(QUERY[0]), "query must be [2, num_q_heads, q_tokens, 16], got (4, 1, 16)"),
    (
        "batch",
        _attend(QUERY[:1]),
        "query must be [2, num_q_heads, q_tokens, 16], got (1, 4, 1, 16)",
    ),
    (
        "head_dim",
        _attend(QUERY[..., :8]),
        "query must be [2, num_q_heads, q_tokens, 16], got (2, 4, 1, 8)",
    ),
    (
        "heads",
        _attend(make_query(5, 2, 3)),
        "query heads must be a multiple of the 2 KV heads, got 3",
    ),
    ("no head", _attend(QUERY[:, :0]), "query heads must be a multiple of the 2 KV heads, got 0"),
    ("no token", _attend(QUERY[:, :, :0]), "query must have at least one token, got (2, 4, 0, 16)"),
    (
        "more than given",
        _attend(make_query(5, 2, 4, 6)),
        "query has 6 tokens, the latest call gave 5",
    ),
    (
        "dtype",
        _attend(QUERY.double()),
        "query must be torch.float32 on cpu, got torch.float64 on cpu",
    ),
    (
        "integers",
        _attend(QUERY.long()),
        "query must be torch.float32 on cpu, got torch.int64 on cpu",
    ),
    (
        "device",
        _attend(QUERY.to("meta")),
        "query must be torch.float32 on cpu, got torch.float32 on meta",
    ),
    ("NaN", _attend(QUERY * torch.nan), "query must be finite, got NaN or infinity"),
    ("scaling NaN", _attend(QUERY, scaling=torch.nan), "scaling must be finite, got nan"),
    ("scaling inf", _attend(QUERY, scaling=float("inf")), "scaling must be finite, got inf"),
    (
        "softcap 0",
        _attend(QUERY, softcap=0.0),
        "softcap must be a positive number or None, got 0.0",
    ),
    (
        "softcap < 0",
        _attend(QUERY, softcap=-1.0),
        "softcap must be a positive number or None, got -1.0",
    ),
    (
        "softcap NaN",
        _attend(QUERY, softcap=torch.nan),
        "softcap must be a positive number or None, got nan",
    ),
    (
        "few sinks",
        _attend(QUERY, sink_logits=torch.zeros(3)),
        "sink_logits must be [num_q_heads] = (4,), got (3,)",
    ),
    (
        "many sinks",
        _attend(QUERY, sink_logits=torch.zeros(8)),
        "sink_logits must be [num_q_heads] = (4,), got (8,)",
    ),
    (
        "sinks of heads x 1",
        _attend(QUERY, sink_logits=torch.zeros(4, 1)),
        "sink_logits must be [num_q_heads] = (4,), got (4, 1)",
    ),
    (
        "sinks no tensor",
        _attend(QUERY, sink_logits=[0.0] * 4),
        "sink_logits must be a torch.Tensor, got list",
    ),
    ("sinks NaN", _attend(QUERY, sink_logits=torch.full((4,), torch.nan)), "sink_logits must"),
]


def _crop(num: Any) -> Bad:
    return lambda layer: layer.crop(num)


def _reorder(rows: Any) -> Bad:
    return lambda layer: layer.reorder(rows)


CROP_REORDER_BAD: list[tuple[str, Bad, str]] = [
    ("negative", _crop(-1), "got -1"),
    ("too deep", _crop(61), "got 61"),
    ("fraction", _crop(1.5), "crop must be an integer, got 1.5"),
    ("bool", _crop(True), "crop must be an integer, got True"),
    ("tensor", _crop(torch.tensor(1)), "crop must be an integer, got tensor(1)"),
    ("row too large", _reorder(torch.tensor([0, 2])), "rows must be from 0 to 1, got [0, 2]"),
    ("row negative", _reorder(torch.tensor([-1])), "rows must be from 0 to 1, got [-1]"),
    (
        "no rows",
        _reorder(torch.tensor([], dtype=torch.int64)),
        "rows must be a vector of integers, got torch.int64 of shape (0,)",
    ),
    (
        "rows 2-D",
        _reorder(torch.zeros(2, 2, dtype=torch.int64)),
        "rows must be a vector of integers, got torch.int64 of shape (2, 2)",
    ),
    (
        "rows float",
        _reorder(torch.tensor([0.0, 1.0])),
        "rows must be a vector of integers, got torch.float32 of shape (2,)",
    ),
    (
        "rows bool",
        _reorder(torch.tensor([True, False])),
        "rows must be a vector of integers, got torch.bool of shape (2,)",
    ),
    ("rows list", _reorder([1, 0]), "rows must be a torch.Tensor, got list"),
]

ALL_BAD = [*SEVERAL_BAD, *ATTEND_BAD, *CROP_REORDER_BAD]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize(
    ("bad", "message"), [case[1:] for case in ALL_BAD], ids=[case[0] for case in ALL_BAD]
)
def test_a_refused_call_changes_nothing(bad: Bad, message: str, prompt: str) -> None:
    tried, untried = small_layer(), small_layer()
    for layer in (tried, untried):
        layer.prefill(*make_tokens(0, 2, PROMPTS[prompt]))
        layer.append(*make_tokens(1, 2, 5))
    stats = tried.stats()
    with pytest.raises(InputError, match=re.escape(message)):
        bad(tried)
    assert tried.stats() == stats
    for query in (make_query(6, 2, 4, 5), make_query(7, 2, 4)):
        assert torch.equal(tried.attend(query), untried.attend(query))
    tried.check_integrity()
    assert tried.stats() == untried.stats()


@pytest.mark.parametrize(
    ("bad", "message"),
    [case[1:] for case in SEVERAL_BAD if case[0] != "batch"],
    ids=[case[0] for case in SEVERAL_BAD if case[0] != "batch"],
)
def test_an_empty_layer_stays_empty(bad: Bad, message: str) -> None:
    layer = small_layer()
    with pytest.raises(InputError, match=re.escape(message)):
        bad(layer)
    assert layer.stats() == small_layer().stats()
    layer.prefill(*make_tokens(0, 3, 7))
    assert layer.batch_size == 3


def test_attend_on_an_empty_layer() -> None:
    layer = small_layer()
    with pytest.raises(InputError, match="attend needs tokens: call prefill or append first"):
        layer.attend(QUERY)
    assert layer.stats() == small_layer().stats()


def test_attend_after_everything_was_taken_back() -> None:
    layer = small_layer()
    layer.prefill(*GOOD)
    layer.crop(4)
    with pytest.raises(InputError, match="attend needs tokens"):
        layer.attend(QUERY)


def test_inspect_needs_an_index() -> None:
    layer = small_layer()
    with pytest.raises(InputError, match="inspect needs an indexed context, the layer is empty"):
        layer.inspect(QUERY)
    layer.prefill(*GOOD)
    with pytest.raises(InputError, match="inspect needs an indexed context, the layer is dense"):
        layer.inspect(QUERY)


def test_crop_of_an_empty_layer() -> None:
    with pytest.raises(InputError, match="crop must be from 0 to the 0 tokens"):
        small_layer().crop(1)
    small_layer().crop(0)


@pytest.mark.parametrize("queries", [2, 3])
def test_inspect_takes_one_query_token(queries: int) -> None:
    layer = small_layer()
    layer.prefill(*make_tokens(0, 2, 60))
    layer.attend(QUERY)
    stats = layer.stats()
    with pytest.raises(InputError, match="one"):
        layer.inspect(make_query(1, 2, 4, queries))
    assert layer.stats() == stats


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_kv_heads": 0}, "num_kv_heads must be a positive integer, got 0"),
        ({"num_kv_heads": 2.0}, "num_kv_heads must be a positive integer, got 2.0"),
        ({"num_kv_heads": True}, "num_kv_heads must be a positive integer, got True"),
        ({"head_dim": -64}, "head_dim must be a positive integer, got -64"),
        ({"dtype": torch.int8}, "dtype must be a floating-point type of .* got torch.int8"),
        ({"dtype": "float32"}, "dtype must be .* got .*float32"),
        ({"device": "meta"}, "device must be cpu for this layer, got meta"),
    ],
)
def test_a_layer_of_wrong_shape(settings: dict[str, Any], message: str) -> None:
    good = {"num_kv_heads": 2, "head_dim": 16, "dtype": torch.float32}
    with pytest.raises(ConfigError, match=message):
        IceCacheLayer(IceCacheConfig(), **{**good, **settings})


def test_input_errors_can_be_caught_as_values_and_as_ours() -> None:
    assert issubclass(InputError, ValueError)
    assert issubclass(InputError, IceCacheError)
