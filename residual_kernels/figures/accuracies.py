"""How were the images labelled? Accuracies of classes and methods, and what is taken for what."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from residual_kernels.figures.style import (
    BLUE,
    GREY,
    LINE,
    PALE,
    PAPER,
    SEQUENTIAL,
    STRONG_LINE,
    bare,
    cell_ink,
    cells,
    colour_bar,
    ink_on,
    new_figure,
    percents,
    styled,
)

OURS = ("fine", "full")
WRITTEN = 12  # classes of a confusion matrix whose cells hold numbers


@styled
def class_changes(names: Sequence[str], before: Tensor, after: Tensor) -> Figure:
    """One line per class from its accuracy before to its accuracy after, the largest gain on top.

    Args:
        names: of K classes.
        before, after: [K] accuracies; a class without images has none and is left out.
    """
    change = (after - before).tolist()
    order = sorted((k for k in range(len(names)) if change[k] == change[k]), key=lambda k: change[k])
    without, adapted = before[order].numpy(), after[order].numpy()
    rows = np.arange(len(order))
    figure = new_figure(7.5, 1.3 + 0.32 * len(order))
    axes = figure.add_subplot()
    axes.hlines(rows, without, adapted, color=STRONG_LINE, lw=3, zorder=1, capstyle="round")
    axes.scatter(without, rows, s=52, facecolor=PAPER, edgecolor=GREY, lw=1.6, zorder=2, label="without")
    axes.scatter(adapted, rows, s=56, color=BLUE, zorder=3, label="with the adapter")
    axes.set_yticks(rows, [names[k] for k in order])
    lowest = min(float(without.min()), float(adapted.min()), 0.8)
    axes.set_xlim(int(10 * lowest) / 10 - 0.02, 1.02)
    percents(axes.xaxis)
    axes.set_xlabel("accuracy")
    axes.grid(axis="x", color=LINE)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return figure


@styled
def confusion(names: Sequence[str], counts: Tensor, title: str = "", *, of: Tensor | None = None) -> Figure:
    """Of the images of each class (a row), the share that got each label (a column).

    Args:
        names: of K classes.
        counts: [K, K] images of the row's class that were given the column's label.
        of: [K] images of the row's class, where labels are left out; the sums of the rows by default.
    """
    counts = counts.double()
    share = (counts / (counts.sum(1) if of is None else of)[:, None]).nan_to_num(0.0).numpy()
    size = 2.2 + 0.27 * len(names)
    figure = new_figure(size + 1.2, size)
    axes = figure.add_subplot()
    drawn = axes.imshow(share, cmap=SEQUENTIAL, vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    cells(axes)
    axes.set_xlabel("label given")
    axes.set_ylabel("true class")
    axes.set_title(title)
    if len(names) <= WRITTEN:
        for row, column in np.argwhere(share >= 0.005):
            value = share[row, column]
            axes.text(
                column,
                row,
                f"{100 * value:.0f}",
                ha="center",
                va="center",
                fontsize=8,
                color=cell_ink(SEQUENTIAL, value),
            )
    percents(colour_bar(figure, drawn, axes, shrink=0.7).ax.yaxis)
    return figure


@styled
def accuracy_bars(rows: Sequence[Mapping], title: str = "Accuracy on the test images") -> Figure:
    """One bar per method; `rows` hold "method", "accuracy" and "parameters", the learned numbers."""
    figure = new_figure(7, 0.55 * len(rows) + 1.2)
    axes = figure.add_subplot()
    for place, row in enumerate(reversed(rows)):
        ours = row["method"] in OURS
        axes.barh(place, row["accuracy"], height=0.7, color=BLUE if ours else PALE)
        learned = f"{row['parameters']:,} learned numbers" if row["parameters"] else "nothing learned"
        axes.text(
            row["accuracy"] + 0.01, place, f"{row['accuracy']:.1%}", va="center", fontsize=11, weight="bold"
        )
        axes.text(0.012, place, learned, va="center", fontsize=9, color="white" if ours else "black")
    axes.set_yticks(range(len(rows)), [row["method"] for row in reversed(rows)], fontsize=11)
    axes.set_xlim(0, 1.12)
    axes.spines["bottom"].set_bounds(0, 1)
    axes.set_xticks(np.linspace(0, 1, 6))
    percents(axes.xaxis)
    axes.set_title(title)
    return figure


@styled
def accuracy_table(columns: Sequence[str], lines: Sequence[tuple]) -> Figure:
    """A table of accuracies: a block of lines per tower, one per method, a column per data set.

    The best are bold.

    `lines` hold (tower, method, numbers learned, ((mean, deviation), ...) for every column).
    """
    towers = list(dict.fromkeys(line[0] for line in lines))
    rows = [row for tower in towers for row in (tower, *(line for line in lines if line[0] == tower))]
    left = 3.4  # room for method and count, in columns
    figure = new_figure(1.15 * (len(columns) + left), 0.34 * (len(rows) + 1) + 0.3)
    axes = figure.add_subplot()
    for place, name in enumerate(columns):
        axes.text(place + 0.5, -0.5, name, ha="center", va="center", fontsize=10, weight="bold")
    axes.text(-0.1, -0.5, "learned", ha="right", va="center", fontsize=9, color=GREY)
    for height, row in enumerate(rows):
        if isinstance(row, str):
            axes.text(-left, height + 0.5, row, va="center", fontsize=10, weight="bold")
            continue
        tower, method, numbers, found = row
        axes.text(-left + 0.15, height + 0.5, method, va="center", fontsize=10)
        axes.text(-0.1, height + 0.5, f"{numbers:,}", ha="right", va="center", fontsize=9, color=GREY)
        for place, (mean, spread) in enumerate(found):
            best = max(line[3][place][0] for line in lines if line[0] == tower)
            colour = SEQUENTIAL(0.05 + 0.85 * mean**3)
            axes.add_patch(Rectangle((place + 0.02, height + 0.04), 0.96, 0.92, color=colour))
            text = f"{mean:.1%}" + (f" ± {100 * spread:.1f}" if spread > 0 else "")
            axes.text(
                place + 0.5,
                height + 0.5,
                text,
                ha="center",
                va="center",
                fontsize=9.5,
                weight="bold" if mean == best else "normal",
                color=ink_on(colour),
            )
    axes.set_xlim(-left, len(columns))
    axes.set_ylim(len(rows), -1)
    bare(axes)
    return figure
