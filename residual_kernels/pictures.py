"""Pictures of a fitted adapter: each function takes numbers, writes one PNG and returns its path."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import CenteredNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL.Image import Image
from torch import Tensor

from residual_kernels.adapters.residual import ResiDual
from residual_kernels.bases.spectral_bases import SpectralBases
from residual_kernels.files import atomic_path
from residual_kernels.ops.reference import coefficients
from residual_kernels.units.cache import UnitCache

# Okabe and Ito's colours, told apart by colour-blind readers too.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6b7280"
DPI = 150


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _save(figure: Figure, path: str | Path) -> Path:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)
    return Path(path)


def _bare(axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def accuracy_bars(rows: Sequence[dict], path: str | Path, title: str = "Accuracy on the test images") -> Path:
    """One bar per method with its accuracy and number of learned parameters."""
    figure = _figure(7, 0.55 * len(rows) + 1.2)
    axes = figure.add_subplot()
    ours = {"fine", "full"}
    for place, row in enumerate(reversed(rows)):
        axes.barh(place, row["accuracy"], height=0.7, color=BLUE if row["method"] in ours else "#b8bec8")
        learned = f"{row['parameters']:,} learned numbers" if row["parameters"] else "nothing learned"
        axes.text(
            row["accuracy"] + 0.01, place, f"{row['accuracy']:.1%}", va="center", fontsize=11, weight="bold"
        )
        axes.text(
            0.012, place, learned, va="center", fontsize=9, color="white" if row["method"] in ours else "#333"
        )
    axes.set_yticks(range(len(rows)), [row["method"] for row in reversed(rows)], fontsize=11)
    axes.set_xlim(0, 1.12)
    axes.spines["bottom"].set_bounds(0, 1)
    axes.set_xticks(np.linspace(0, 1, 6), [f"{x:.0%}" for x in np.linspace(0, 1, 6)])
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left", fontsize=12)
    return _save(figure, path)


def accuracy_table(columns: Sequence[str], lines: Sequence[tuple], path: str | Path) -> Path:
    """A table of accuracies: a block of lines per tower, one per method, a column per data set; the best are bold.

    `lines` hold (tower, method, numbers learned, ((mean, deviation), ...) for every column).
    """
    towers = list(dict.fromkeys(line[0] for line in lines))
    rows = [row for tower in towers for row in (tower, *(line for line in lines if line[0] == tower))]
    left = 3.4  # room for method and count, in columns
    figure = _figure(1.15 * (len(columns) + left), 0.34 * (len(rows) + 1) + 0.3)
    axes = figure.add_subplot()
    colours = colormaps["Blues"]
    for place, name in enumerate(columns):
        axes.text(place + 0.5, -0.5, name, ha="center", va="center", fontsize=10, weight="bold")
    axes.text(-0.1, -0.5, "learned", ha="right", va="center", fontsize=9, color=GREY)
    for height, row in enumerate(rows):
        if isinstance(row, str):
            axes.text(-left, height + 0.5, row, va="center", fontsize=10, weight="bold")
            continue
        tower, method, numbers, cells = row
        axes.text(-left + 0.15, height + 0.5, method, va="center", fontsize=10)
        axes.text(-0.1, height + 0.5, f"{numbers:,}", ha="right", va="center", fontsize=9, color=GREY)
        for place, (mean, spread) in enumerate(cells):
            best = max(line[3][place][0] for line in lines if line[0] == tower)
            colour = colours(0.05 + 0.85 * mean**3)
            axes.add_patch(Rectangle((place + 0.02, height + 0.04), 0.96, 0.92, color=colour))
            text = f"{mean:.1%}" + (f" ± {100 * spread:.1f}" if spread > 0 else "")
            axes.text(
                place + 0.5, height + 0.5, text, ha="center", va="center", fontsize=9.5,
                weight="bold" if mean == best else "normal", color="white" if sum(colour[:3]) < 1.7 else "#111",
            )  # fmt: skip
    axes.set_xlim(-left, len(columns))
    axes.set_ylim(len(rows), -1)
    _bare(axes)
    return _save(figure, path)


def weight_map(residual: ResiDual, path: str | Path) -> Path:
    """Learned weight by layer and head: the mean over a head's components, in proportion to their variance."""
    layout, bases = residual.layout, residual.bases
    grid = np.ones((layout.layers, layout.heads))
    counts = np.zeros_like(grid, dtype=int)
    for unit in layout.select("head"):
        weight = residual.weight_of(unit).detach().double().cpu()
        share = bases.explained_variance(unit)
        total = float(share.sum())
        mean = float((weight * share).sum() / total) if total > 0 else float(weight.mean())
        grid[unit.layer, unit.head], counts[unit.layer, unit.head] = mean, len(weight)
    figure = _figure(1.2 + 0.75 * layout.heads, 1.4 + 0.5 * layout.layers)
    axes = figure.add_subplot()
    shown = axes.imshow(grid, cmap="PuOr_r", norm=CenteredNorm(1.0), aspect="auto")
    if layout.layers * layout.heads <= 150:
        for layer in range(layout.layers):
            for head in range(layout.heads):
                strong = abs(shown.norm(grid[layer, head]) - 0.5) > 0.35
                axes.text(
                    head, layer, f"{grid[layer, head]:.1f}\n({counts[layer, head]})", ha="center", va="center",
                    fontsize=7, color="white" if strong else "#222",
                )  # fmt: skip
    axes.set_xticks(range(layout.heads))
    axes.set_yticks(range(layout.layers))
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.set_title("Learned weight per head (number of components)", fontsize=11)
    figure.colorbar(shown, ax=axes, label="mean weight; 1 is unchanged", shrink=0.9)
    return _save(figure, path)


