"""One context length of the decode benchmark: every cache filled alike, then decoding in turns."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import psutil
import torch
from common import step_times
from decode_caches import Opening, Player, make_player
from decode_model import Subject
from synthetic import clustered_record
from torch import Tensor

from icecache.errors import HostMemoryExceeded
from icecache.integrations.embedded import EMBEDDED

BLOCK = 8
CHUNK = 2048
_SAMPLE_S = 0.02
# keys, values and an index over them; concatenation and builds need room on the way
_ROOM = 1.3

Advance = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Case:
    """One length of context; without token ids its keys and values are synthetic."""

    tokens: int
    token_ids: Tensor | None  # [1, tokens]
    steps: int
    settings: dict[str, Any]  # of IceCache

    @property
    def is_synthetic(self) -> bool:
        return self.token_ids is None

    @property
    def blocks(self) -> list[int]:
        """Steps of each block, the one that warms up first."""
        full, rest = divmod(self.steps, BLOCK)
        return [BLOCK] + [BLOCK] * full + [rest] * bool(rest)

    def num_stages(self, subject: Subject, caches: int) -> int:
        """Calls of `advance` in all."""
        filling = subject.kv_shape[0] if self.is_synthetic else caches * -(-self.tokens // CHUNK)
        return filling + caches * len(self.blocks)


@dataclass(slots=True)
class Take:
    """What was measured of one cache."""

    prefill_s: float | None = None
    settle_s: float | None = None
    seconds: list[float] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    peak_rss: int = 0


@contextmanager
def watched(take: Take) -> Iterator[None]:
    """Keep the most resident bytes of this process meanwhile, sampled by a thread."""
    process, done = psutil.Process(), threading.Event()

    def sample() -> None:
        take.peak_rss = max(take.peak_rss, process.memory_info().rss)

    def keep_sampling() -> None:
        while not done.wait(_SAMPLE_S):
            sample()

    sample()
    thread = threading.Thread(target=keep_sampling, name="peak memory", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        sample()


def measure(
    subject: Subject, case: Case, names: list[str], advance: Advance = lambda stage: None
) -> list[dict[str, Any]]:
    """Rows of one length, a cache each in the order of `names`.

    DynamicCache, where it takes part, goes first in each round and chooses the tokens; the others
    are given the same tokens, so that their answers can be compared at every step.
    """
    check_memory(subject, case, len(names))
    capacity = case.tokens + sum(case.blocks)
    opening = Opening(subject.model, capacity, case.settings, subject.name == EMBEDDED)
    players = [make_player(name, opening) for name in names]
    # the leader first, the others as they were
    players.sort(key=lambda player: player.name != "dynamic")
    takes = {name: Take() for name in names}
    first = torch.ones(1, 1, dtype=torch.long)
    try:
        if case.token_ids is None:
            fill(players, subject, case.tokens, advance)
        else:
            first = prefill(players, case.token_ids, takes, advance)
        play(players, case.blocks, first, takes, advance)
        held = {player.name: (player.held_bytes, player.native_steps) for player in players}
    finally:
        for player in players:
            player.close()
        # the next length needs the memory
        del players
        gc.collect()
    return [row(name, case, takes, *held[name]) for name in names]


def check_memory(subject: Subject, case: Case, caches: int) -> None:
    """Raise `HostMemoryExceeded` when this many caches of the context cannot fit."""
    layers, kv_heads, head_dim = subject.kv_shape
    each = 2 * layers * kv_heads * head_dim * subject.model.dtype.itemsize
    needed = int(caches * _ROOM * each * (case.tokens + sum(case.blocks)))
    free = psutil.virtual_memory().available
    if needed > free:
        raise HostMemoryExceeded(needed, free)


def layer_tokens(subject: Subject, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """One layer's keys and values, `[1, kv_heads, tokens, head_dim]`, in the model's dtype."""
    _, kv_heads, head_dim = subject.kv_shape
    record = clustered_record(
        tokens, num_kv_heads=kv_heads, head_dim=head_dim, steps=1, seed=seed,
        dtype=subject.model.dtype,
    )  # fmt: skip
    return record.keys[None], record.values[None]


def fill(players: list[Player], subject: Subject, tokens: int, advance: Advance) -> None:
    """Give every cache the same synthetic keys and values."""
    for index in range(subject.kv_shape[0]):
        advance("synthetic context")
        keys, values = layer_tokens(subject, tokens, index)
        for player in players:
            player.take(index, keys, values)
    for player in players:
        player.settle()


def prefill(
    players: list[Player], token_ids: Tensor, takes: dict[str, Take], advance: Advance
) -> Tensor:
    """Let every cache take in the prompt, one after another; the leader's answer to it."""
    answers = []
    # the first pass of a length is slower, and would be DynamicCache's
    players[0].model(input_ids=token_ids[:, :CHUNK], use_cache=False, logits_to_keep=1)
    for player in players:
        take = takes[player.name]
        with watched(take), player.attached():
            start = time.perf_counter()
            for chunk in token_ids.split(CHUNK, 1):
                advance(f"prefill {player.name}")
                logits = player.forward(chunk)
            done = time.perf_counter()
            # not to be left to run beside another cache
            player.settle()
        take.prefill_s, take.settle_s = done - start, time.perf_counter() - done
        answers.append(logits.argmax(-1, keepdim=True))
    return answers[0]


