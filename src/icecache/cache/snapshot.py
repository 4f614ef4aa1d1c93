"""Snapshots: what caches hold, in a folder of safetensors beside one JSON file.

manifest.json                 names every other file with its checksum; the last to be written
NAME-0123456789abcdef.safetensors   the tensors of one part (a layer), named by their content

The manifest is written to a temporary file and renamed, after all that it names is on the disk:
until then the folder holds the snapshot that was there before, from then on the new one. Nothing
in a snapshot is ever executed; what differs from its checksum is refused.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from icecache.errors import InputError, SnapshotMismatch

__all__ = ["FORMAT", "Snapshot", "State", "is_snapshot", "read_snapshot", "write_snapshot"]

FORMAT = 1
_MANIFEST = "manifest.json"
_KIND = "icecache snapshot"

# names to tensors, numbers, strings, lists of those, None, or further states
State = dict[str, Any]


class Snapshot(NamedTuple):
    """A snapshot whose manifest has been read and found whole.

    Attributes
    ----------
    folder : Path
    about : dict
        As given to `write_snapshot`.
    files : dict of str to dict
        Of each part: the file's name, checksum, bytes, and what of its state is no tensor.
    """

    folder: Path
    about: dict[str, Any]
    files: dict[str, dict[str, Any]]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(int(entry["bytes"]) for entry in self.files.values())

    def part(self, name: str) -> State:
        """Return one part's state.

        Raises
        ------
        SnapshotMismatch
            If the part is missing, truncated or altered.
        """
        entry = self.files.get(name)
        if entry is None:
            raise SnapshotMismatch(f"{self.folder} has no part {name!r}")
        path = self.folder / Path(entry["file"]).name
        try:
            content = path.read_bytes()
        except OSError as error:
            raise SnapshotMismatch(f"{path} cannot be read: {error.strerror}") from error
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise SnapshotMismatch(f"{path} is truncated or was altered: its checksum differs")
        try:
            tensors = load(content)
        except SafetensorError as error:
            raise SnapshotMismatch(f"{path} holds no tensors: {error}") from error
        return _join(entry["rest"], tensors)


def write_snapshot(
    folder: str | os.PathLike[str], parts: Iterable[tuple[str, State]], about: dict[str, Any]
) -> None:
    """Write a snapshot; one that is there already stays whole until the new one is.

    Parameters
    ----------
    folder : path
        Made if it does not exist; its parent must.
    parts : iterable of (str, dict)
        Taken one by one, so that beside the caches only one part is in memory.
    about : dict
        What JSON can hold; returned by `read_snapshot`.

    Raises
    ------
    InputError
        If the folder cannot be made or holds something else than a snapshot.
    OSError
        If the disk is full or refuses; the older snapshot, if there is one, is intact.
    """
    folder = Path(folder)
    _prepare(folder)
    files: dict[str, dict[str, Any]] = {}
    written: list[Path] = []
    try:
        for name, state in parts:
            files[name] = _write_part(folder, name, state, written)
        body = {"about": about, "files": files}
        record = {"kind": _KIND, "format": FORMAT, "checksum": _checksum(body), **body}
        _replace(folder / _MANIFEST, json.dumps(record).encode())
    except BaseException:
        kept = _named_in(folder)
        for path in written:
            if path.name not in kept:
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()  # only if it is empty: the folder was new
        raise
    _clean(folder)


def is_snapshot(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder has a manifest; `read_snapshot` says whether it is sound."""
    return (Path(folder) / _MANIFEST).is_file()


def read_snapshot(folder: str | os.PathLike[str]) -> Snapshot:
    """Read and check a manifest; the parts are read, and checked, one by one later.

    Raises
    ------
    SnapshotMismatch
        If there is no snapshot, or one that is damaged or of another format.
    """
    folder = Path(folder)
    try:
        record = json.loads((folder / _MANIFEST).read_bytes())
    except OSError as error:
        raise SnapshotMismatch(f"no snapshot in {folder}: {error.strerror}") from error
    except ValueError as error:
        raise SnapshotMismatch(f"the manifest of {folder} is truncated or was altered") from error
    if not isinstance(record, dict) or record.get("kind") != _KIND:
        raise SnapshotMismatch(f"{folder} holds no icecache snapshot")
    if record.get("format") != FORMAT:
        raise SnapshotMismatch(
            f"{folder} has format {record.get('format')!r}, this version reads {FORMAT}; "
            "make it anew with this version"
        )
    body: dict[str, Any] = {name: record.get(name) for name in ("about", "files")}
    if record.get("checksum") != _checksum(body):
        raise SnapshotMismatch(
            f"the manifest of {folder} is truncated or was altered: its checksum differs"
        )
    return Snapshot(folder, body["about"], body["files"])


def _prepare(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"a snapshot is a folder, but {folder} is a file")
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}") from error
    if not is_snapshot(folder):
        foreign = [path.name for path in folder.iterdir() if not _is_ours(path)]
        if foreign:
            raise InputError(
                f"{folder} holds other files ({foreign[0]}); give a snapshot a folder of its own"
            )


def _is_ours(path: Path) -> bool:
    return path.name == _MANIFEST or path.suffix in (".safetensors", ".part")


def _write_part(folder: Path, name: str, state: State, written: list[Path]) -> dict[str, Any]:
    rest, tensors = _split(state)
    scratch = folder / f"{name}.part"
    written.append(scratch)
    try:
        save_file(tensors, scratch)
    except SafetensorError as error:
        raise OSError(f"cannot write {scratch}: {error}") from error
    with scratch.open("rb+") as file:
        os.fsync(file.fileno())
        content = hashlib.sha256()
        for block in iter(lambda: file.read(1 << 20), b""):
            content.update(block)
        size = file.tell()
    path = folder / f"{name}-{content.hexdigest()[:16]}.safetensors"
    written.append(path)
    scratch.replace(path)
    return {"file": path.name, "sha256": content.hexdigest(), "bytes": size, "rest": rest}


def _replace(path: Path, content: bytes) -> None:
    scratch = path.with_suffix(".part")
    with scratch.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _named_in(folder: Path) -> set[str]:
    try:
        return {entry["file"] for entry in read_snapshot(folder).files.values()}
    except SnapshotMismatch:
        return set()


def _clean(folder: Path) -> None:
    """Remove what earlier snapshots and interrupted writes left behind."""
    kept = _named_in(folder) | {_MANIFEST}
    for path in folder.iterdir():
        if path.name not in kept and _is_ours(path):
            path.unlink(missing_ok=True)


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _split(state: State) -> tuple[State, dict[str, Tensor]]:
    """Return the same state with null for its tensors, and those by their path."""
    tensors: dict[str, Tensor] = {}

    def rest_of(value: Any, path: str) -> Any:
        if isinstance(value, dict):
            return {name: rest_of(each, f"{path}/{name}") for name, each in value.items()}
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value)
        if isinstance(value, Tensor):
            tensors[path] = value.detach().contiguous()
            return None
        return value

    return rest_of(state, ""), tensors


def _join(rest: State, tensors: dict[str, Tensor]) -> State:
    state: State = json.loads(json.dumps(rest))
    for path, tensor in tensors.items():
        *above, name = path.split("/")[1:]
        here = state
        for each in above:
            here = here[each]
        here[name] = tensor
    return state
