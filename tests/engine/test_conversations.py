"""Stored conversations: found by content, shared, spilled, and gone when others need the room."""

from pathlib import Path

import pytest
import torch

from icecache.engine import Sampling, store
from icecache.engine.store import Store
from icecache.errors import InputError
from tests.engine.asking import CACHE, engine_of, llama, prompt, run

EIGHT = Sampling(max_tokens=8)


def test_a_second_turn_reads_only_what_is_new() -> None:
    with engine_of(llama()) as engine:
        first = run(engine, prompt(0, 300))
        more = [*first.prompt, *first.answer, *prompt(1, 20)]
        second = run(engine, more)
        assert second.num_cached == 300 + 7
        assert engine.stats().prompt_tokens == 300 + 21
        # a third from the same first turn: the second one changed nothing for it
        third = run(engine, [*first.prompt, *first.answer, *prompt(2, 20)])
        assert third.num_cached == 300 + 7
        again = run(engine, more)
        assert again.num_cached >= 300 + 7
        assert again.answer == second.answer


def test_the_same_prompt_again_takes_no_forward_at_all() -> None:
    with engine_of(llama()) as engine:
        first = run(engine, prompt(0, 300))
        read = engine.stats().prompt_tokens
        again = run(engine, prompt(0, 300))
    assert again.num_cached == 300
    assert engine._counts.prompt_tokens == read
    assert again.answer == first.answer


def test_what_is_shared_gives_the_answer_of_a_fresh_start() -> None:
    """A common beginning is cut where a fresh prompt would be cut, so the caches are the same."""
    beginning = prompt(0, 300)
    ids = [[*beginning, *prompt(seed, 8)] for seed in (1, 2)]
    with engine_of(llama()) as engine:
        fresh = run(engine, ids[1]).answer
    with engine_of(llama()) as engine:
        run(engine, ids[0])
        request = run(engine, ids[1])
        assert request.num_cached == 288
        assert request.num_cached % 32 == 0
        assert request.answer == fresh
        both = [engine.add([*beginning, *prompt(seed, 8)], EIGHT) for seed in (1, 2)]
        while engine.has_work:
            engine.step()
        assert both[1].answer == fresh


def test_one_wrong_token_and_other_settings_are_not_found() -> None:
    with engine_of(llama()) as engine:
        first = run(engine, prompt(0, 300))
        wrong = [*first.prompt]
        wrong[3] += 1
        assert run(engine, wrong).num_cached == 0
        assert run(engine, prompt(0, 300), cache=CACHE.replace(budget=40)).num_cached == 0
        wrong = [*first.prompt]
        wrong[299] = 3 if wrong[299] != 3 else 4
        # the beginning is the same
        assert run(engine, wrong).num_cached == 256


def test_pages_are_shared_in_memory_until_they_are_written() -> None:
    with engine_of(llama()) as engine:
        first = run(engine, prompt(0, 600))
        alone = engine.stats().conversation_bytes
        for seed in range(4):
            run(engine, [*first.prompt, *first.answer, *prompt(seed, 10)])
        together = engine.stats().conversation_bytes
        pools = {
            layer._context.indexed.pool
            for each in engine._store._kept
            for layer in each.layers
            if layer._context.indexed is not None
        }
        assert len(pools) == 4  # one a layer of the model
        for each in engine._store._kept:
            for layer in each.layers:
                layer.check_integrity()
    # four more conversations of this length took less than two copies
    assert together < 3 * alone


def test_a_restart_finds_them_on_disk(tmp_path: Path) -> None:
    model = llama()
    with engine_of(model, conversations=tmp_path) as engine:
        first = run(engine, prompt(0, 300))
        more = [*first.prompt, *first.answer, *prompt(1, 20)]
        second = run(engine, more)
    with engine_of(model, conversations=tmp_path) as engine:
        assert engine.stats().conversation_bytes == 0
        assert engine.stats().disk_bytes > 0
        again = run(engine, more)
        assert again.num_cached == 307
        assert again.answer == second.answer


def test_memory_is_given_back_once_nobody_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = [0.0], []
    monkeypatch.setattr(store, "give_back", lambda: calls.append(engine.num_running))
    with engine_of(llama(), forget_seconds=60) as engine:
        engine._store = Store(engine._runner, engine.settings, clock=lambda: now[0])
        engine.rest()
        assert calls == []
        run(engine, prompt(0, 300))
        assert calls == []
        engine.rest()
        engine.rest()
        assert calls == [0]
        now[0] = 61.0
        engine.rest()
        assert calls == [0, 0]
        engine._store.drop([])
        engine.rest()
        assert calls == [0, 0, 0]


