"""Rows on disk as they are measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prompts import Prompt

from icecache.errors import InputError

Row = dict[str, Any]


class RowLog:
    """Rows as JSON lines on disk, prompt by prompt; an interrupted run goes on where it stopped."""

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self._path = path
        self.rows: list[Row] = []
        if path is None:
            return
        if path.exists():
            header, *lines = path.read_text().splitlines()
            if json.loads(header) != settings:
                raise InputError(f"{path} holds rows of other settings; give another --out")
            self.rows = [json.loads(line) for line in lines]
        else:
            path.write_text(json.dumps(settings) + "\n")

    def has(self, prompt: Prompt) -> bool:
        return any((row["task"], row["id"]) == (prompt.task, prompt.id) for row in self.rows)

    def add(self, rows: list[Row]) -> None:
        self.rows += rows
        if self._path is not None:
            with self._path.open("a") as out:
                out.write("".join(json.dumps(row) + "\n" for row in rows))
