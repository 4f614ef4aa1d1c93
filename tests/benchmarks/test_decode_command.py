"""The decode benchmark's command line: reports, shapes, peers, bad input."""

import sys
from pathlib import Path
from typing import Any

import decode
import decode_caches
import decode_measure
import decode_model
import psutil
import pytest
import torch
from decode_caches import Opening
from decode_model import Subject
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from tests.benchmarks.decode_cases import make_case, rows_of

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_report_is_saved_after_each_context_and_a_full_memory_is_named(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [make_case(subject, tokens, real=False, steps=1) for tokens in (70, 1 << 20, 80)]

    class Memory:
        available = 1 << 28

    report: dict[str, Any] = {"rows": [], "left_out": []}
    saved = []
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(psutil, "virtual_memory", Memory)
        decode.run(
            subject, cases, ["dynamic"], report, save=lambda: saved.append(len(report["rows"]))
        )
    assert saved == [1, 1, 2]
    (left,) = report["left_out"]
    assert (left["cache"], left["context"]) == ("dynamic", 1 << 20)
    assert "bytes free" in left["reason"]


def test_which_contexts_are_synthetic(subject: Subject, tiny_model: Path) -> None:
    def synthetic(subject: Subject, *arguments: str) -> list[bool]:
        options = decode.make_parser().parse_args(["--context", "70", "8193", *arguments])
        return [case.is_synthetic for case in decode.make_cases(options, subject, {})]

    trained = decode_model.load_subject(str(tiny_model), torch.float32)
    assert synthetic(trained) == [False, True]
    assert synthetic(trained, "--synthetic", "never") == [False, False]
    assert synthetic(subject) == [True, True]
    assert synthetic(subject, "--synthetic", "never") == [False, False]
    assert synthetic(trained, "--synthetic", "always") == [True, True]


def test_the_shapes_are_those_of_the_models() -> None:
    smollm2, qwen = (decode_model.SHAPES[name] for name in ("smollm2-shape", "qwen-0.5b-shape"))
    assert isinstance(smollm2, LlamaConfig) and isinstance(qwen, Qwen2Config)
    for config, shape, parameters in (
        (smollm2, (30, 3, 64), 134_515_008),
        (qwen, (24, 2, 64), 494_032_768),
    ):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        assert Subject("shape", model, None).kv_shape == shape
        assert model.num_parameters() == parameters


def test_random_weights_are_the_same_on_every_run(tiny: LlamaConfig, subject: Subject) -> None:
    before = torch.get_rng_state()
    again = decode_model.load_subject("tiny", torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    for ours, theirs in zip(subject.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--caches", "dynamo"],
            "--caches must be of icecache, icecache:compiled, icecache:torch, dynamic",
        ),
        (["--caches", "kvpress:other"], "got 'kvpress:other'"),
        (["--model", "smollm3"], "--model must be one of embedded, smollm2-shape"),
        (["--context", "0"], "--context must be from 1 to 16777216, got 0"),
        (["--steps", "0"], "--steps must be from 1 to 65536, got 0"),
        (["--threads", "0"], "--threads must be from 1 to 1024, got 0"),
        (["--budget", "-1"], "budget"),
        (["--set", "bugdet=3"], "bugdet"),
        (["--text", "nowhere.txt"], "--text must be an existing file, got nowhere.txt"),
        (["--png", "nowhere/x.png"], "must be files in existing folders"),
        (["--caches", "kvpress:snapkv"], "--caches must name one that can run here"),
        (["--text", __file__], "all that were asked for are synthetic"),
        (["--text", __file__, "--synthetic", "never"], "--text needs a model with a tokenizer"),
    ],
)
def test_bad_input_is_one_clear_error(
    tiny: LlamaConfig, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        decode.main(["--model", "tiny", "--context", "70", *arguments])
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err
    assert captured.out == ""


def test_the_compiled_step_takes_part(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    make = torch.compile

    def compile_plainly(function: Any, **options: Any) -> Any:
        return make(function, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", compile_plainly)
    torch._dynamo.reset()
    case = make_case(subject, 90, real=True)
    rows = rows_of(subject, case, "icecache:compiled", "icecache", "dynamic")
    assert rows["icecache:compiled"]["agreement"] == rows["icecache"]["agreement"]
    # one graph for both lengths, and every step ran in it
    rows_of(subject, make_case(subject, 120, real=False), "icecache:compiled")
    assert decode_caches._compiled_step(subject.model).steps == 2 * 16
    decode_caches._compiled_step.cache_clear()


def test_ratios_are_medians_over_the_rounds() -> None:
    # a round in which all was four times slower counts like any other
    full = [4.0] * 8 + [16.0] * 8 + [4.4] * 3
    ours = [2.0] * 8 + [8.0] * 8 + [2.0] * 3
    assert decode_measure._ratio(full, ours) == pytest.approx(2.0)


def test_llama_cpp_is_filled_and_asked_like_the_others(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Engine:
        ctx = "context"

        def __init__(self, weights: str, **options: Any) -> None:
            self.options, self.seen, self._ctx = options, [], self

        def n_ctx(self) -> int:
            return int(self.options["n_ctx"])

        def n_vocab(self) -> int:
            return 100

        def eval(self, tokens: list[int]) -> None:
            self.seen += tokens

        def close(self) -> None:
            self.seen = []

    class Library:
        Llama = Engine

        @staticmethod
        def llama_get_logits_ith(context: str, which: int) -> list[float]:
            assert (context, which) == ("context", -1)
            return [0.0] * 7 + [1.0] + [0.0] * 200

    monkeypatch.setitem(sys.modules, "llama_cpp", Library())
    monkeypatch.setattr(decode_caches, "find_spec", lambda name: name)
    left = decode_caches.sort_out(["llama.cpp"], subject, {})[1]
    assert "embedded model only" in left[0]["reason"]
    player = decode_caches.make_player("llama.cpp", Opening(subject.model, 700, {}, True))
    player.take(0, torch.zeros(1, 2, 600, 16), torch.zeros(1, 2, 600, 16))
    player.settle()
    player.settle()
    assert player.forward(torch.tensor([[1, 2]])).argmax() == 7
    assert player._engine.seen == [5] * 600 + [1, 2]
    assert player._engine.options["n_ctx"] == 700
    # two layers, keys and values of two heads, sixteen 16-bit numbers each
    assert player.held_bytes == 700 * 2 * 2 * 2 * 16 * 2
    player.close()
