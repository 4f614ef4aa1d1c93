"""The decode benchmark on tiny models: every cache gets the same context and the same tokens."""

import json
import mmap
import time
from pathlib import Path

import decode
import decode_caches
import decode_measure
import decode_model
import pytest
import torch
from decode_caches import Opening, Player
from decode_measure import Case, Take
from decode_model import Subject
from transformers import LlamaConfig

from tests.benchmarks.decode_cases import KEYS, SETTINGS, TOKEN_BYTES, make_case, rows_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("real", [True, False])
def test_all_caches_are_measured_on_the_same_context(subject: Subject, real: bool) -> None:
    case = make_case(subject, 300, real=real)
    rows = rows_of(subject, case, "icecache", "dynamic", "static", "quantized:fp8")
    dynamic = rows["dynamic"]
    for row in rows.values():
        assert set(row) == KEYS
        assert (row["context"], row["synthetic"], row["steps"]) == (300, not real, 8)
        # a block of eight is not timed
        assert row["native_steps"] == (16 if row["cache"] == "icecache" else 0)
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
    assert decode_measure.row("static", case, takes, 0, 0)["agreement"] == 0.9


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
