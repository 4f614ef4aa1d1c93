"""What a comparison found, as records: the table and ``--json`` show the same."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

__all__ = ["Comparison", "Row"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One cache on one prompt. Bytes count the whole model; `attended` is a mean per KV head."""

    name: str
    answer: str
    tokens: int
    attended: float
    exact_bytes: int
    summary_bytes: int
    full_bytes: int
    prefill_s: float
    tokens_per_s: float

    @property
    def total_bytes(self) -> int:
        """Bytes of keys, values and summaries."""
        return self.exact_bytes + self.summary_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The rows of a prompt, IceCache first; `divergence` is None without the full cache's row."""

    question: str
    rows: tuple[Row, ...]
    divergence: float | None
    settings: dict[str, Any]

    def to_json(self) -> str:
        """Return the records as one JSON object."""
        record = dataclasses.asdict(self)
        for row, entry in zip(self.rows, record["rows"]):
            entry["total_bytes"] = row.total_bytes
        return json.dumps(record, indent=2, ensure_ascii=False)