def play(
    players: list[Player],
    blocks: list[int],
    token: Tensor,
    takes: dict[str, Take],
    advance: Advance,
) -> None:
    """Decode in turns; the first block only warms up.

    It ends the builds, and threads and caches settle. The leader's place is the first in each
    round, the others take the places after it by rotation.
    """
    leader, others = players[0], players[1:]
    for number, steps in enumerate(blocks):
        shift = number % len(others) if others else 0
        given: Tensor | None = None
        for player in [leader, *others[shift:], *others[:shift]]:
            take = takes[player.name]
            advance(f"decode {player.name}")
            with watched(take), player.attached():
                seconds, answers = decode(player, token, steps, given)
            if given is None:
                given, following = torch.cat([token, answers[:, :-1]], 1), answers[:, -1:]
            if number:
                take.seconds += seconds
                take.answers += answers[0].tolist()
        token = following


def decode(
    player: Player, token: Tensor, steps: int, given: Tensor | None = None
) -> tuple[list[float], Tensor]:
    """Seconds and greedy answers `[1, steps]` of decode steps, from `token` or on `given` ones."""
    seconds, answers = [], []
    for step in range(steps):
        if given is not None:
            token = given[:, step : step + 1]
        start = time.perf_counter()
        logits = player.forward(token)
        seconds.append(time.perf_counter() - start)
        token = logits.argmax(-1, keepdim=True)
        answers.append(token)
    return seconds, torch.cat(answers, 1)


def _blocks(seconds: list[float]) -> list[list[float]]:
    return [seconds[i : i + BLOCK] for i in range(0, len(seconds), BLOCK)]


def _ratio(full: list[float], ours: list[float]) -> float:
    """Median over the rounds of one median over the other: what slows a round slows both."""
    rounds = zip(_blocks(full), _blocks(ours), strict=True)
    return median(median(theirs) / median(mine) for theirs, mine in rounds)


def row(
    name: str, case: Case, takes: dict[str, Take], held: int, native_steps: int
) -> dict[str, Any]:
    """The figures of a cache; what cannot be had is None."""
    take, full = takes[name], takes.get("dynamic")
    times = step_times(take.seconds)
    ratio = agreement = None
    if full is not None:
        ratio = _ratio(full.seconds, take.seconds)
        if not case.is_synthetic:
            same = sum(ours == theirs for ours, theirs in zip(take.answers, full.answers))
            agreement = same / case.steps
    return {
        "ratio": ratio,
        "cache": name,
        "context": case.tokens,
        "synthetic": case.is_synthetic,
        "tpot_ms_median": times["median_ms"],
        "tpot_ms_p99": times["p99_ms"],
        "prefill_s": take.prefill_s,
        "settle_s": take.settle_s,
        "kv_bytes": held,
        "native_steps": native_steps,
        "peak_rss": take.peak_rss,
        "agreement": agreement,
        "steps": case.steps,
    }
