"""Cases of the decode benchmark, small enough for tests."""

from typing import Any

import decode_measure
import decode_model
import torch
from decode_measure import Case
from decode_model import Subject

__all__ = ["KEYS", "SETTINGS", "TOKEN_BYTES", "make_case", "rows_of"]

KEYS = {
    "ratio", "cache", "context", "synthetic", "tpot_ms_median", "tpot_ms_p99", "prefill_s",
    "settle_s", "kv_bytes", "peak_rss", "agreement", "steps", "native_steps",
}  # fmt: skip
# 2 layers, keys and values, 2 KV heads of 16 float32 numbers
TOKEN_BYTES = 2 * 2 * 2 * 16 * 4
SETTINGS = {"budget": 64}


def make_case(subject: Subject, tokens: int, *, real: bool, steps: int = 8) -> Case:
    ids = decode_model.prompt_ids(subject, tokens) if real else None
    return Case(tokens, ids, steps, SETTINGS)


def rows_of(subject: Subject, case: Case, *names: str) -> dict[str, dict[str, Any]]:
    with torch.no_grad():
        rows = decode_measure.measure(subject, case, list(names))
    assert [row["cache"] for row in rows] == list(names)
    return {row["cache"]: row for row in rows}
