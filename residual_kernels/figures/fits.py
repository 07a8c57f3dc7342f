"""How did a fit go?

Its epochs, the strengths of a convex fit, the candidates that competed, and learned weights.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from residual_kernels.figures.style import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    PALE,
    new_figure,
    percents,
    plain_log,
    styled,
)

if TYPE_CHECKING:
    from residual_kernels.train.results import FitResult
    from residual_kernels.train.tuning import TuneResult


@styled
def epochs(result: "FitResult") -> Figure:
    """Loss by epoch and, where there was validation, accuracy beside it.

    A dotted line marks the best epoch.
    """
    rows = result.history
    measured = any(row.val_accuracy is not None for row in rows)
    figure = new_figure(9.5 if measured else 5.5, 3.6)
    panels = figure.subplots(1, 2 if measured else 1, squeeze=False)[0]
    _line(panels[0], rows, "train_loss", "training", GREY, "s")
    if measured:
        _line(panels[0], rows, "val_loss", "validation", BLUE, "o")
        _line(panels[1], rows, "val_accuracy", "validation", BLUE, "o")
        _base(panels[1], result.base_accuracy)
        percents(panels[1].yaxis)
        panels[1].set_title("Accuracy")
    panels[0].set_title("Loss (nats)")
    for axes in panels:
        axes.axvline(
            result.best_epoch, color=ORANGE, lw=1.2, ls=":", label=f"best epoch ({result.best_epoch})"
        )
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False, fontsize=9)
    return figure


def _line(axes: Axes, rows: Sequence, name: str, label: str, colour: str, marker: str) -> None:
    known = [(row.epoch, getattr(row, name)) for row in rows if getattr(row, name) is not None]
    if known:
        axes.plot(*zip(*known, strict=True), color=colour, marker=marker, ms=4, label=label)


def _base(axes: Axes, value: float | None) -> None:
    if value is not None:
        axes.axhline(value, color=INK, lw=1, ls="--", label="untouched model")


@styled
def strengths(result: "FitResult") -> Figure:
    """Loss (with one standard error) and accuracy of a convex fit by how many numbers its penalty leaves
    free."""
    base, *tried = result.path
    figure = new_figure(9.5, 3.6)
    left, right = figure.subplots(1, 2)
    free = [one.freedom for one in tried]
    left.errorbar(
        free,
        [one.loss for one in tried],
        [one.error for one in tried],
        color=BLUE,
        marker="o",
        ms=4,
        capsize=2,
        label="fitted",
    )
    right.plot(free, [one.accuracy for one in tried], color=BLUE, marker="o", ms=4, label="fitted")
    _base(left, base.loss)
    _base(right, base.accuracy)
    left.set_title("Loss (nats)")
    right.set_title("Accuracy")
    percents(right.yaxis)
    for axes in (left, right):
        if result.freedom:
            axes.axvline(result.freedom, color=ORANGE, lw=1.2, ls=":", label="chosen")
        plain_log(axes, "x")
        axes.xaxis.set_major_locator(LogLocator())  # four decades and more: powers of ten alone
        axes.set_xlabel("weights left about free")
        axes.legend(frameon=False, fontsize=9)
    return figure


@styled
def candidates(result: "TuneResult") -> Figure:
    """Accuracy of every candidate on images that it was not fitted to.

    The winner is blue, the line is the model.
    """
    rows = list(reversed(result.table))
    figure = new_figure(7, 0.5 * len(rows) + 1.2)
    axes = figure.add_subplot()
    for place, one in enumerate(rows):
        won = one.name == result.winner
        axes.barh(place, one.accuracy, height=0.7, color=BLUE if won else PALE)
        axes.text(one.accuracy + 0.01, place, f"{one.accuracy:.1%}", va="center", weight="bold")
        learned = f"{one.numbers:,} numbers" if one.numbers else "nothing learned"
        axes.text(0.012, place, learned, va="center", fontsize=9, color="white" if won else "black")
    axes.axvline(result.base_accuracy, color=INK, lw=1, ls="--")
    axes.set_yticks(range(len(rows)), [one.name for one in rows])
    axes.set_xlim(0, 1.12)
    axes.set_xticks(np.linspace(0, 1, 6))
    percents(axes.xaxis)
    judged = "held-out training" if result.judged_by == "folds" else "validation"
    axes.set_title(f"Accuracy on {result.images:,} {judged} images")
    return figure


@styled
def weight_line(weights: Sequence[float]) -> Figure:
    """Learned weights by their place, where components have no layer and head: of the output,
    or of the embedding."""
    figure = new_figure(7.5, 3.6)
    axes = figure.add_subplot()
    axes.axhline(1, color=INK, lw=1, ls="--")
    axes.plot(range(len(weights)), weights, color=BLUE, marker="o", ms=3, lw=0)
    axes.set_xlabel("component, by falling variance")
    axes.set_ylabel("weight (1 is unchanged)")
    return figure
