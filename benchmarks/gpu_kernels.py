"""Every kernel against its twin on the same device, in all dtypes that the device has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from icecache.errors import IntegrityError
from icecache.ops.device import twin
from icecache.ops.device.check import check_device_tree
from icecache.ops.device.records import Part
from icecache.ops.device.testing import Case, CaseShape, random_case

SCALING = 0.1
SOFTCAP = 20.0
# float32 sums in another order, and tensor cores where a model's dtype has 16 bits
MOST_ERROR = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 2e-3}
SHAPES = (
    CaseShape(group=4, head_dim=128, leaves=1500, pages=420, slots=40, batch=2, window=70),
    CaseShape(group=1, head_dim=64, page_size=8, leaf_size=4, leaves=301, pages=90, slots=12),
    CaseShape(group=7, head_dim=80, page_size=32, leaf_size=16, leaves=77, int8_pages=True),
    CaseShape(group=3, head_dim=96, leaves=133, pages=60, offload=False),
    CaseShape(group=16, head_dim=256, page_size=64, leaf_size=32, leaves=40, pages=9),
)
SMOKE = (CaseShape(kv_heads=2, head_dim=16, leaves=19),)


def check_kernels(
    shapes: tuple[CaseShape, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    ops: ModuleType,
) -> list[dict[str, Any]]:
    """One row a shape and dtype: each op's largest error, relative to 1 + the twin's value.

    `passed` says whether errors are within bounds, what only moves is equal bit for bit, and the
    tree is whole after an insert.
    """
    rows = []
    for shape in shapes:
        for dtype in dtypes:
            torch.manual_seed(0)
            errors = _errors(replace(shape, dtype=dtype), device, ops)
            passed = all(error <= MOST_ERROR[dtype] for error in errors.values())
            row = {"head_dim": shape.head_dim, "group": shape.group, "page_size": shape.page_size}
            rows.append({**row, "dtype": str(dtype), "errors": errors, "passed": passed})
    return rows


def _errors(shape: CaseShape, device: torch.device, ops: ModuleType) -> dict[str, float]:
    case = random_case(shape)
    theirs, mine = _copy(case, device), _copy(case, device)
    errors: dict[str, float] = {}

    def both(name: str, call: Callable[[ModuleType, Case], Any], exact: bool) -> Any:
        """Run an op of both kinds, each on its own layer; the twin's result goes on."""
        expected, got = call(twin, theirs), call(ops, mine)
        errors[name] = _error(got, expected, exact)
        return expected

    new = torch.randn(2, shape.rows, shape.head_dim).to(device, shape.dtype)
    step = torch.ones(1, dtype=torch.int64, device=device)
    most = min(shape.slots, 20)
    query = case.query.to(device)
    leaving = both("push", lambda o, c: o.push(c.fixed, *new), True)
    asked = (SCALING, SOFTCAP)
    near = both("fixed", lambda o, c: o.attend_fixed(query, c.fixed, leaving, *asked), False)
    scores = both("score", lambda o, c: o.score(query, c.tree, leaving, *asked, 0.3)[:3], False)
    scores = twin.score(query, theirs.tree, leaving, *asked, 0.3)
    both("vote", lambda o, c: o.vote(scores, near, c.tree) / twin.VOTE_UNIT, False)
    votes = twin.vote(scores, near, theirs.tree)
    both("select_pages", lambda o, c: o.select_pages(votes, c.tree, 100, most), True)
    selected = both("select", lambda o, c: o.select_leaves(votes, c.tree, 100, most), True)
    slots, missing = both("resolve", lambda o, c: o.resolve(selected.pages, c.pages, step), True)
    both("gather", lambda o, c: (o.gather(c.pages, slots, missing), c.pages.resident)[1], True)
    exact = both(
        "pages",
        lambda o, c: o.attend_pages(query, c.pages, selected, slots, *asked),
        False,
    )
    rest = both("rest", lambda o, c: o.attend_rest(scores, c.tree, selected), False)
    both("combine", lambda o, c: o.combine([near, exact, rest], None), False)
    both(
        "insert",
        lambda o, c: (o.insert(c.tree, c.pages, leaving, scores, shape.leaf_size), c.pages.host)[1],
        True,
    )
    try:
        check_device_tree(mine.tree, mine.pages, shape.leaf_size)
    except IntegrityError:
        errors["insert"] = float("inf")
    return errors


def _copy(case: Case, device: torch.device) -> Case:
    query, fixed, tree, pages = case
    return Case(query.to(device), fixed.to(device), tree.to(device), pages.to(device))


def _error(got: Any, expected: Any, exact: bool) -> float:
    if isinstance(got, Part):
        return _error(twin.combine([got], None), twin.combine([expected], None), exact)
    if isinstance(got, tuple):
        return max((_error(a, b, exact) for a, b in zip(got, expected)), default=0.0)
    if got is None:
        return 0.0
    return _distance(got, expected, exact)


def _distance(got: Tensor, expected: Tensor, exact: bool) -> float:
    got, expected = got.double(), expected.double()
    same = (got == expected) | (got.isnan() & expected.isnan())
    if exact:
        return 0.0 if bool(same.all()) else float("inf")
    error = (got - expected).abs() / (1 + expected.abs())
    error = torch.where(same, 0.0, error.nan_to_num(nan=float("inf")))
    return float(error.max())
