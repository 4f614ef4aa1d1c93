"""Which threads a server's work is done in."""

from pathlib import Path
from typing import Any

import pytest
import torch

from icecache.engine import Engine
from icecache.integrations.embedded import load
from tests.serve.running import running


def test_an_engine_is_made_without_a_team_of_threads(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def make(*given: Any, **named: Any) -> Engine:
        found.append(torch.get_num_threads())
        return Engine(*given, **named)

    monkeypatch.setattr("icecache.serve.worker.Engine", make)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with running(*load(tiny_model, "float32")):
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert found == [1]
