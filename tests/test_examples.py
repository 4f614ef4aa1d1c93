"""Each example runs as a user would run it."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_quickstart_finds_the_key_within_the_budget() -> None:
    out = run("quickstart.py")
    assert "blue lamp" in out
    found = re.search(r"(\d+) tokens in context, (\d+) attended a step", out)
    assert found is not None
    assert int(found[2]) <= 128 < 1000 < int(found[1])


def test_layer_alone_stays_close_to_full_attention() -> None:
    out = run("layer_alone.py")
    assert "4096 tokens" in out
    error = re.search(r"full attention: ([\d.]+)", out)
    assert error is not None
    assert 0 < float(error[1]) < 0.2


def test_every_example_has_a_test() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"quickstart.py", "layer_alone.py"}
