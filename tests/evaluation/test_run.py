"""Whole runs: their results, their resumption, what they refuse."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from icecache.errors import InputError
from icecache.evaluation.results.record import Record
from icecache.evaluation.results.store import load_results, load_sessions
from icecache.evaluation.run import Runner
from icecache.evaluation.settings import RunSettings
from icecache.integrations.embedded import load
from tests.cli.running import Cli
from tests.conftest import SmolLM2

pytest_plugins = ["tests.cli.conftest"]

METHODS = ("topk", "icecache", "magicpig")


class _Silent:
    def plan(self, results: int, done: int) -> None:
        self.results, self.done = results, done

    def begin(self, what: str) -> None:
        pass

    def advance(self) -> None:
        self.done += 1


def _settings(model: Path, **changes: Any) -> RunSettings:
    given: dict[str, Any] = {
        **{"model": str(model), "tasks": ("passkey", "ruler_qa"), "methods": METHODS},
        **{"budgets": (64, 100), "limit": 2, "lengths": (700,), "steps": 4, "max_new_tokens": 4},
    }
    return RunSettings(**{**given, **changes})


def _run(folder: Path, settings: RunSettings) -> _Silent:
    progress = _Silent()
    Runner(settings, *load(settings.model, settings.dtype)).run(folder, progress)
    return progress


@pytest.fixture(scope="module")
def tiny_model(smollm2: SmolLM2, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama with weights so large that attention decides what it says."""
    folder = tmp_path_factory.mktemp("sharp-llama")
    config = LlamaConfig(
        **{"vocab_size": len(smollm2[1]), "hidden_size": 64, "intermediate_size": 64},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"max_position_embeddings": 2048, "initializer_range": 0.3},
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    smollm2[1].save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken run."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    _run(folder, _settings(tiny_model))
    return folder


def test_a_run_has_a_result_for_everything_asked(finished: Path) -> None:
    records = load_results(finished)
    # 2 tasks of 2 samples: the full cache, and 3 methods at 2 budgets
    assert len({record.key for record in records}) == len(records) == 4 * (1 + 3 * 2)
    assert {record.task for record in records} == {"passkey@700", "ruler_qa@700"}
    for record in records:
        assert record.tokens + 4 <= 700
        assert record.score is not None and record.answer is not None
        assert len(record.mass) == len(record.error) == 2
        if record.method == "full":
            assert (record.kl, record.top1, record.budget) == (0.0, 1.0, None)
            assert record.mass == (1.0, 1.0)
        else:
            assert record.kl > 0
            assert record.attended <= record.budget
    # by turns of the tasks, so that a run cut short has some of each
    order = list(dict.fromkeys((record.task, record.id) for record in records))
    assert order == [(task, f"0-{n}") for n in (0, 1) for task in ("passkey@700", "ruler_qa@700")]


def test_a_method_that_parts_from_the_full_cache_answers_for_itself(finished: Path) -> None:
    records = load_results(finished)
    full = {(r.task, r.id): r for r in records if r.method == "full"}
    same = {(r.top1 == 1.0, r.answer == full[r.task, r.id].answer) for r in records}
    # the answer is as long as the forced steps, whose last token is beyond it
    assert (True, True) in same and (False, False) in same
    assert (True, False) not in same


def test_a_finished_run_does_nothing_again(finished: Path, tiny_model: Path) -> None:
    before = (finished / "results.jsonl").read_bytes()
    progress = _run(finished, _settings(tiny_model))
    assert progress.done == progress.results == 28
    assert (finished / "results.jsonl").read_bytes() == before


def _assert_same(record: Record, expected: Record) -> None:
    """Compare two results of one thing; a product over other rows may round otherwise."""
    figures = ("kl", "mass", "error")
    rest = [dataclasses.replace(r, kl=0.0, mass=(), error=()) for r in (record, expected)]
    assert rest[0] == rest[1]
    for name in figures:
        assert getattr(record, name) == pytest.approx(getattr(expected, name), rel=1e-3, abs=1e-6)


def test_more_can_be_asked_of_a_run_later(finished: Path, tiny_model: Path, tmp_path: Path) -> None:
    one = _settings(tiny_model, tasks=("passkey",), methods=("topk",), budgets=(64,))
    _run(tmp_path / "run", one)
    _run(tmp_path / "run", _settings(tiny_model))
    expected = load_results(finished)
    found = {record.key: record for record in load_results(tmp_path / "run")}
    assert len(found) == len(expected)
    for record in expected:
        _assert_same(found[record.key], record)


