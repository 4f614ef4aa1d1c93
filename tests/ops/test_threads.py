"""Threads that work beside the model: they make no team, and the model's keeps its own."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts threads by /proc")

_COUNT = """
import os
import torch
from {module} import {name}
from concurrent.futures import ThreadPoolExecutor

def multiply():
    x = torch.ones(600, 600)
    return float((x @ x).sum()), torch.get_num_threads()

def count():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(3)
multiply()
before = count()
pool = {make}
ours = pool.submit(multiply).result()[1]
more = count() - before
with ThreadPoolExecutor(1) as later:
    next_one = later.submit(torch.get_num_threads).result()
print(ours, more, torch.get_num_threads(), next_one)
"""


def _count(module: str, name: str, make: str) -> list[int]:
    script = _COUNT.format(module=module, name=name, make=make)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    return [int(number) for number in done.stdout.split()]


@pytest.mark.parametrize(
    ("module", "name", "make"),
    [
        ("icecache.ops.threads", "SoloThreads", "SoloThreads(1, 'beside')"),
        ("icecache.integrations.transformers.threads", "Threads", "Threads().executor()"),
    ],
)
def test_a_thread_beside_the_model_makes_no_team(module: str, name: str, make: str) -> None:
    assert _count(module, name, make) == [1, 1, 3, 3]


def test_a_thread_that_works_alone_leaves_others_as_they_were() -> None:
    # the pool's thread makes a team of three, the main thread's is one now
    make = "work_alone() or ThreadPoolExecutor(1)"
    assert _count("icecache.ops.threads", "work_alone", make) == [3, 3, 1, 3]


def test_other_threads_do_make_one() -> None:
    # what the test above would see if nothing were done about it
    found = _count("concurrent.futures", "ThreadPoolExecutor", "ThreadPoolExecutor(1)")
    assert found == [3, 3, 3, 3]
