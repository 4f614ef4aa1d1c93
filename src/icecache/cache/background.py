"""Work that a layer leaves to another thread, and waits for before it is used again."""

from collections.abc import Callable
from concurrent.futures import Executor, Future, wait

import torch

__all__ = ["Background"]


class Background:
    """At most one task of a layer at a time.

    Parameters
    ----------
    executor : Executor, optional
        Whose threads run the tasks; without one, or once it was shut down, they run at once.
    """

    def __init__(self, executor: Executor | None) -> None:
        self._executor = executor
        self._future: Future[None] | None = None

    def __getstate__(self) -> dict[str, object]:
        # threads cannot be copied: a copy works in the foreground
        self.wait()
        return {"_executor": None, "_future": None}

    @property
    def has_threads(self) -> bool:
        """Whether tasks run beside the caller."""
        return self._executor is not None

    def run(self, task: Callable[[], None]) -> None:
        """Run a task, after the one before it."""
        self.wait()
        if self._executor is None:
            task()
            return
        # both modes belong to a thread, and tensors of one cannot be written in the other
        mode = torch.is_inference_mode_enabled()
        try:
            self._future = self._executor.submit(_run, task, mode)
        except RuntimeError:
            # shut down: what was taken in must not be lost for that
            self._executor = None
            task()

    def wait(self) -> None:
        """Wait for the task; what it raised is raised here, once."""
        future = self._future
        if future is not None:
            try:
                future.result()
            finally:
                if future.done():
                    self._future = None

    def drop(self) -> None:
        """Wait for the task and forget how it ended."""
        if self._future is not None:
            wait([self._future])
            self._future = None


def _run(task: Callable[[], None], inference: bool) -> None:
    # in this order: leaving inference mode out would turn gradients on again
    with torch.inference_mode(inference), torch.no_grad():
        task()
