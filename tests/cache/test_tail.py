"""The buffer of the latest tokens against lists."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icecache.cache.tail import Tail

ROWS, HEADS, DIM = 3, 2, 4
OPS = ("append", "append ragged", "drop oldest", "drop latest", "reorder", "release")


def _tokens(first: int, num: int) -> torch.Tensor:
    """Return tokens whose numbers are their content, each row's own thousand."""
    numbers = torch.arange(first, first + num).float() + 1000 * torch.arange(ROWS)[:, None]
    return numbers[:, None, :, None].expand(-1, HEADS, -1, DIM).contiguous()


def _poison(tail: Tail) -> None:
    for buffer in (tail._keys, tail._values):
        buffer[:, :, tail._end :] = torch.nan
        buffer[:, :, : tail._end - tail.longest] = torch.nan


def _compare(tail: Tail, model: list[list[float]]) -> None:
    assert tail.lens == [len(row) for row in model]
    assert tail.longest == max(map(len, model))
    assert tail.is_ragged == (len({len(row) for row in model}) > 1)
    keys, values = tail.keys_values()
    valid = tail.valid()
    assert bool(torch.isfinite(keys).all()) and bool(torch.isfinite(values).all())
    for row, numbers in enumerate(model):
        for head in range(HEADS):
            assert keys[row, head][valid[row]][:, 0].tolist() == numbers
            assert values[row, head][valid[row]][:, -1].tolist() == [-n for n in numbers]
        oldest, _ = tail.oldest(row, len(numbers) // 2)
        assert oldest[0, :, 0].tolist() == numbers[: len(numbers) // 2]
        buffer, _, start = tail.buffers()
        assert buffer[row, 0, start[row] : start[row] + len(numbers), 0].tolist() == numbers


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.sampled_from(OPS), st.integers(0, 30)), max_size=25))
def test_random_traces(trace: list[tuple[str, int]]) -> None:
    tail = Tail(ROWS, HEADS, DIM, torch.float32, slack=5)
    model: list[list[float]] = [[] for _ in range(ROWS)]
    given_ = 0
    for op, number in trace:
        if op.startswith("append"):
            num = 1 + number % 9
            tokens, mask = _tokens(given_, num), None
            kept = [num] * ROWS
            if op == "append ragged":
                kept = [number % (num + 1), num, (number // 2) % (num + 1)]
                mask = torch.arange(num)[None] >= num - torch.tensor(kept)[:, None]
                tokens = tokens.masked_fill(~mask[:, None, :, None], 0.0)
            tail.append(tokens, -tokens, mask)
            for row in range(ROWS):
                numbers = range(given_ + num - kept[row], given_ + num)
                model[row].extend(float(1000 * row + n) for n in numbers)
            given_ += num
        elif op == "drop oldest":
            nums = [min(len(row), number % (i + 3)) for i, row in enumerate(model)]
            tail.drop_oldest(nums)
            model = [row[num:] for row, num in zip(model, nums, strict=True)]
        elif op == "drop latest":
            num = min(number % 4, *map(len, model))
            tail.drop_latest(num)
            model = [row[: len(row) - num] for row in model]
        elif op == "reorder" and number % 3 == 0:
            order = [number % ROWS, 1, (number // 3) % ROWS]
            tail.reorder(torch.tensor(order))
            # the rows' content moves with them: begin anew where it would no longer be their own
            if order != [0, 1, 2]:
                moved = [list(model[row]) for row in order]
                _compare(tail, moved)
                return
        elif op == "release":
            tail.release()
        _poison(tail)
        _compare(tail, model)
