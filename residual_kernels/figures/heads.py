"""What are the heads like?

Values by layer and head, spectra, dimensions, what heads share and what they are worth.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import CenteredNorm, Normalize
from matplotlib.figure import Figure
from torch import Tensor

from residual_kernels.analysis.selection import Curve
from residual_kernels.bases.spectral_bases import OUTPUT, SpectralBases
from residual_kernels.figures.style import (
    BLUE,
    CELLS,
    CELLS_FROM_ZERO,
    DEPTH,
    DIVERGING,
    GREEN,
    GREY,
    INK,
    ORANGE,
    SEQUENTIAL,
    SERIES,
    cell_ink,
    cells,
    colour_bar,
    new_figure,
    percents,
    plain_log,
    styled,
)
from residual_kernels.towers import UnitLayout

WRITTEN = 220  # cells of a map that hold numbers at most


@styled
def unit_map(
    layout: UnitLayout,
    values: Mapping[int, float],
    title: str = "",
    *,
    centre: float | None = None,
    form: str = "{:.2f}",
    factor: float = 1.0,
    below: Mapping[int, int] | None = None,
) -> Figure:
    """One cell per head, layers down, with a column of MLPs where they have values.

    Args:
        values: of units, by layout index.
        centre: the middle of a diverging scale; a scale from zero without it.
        form, factor: how a value is written, after it was multiplied by `factor`.
        below: a number to write below a unit's value, in brackets.
    """
    layers, heads = layout.layers, layout.heads
    grid = np.full((layers, heads + 1), np.nan)
    counts = {}
    for unit in layout:
        if unit.index in values and unit.layer is not None:
            column = heads if unit.head is None else unit.head
            grid[unit.layer, column] = values[unit.index]
            counts[unit.layer, column] = None if below is None else below[unit.index]
    if np.isnan(grid[:, heads]).all():
        grid = grid[:, :heads]
    figure = new_figure(1.8 + 0.62 * grid.shape[1], 1.3 + (0.42 if below is None else 0.5) * layers)
    axes = figure.add_subplot()
    is_written = grid.size <= WRITTEN  # then colours are light, so that black numbers stand out on every cell
    if centre is None:
        scale, norm = (CELLS_FROM_ZERO if is_written else SEQUENTIAL), Normalize(0, np.nanmax(grid) or 1)
    else:
        scale, norm = (CELLS if is_written else DIVERGING), CenteredNorm(centre)
    drawn = axes.imshow(grid, cmap=scale, norm=norm, aspect="auto")
    if is_written:
        for layer, column in np.argwhere(~np.isnan(grid)):
            text, count = written(form, factor * grid[layer, column]), counts[layer, column]
            axes.text(
                column,
                layer,
                text if count is None else f"{text}\n({count})",
                ha="center",
                va="center",
                fontsize=8 if count is None else 7,
                color=cell_ink(drawn.cmap, float(np.asarray(drawn.norm(grid[layer, column])))),
            )
    labels = [str(head) for head in range(heads)] + ["MLP"] * (grid.shape[1] - heads)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_yticks(range(layers), [str(layer) for layer in range(layers)])
    cells(axes)
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.set_title(title)
    bar = colour_bar(figure, drawn, axes, shrink=0.9)
    bar.ax.yaxis.set_major_formatter(lambda value, _: written(form, factor * value))
    return figure


def written(form: str, value: float) -> str:
    """A number with a true minus sign, and no sign before zero."""
    text = form.format(value)
    return text.lstrip("+-") if float(text) == 0 else text.replace("-", "−")


def _depth(layout: UnitLayout, layer: int | None) -> tuple[float, ...]:
    """The colour of a layer; units of no layer have the first's."""
    return DEPTH((layer or 0) / max(1, layout.layers - 1))


def _draw_spectra(
    figure: Figure, axes: Axes, bases: SpectralBases, energy: float, kind: str = "head"
) -> None:
    part = bases.parts[kind]
    layers = [None] if kind == OUTPUT else [unit.layer for unit in bases.layout.select(kind)]
    for place, layer in enumerate(layers):
        curve = part.ratio(place).cumsum(0).numpy()
        colour = BLUE if layer is None else _depth(bases.layout, layer)
        axes.plot(range(1, len(curve) + 1), curve, color=colour, alpha=0.6, lw=1.1)
    axes.axhline(energy, color=ORANGE, lw=1.2, ls="--")
    axes.text(
        1, 0.02, f"dashed: {energy:.0%} of the variance", color=ORANGE, va="bottom", fontsize=9
    )  # below every curve
    plain_log(axes, "x")
    axes.set_ylim(0, 1.03)
    percents(axes.yaxis)
    axes.set_xlabel("principal components kept")
    owner = {"head": "head", "mlp": "MLP", OUTPUT: "output"}.get(kind, "unit")
    axes.set_ylabel(f"share of the {owner}'s variance")
    if layers != [None]:
        scale = ScalarMappable(Normalize(0, max(1, bases.layout.layers - 1)), DEPTH)
        colour_bar(figure, scale, axes, label="layer")


