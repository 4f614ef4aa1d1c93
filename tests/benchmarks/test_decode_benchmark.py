"""The decode benchmark on tiny models: every cache gets the same context and the same tokens."""

import json
import mmap
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import decode
import decode_caches
import decode_measure
import decode_model
import psutil
import pytest
import torch
from decode_caches import Opening, Player
from decode_measure import Case, Take
from decode_model import Subject
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

KEYS = {
    "ratio", "cache", "context", "synthetic", "tpot_ms_median", "tpot_ms_p99", "prefill_s",
    "settle_s", "kv_bytes", "peak_rss", "agreement", "steps",
}  # fmt: skip
# 2 layers, keys and values, 2 KV heads of 16 float32 numbers
TOKEN_BYTES = 2 * 2 * 2 * 16 * 4
SETTINGS = {"budget": 64}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # torch's threads wait for each other on a busy machine, and these models need none
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> LlamaConfig:
    """A shape named "tiny", so that the command line finds it."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
    )
    monkeypatch.setitem(decode_model.SHAPES, "tiny", config)
    return config


@pytest.fixture
def subject(tiny: LlamaConfig) -> Subject:
    return decode_model.load_subject("tiny", torch.float32)


def make_case(subject: Subject, tokens: int, *, real: bool, steps: int = 8) -> Case:
    ids = decode_model.prompt_ids(subject, tokens) if real else None
    return Case(tokens, ids, steps, SETTINGS)


def rows_of(subject: Subject, case: Case, *names: str) -> dict[str, dict[str, Any]]:
    with torch.no_grad():
        rows = decode_measure.measure(subject, case, list(names))
    assert [row["cache"] for row in rows] == list(names)
    return {row["cache"]: row for row in rows}


@pytest.mark.parametrize("real", [True, False])
def test_all_caches_are_measured_on_the_same_context(subject: Subject, real: bool) -> None:
    case = make_case(subject, 300, real=real)
    rows = rows_of(subject, case, "icecache", "dynamic", "static", "quantized:fp8")
    dynamic = rows["dynamic"]
    for row in rows.values():
        assert set(row) == KEYS
        assert (row["context"], row["synthetic"], row["steps"]) == (300, not real, 8)
        assert row["ratio"] == pytest.approx(dynamic["tpot_ms_median"] / row["tpot_ms_median"])
        assert 0 < row["tpot_ms_median"] <= row["tpot_ms_p99"]
        assert (row["prefill_s"] is not None) == (row["agreement"] is not None) == real
    # 16 steps were taken, 8 of them to warm up
    assert dynamic["kv_bytes"] == rows["static"]["kv_bytes"] == 316 * TOKEN_BYTES
    # a quarter of the bytes, and a scale for keys and values of each layer
    assert rows["quantized:fp8"]["kv_bytes"] == 316 * TOKEN_BYTES // 4 + 2 * 2 * 4
    assert rows["icecache"]["kv_bytes"] > dynamic["kv_bytes"]
    if real:
        assert dynamic["agreement"] == rows["static"]["agreement"] == 1


def test_a_budget_over_the_context_agrees_with_the_full_cache(subject: Subject) -> None:
    case = Case(90, decode_model.prompt_ids(subject, 90), 11, {"budget": 256})
    assert case.blocks == [8, 8, 3]
    row = rows_of(subject, case, "icecache", "dynamic")["icecache"]
    assert (row["agreement"], row["steps"]) == (1.0, 11)


def test_without_the_full_cache_there_is_nothing_to_compare_with(subject: Subject) -> None:
    row = rows_of(subject, make_case(subject, 90, real=True), "static")["static"]
    assert row["ratio"] is row["agreement"] is None
    assert row["prefill_s"] > 0


@pytest.mark.parametrize("real", [True, False])
def test_the_filled_caches_hold_the_same(
    subject: Subject, real: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_measure, "CHUNK", 128)
    case = make_case(subject, 300, real=real)
    names = ["dynamic", "icecache", "static"]
    players = [Player(name, Opening(subject.model, 303, SETTINGS)) for name in names]
    stages: list[str] = []
    with torch.no_grad():
        if case.token_ids is None:
            decode_measure.fill(players, subject, 300, stages.append)
        else:
            takes = {name: Take() for name in names}
            decode_measure.prefill(players, case.token_ids, takes, stages.append)
        ours, theirs = players[1].cache, players[0].cache
        for player in players:
            with player.attached():
                decode_measure.decode(player, torch.ones(1, 1, dtype=torch.long), 3)
    chunks = [f"prefill {name}" for name in names for _ in range(3)]
    assert stages == (chunks if real else ["synthetic context"] * 2)
    assert len(stages) == case.num_stages(subject, 3) - 3 * len(case.blocks)
    stats = ours.stats()
    assert stats.sparse_steps == 6
    assert stats.tokens == theirs.get_seq_length() == players[2].cache.get_seq_length() == 303
    full, static = theirs.layers[1], players[2].cache.layers[1]
    if real:
        torch.testing.assert_close(full.keys, static.keys)
    else:
        assert torch.equal(full.keys[:, :, :300], static.keys[:, :, :300])
        assert torch.equal(full.values[:, :, :300], static.values[:, :, :300])
    # the model is as it was: the full caches ran without IceCache's attention
    assert subject.model.config._attn_implementation == "sdpa"


def test_all_are_given_the_leaders_tokens_and_compared_step_by_step(subject: Subject) -> None:
    """Caches that answer by rule: the follower errs once, and goes on with the right tokens."""

    class Scripted:
        def __init__(self, name: str, wrong: int | None) -> None:
            self.name, self.wrong, self.given = name, wrong, []
            self.attached = Player.attached.__get__(self)
            self.cache = None

        def forward(self, token: torch.Tensor) -> torch.Tensor:
            said = int(token) + 1 + (len(self.given) == self.wrong)
            self.given.append(int(token))
            return torch.nn.functional.one_hot(torch.tensor([said]), 200).float()

    leader, follower = Scripted("dynamic", None), Scripted("static", 13)
    takes = {"dynamic": Take(), "static": Take()}
    case = Case(5, torch.zeros(1, 5), 10, SETTINGS)
    first = torch.tensor([[40]])
    decode_measure.play([leader, follower], case.blocks, first, takes, lambda stage: None)
    assert leader.given == follower.given == list(range(40, 58))
    assert takes["dynamic"].answers == list(range(49, 59))
    assert decode_measure.row("static", case, takes, 0)["agreement"] == 0.9


def test_peak_memory_is_that_of_the_own_turns() -> None:
    quiet, busy = Take(), Take()
    with decode_measure.watched(quiet):
        pass
    with decode_measure.watched(busy):
        # mapped anew: what the allocator has left from before is resident already
        held = mmap.mmap(-1, 32 << 20)
        held.write(bytes(32 << 20))
        time.sleep(0.2)
        held.close()
    assert 0 < quiet.peak_rss < busy.peak_rss
    assert busy.peak_rss - quiet.peak_rss > 16 << 20


def test_the_command_line_with_every_cache(
    tiny: LlamaConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "tpot.png"
    base = ["--model", "tiny", "--context", "70", "200", "--steps", "3", "--budget", "64"]
    assert decode.main([*base, "--json", "-", "--png", str(picture)]) == 0
    report = json.loads(capsys.readouterr().out)
    ran = ["icecache", "dynamic", "static", "quantized:fp8"]
    assert [row["cache"] for row in report["rows"]] == ran * 2
    # random weights have random contexts unless asked for
    assert all(row["synthetic"] for row in report["rows"])
    left = {one["cache"]: one for one in report["left_out"]}
    assert {"offloaded", "kvpress:snapkv", "llama.cpp"} <= set(left)
    assert "runs on the cpu" in left["offloaded"]["reason"]
    assert "transformers < 5.3" in left["kvpress:snapkv"]["reason"]
    assert "pip install kvpress" in left["kvpress:snapkv"]["install"]
    assert report["settings"] == {"budget": 64}
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_packages_that_are_missing_are_named(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_caches, "is_optimum_quanto_available", lambda: False)
    monkeypatch.setattr(decode_caches, "is_hqq_available", lambda: False)
    running, (left,) = decode_caches.sort_out(["quantized", "static"], subject, {})
    assert running == ["static"]
    assert (left["cache"], left["context"]) == ("quantized", None)
    assert "pip install optimum-quanto" in left["install"]


def test_a_peer_that_fails_does_not_stop_the_others(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(opening: Opening) -> None:
        raise ValueError("only for full attention")

    monkeypatch.setitem(decode_caches.OPENERS, "quantized:fp8", fail)
    running, (left,) = decode_caches.sort_out(["quantized:fp8", "dynamic"], subject, {})
    assert running == ["dynamic"]
    assert left["reason"] == "ValueError: only for full attention"


def test_text_with_a_model_of_ones_own(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "decode.json"
    text.write_text("The lamp stood in the window of the old house. " * 20, encoding="utf-8")
    base = ["--model", str(tiny_model), "--steps", "2", "--budget", "64", "--dtype", "float32"]
    caches = ["--caches", "icecache", "dynamic", "dynamic", "kvpress:snapkv"]
    context = ["--context", "80", "150"]
    assert decode.main([*base, *caches, *context, "--text", str(text), "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["cache"], row["synthetic"]) for row in rows] == [
        ("icecache", False),
        ("dynamic", False),
    ] * 2
    assert decode.main([*base, *caches, "--context", "80"]) == 0
    shown = capsys.readouterr().out
    assert "agreement" in shown and "left out kvpress:snapkv: kvpress 0.5.5" in shown
    with pytest.raises(SystemExit):
        decode.main([*base, "--context", "900", "--text", str(text)])
    assert "--text must hold as many tokens as the longest real context, 900" in (
        capsys.readouterr().err
    )


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
        (["--caches", "dynamo"], "--caches must be of icecache, icecache:compiled, dynamic"),
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