def test_idle_ones_are_written_and_leave_the_memory(tmp_path: Path) -> None:
    now = [0.0]
    with engine_of(llama(), conversations=tmp_path, forget_seconds=60) as engine:
        engine._store.close()
        engine._store = Store(engine._runner, engine.settings, clock=lambda: now[0])
        first = run(engine, prompt(0, 300))
        assert list(tmp_path.rglob("manifest.json")) == []
        now[0] = 6.0
        engine.rest()
        engine._store._collect(wait=True)
        assert len(list(tmp_path.rglob("manifest.json"))) == 1
        assert engine.stats().conversation_bytes > 0
        now[0] = 61.0
        engine.rest()
        assert engine.stats().conversation_bytes == 0
        request = run(engine, [*first.prompt, *first.answer, 5])
        assert request.num_cached == 307


def test_the_disks_limit_drops_the_least_recently_used(tmp_path: Path) -> None:
    model = llama()
    with engine_of(model, conversations=tmp_path / "one") as engine:
        run(engine, prompt(0, 300))
    size = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    folder = tmp_path / "two"
    with engine_of(model, conversations=folder, max_disk=int(2.5 * size)) as engine:
        turns = [run(engine, prompt(seed, 300)) for seed in range(2)]
    with engine_of(model, conversations=folder, max_disk=int(2.5 * size)) as engine:
        # the first is used again, so the second is the one that goes
        run(engine, [*turns[0].prompt, *turns[0].answer, 7], Sampling(max_tokens=1))
        run(engine, prompt(5, 300))
    with engine_of(model, conversations=folder, max_disk=int(2.5 * size)) as engine:
        assert engine.stats().disk_bytes <= 2.5 * size
        assert run(engine, [*turns[1].prompt, *turns[1].answer, 9]).num_cached == 0


def test_damaged_and_torn_ones_are_dropped(tmp_path: Path) -> None:
    model = llama()
    with engine_of(model, conversations=tmp_path) as engine:
        first, second = (run(engine, prompt(seed, 300)) for seed in (0, 1))
    torn, damaged = (path.parent for path in tmp_path.rglob("manifest.json"))
    (torn / "manifest.json").unlink()
    part = next(damaged.glob("layer-002-*"))
    part.write_bytes(part.read_bytes()[:-100])
    with engine_of(model, conversations=tmp_path) as engine:
        assert not torn.exists()
        for turn in (first, second):
            ids = [*turn.prompt, *turn.answer, 5]
            request = run(engine, ids)
            assert request.num_cached == 0
            assert len(request.answer) == 8
        assert not (damaged / part.name).exists()


def test_a_full_disk_costs_the_conversation_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("icecache.engine.archive.write_snapshot", full)
    with engine_of(llama(), conversations=tmp_path, idle_seconds=0) as engine:
        first = run(engine, prompt(0, 300))
        engine.rest()
        engine._store._collect(wait=True)
        failures = engine.stats().disk_failures
        assert failures > 0
        # for a minute nothing more is tried
        engine.rest()
        engine._store._collect(wait=True)
        assert engine.stats().disk_failures == failures
        # it is still in memory
        assert run(engine, [*first.prompt, *first.answer, 5]).num_cached == 307


def test_a_folder_has_one_engine(tmp_path: Path) -> None:
    model, other = llama(), llama()
    with engine_of(model, conversations=tmp_path):
        with pytest.raises(InputError, match="another process keeps"):
            engine_of(other, conversations=tmp_path)
        assert torch.isfinite(other(torch.tensor([[5, 6]])).logits).all()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot keep conversations"):
        engine_of(other, conversations=tmp_path / "file")


def test_another_models_conversations_stay_where_they_are(tmp_path: Path) -> None:
    with engine_of(llama(), conversations=tmp_path) as engine:
        run(engine, prompt(0, 300))
    with engine_of(llama("qwen3"), conversations=tmp_path) as engine:
        assert run(engine, prompt(0, 300)).num_cached == 0
    with engine_of(llama(), conversations=tmp_path) as engine:
        assert run(engine, [*prompt(0, 300)]).finish
        assert len(list(tmp_path.rglob("manifest.json"))) == 2


def test_a_known_text_has_the_tokens_of_its_answer() -> None:
    model = llama()
    with engine_of(model) as engine:
        engine._decode = lambda ids: "".join(f"<{i}>" for i in ids)
        first = run(engine, prompt(0, 300), text="question ")
        said = "question " + engine._decode(first.answer[:-1])
        tokens, rest = engine.tokens_of(said + " and more")
        assert (tokens, rest) == ([*first.prompt, *first.answer[:-1]], " and more")
        assert engine.tokens_of("question other")[1] == "question other"[9:]
        assert engine.tokens_of("other") == ([], "other")
