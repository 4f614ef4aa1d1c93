"""Rows of a data set: from a local JSONL file or from the Hugging Face hub."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from icecache.errors import BackendUnavailable, InputError

__all__ = ["Hub", "read_jsonl", "read_rows", "text_of", "where_of"]

Row = dict[str, Any]


class Hub:
    """A data set on the hub.

    Parameters
    ----------
    path : str
        As `datasets.load_dataset` takes it.
    settings
        Its further arguments.
    """

    def __init__(self, path: str, **settings: str) -> None:
        self.path, self.settings = path, settings

    def rows(self) -> Iterator[Row]:
        """Yield the rows.

        Raises
        ------
        BackendUnavailable
            If ``datasets`` is not installed.
        InputError
            If the hub cannot be reached or has no such data.
        """
        if importlib.util.find_spec("datasets") is None:
            raise BackendUnavailable("datasets is missing: pip install 'icecache[eval]'")
        import datasets

        try:
            table = datasets.load_dataset(self.path, **self.settings)
        except (OSError, ValueError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(
                f"data set {self.path} {self.settings} cannot be had from the Hugging Face hub "
                f"({reason}); pass a local folder with --data"
            ) from error
        yield from table


def read_rows(data: Path | None, names: tuple[str, ...], hub: Hub) -> Iterator[Row]:
    """Yield the rows of the first of `names` that is in the local folder, else of the hub.

    Raises
    ------
    InputError
        If there is a folder and none of the files is in it.
    """
    if data is None:
        yield from hub.rows()
        return
    if not data.is_dir():
        raise InputError(f"data folder does not exist: {data}")
    for name in names:
        if (data / name).is_file():
            yield from read_jsonl(data / name)
            return
    raise InputError(f"data folder {data} has none of: {', '.join(names)}")


def read_jsonl(path: Path) -> Iterator[Row]:
    """Yield the objects of a JSON-lines file.

    Raises
    ------
    InputError
        With file and line, if a line is not a JSON object or not UTF-8.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode())
            except ValueError as error:
                raise InputError(f"{path}:{number}: not a line of JSON ({error})") from error
            if not isinstance(row, dict):
                raise InputError(f"{path}:{number}: not a JSON object, but {type(row).__name__}")
            yield {**row, "_where": f"{path}:{number}"}


def where_of(row: Row) -> str:
    """Return the file and line of a row, or what there is to say."""
    return str(row.get("_where", "data set"))


def text_of(row: Row, key: str) -> str:
    """Return a text field; `InputError` with the row's place if it is missing or no text."""
    value = row.get(key)
    if not isinstance(value, str):
        found = "is missing" if value is None else f"is {type(value).__name__}"
        raise InputError(f"{where_of(row)}: field {key!r} must be text, it {found}")
    return value
