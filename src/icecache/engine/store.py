"""Which conversations are in memory, which on disk, and which give way."""

import gc
import time
from collections.abc import Callable, Sequence

from icecache.cache.layer import IceCacheLayer
from icecache.config import IceCacheConfig
from icecache.engine.archive import Archive
from icecache.engine.conversations import Conversation, Conversations
from icecache.engine.runner import Runner
from icecache.engine.settings import EngineSettings
from icecache.errors import SnapshotMismatch
from icecache.store.memory import give_back

__all__ = ["Store"]


class Store:
    """The conversations of an engine.

    Parameters
    ----------
    runner : Runner
    settings : EngineSettings
        Folder, its size, and when a conversation is idle.
    clock : callable, optional
        Returns seconds.
    """

    def __init__(
        self,
        runner: Runner,
        settings: EngineSettings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner, self._settings, self._clock = runner, settings, clock
        self._kept = Conversations()
        self._archive: Archive | None = None
        self._nbytes: int | None = None
        self._has_freed = False
        if settings.conversations is not None:
            self._archive = Archive(settings.conversations, runner.model, settings.max_disk)
            for each in self._archive.open():
                self._kept.add(each)

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        if self._nbytes is None:
            self._nbytes = self._kept.nbytes
        return self._nbytes

    @property
    def disk_bytes(self) -> int:
        """Bytes on disk."""
        return 0 if self._archive is None else self._archive.nbytes

    @property
    def failures(self) -> int:
        """Conversations that could not be written."""
        return 0 if self._archive is None else self._archive.failures

    def find(self, prompt: Sequence[int], settings: IceCacheConfig) -> Conversation | None:
        """Return the longest conversation that a prompt begins with, in memory; None without.

        What is damaged on disk is dropped, and the next longest is taken.
        """
        while (found := self._kept.find(prompt, settings)) is not None:
            found.used_at = self._clock()
            if found.layers is not None:
                if self._archive is not None:
                    self._archive.touch(found)
                return found
            assert self._archive is not None
            try:
                self._archive.load(found, self._runner)
            except SnapshotMismatch:
                self._archive.remove(found.name)
                self._kept.remove(found)
                continue
            self._nbytes = None
            return found
        return None

    def find_text(self, text: str, settings: IceCacheConfig) -> Conversation | None:
        """Return the conversation with the longest text that `text` goes on with."""
        return self._kept.find_text(text, settings)

    def keep(self, conversation: Conversation) -> None:
        """Take a conversation over, or let its layers go if it is not worth keeping."""
        conversation.used_at = self._clock()
        if not self._kept.add(conversation):
            conversation.release()
        self._nbytes, self._has_freed = None, True

    def drop(self, layers: list[IceCacheLayer]) -> None:
        """Let layers go that are no conversation."""
        for layer in layers:
            layer.release()
        self._has_freed = True

    def make_room(self, wanted: int) -> None:
        """Free memory until conversations take at most so many bytes, as far as that goes."""
        while self.nbytes > max(0, wanted) and (oldest := self._oldest_in_memory()) is not None:
            self._leave_memory(oldest)

    def tidy(self) -> None:
        """Write what is idle to disk, and let go of the memory of what is idle for long."""
        now = self._clock()
        for each in list(self._kept):
            idle = now - each.used_at
            if each.layers is None:
                continue
            if self._archive is not None and idle >= self._settings.idle_seconds:
                self._write(each)
            if idle >= self._settings.forget_seconds:
                self._leave_memory(each)
        self._collect(wait=False)

    def rest(self) -> None:
        """`tidy`, and return to the system what requests and conversations have left behind."""
        self.tidy()
        if self._has_freed:
            self._has_freed = False
            gc.collect()
            give_back()

    def close(self) -> None:
        """Write everything that is not on disk yet, and let all memory go."""
        if self._archive is not None:
            for each in list(self._kept):
                if each.layers is not None:
                    self._write(each)
            self._archive.close()
        for each in list(self._kept):
            self._kept.remove(each)
        self._nbytes = None

    def _write(self, conversation: Conversation) -> None:
        """Begin to write, unless longer ones make this one needless after a restart."""
        assert self._archive is not None
        if not self._archive.holds(conversation) and not self._is_superseded(conversation):
            self._archive.write(conversation)
            self._prune(self._archive)

    def _prune(self, archive: Archive) -> None:
        """Remove from disk what longer conversations have made needless."""
        for each in list(self._kept):
            if archive.holds(each) and self._is_superseded(each):
                archive.remove(each.name)
                if each.layers is None:
                    self._kept.remove(each)

    def _leave_memory(self, conversation: Conversation) -> None:
        self._nbytes, self._has_freed = None, True
        if self._archive is not None:
            self._write(conversation)
            if self._archive.is_writing(conversation):
                self._collect(wait=True)
            if self._archive.holds(conversation):
                conversation.release()
                return
        self._kept.remove(conversation)

    def _collect(self, wait: bool) -> None:
        assert self._archive is not None or not wait
        gone = set(self._archive.collect(wait)) if self._archive is not None else set()
        for each in list(self._kept) if gone else ():
            if each.name in gone and each.layers is None:
                self._kept.remove(each)

    def _oldest_in_memory(self) -> Conversation | None:
        held = [each for each in self._kept if each.layers is not None]
        return min(held, key=lambda each: each.used_at, default=None)

    def _is_superseded(self, conversation: Conversation) -> bool:
        """Whether longer ones serve instead: of a conversation's turns the last two are enough."""
        longer = sum(each.is_ended and each.continues(conversation) for each in self._kept)
        return longer > conversation.is_ended
