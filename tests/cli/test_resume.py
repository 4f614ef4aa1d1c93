"""``icecache generate --save`` and ``--load``."""

import json
from pathlib import Path

import pytest

from tests.cli.running import Cli


@pytest.fixture
def saved(cli: Cli, log_file: Path, tiny_model: Path, tmp_path: Path) -> Path:
    """A conversation after its first answer."""
    folder = tmp_path / "talk"
    result = cli(
        *("generate", "--prompt-file", log_file, "--question", "What?", "--model", tiny_model),
        *("--max-new-tokens", 6, "--budget", 64, "--dtype", "float32", "--save", folder, "--json"),
    )
    assert result.code == 0, result.err
    assert "saved:" in result.err
    return folder


def go_on(cli: Cli, saved: Path, tiny_model: Path, *more: str | Path) -> dict[str, object]:
    """Ask a second question; returns the JSON."""
    result = cli(
        *("generate", "--load", saved, "--question", "And why?", "--model", tiny_model),
        *("--max-new-tokens", 5, "--dtype", "float32", "--json", *more),
    )
    assert result.code == 0, result.err
    return json.loads(result.out)


def test_a_second_question_reads_only_itself(cli: Cli, saved: Path, tiny_model: Path) -> None:
    record = go_on(cli, saved, tiny_model)
    (row,) = record["rows"]
    assert 600 < row["tokens"] < 800
    assert row["attended"] <= 64
    assert record["settings"]["budget"] == 64
    assert go_on(cli, saved, tiny_model)["rows"][0]["answer"] == row["answer"]


def test_a_third_question_follows_the_second(
    cli: Cli, saved: Path, tiny_model: Path, tmp_path: Path
) -> None:
    second = go_on(cli, saved, tiny_model, "--save", tmp_path / "later")
    third = go_on(cli, tmp_path / "later", tiny_model)
    assert third["rows"][0]["tokens"] > second["rows"][0]["tokens"]


def test_what_does_not_fit_together_is_refused(
    cli: Cli, saved: Path, tiny_model: Path, log_file: Path, tmp_path: Path
) -> None:
    common = ("--question", "Why?", "--model", tiny_model, "--dtype", "float32")
    for options, message in (
        ((), "give either --prompt-file or --load"),
        (("--load", saved, "--prompt-file", log_file), "give either --prompt-file or --load"),
        (("--load", saved, "--compare"), "--compare needs the whole prompt"),
        (("--load", saved, "--budget", 65), "made with other settings: budget=64, not 65"),
        (("--load", tmp_path), "no snapshot in"),
        (("--load", saved, "--max-new-tokens", 5000), "more than the model's context"),
    ):
        result = cli("generate", *common, *options)
        assert (result.code, result.out) == (1, "")
        assert message in result.err, result.err
