"""Snapshots: what comes back is what was there; what is damaged, or killed half-way, is not it."""

import hashlib
import json
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from icecache import IceCacheLayer, Phase
from icecache.cache.snapshot import read_snapshot, write_snapshot
from icecache.errors import InputError, SnapshotMismatch
from tests.helpers import FAST_BACKENDS, left_padded, make_query, make_tokens, poison, small_layer


def grown(layer: IceCacheLayer, batch: int, prompt: int, steps: int) -> IceCacheLayer:
    """Fill a layer by a prompt and decode steps."""
    if prompt:
        mask = left_padded([prompt - 7 * row for row in range(batch)])
        layer.prefill(*make_tokens(0, batch, prompt), mask)
        layer.attend(make_query(1, batch, 4, prompt))
    for step in range(steps):
        layer.append(*make_tokens(step + 2, batch, 1))
        layer.attend(make_query(step + 3, batch, 4))
    return layer


def saved(layer: IceCacheLayer, folder: Path) -> Path:
    """Write a layer's snapshot."""
    write_snapshot(folder, [("one", layer.state())], {"text": "ü"})
    return folder


def loaded(folder: Path, **settings: Any) -> IceCacheLayer:
    """Return a layer of a snapshot."""
    layer = small_layer(**settings)
    layer.load_state(read_snapshot(folder).part("one"))
    return layer


def assert_go_on_alike(first: IceCacheLayer, second: IceCacheLayer, batch: int) -> None:
    """Assert that two layers stay bit for bit the same while they grow."""
    for step in range(12):
        num = 40 if step == 9 else 1
        tokens, query = make_tokens(100 + step, batch, num), make_query(step, batch, 4, num)
        outputs = []
        for layer in (first, second):
            layer.append(*tokens)
            outputs.append(layer.attend(query))
        assert torch.equal(*outputs)
        second.check_integrity()
        poison(second)
    assert first.stats().inserted == second.stats().inserted
    assert first.stats().leaves == second.stats().leaves


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize(
    ("batch", "prompt", "steps", "phase"),
    [
        (1, 10, 3, Phase.DENSE),
        (1, 60, 0, Phase.INDEXED),
        (2, 60, 15, Phase.INDEXED),
        (1, 900, 5, Phase.INDEXED),
    ],
)
def test_what_comes_back_goes_on_as_before(
    tmp_path: Path, backend: str, batch: int, prompt: int, steps: int, phase: Phase
) -> None:
    layer = grown(small_layer(backend=backend), batch, prompt, steps)
    # on top of freed pages, so that what is saved does not lie in order
    layer.reorder(torch.arange(batch))
    folder = saved(layer, tmp_path / "snap")
    again = loaded(folder, backend=backend)
    assert (again.phase, again.row_lens) == (phase, layer.row_lens)
    again.check_integrity()
    # the window's buffer has another amount of room
    same = [replace(each.stats(), kv_bytes=0, host_bytes=0) for each in (again, layer)]
    assert same[0] == same[1]
    assert_go_on_alike(layer, again, batch)


def test_upper_levels_come_back(tmp_path: Path) -> None:
    layer = grown(small_layer(crossover=8, field_of_view=4), 1, 900, 30)
    again = loaded(saved(layer, tmp_path / "snap"), crossover=8, field_of_view=4)
    assert len(again._context.indexed.tree.levels) >= 3
    assert_go_on_alike(layer, again, 1)


def test_rows_that_shared_pages_come_back(tmp_path: Path) -> None:
    layer = grown(small_layer(), 2, 60, 3)
    layer.reorder(torch.tensor([1, 1, 0]))
    again = loaded(saved(layer, tmp_path / "snap"))
    assert again._context.indexed.pool.num_pages == layer._context.indexed.pool.num_pages
    assert_go_on_alike(layer, again, 3)


def test_an_empty_layer_and_what_was_said_about_it(tmp_path: Path) -> None:
    folder = saved(small_layer(), tmp_path / "snap")
    assert loaded(folder).phase is Phase.EMPTY
    assert read_snapshot(folder).about == {"text": "ü"}


def test_an_older_snapshot_is_replaced_without_a_trace(tmp_path: Path) -> None:
    folder = saved(grown(small_layer(), 1, 60, 0), tmp_path / "snap")
    layer = grown(small_layer(), 1, 70, 0)
    saved(layer, folder)
    assert loaded(folder).row_lens == [70]
    assert len(list(folder.iterdir())) == 2


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
@pytest.mark.parametrize("damage", [_cut, _flip, _empty, Path.unlink])
def test_damage_is_refused(tmp_path: Path, suffix: str, damage: Callable[[Path], None]) -> None:
    folder = saved(grown(small_layer(), 1, 60, 0), tmp_path / "snap")
    (path,) = folder.glob(f"*{suffix}")
    damage(path)
    with pytest.raises(SnapshotMismatch):
        loaded(folder)


def test_another_format_is_refused_by_name(tmp_path: Path) -> None:
    folder = saved(small_layer(), tmp_path / "snap")
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(SnapshotMismatch, match="format 2, this version reads 1"):
        read_snapshot(folder)


def test_a_pickle_is_refused_and_not_executed(tmp_path: Path) -> None:
    folder = saved(grown(small_layer(), 1, 60, 0), tmp_path / "snap")
    (path,) = folder.glob("*.safetensors")
    # unpickling this makes a file
    path.write_bytes(b"cpathlib\nPath\n(S'%s'\ntR(dR." % str(tmp_path / "executed").encode())
    _seal(folder)
    with pytest.raises(SnapshotMismatch, match="holds no tensors"):
        loaded(folder)