def test_results_do_not_depend_on_what_else_is_run(
    finished: Path, tiny_model: Path, tmp_path: Path
) -> None:
    alone = _settings(tiny_model, methods=("magicpig",), budgets=(100,), limit=1)
    _run(tmp_path / "run", alone)
    expected = {record.key: record for record in load_results(finished)}
    for record in load_results(tmp_path / "run"):
        _assert_same(record, expected[record.key])


def test_methods_alone_and_together_have_the_same_results(
    finished: Path, tiny_model: Path, tmp_path: Path
) -> None:
    # the unbroken run has all six in one group, this one has each beside the full cache alone
    _run(tmp_path / "run", _settings(tiny_model, together=1))
    for record, expected in zip(
        load_results(tmp_path / "run"), load_results(finished), strict=True
    ):
        _assert_same(record, expected)


def test_more_forced_steps_ask_the_same(tiny_model: Path) -> None:
    loaded = load(tiny_model, "float32")
    few, many = (
        [
            [prompt.sample.answers for prompt in work.prompts]
            for work in Runner(_settings(tiny_model, tasks=("passkey",), steps=n), *loaded).works
        ]
        for n in (4, 80)
    )
    assert few == many


def test_a_run_that_is_killed_again_and_again_ends_as_an_unbroken_one(
    finished: Path, tiny_model: Path, tmp_path: Path
) -> None:
    folder, whole = tmp_path / "run", (finished / "results.jsonl").read_bytes()
    path = folder / "results.jsonl"
    lines = whole.splitlines(keepends=True)
    for least in (2, 12):
        process = _start(tiny_model, folder)
        _wait_for_lines(process, path, least)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        left = path.read_bytes()
        assert whole.startswith(left)
        assert least <= left.count(b"\n") < len(lines)
    # and once in the middle of a line, as a machine that goes down would leave it
    path.write_bytes(left + lines[left.count(b"\n")][:37])
    process = _start(tiny_model, folder)
    assert process.wait(timeout=300) == 0
    assert path.read_bytes() == whole
    assert len((folder / "sessions.jsonl").read_text().splitlines()) == 3


def _start(model: Path, folder: Path) -> "subprocess.Popen[bytes]":
    code = "from icecache.cli.main import main; main()"
    arguments = [
        *("eval", "run", "--model", str(model), "--out", str(folder)),
        *("--tasks", "passkey", "ruler_qa", "--methods", *METHODS, "--budgets", "64", "100"),
        *("--limit", "2", "--lengths", "700", "--steps", "4", "--max-new-tokens", "4"),
        *("--threads", str(torch.get_num_threads())),
    ]
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _wait_for_lines(process: "subprocess.Popen[bytes]", path: Path, count: int) -> None:
    while not path.is_file() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)


def test_a_budget_that_holds_everything_gives_the_full_answers(
    tiny_model: Path, tmp_path: Path
) -> None:
    settings = _settings(tiny_model, budgets=(1000,), limit=1, max_new_tokens=8, answers=True)
    _run(tmp_path / "run", settings)
    records = load_results(tmp_path / "run")
    for record in records:
        full = next(r for r in records if r.method == "full" and r.task == record.task)
        assert record.answer == full.answer
        assert record.top1 == 1.0
        assert record.kl < 1e-9


