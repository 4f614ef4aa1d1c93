"""Conversations on disk: one snapshot each, the least recently used give way to new ones."""

import dataclasses
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from icecache.cache.snapshot import (
    Snapshot,
    State,
    is_snapshot,
    read_snapshot,
    write_snapshot,
)
from icecache.config import IceCacheConfig
from icecache.engine.conversations import Conversation
from icecache.engine.runner import Runner
from icecache.errors import IceCacheError, InputError, SnapshotMismatch
from icecache.integrations.transformers.fingerprint import fingerprint
from icecache.ops.threads import SoloThreads

__all__ = ["Archive"]

_LOCK = "lock"
_PAUSE_SECONDS = 60.0
_logger = logging.getLogger(__name__)


class Archive:
    """A folder of conversations of one model; other models' lie beside it, untouched.

    Parameters
    ----------
    folder : Path
        Made if it does not exist.
    model : PreTrainedModel
    max_bytes : int, optional
        What the conversations of this model may take.

    Raises
    ------
    InputError
        If the folder cannot be used, or another process uses it.
    """

    def __init__(self, folder: Path, model: PreTrainedModel, max_bytes: int | None) -> None:
        self._model = fingerprint(model)
        self._folder = folder / self._model["weights"][:16]
        self._max_bytes = max_bytes
        self._bytes: dict[str, int] = {}  # by name, the least recently used first
        self._pending: dict[str, Future[None]] = {}
        self._resume_at = 0.0
        self.failures = 0
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self._folder / _LOCK).open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another process keeps its conversations in {folder}") from error
        except OSError as error:
            raise InputError(f"cannot keep conversations in {folder}: {error.strerror}") from error
        self._writer = SoloThreads(1, "icecache-archive")

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(self._bytes.values())

    def holds(self, conversation: Conversation) -> bool:
        """Whether a conversation is on disk, whole."""
        return conversation.name in self._bytes

    def is_writing(self, conversation: Conversation) -> bool:
        """Whether a conversation is on its way to the disk."""
        return conversation.name in self._pending

    def open(self) -> Iterator[Conversation]:
        """Yield what an earlier process left, and remove what it left unfinished."""
        found: list[tuple[float, Snapshot]] = []
        for path in self._folder.iterdir():
            if path.name == _LOCK:
                continue
            try:
                snapshot = read_snapshot(path)
                if snapshot.about["model"] != self._model or path.name != snapshot.about["name"]:
                    raise SnapshotMismatch(f"{path} does not belong here")
            except IceCacheError as error:
                _logger.warning("removing a conversation that cannot be used: %s", error)
                shutil.rmtree(path, ignore_errors=True)
                continue
            found.append((path.stat().st_mtime, snapshot))
        for _, snapshot in sorted(found, key=lambda each: each[0]):
            about = snapshot.about
            self._bytes[snapshot.folder.name] = snapshot.nbytes
            yield Conversation(
                tokens=np.asarray(about["tokens"], dtype=np.int32),
                settings=IceCacheConfig.from_kwargs(**about["settings"]),
                layers=None,
                text=about["text"],
                is_ended=about["is_ended"],
            )

    def write(self, conversation: Conversation) -> None:
        """Begin to write a conversation, whose layers must stay until that is done.

        For a minute after one could not be written none is.
        """
        name, is_paused = conversation.name, time.monotonic() < self._resume_at
        if not is_paused and name not in self._bytes and name not in self._pending:
            self._pending[name] = self._writer.submit(self._write, conversation, name)

    def collect(self, wait: bool = False) -> list[str]:
        """Return the names of what had to go, after what has been written since the last call.

        A conversation that could not be written is logged and counted, and stays in memory.
        """
        for name, future in list(self._pending.items()):
            if not (wait or future.done()):
                continue
            del self._pending[name]
            try:
                future.result()
            except (OSError, IceCacheError) as error:
                self.failures += 1
                # a full disk refuses the next one too
                self._resume_at = time.monotonic() + _PAUSE_SECONDS
                _logger.warning("a conversation could not be written: %s", error)
                continue
            self._bytes[name] = read_snapshot(self._folder / name).nbytes
        return self._trim()

    def load(self, conversation: Conversation, runner: Runner) -> None:
        """Bring a conversation's layers back; `SnapshotMismatch` if they are damaged."""
        name = conversation.name
        snapshot = read_snapshot(self._folder / name)
        layers = runner.new_layers(conversation.settings)
        try:
            for index, layer in enumerate(layers):
                layer.load_state(snapshot.part(f"layer-{index:03}"))
            logits = snapshot.part("next")["logits"]
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise SnapshotMismatch(f"{snapshot.folder} is damaged: {error}") from error
        conversation.layers, conversation.logits = layers, logits
        self.touch(conversation)

    def touch(self, conversation: Conversation) -> None:
        """Take note that a conversation was used."""
        name = conversation.name
        if name in self._bytes:
            self._bytes[name] = self._bytes.pop(name)
            os.utime(self._folder / name)

    def remove(self, name: str) -> None:
        """Remove a conversation from the disk."""
        self._bytes.pop(name, None)
        # without its manifest it is nothing, even if the rest stays
        (self._folder / name / "manifest.json").unlink(missing_ok=True)
        shutil.rmtree(self._folder / name, ignore_errors=True)

    def close(self) -> None:
        """Wait for what is being written and let others use the folder."""
        self.collect(wait=True)
        self._writer.shutdown()
        self._lock.close()

    def _trim(self) -> list[str]:
        gone = []
        while self._max_bytes is not None and self.nbytes > self._max_bytes:
            name = next(iter(self._bytes))
            self.remove(name)
            gone.append(name)
        return gone

    def _write(self, conversation: Conversation, name: str) -> None:
        about: dict[str, Any] = {
            "model": self._model,
            "name": name,
            "settings": dataclasses.asdict(conversation.settings),
            "tokens": conversation.tokens.tolist(),
            "text": conversation.text,
            "is_ended": conversation.is_ended,
        }
        folder = self._folder / name
        write_snapshot(folder, _parts(conversation), about)
        if not is_snapshot(folder):
            raise SnapshotMismatch(f"{folder} vanished while it was written")


def _parts(conversation: Conversation) -> Iterator[tuple[str, State]]:
    yield "next", {"logits": conversation.logits}
    for index, layer in enumerate(conversation.layers or ()):
        yield f"layer-{index:03}", layer.state()
