"""The interpreter is looser than the compiler: every kernel is compiled as well, without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_kernels.py")
SELECTING = {"score", "vote", "best_of_tile", "best_of_keys", "fit_leaves"}
SELECTING |= {"page_votes", "fit_pages", "resolve", "gather"}
KERNELS = {"push", "fixed", "pages", "rest", "combine", "insert"} | SELECTING
# what a block of an H100 or H200 may have
SHARED_BYTES = 227 * 1024


def compiled(arguments: str, cache: Path) -> dict[str, int]:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    ran = subprocess.run(
        [sys.executable, SCRIPT, *arguments.split()],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return {line.split()[0]: int(line.split()[1]) for line in ran.stdout.splitlines()}


def check(arguments: str, cache: Path) -> None:
    shared = compiled(arguments, cache)
    assert set(shared) == {f"_{name}_kernel" for name in KERNELS}
    assert max(shared.values()) <= SHARED_BYTES


def test_every_kernel_compiles_for_an_8b_models_shape(tmp_path: Path) -> None:
    check("bfloat16 128 4 16 int8", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        "bfloat16 128 4 32 plain",
        "float16 80 7 8 plain",
        "float32 256 16 64 plain",
        "float32 64 1 16 int8",
        "bfloat16 96 8 64 int8",
        "bfloat16 256 2 64 plain",
    ],
)
def test_every_kernel_compiles_for_other_shapes(arguments: str, tmp_path: Path) -> None:
    check(arguments, tmp_path)
