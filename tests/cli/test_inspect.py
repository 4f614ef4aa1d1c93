from pathlib import Path

import pytest
import torch

from icecache import IceCacheConfig
from icecache.cli.capture import Asked, Recording
from icecache.cli.captured import Captured, measure
from icecache.errors import InputError
from tests.cli.running import Cli

TOKENS, STEPS, KV_HEADS, HEADS, DIM = 700, 3, 2, 6, 16


@pytest.fixture
def recording() -> Recording:
    """One layer with keys in 40 groups and queries that look for some of them."""
    centres = 3 * torch.randn(KV_HEADS, 40, DIM)
    keys = centres[:, torch.randint(40, (TOKENS,))] + 0.3 * torch.randn(KV_HEADS, TOKENS, DIM)
    values = torch.randn(1, KV_HEADS, TOKENS, DIM)
    wanted = centres[:, :STEPS].repeat_interleave(HEADS // KV_HEADS, dim=0)
    asked = [Asked(wanted[:, step], DIM**-0.5) for step in range(STEPS)]
    return Recording(7, keys[None], values, asked)


def true_share(recording: Recording, head: int) -> torch.Tensor:
    """The last step's attention of one query head, in plain words."""
    asked, keys = recording.asked[-1], recording.keys[0, head // (HEADS // KV_HEADS)]
    return torch.softmax(keys @ asked.query[head] * asked.scaling, dim=0)


def test_exact_selection_captures_what_the_best_tokens_do(recording: Recording) -> None:
    found = measure(recording, IceCacheConfig(budget=128, selection="exact"))
    torch.testing.assert_close(found.icecache, found.best_tokens)


def test_masses_are_ordered(recording: Recording) -> None:
    found = measure(recording, IceCacheConfig(budget=128))
    assert found.layer == 7
    assert found.icecache.shape == (HEADS,)
    assert float(found.icecache.mean()) > float(found.positional.mean()) + 0.1
    # the vote is the best for a KV head's query heads together, not for each
    best = found.best_tokens.view(KV_HEADS, -1).sum(1)
    assert bool((found.icecache.view(KV_HEADS, -1).sum(1) <= best + 1e-5).all())
    assert 0.0 < float(found.positional.min()) <= float(found.best_tokens.max()) <= 1.0


def test_mass_is_the_share_of_the_attended_tokens(recording: Recording) -> None:
    config = IceCacheConfig(budget=128)
    last = Recording(7, recording.keys, recording.values, recording.asked[-1:])
    found = measure(last, config)
    for maps, mass in ((found.maps, found.icecache), (found.positional_maps, found.positional)):
        for head in range(HEADS):
            share, pages = true_share(recording, head), maps[head // (HEADS // KV_HEADS)]
            attended = pages.positions[pages.attended]
            expected = share[: config.sink].sum() + share[-config.window :].sum()
            torch.testing.assert_close(mass[head], expected + share[attended].sum())


def test_maps_hold_every_stored_token_once_and_full_pages_at_most(recording: Recording) -> None:
    config = IceCacheConfig(budget=128)
    found: Captured = measure(recording, config)
    stored = torch.arange(config.sink, TOKENS - config.window)
    for pages in (*found.maps, *found.positional_maps):
        assert torch.equal(pages.positions.sort().values, stored)
        assert int(torch.bincount(pages.pages).max()) <= config.page_size
        assert int(pages.attended.sum()) <= config.budget - config.sink - config.window


def test_nothing_to_select_is_said(recording: Recording) -> None:
    with pytest.raises(InputError, match="budget of 1,024 attends to all"):
        measure(recording, IceCacheConfig(budget=1024))


def test_the_command_writes_a_picture(cli: Cli, log_file: Path, tiny_model: Path) -> None:
    out = log_file.with_suffix(".png")
    result = cli(
        *("inspect", "--prompt-file", log_file, "--out", out, "--model", tiny_model),
        *("--budget", 64, "--steps", 2, "--dtype", "float32", "--layer", 1, "--head", 1),
    )
    assert result.code == 0, result.err
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "positional pages" in result.out


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--layer", 2), "layer must be one of 0, 1"),
        (("--head", 2), "head must be from 0 to 1"),
        (("--budget", 2000), "attends to all"),
        (("--out", "/no/such/folder/x.png"), "folder does not exist"),
    ],
)
def test_bad_requests(
    cli: Cli, log_file: Path, tiny_model: Path, flags: tuple[str, int], word: str
) -> None:
    result = cli(
        *("inspect", "--prompt-file", log_file, "--out", log_file.with_suffix(".png")),
        *("--model", tiny_model, "--budget", 64, "--steps", 1, *flags),
    )
    assert result.code == 1
    assert word in result.err
    assert len(result.err.splitlines()) == 1
