"""Which threads a server's work is done in."""

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from icecache.cli.app import app
from icecache.engine import Engine
from icecache.integrations.embedded import load
from icecache.ops.threads import work_alone
from tests.serve.running import running
from tests.serve.test_openai import chat


@pytest.fixture
def three_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_a_model_is_loaded_without_a_team_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def note(*given: Any) -> Any:
        found.append(torch.get_num_threads())
        raise KeyboardInterrupt

    monkeypatch.setattr("icecache.cli.serve.load", note)
    CliRunner().invoke(app, ["serve"])
    assert found == [1]


@pytest.mark.usefixtures("three_threads")
def test_steps_have_all_threads(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, step = set(), Engine.step

    def noted(engine: Engine) -> Any:
        found.add(torch.get_num_threads())
        return step(engine)

    monkeypatch.setattr(Engine, "step", noted)
    work_alone()
    with running(*load(tiny_model, "float32")) as server:
        chat(server.client(), "x")
    assert found == {3}