@styled
def spectra(bases: SpectralBases, energy: float = 0.99, kind: str = "head") -> Figure:
    """Cumulative explained variance of every head, or unit of another kind, coloured by layer."""
    figure = new_figure(7.5, 4.4)
    _draw_spectra(figure, figure.add_subplot(), bases, energy, kind)
    return figure


@styled
def spectra_and_counts(bases: SpectralBases, energy: float = 0.9) -> Figure:
    """:func:`spectra`, and beside them how many components of every head reach `energy`."""
    layout, kept = bases.layout, bases.truncate(energy=energy)
    figure = new_figure(10, 4)
    left, right = figure.subplots(1, 2, width_ratios=(1.4, 1))
    _draw_spectra(figure, left, bases, energy)
    left.set_title("Every head lies on few components")
    for unit in layout.select("head"):
        count = len(kept.components(unit))
        right.scatter(aside(layout, unit), count, color=_depth(layout, unit.layer), s=22, lw=0)
    right.set_xticks(range(layout.layers), minor=layout.layers > 24)
    right.set_xlabel("layer (one dot per head)")
    right.set_ylabel("components")
    right.set_ylim(bottom=0)
    right.set_title(f"Components for {energy:.0%} of the variance")
    return figure


def aside(layout: UnitLayout, unit) -> float:
    """Where a head's mark stands: its layer, a little to the side so that the layer's heads stand side by
    side."""
    return unit.layer + (unit.head - (layout.heads - 1) / 2) * 0.6 / layout.heads


@styled
def dimensions(layout: UnitLayout, counts: Mapping[str, Tensor]) -> Figure:
    """Dimensions of every head by depth, with the layers' medians.

    `counts` has [R] numbers for each of at most three ways of counting.
    """
    figure = new_figure(7.5, 4.4)
    axes = figure.add_subplot()
    places = [aside(layout, unit) for unit in layout.select("head")]
    for (name, values), colour, marker in zip(counts.items(), (BLUE, GREEN, ORANGE), "osD", strict=False):
        axes.scatter(places, values.numpy(), color=colour, marker=marker, s=14, alpha=0.35, lw=0)
        medians = values.double().view(layout.layers, layout.heads).nanmedian(1).values.numpy()
        axes.plot(range(layout.layers), medians, color=colour, marker=marker, lw=2, label=name)
    plain_log(axes, "y")
    axes.set_xlabel("layer (lines: the layer's median, faint: its heads)")
    axes.set_ylabel("dimensions")
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=3, fontsize=9)
    return figure


@styled
def similarity(layout: UnitLayout, matrix: Tensor) -> Figure:
    """Normalised spectral cosine of every two of the last S heads, [S, S]."""
    figure = new_figure(6.6, 5.6)
    axes = figure.add_subplot()
    drawn = axes.imshow(matrix.numpy(), cmap=SEQUENTIAL, vmin=0, vmax=1)
    units = layout.select("head")[-len(matrix) :]
    layers = torch.tensor([unit.layer for unit in units])
    ends = torch.unique_consecutive(layers, return_counts=True)[1].cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    for at in starts[1:]:
        axes.axhline(at - 0.5, color="white", lw=0.8)
        axes.axvline(at - 0.5, color="white", lw=0.8)
    middle = [(start + end - 1) / 2 for start, end in zip(starts, ends, strict=True)]
    names = [str(units[start].layer) for start in starts]
    axes.set_xticks(middle, names)
    axes.set_yticks(middle, names)
    cells(axes)
    axes.set_xlabel("head, by layer")
    axes.set_ylabel("head, by layer")
    colour_bar(figure, drawn, axes, label="normalised spectral cosine", shrink=0.8)
    return figure


@styled
def selection(curves: Sequence[Curve], heads: int, whole: float) -> Figure:
    """Accuracy when only the best of `heads` heads by each score are kept; `whole` is the whole model's."""
    figure = new_figure(7.5, 4.4)
    axes = figure.add_subplot()
    styles = iter(SERIES)
    for curve in curves:
        share = np.array(curve.kept) / heads
        if curve.low is not None and curve.high is not None:
            axes.fill_between(share, curve.low, curve.high, color=GREY, alpha=0.2, lw=0)
            axes.plot(share, curve.accuracy, color=GREY, ls=":", marker="o", mfc="white", label=curve.name)
        else:
            colour, marker = next(styles, (GREY, "x"))
            axes.plot(share, curve.accuracy, color=colour, marker=marker, lw=2, label=curve.name)
    axes.axhline(whole, color=INK, lw=1, ls="--")
    axes.text(1, whole, "whole model", ha="right", va="bottom", fontsize=9)
    plain_log(axes, "x")
    percents(axes.xaxis)
    percents(axes.yaxis)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("share of the heads kept")
    axes.set_ylabel("accuracy")
    axes.legend(frameon=False, loc="lower right")
    return figure
