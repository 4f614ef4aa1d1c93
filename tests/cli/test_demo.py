"""The demo end to end is `make demo`; here are its document and its verdict."""

from importlib.resources import files

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icecache.cli import demo as module
from icecache.cli.compare import Comparer
from icecache.cli.report import Comparison, Row
from tests.cli.running import Cli


def document() -> str:
    return files("icecache.cli").joinpath("data/expedition.txt").read_text(encoding="utf-8")


def test_the_fact_stands_in_the_document_once() -> None:
    text = document().lower()
    assert text.count("copper") == text.count("lantern") == text.count("copper lantern") == 1
    assert 0.2 < text.index("copper lantern") / len(text) < 0.8


def test_the_document_is_long_enough(
    smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    assert 6000 < len(smollm2[1](document(), verbose=False)["input_ids"]) < 7000


@pytest.mark.parametrize(
    ("answer", "code", "word"),
    [('It is "Copper Lantern".', 0, "Right"), ("It is the fox.", 1, "Wrong")],
)
def test_exit_code_tells_whether_the_answer_is_right(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, answer: str, code: int, word: str
) -> None:
    row = Row(
        name="IceCache",
        answer=answer,
        tokens=6376,
        attended=256.0,
        exact_bytes=1,
        summary_bytes=1,
        full_bytes=2,
        prefill_s=1.0,
        tokens_per_s=1.0,
    )
    result = Comparison(question="?", rows=(row,), divergence=None, settings={})
    monkeypatch.setattr(module, "load", lambda name: (None, None))
    monkeypatch.setattr(Comparer, "ask", lambda *args, **kwargs: result)
    shown = cli("demo")
    assert shown.code == code
    assert word in shown.out