def spectra(bases: SpectralBases, energy: float, path: str | Path) -> Path:
    """Cumulative explained variance of every head, coloured by layer, and how many components reach `energy`."""
    layout, kept = bases.layout, bases.truncate(energy=energy)
    figure = _figure(10, 4)
    left, right = figure.subplots(1, 2, width_ratios=(1.4, 1))
    colours = colormaps["viridis"]
    longest = 1
    for unit in layout.select("head"):
        curve = bases.explained_variance_ratio(unit).cumsum(0).numpy()
        shade = colours(unit.layer / max(1, layout.layers - 1))
        left.plot(np.arange(1, len(curve) + 1), curve, color=shade, alpha=0.55, lw=1.1)
        longest = max(longest, len(curve))
    left.axhline(energy, color=ORANGE, lw=1.2, ls="--")
    left.text(
        longest,
        energy - 0.015,
        f"{energy:.0%} of the variance",
        color=ORANGE,
        ha="right",
        va="top",
        fontsize=9,
    )
    left.set_xscale("log")
    ticks = [k for k in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if k <= longest]
    left.set_xticks(ticks, [str(k) for k in ticks])
    left.minorticks_off()
    shades = ScalarMappable(Normalize(0, max(1, layout.layers - 1)), colours)
    figure.colorbar(shades, ax=left, label="layer", pad=0.01)
    left.set_xlabel("principal components kept")
    left.set_ylabel("explained variance of the head")
    left.set_ylim(top=1.01)
    left.set_title("Every head lies on few components", loc="left", fontsize=11)
    for unit in layout.select("head"):
        aside = (unit.head - (layout.heads - 1) / 2) * 0.7 / layout.heads  # one dot per head, side by side
        shade = colours(unit.layer / max(1, layout.layers - 1))
        right.scatter(unit.layer + aside, len(kept.components(unit)), color=shade, s=22, lw=0)
    right.set_xticks(range(layout.layers), minor=layout.layers > 24)
    right.set_xlabel("layer (one dot per head)")
    right.set_ylabel("components")
    right.set_ylim(bottom=0)
    right.set_title(f"Components that hold {energy:.0%} of the variance", loc="left", fontsize=11)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


def reread(
    images: Sequence[Image], labels: Tensor, before: Tensor, after: Tensor, path: str | Path, count: int = 30
) -> Path:
    """The first `count` images misread before, with what was read before and after; not chosen by what came after."""
    wrong = (before != labels).nonzero().flatten()[:count].tolist()
    columns = 10
    rows = max(1, -(-len(wrong) // columns))
    figure = _figure(columns, 1.25 * rows + 0.6)
    figure.suptitle(
        "What the model misread, and what it reads after the fit (green: now right, orange: still wrong)",
        fontsize=12,
    )
    for place, axes in enumerate(np.atleast_1d(figure.subplots(rows, columns)).flat):
        _bare(axes)
        if place < len(wrong):
            index = wrong[place]
            axes.imshow(images[index], interpolation="nearest")
            right = bool(after[index] == labels[index])
            axes.set_title(
                f"{int(before[index])} → {int(after[index])}", fontsize=11, pad=3, color=GREEN if right else ORANGE,
                weight="bold",
            )  # fmt: skip
    return _save(figure, path)


def component_ends(
    residual: ResiDual, cache: UnitCache, images: Sequence[Image], path: str | Path, count: int = 10
) -> Path:
    """Images at both ends of the head component that the fit moved most.

    Moved most: |weight - 1| times the spread of the component's coefficient over the cache, which is how far it moves
    embeddings. `images` are indexed by the cache's ids.
    """
    constants = residual.units["head"]
    terms = cache.terms(slice(None))
    named = {name: value.cpu() for name, value in constants.named_buffers()}
    basis = named.pop("basis")
    with torch.no_grad():
        c = coefficients(terms.z["head"], terms.scale, terms.mean, **named)
    weight = residual.component_weight().detach().cpu()[: len(basis)]
    j = int(((weight - 1).abs() * c.std(0)).argmax())
    unit_index = int(torch.searchsorted(named["unit_offsets"], j, right=True)) - 1
    unit = residual.layout[residual.layout.span("head").start + unit_index]
    component = j - int(named["unit_offsets"][unit_index])
    order = c[:, j].argsort().tolist()
    figure = _figure(count, 3.3)
    figure.suptitle(
        f"The component that moved most: layer {unit.layer}, head {unit.head}, component {component}, "
        f"weight {float(weight[j]):+.2f} (1 is unchanged)\n"
        "images with its lowest coefficients above, its highest below",
        fontsize=11,
    )
    grid = figure.subplots(2, count)
    for axes, row in zip(grid.flat, order[:count] + order[-count:], strict=True):
        _bare(axes)
        axes.imshow(images[int(cache.ids[row])], interpolation="nearest")
        axes.set_title(f"{float(c[row, j]):+.2f}", fontsize=8, color=GREY, pad=2)
    return _save(figure, path)
