"""The kernels' part of `benchmarks/gpu.py`, run off a GPU with the twins."""

from types import SimpleNamespace

import gpu_gather
import gpu_kernels
import torch

from icecache.ops.device import twin

CPU = torch.device("cpu")


def test_twins_agree_with_themselves() -> None:
    rows = gpu_kernels.check_kernels(gpu_kernels.SMOKE, (torch.float32, torch.float16), CPU, twin)
    assert [row["dtype"] for row in rows] == ["torch.float32", "torch.float16"]
    for row in rows:
        assert row["passed"] and set(row["errors"].values()) == {0.0}
        assert {"push", "score", "select", "gather", "combine", "insert"} <= set(row["errors"])


def test_a_wrong_op_is_seen() -> None:
    names = {name: getattr(twin, name) for name in twin.__all__}
    for name, wrong in {
        "combine": lambda parts, sinks: twin.combine(parts, sinks) + 0.01,
        "gather": lambda pages, slots, missing: None,
        "insert": lambda *_: None,
    }.items():
        ops = SimpleNamespace(**{**names, name: wrong})
        (row,) = gpu_kernels.check_kernels(gpu_kernels.SMOKE, (torch.float32,), CPU, ops)
        assert not row["passed"]
        # later ops read what the wrong one left
        assert next(op for op, error in row["errors"].items() if error > 1e-4) == name


def test_the_gather_sweep_measures_every_size() -> None:
    rows = gpu_gather.measure_gather(gpu_gather.SMOKE, CPU, twin)
    assert [(row["record_bytes"], row["records"]) for row in rows] == [
        (4096, 8),
        (4096, 16),
        (8192, 8),
        (8192, 16),
    ]
    for row in rows:
        assert row["seconds"] > 0
        assert row["share_of_copy"] == row["bytes_per_second"] / row["copy_bytes_per_second"]
