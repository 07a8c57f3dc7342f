"""What do images show? Those at both ends of a component, and those that are read anew."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from PIL.Image import Image
from torch import Tensor

from residual_kernels.figures.style import GREEN, GREY, ORANGE, bare, new_figure, styled

NAMED = 3  # classes that a caption names


class End(NamedTuple):
    """One end of a component, as a figure shows it.

    Attributes:
        images: square ones.
        values: their coefficients.
        classes: the names of their classes; () where there are no labels.
        words: that describe the end; () where none does.
    """

    images: Sequence[Image]
    values: Sequence[float]
    classes: Sequence[str]
    words: Sequence[str]

    def caption(self, name: str) -> str:
        """Such as "high end: 6 four, 2 nine; words: an arrow"."""
        counts = Counter(self.classes).most_common()
        told = ", ".join(f"{count} {label}" for label, count in counts[:NAMED])
        parts = [f"{name} end" + (f": {told}" if told else "") + (" ..." if len(counts) > NAMED else "")]
        return "; ".join(parts + ([f"words: {', '.join(self.words)}"] if self.words else []))


@styled
def component_ends(title: str, high: End, low: End) -> Figure:
    """Images (square) at both ends of a component, with the classes and the words of each end.

    Args:
        title: above the figure.
        high: the images with the highest coefficients, highest first.
        low: those with the lowest, lowest first.
    """
    columns, tall = len(high.images), 1.62  # of a row: caption, image, coefficient
    figure = new_figure(0.95 * columns + 0.2, 0.95 * (2 * tall + 0.4) + 0.2)
    axes = figure.add_subplot()
    for line, (name, end) in enumerate((("high", high), ("low", low))):
        top = line * tall
        axes.text(0, top - 0.08, end.caption(name), fontsize=9)
        for column, (image, value) in enumerate(zip(end.images, end.values, strict=True)):
            axes.imshow(
                np.asarray(image),
                extent=(column, column + 0.95, top + 0.95, top),
                interpolation="nearest",
                zorder=2,
            )
            number = f"{value:+.2f}".replace("-", "−")
            axes.text(column + 0.475, top + 1.12, number, ha="center", fontsize=7, color=GREY)
    axes.text(0, -0.5, title, fontsize=11)
    axes.set(xlim=(0, columns), ylim=(2 * tall - 0.4, -0.8), aspect="equal")
    axes.set_axis_off()
    return figure


@styled
def rereadings(
    images: Sequence[Image], labels: Tensor, before: Tensor, after: Tensor, count: int = 30
) -> Figure:
    """The first `count` images misread before, with their true labels and those given before and after.

    Which images are shown does not depend on the labels given after.

    Args:
        images: N of them.
        labels, before, after: [N] true labels, and those given.
    """
    wrong = (before != labels).nonzero().flatten()[:count].tolist()
    columns = 10
    rows = max(1, -(-len(wrong) // columns))
    figure = new_figure(columns, 1.45 * rows + 0.6)
    figure.suptitle(
        "What the model misread: label before → after the fit (green: now right, orange: still wrong), "
        "truth below",
        fontsize=12,
    )
    for place, axes in enumerate(np.atleast_1d(figure.subplots(rows, columns)).flat):
        bare(axes)
        if place < len(wrong):
            index = wrong[place]
            axes.imshow(images[index], interpolation="nearest")
            right = bool(after[index] == labels[index])
            axes.set_title(
                f"{int(before[index])} → {int(after[index])}",
                fontsize=11,
                pad=3,
                loc="center",
                color=GREEN if right else ORANGE,
                weight="bold",
            )
            axes.set_xlabel(f"truth: {int(labels[index])}", fontsize=9, color=GREY, labelpad=2)
    return figure
