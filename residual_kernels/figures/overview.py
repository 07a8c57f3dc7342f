"""The library in one picture: what was misread, the parts that an embedding sums,
and one component with its weight."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL.Image import Image

from residual_kernels.figures.style import ON_DARK, ON_LIGHT, Colours, bare, new_figure, styled

LEFT = 0.015  # margin, a share of the width


@dataclass(frozen=True)
class Read:
    """An image with its true label and the labels given before and after."""

    image: Image
    truth: str
    before: str
    after: str


@dataclass(frozen=True)
class Sum:
    """What each part of a tower adds to the lead of one class over another, in logits.

    units: [L, H + 1] of the heads and, in the last column, of the MLPs. rest: of the token embedding and all
    else that belongs to no layer. `total` is their sum.
    """

    units: np.ndarray
    rest: float

    @property
    def total(self) -> float:
        return float(self.units.sum()) + self.rest


@dataclass(frozen=True)
class ShownEnds:
    """One component: its name, its learned weight, and images and a word of either end."""

    name: str
    weight: float
    high: Sequence[Image]
    low: Sequence[Image]
    high_word: str
    low_word: str


@styled
def overview(
    reads: Sequence[Read],
    accuracy: tuple[float, float],
    images: int,
    example: Read,
    sums: tuple[Sum, Sum],
    learned: int,
    ends: ShownEnds,
    dark: bool = False,
) -> Figure:
    """Three panels: images misread before, one image's embedding as a sum of its parts, and one component.

    Args:
        reads: images of the strip.
        accuracy: before and after, over all `images`.
        example: the image whose parts are shown.
        sums: before and after, for the lead of `example.truth` over `example.before`.
        learned: how many weights were learned.
        ends: of the component that is shown.
        dark: for a dark page.
    """
    colours = ON_DARK if dark else ON_LIGHT
    figure = new_figure(10, 6.2, colours.paper)
    figure.set_layout_engine("none")
    _strip(figure, colours, reads, accuracy, images)
    _sums(figure, colours, example, sums)
    _component(figure, colours, ends, learned)
    return figure


def _heading(figure: Figure, colours: Colours, left: float, top: float, text: str, below: str) -> None:
    figure.text(left, top, text, fontsize=13, weight="bold", va="top", color=colours.ink)
    figure.text(left, top - 0.045, below, fontsize=10, va="top", color=colours.grey)


def _picture(figure: Figure, image: Image, left: float, bottom: float, width: float) -> None:
    """A square image; places and width are shares of the figure."""
    height = width * figure.get_figwidth() / figure.get_figheight()
    axes = figure.add_axes((left, bottom, width, height))
    bare(axes)
    axes.imshow(image, interpolation="nearest")


def _strip(
    figure: Figure, colours: Colours, reads: Sequence[Read], accuracy: tuple[float, float], images: int
) -> None:
    _heading(
        figure,
        colours,
        LEFT,
        0.98,
        "Images that the model misread",
        f"the first {len(reads)} of them; over all {images:,} test images, accuracy rises from "
        f"{accuracy[0]:.1%} to {accuracy[1]:.1%}",
    )
    start, lines = 0.09, (0.69, 0.652, 0.614)
    for name, height in zip(("truth", "before", "after"), lines, strict=True):
        figure.text(LEFT, height, name, fontsize=10, va="center", color=colours.grey)
    step = (1 - LEFT - start) / len(reads)
    for place, one in enumerate(reads):
        left, width = start + place * step, step * 0.92
        _picture(figure, one.image, left, 0.725, width)
        after = colours.green if one.after == one.truth else colours.orange
        said_in = (one.truth, colours.grey), (one.before, colours.orange), (one.after, after)
        for (said, colour), height in zip(said_in, lines, strict=True):
            weight = "normal" if colour == colours.grey else "bold"
            figure.text(
                left + width / 2,
                height,
                said,
                fontsize=11,
                ha="center",
                va="center",
                color=colour,
                weight=weight,
            )


def _sums(figure: Figure, colours: Colours, example: Read, sums: tuple[Sum, Sum]) -> None:
    _heading(
        figure,
        colours,
        LEFT,
        0.545,
        "The embedding is a sum of heads and MLPs",
        f"what each adds for “{example.truth}” (blue) or “{example.before}” (orange), in logits",
    )
    _picture(figure, example.image, LEFT, 0.2, 0.1)
    reach = max(float(np.abs(one.units[:, :-1]).max()) for one in sums)
    told = zip((0.175, 0.405), sums, ("before", "after"), (example.before, example.after), strict=True)
    for left, one, name, read in told:
        axes = figure.add_axes((left, 0.125, 0.2, 0.285))
        _cells(axes, colours, one, reach, first=name == "before")
        axes.set_title(name, fontsize=10, loc="center", pad=4, color=colours.ink)
        figure.text(
            left + 0.1,
            0.045,
            f"sum {one.total:+.1f}: “{read}”".replace("-", "−"),
            fontsize=12,
            weight="bold",
            ha="center",
            va="center",
            color=colours.green if read == example.truth else colours.orange,
        )


def _cells(axes: Axes, colours: Colours, one: Sum, reach: float, first: bool) -> None:
    """Heads and MLPs by layer. Colours end at the largest value of a head; MLPs may lie beyond it."""
    axes.set_facecolor(colours.paper)
    axes.imshow(one.units, cmap=colours.cells, norm=Normalize(-reach, reach), aspect="auto")
    layers, columns = one.units.shape
    axes.set_xticks([(columns - 2) / 2, columns - 1], ["heads", "MLP"], fontsize=9)
    axes.set_yticks([0, layers - 1], ["layer 0", f"layer {layers - 1}"] if first else ["", ""], fontsize=9)
    axes.set_xticks(np.arange(0.5, columns - 1), minor=True)
    axes.set_yticks(np.arange(0.5, layers - 1), minor=True)
    axes.grid(which="minor", color=colours.paper, lw=1.5, axis="both")
    axes.axvline(columns - 1.5, color=colours.paper, lw=5)
    axes.tick_params(which="both", length=0, labelcolor=colours.ink)
    axes.spines[:].set_visible(False)


def _component(figure: Figure, colours: Colours, ends: ShownEnds, learned: int) -> None:
    left = 0.645
    _heading(
        figure,
        colours,
        left,
        0.545,
        "Each component has one weight",
        f"one of {learned:,}: {ends.name}",
    )
    for bottom, images, name, word in (
        (0.3, ends.high, "high", ends.high_word),
        (0.1, ends.low, "low", ends.low_word),
    ):
        figure.text(left, bottom + 0.125, f"{name} end: “{word}”", fontsize=11, color=colours.ink)
        for place, image in enumerate(images):
            _picture(figure, image, left + place * 0.0685, bottom, 0.065)
    weight = f"{ends.weight:.2f}".replace("-", "−")
    figure.text(
        left,
        0.045,
        f"weight 1 before, {weight} after",
        fontsize=12,
        weight="bold",
        va="center",
        color=colours.blue,
    )