def test_a_plain_model_without_template_runs(
    tiny_model: Path, tmp_path: Path, smollm2: SmolLM2
) -> None:
    config = LlamaConfig(
        **{"vocab_size": len(smollm2[1]), "hidden_size": 32, "intermediate_size": 32},
        **{"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1},
        max_position_embeddings=1024,
    )
    folder = tmp_path / "plain"
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    _run(tmp_path / "run", _settings(folder, tasks=("passkey",), budgets=(64,), limit=1))
    plain = load_results(tmp_path / "run")
    assert load_sessions(tmp_path / "run")[0]["prompts"].startswith("plain: the sample's text")
    _run(tmp_path / "chat", _settings(tiny_model, tasks=("passkey",), budgets=(64,), limit=1))
    assert len(plain) == 4
    # the template's own tokens are part of the length asked for
    assert abs(plain[0].tokens - load_results(tmp_path / "chat")[0].tokens) < 40


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("nope",)}, "unknown task 'nope'; known: narrativeqa"),
        ({"methods": ("nope",)}, "unknown method 'nope'; known: full, topk"),
        ({"methods": ("topk", "topk")}, "method named twice: topk"),
        ({"methods": ("quest:size=3",)}, "quest has no parameter 'size'; known: sink, window"),
        ({"methods": ("quest:sink=a",)}, "quest: sink must be int, got 'a'"),
        ({"methods": ("quest:sink",)}, "a parameter is written key=value, got 'sink'"),
        ({"methods": ("icecache:leaf=3",)}, "icecache has no parameter 'leaf'; known: sink"),
        ({"methods": ("icecache:leaf_size=0",)}, "icecache: leaf_size must be from 1 to 128"),
        ({"budgets": (50,)}, "icecache: budget must be at least"),
        ({"limit": None}, "passkey is generated without end: give --limit"),
        ({"lengths": (4000,)}, "a length of 4,000 tokens is more than the model's context"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is(
    changes: dict[str, Any], message: str, tiny_model: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        Runner(_settings(tiny_model, **changes), *load(tiny_model, "float32"))


def test_samples_with_the_same_id_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    row = {"prompt": "x " * 100, "answers": ["a"], "id": "same"}
    (tmp_path / "lcc.jsonl").write_text(f"{json.dumps(row)}\n" * 2)
    settings = _settings(tiny_model, tasks=("lcc",), data=tmp_path, limit=None)
    with pytest.raises(InputError, match="lcc: several samples have the same id"):
        Runner(settings, *load(tiny_model, "float32"))


def test_parameters_of_a_method_change_what_it_does(tiny_model: Path, tmp_path: Path) -> None:
    methods = ("quest", "quest:page_size=4", "icecache", "icecache:remainder=false,leaf_size=16")
    settings = _settings(tiny_model, tasks=("passkey",), methods=methods, budgets=(72,), limit=1)
    _run(tmp_path / "run", settings)
    found = {record.method: record.kl for record in load_results(tmp_path / "run")}
    assert list(found) == ["full", *methods]
    assert len(set(found.values())) == 5


def test_run_and_report_on_the_command_line(cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = cli(
        *("eval", "run", "--model", tiny_model, "--tasks", "passkey", "ruler_fwe"),
        *("--methods", "streaming", "topk", "--budgets", 64, 128, "--limit", 1, "--lengths", 600),
        *("--steps", 2, "--max-new-tokens", 2, "--out", out),
    )
    assert result.code == 0, result.err
    assert f"icecache eval report {out}" in result.out
    assert len(load_results(out)) == 2 * (1 + 2 * 2)
    result = cli("eval", "report", out)
    assert result.code == 0, result.err
    assert result.out.split() == [str(out / "report.md"), str(out / "report.html")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "--tasks", "nope", "--out", "x"), "unknown task 'nope'"),
        (("run", "--tasks", "passkey", "--methods", "nope", "--out", "x"), "unknown method 'nope'"),
        (("run", "--tasks", "passkey", "--limit", "0", "--out", "x"), "--limit must be at least 1"),
        (
            ("run", "--tasks", "passkey", "--budgets", "--limit", "1", "--out", "x"),
            "--budgets must have a value or more, got none",
        ),
        (
            ("run", "--tasks", "passkey", "--methods", "full:sink=3", "--out", "x"),
            "full takes no parameters, got sink",
        ),
        (
            ("run", "--tasks", "passkey", "--methods", "full:", "--out", "x"),
            "a parameter is written key=value, got ''",
        ),
        (("report", "x"), "no results of `icecache eval run` in"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(
    arguments: tuple[str, ...], message: str, cli: Cli, tiny_model: Path, tmp_path: Path
) -> None:
    model = ("--model", tiny_model) if arguments[0] == "run" else ()
    given = [tmp_path / "x" if argument == "x" else argument for argument in arguments]
    result = cli("eval", *given, *model)
    assert result.code == 1
    assert message in result.err
    assert "Traceback" not in result.err
    assert not (tmp_path / "x").exists()


def test_a_missing_package_says_what_to_install(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from icecache.cli import eval as command

    needed = {**command._NEEDED, "no_such_module": "no-such-package"}
    monkeypatch.setattr(command, "_NEEDED", needed)
    result = cli("eval", "report", "x")
    assert result.code == 1
    assert "no-such-package: pip install 'icecache[eval]'" in result.err