def _seal(folder: Path) -> None:
    """Give altered parts checksums that fit, as an attacker would."""
    path = folder / "manifest.json"
    record = json.loads(path.read_text())
    for entry in record["files"].values():
        content = (folder / entry["file"]).read_bytes()
        entry["sha256"] = hashlib.sha256(content).hexdigest()
    body = {name: record[name] for name in ("about", "files")}
    record["checksum"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    "name",
    [
        "pages/page_of",
        "pages/free",
        "pages/head",
        "pages/before",
        "pages/after",
        "pages/num_pages",
        "tree/level 0/num",
        "tree/level 0/next",
        "tree/level 0/page",
        "tree/level 0/count",
        "tree/level 1/first",
    ],
)
@pytest.mark.parametrize("number", [-5, 1 << 20])
def test_numbers_that_would_lead_astray_are_refused(name: str, number: int) -> None:
    layer = grown(small_layer(), 1, 900, 5)
    state = layer.state()
    *above, last = name.split("/")
    here = state["context"]["indexed"]
    for each in above:
        here = here[each]
    array = torch.as_tensor(here[last]).clone()
    limits = torch.iinfo(array.dtype)
    array.view(-1)[0] = 255 if limits.max == 255 else number
    here[last] = array
    for part in (here, *_dicts(state)):
        part.update({n: torch.as_tensor(x) for n, x in part.items() if hasattr(x, "dtype")})
    fresh = small_layer()
    with pytest.raises((SnapshotMismatch, RuntimeError, ValueError)):
        fresh.load_state(state)
    assert fresh.phase is Phase.EMPTY


def _dicts(state: dict[str, Any]) -> list[dict[str, Any]]:
    inner = [each for value in state.values() if isinstance(value, dict) for each in _dicts(value)]
    return [state, *inner]


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match=r"holds other files \(letter.txt\)"):
        saved(small_layer(), tmp_path)
    with pytest.raises(InputError, match="is a file"):
        saved(small_layer(), tmp_path / "letter.txt")
    with pytest.raises(InputError, match="cannot make the folder"):
        saved(small_layer(), tmp_path / "nowhere" / "snap")
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


_KILLED = """
import os, signal, sys
from pathlib import Path
from icecache.cache import snapshot
from tests.cache.test_snapshot import grown
from tests.helpers import small_layer

folder, moment = Path(sys.argv[1]), sys.argv[2]
die = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
states = [(f"part{i}", grown(small_layer(), 1, 80 + i, 0).state()) for i in range(3)]
if moment == "file":
    save = snapshot.save_file
    def half(tensors, path):
        save(tensors, path)
        os.truncate(path, os.path.getsize(path) // 2)
        die()
    snapshot.save_file = half
elif moment == "manifest":
    def sync(fd):
        if Path(f"/proc/self/fd/{fd}").resolve().name == "manifest.part":
            die()
    os.fsync = sync
elif moment == "renamed":
    snapshot._clean = die
def parts():
    for i, state in enumerate(states):
        if moment == str(i):
            die()
        yield state
snapshot.write_snapshot(folder, parts(), {})
"""


@pytest.mark.parametrize("moment", ["0", "2", "file", "manifest"])
def test_killed_while_it_is_written_the_old_one_is_whole(tmp_path: Path, moment: str) -> None:
    folder = saved(grown(small_layer(), 1, 60, 0), tmp_path / "snap")
    child = subprocess.run([sys.executable, "-c", _KILLED, str(folder), moment])
    assert child.returncode == -signal.SIGKILL
    assert loaded(folder).row_lens == [60]
    # the next one clears up
    saved(grown(small_layer(), 1, 70, 0), folder)
    assert loaded(folder).row_lens == [70]
    assert len(list(folder.iterdir())) == 2


def test_killed_after_the_rename_the_new_one_is_whole(tmp_path: Path) -> None:
    folder = saved(grown(small_layer(), 1, 60, 0), tmp_path / "snap")
    child = subprocess.run([sys.executable, "-c", _KILLED, str(folder), "renamed"])
    assert child.returncode == -signal.SIGKILL
    found = read_snapshot(folder)
    for number in range(3):
        layer = small_layer()
        layer.load_state(found.part(f"part{number}"))
        assert layer.row_lens == [80 + number]


_FULL = """
import resource, sys
from pathlib import Path
from icecache.cache.snapshot import write_snapshot
from tests.cache.test_snapshot import grown
from tests.helpers import small_layer

resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
state = grown(small_layer(), 1, 900, 0).state()
try:
    write_snapshot(sys.argv[1], [("one", state)], {})
except OSError as error:
    print("refused:", error)
"""


@pytest.mark.parametrize("is_new", [False, True])
def test_a_full_disk_leaves_the_old_one_and_no_rubbish(tmp_path: Path, is_new: bool) -> None:
    folder = tmp_path / "snap"
    if not is_new:
        saved(grown(small_layer(), 1, 20, 0), folder)
    # a file cannot grow beyond the limit, which fails as a full disk does
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    child = subprocess.run(
        [sys.executable, "-c", _FULL, str(folder)], capture_output=True, text=True, check=True
    )
    assert "refused: cannot write" in child.stdout
    if is_new:
        assert not folder.exists()
    else:
        assert loaded(folder).row_lens == [20]
        assert len(list(folder.iterdir())) == 2
