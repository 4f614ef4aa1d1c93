"""The folder of a run: settings, sessions, and results that only ever grow.

A line is written as a whole and flushed to the disk before the next result is begun. A process that
is killed leaves at most one torn line behind, the last, which the next session cuts off.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from icecache.errors import InputError
from icecache.evaluation.results.record import Key, Record
from icecache.evaluation.settings import RunSettings

__all__ = ["STAMPS", "ResultStore", "load_results", "load_sessions", "write_atomically"]

_RESULTS, _SETTINGS, _SESSIONS, _LOCK = "results.jsonl", "run.json", "sessions.jsonl", ".lock"
# what a report tells of a session
STAMPS = (
    *("icecache", "commit", "torch", "transformers", "processor", "threads", "started"),
    "prompts",
)
_VERSIONS = ("icecache", "commit", "torch", "transformers")
_SETTINGS_SHOWN = ("model", "dtype", "steps", "seed", "max_length", "overlong")


class ResultStore:
    """The results of one run, open for adding; use `ResultStore.open`.

    Parameters
    ----------
    folder : Path
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / _RESULTS
        _cut_torn_line(self._path)
        self.records: dict[Key, Record] = {record.key: record for record in _read(self._path)}

    def __contains__(self, key: Key) -> bool:
        return key in self.records

    def add(self, record: Record) -> None:
        """Add a result for good; one that is there already is an error."""
        if record.key in self.records:
            raise InputError(f"{self._path} has a result of {record.key} already")
        _append(self._path, record.to_line())
        self.records[record.key] = record

    @staticmethod
    @contextmanager
    def open(
        folder: Path, settings: RunSettings, session: dict[str, Any], *, mix: bool = False
    ) -> "Iterator[ResultStore]":
        """Open a folder for adding, new or of an earlier session.

        Parameters
        ----------
        folder : Path
        settings : RunSettings
        session : dict
            Noted in ``sessions.jsonl``: the environment.
        mix : bool, default False
            Add to results of another commit or of other versions too.

        Raises
        ------
        InputError
            If the folder cannot be made or written to, holds something else or results of other
            settings or versions, or is in use.
        """
        lock = _locked(folder)
        try:
            _check_settings(folder / _SETTINGS, settings)
            store = ResultStore(folder)
            _cut_torn_line(folder / _SESSIONS)
            if store.records and not mix and _whole_lines(folder / _SESSIONS):
                for earlier in load_sessions(folder):
                    _check_versions(earlier, session, folder)
            _append(
                folder / _SESSIONS, json.dumps({**session, "settings": settings.to_json()}) + "\n"
            )
            yield store
        finally:
            lock.release()


def _locked(folder: Path) -> FileLock:
    """Return the lock of a folder, held; makes the folder if it is new."""
    try:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"--out must be a folder: {folder}")
        if _holds_something_else(folder):
            raise InputError(f"--out holds something else than results: {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / _LOCK)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(f"another process is writing to {folder}") from error
    except OSError as error:
        raise InputError(
            f"--out must be a folder that can be made and written to: {folder} ({error.strerror})"
        ) from error
    return lock


def load_results(folder: Path) -> list[Record]:
    """Return the results of a run, a torn last line left out.

    Raises
    ------
    InputError
        If there are none, or a line is no result: with file and line.
    """
    if not (folder / _RESULTS).is_file():
        raise InputError(f"no results of `icecache eval run` in {folder}")
    records = list(_read(folder / _RESULTS))
    if not records:
        raise InputError(f"{folder / _RESULTS} holds no results yet")
    return records


def load_sessions(folder: Path) -> list[dict[str, Any]]:
    """Return the sessions that a run had, first to last, a torn last line left out.

    Raises
    ------
    InputError
        If there are none, or a line is no session: with file and line.
    """
    path = folder / _SESSIONS
    lines = _whole_lines(path)
    if not lines:
        raise InputError(f"{path} holds no session; run `icecache eval run` on")
    return [_session(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]


def _whole_lines(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1] if path.is_file() else []


def _session(line: bytes, where: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(line)
        missing = [name for name in STAMPS if name not in found]
        missing += [name for name in _SETTINGS_SHOWN if name not in found["settings"]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{where}: not a session ({error!r})") from error
    if missing:
        raise InputError(f"{where}: not a session, it lacks {', '.join(missing)}")
    return found


def _check_settings(path: Path, settings: RunSettings) -> None:
    mine = settings.figures_depend_on()
    if not path.is_file():
        write_atomically(path, json.dumps(mine, indent=1) + "\n")
        return
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    if not isinstance(theirs, dict):
        raise InputError(f"{path}: must be an object of settings, got {type(theirs).__name__}")
    other = [key for key in mine if theirs.get(key) != mine[key]]
    if other:
        changes = "; ".join(f"{key} {theirs.get(key)!r}, now {mine[key]!r}" for key in other)
        raise InputError(
            f"{path.parent} holds results of other settings ({changes}); use another --out"
        )


def _check_versions(earlier: dict[str, Any], session: dict[str, Any], folder: Path) -> None:
    other = [name for name in _VERSIONS if earlier[name] != session[name]]
    if other:
        changes = "; ".join(f"{name} {earlier[name]}, now {session[name]}" for name in other)
        raise InputError(
            f"{folder} holds results of another version ({changes}); "
            "use another --out, or --mix to add to them all the same"
        )


def _read(path: Path) -> Iterator[Record]:
    if not path.is_file():
        return
    lines = path.read_bytes().split(b"\n")
    # what follows the last line break is torn, or nothing
    for number, line in enumerate(lines[:-1], 1):
        yield _parse(line, f"{path}:{number}")


def _parse(line: bytes, where: str) -> Record:
    try:
        return Record.from_json(json.loads(line))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{where}: not a result ({error!r})") from error


def _cut_torn_line(path: Path) -> None:
    if path.is_file():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)


def _append(path: Path, line: str) -> None:
    with path.open("ab") as file:
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that readers see the old or the new one, never half of it."""
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(scratch).chmod(0o644)
        Path(scratch).replace(path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def _holds_something_else(folder: Path) -> bool:
    """Return whether a folder is neither a run's nor what one killed at once left behind."""
    if not folder.is_dir() or (folder / _SETTINGS).is_file():
        return False
    ours = (_LOCK, f".{_SETTINGS}-")
    return any(not entry.name.startswith(ours) for entry in folder.iterdir())
