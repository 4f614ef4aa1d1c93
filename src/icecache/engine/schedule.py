"""Whose turn it is."""

from collections import deque

from icecache.engine.request import Phase, Request
from icecache.engine.runner import Piece

__all__ = ["Schedule"]

# a piece of a prompt that would be shorter joins the one before it
_LEAST_PIECE = 16


class Schedule:
    """The requests of an engine, and what each takes in next.

    Every running answer gets its next token in every step, and one prompt its next piece: prompts
    take turns. Where a prompt is cut depends on the prompt alone, so that its cache does too.

    Parameters
    ----------
    chunk : int
        Tokens of a piece, counted from the prompt's beginning.
    """

    def __init__(self, chunk: int) -> None:
        self._chunk = chunk
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.prefilling: deque[Request] = deque()

    def choose(self) -> list[tuple[Request, Piece]]:
        """Return the requests of the next step and what each of them takes in."""
        chosen = [
            (
                request,
                Piece(
                    request.layers,
                    request.answer[-1:],
                    request.num_tokens,
                    True,
                    request.watch,
                    is_answer=True,
                ),
            )
            for request in self.running
            if request.phase is Phase.DECODE
        ]
        if self.prefilling:
            request = self.prefilling.popleft()
            self.prefilling.append(request)
            chosen.append((request, self.next_of_prompt(request)))
        return chosen

    def next_of_prompt(self, request: Request) -> Piece:
        """Return the next piece of a prompt."""
        first, total = request.num_prefilled, len(request.prompt)
        end = (first // self._chunk + 1) * self._chunk
        if total - end < _LEAST_PIECE:
            end = total
        return Piece(request.layers, request.prompt[first:end], first, end == total)

    def is_worth_sharing(self, request: Request) -> bool:
        """Whether what has been read of a prompt is the most that others may have in common.

        What differs, such as the question about a document, stands at the end.
        """
        total, least = len(request.prompt), self._chunk // 4
        following = self.next_of_prompt(request)
        left = total - request.num_prefilled
        return left >= least > left - len(following.ids)

    def remove(self, request: Request) -> None:
        """Take a request out."""
        for queue in (self.waiting, self.running, self.prefilling):
            if request in queue:
                queue.remove(request)
