"""The picture of `icecache inspect`."""

from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from icecache.cli.captured import Captured, PageMap
from icecache.errors import InputError

__all__ = ["draw"]

_LAYOUT = [["ours", "positional", "layers"], ["map", "map_positional", "legend"]]


def draw(found: list[Captured], layer: Captured, head: int, title: str, path: Path) -> None:
    """Draw mass by layer and head, and the page maps of one KV head of `layer`, as PNG."""
    figure = Figure(figsize=(16, 9), layout="constrained")
    FigureCanvasAgg(figure)
    axes: dict[str, Axes] = figure.subplot_mosaic(_LAYOUT)
    figure.suptitle(title)
    ours = torch.stack([layer.icecache for layer in found])
    positional = torch.stack([layer.positional for layer in found])
    names = [layer.layer for layer in found]
    low = float(torch.minimum(ours, positional).min())
    _heat(axes["ours"], ours, names, low, "attention mass captured: IceCache")
    image = _heat(axes["positional"], positional, names, low, "positional pages, same budget")
    figure.colorbar(image, ax=[axes["ours"], axes["positional"]], shrink=0.8)
    _by_layer(axes["layers"], found, names)
    where = f"layer {layer.layer}, KV head {head}"
    _pages(axes["map"], layer.maps[head], f"IceCache's pages, {where}")
    _pages(axes["map_positional"], layer.positional_maps[head], f"positional pages, {where}")
    _spans(axes["legend"], layer.maps[head], layer.positional_maps[head])
    try:
        figure.savefig(path, format="png", dpi=110)
    except OSError as error:
        raise InputError(f"cannot write the picture to {path}: {error.strerror}") from error


def _heat(axes: Axes, mass: torch.Tensor, names: list[int], low: float, title: str) -> AxesImage:
    image = axes.imshow(mass.numpy(), aspect="auto", vmin=low, vmax=1.0, interpolation="nearest")
    every = max(1, len(names) // 15)
    axes.set_yticks(range(0, len(names), every), [str(name) for name in names[::every]])
    axes.set(title=f"{title}\nmean {float(mass.mean()):.3f}", xlabel="query head", ylabel="layer")
    return image


def _by_layer(axes: Axes, found: list[Captured], names: list[int]) -> None:
    for field, label in (
        ("best_tokens", "best tokens (the ceiling)"),
        ("icecache", "IceCache"),
        ("positional", "positional pages"),
    ):
        means = [float(getattr(layer, field).mean()) for layer in found]
        axes.plot(names, means, marker="o", markersize=3, label=label)
    axes.set(title="mean over heads", xlabel="layer", ylabel="attention mass captured")
    axes.legend()


def _pages(axes: Axes, pages: PageMap, title: str) -> None:
    for attended, color, label in ((False, "0.75", "stored"), (True, "C3", "attended exactly")):
        which = pages.attended == attended
        axes.scatter(pages.positions[which], pages.pages[which], s=2, c=color, label=label)
    axes.set(title=title, xlabel="position in the prompt", ylabel="page, by mean position")
    axes.legend(loc="upper left", markerscale=4)


def _spans(axes: Axes, ours: PageMap, positional: PageMap) -> None:
    spans = [_page_spans(pages).numpy() for pages in (ours, positional)]
    axes.hist(spans, bins=30, label=["IceCache", "positional"])
    axes.set(
        title="how far apart the tokens of a page are",
        xlabel="last position - first position",
        ylabel="pages",
        yscale="log",
    )
    axes.legend()


def _page_spans(pages: PageMap) -> torch.Tensor:
    num = int(pages.pages.max()) + 1
    first = torch.full((num,), int(pages.positions.max()))
    first = first.scatter_reduce(0, pages.pages, pages.positions, "amin")
    last = torch.zeros(num, dtype=torch.int64)
    return last.scatter_reduce(0, pages.pages, pages.positions, "amax") - first
