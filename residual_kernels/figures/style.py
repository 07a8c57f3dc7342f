"""What do all figures share?

One palette, one set of defaults, axes in plain numbers, and how a figure becomes a file.

The colours are four of Okabe and Ito's; colour-blind readers can tell any two of them apart. Scales run in
lightness, and can be read in grey too.
"""

import contextlib
import functools
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec

from matplotlib import rc_context, rcdefaults, rcParams
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from residual_kernels.files import atomic_path
from residual_kernels.visible import visible

BLUE, ORANGE, GREEN, SKY, GREY = "#0072B2", "#D55E00", "#009E73", "#56B4E9", "#6b7280"
INK, LINE, STRONG_LINE, PAPER, PALE = "#1b1e23", "#e5e2dc", "#cfccc5", "#ffffff", "#b8bec8"
SERIES = tuple(zip((BLUE, ORANGE, GREEN, SKY), "osD^", strict=True))  # colour and marker

SEQUENTIAL = LinearSegmentedColormap.from_list("sequential", ["#f4f6f8", "#8dbbdc", BLUE, "#06304f"])
DIVERGING = LinearSegmentedColormap.from_list("diverging", ["#8f3d00", ORANGE, "#f1f1ef", BLUE, "#003f66"])
# Scales of cells that hold numbers: black stands out from every colour of them by 7 to 1.
CELLS = LinearSegmentedColormap.from_list("cells", ["#e0894a", "#f6f5f3", "#4fa3d8"])
CELLS_FROM_ZERO = LinearSegmentedColormap.from_list("cells from zero", ["#f6f5f3", "#4fa3d8"])
DEPTH = LinearSegmentedColormap.from_list("depth", ["#8cc5ea", BLUE, "#0b4f7d"])  # first layer to last


@dataclass(frozen=True)
class Colours:
    """The colours of a figure that is drawn for a light page and for a dark one."""

    ink: str
    grey: str
    paper: str
    blue: str
    orange: str
    green: str
    cells: Colormap


ON_LIGHT = Colours(INK, GREY, PAPER, BLUE, ORANGE, GREEN, CELLS)
ON_DARK = Colours(
    ink="#e6edf3",
    grey="#9198a1",
    paper="#0d1117",
    blue=SKY,
    orange="#f08a3c",
    green="#2fbf91",
    cells=LinearSegmentedColormap.from_list("cells on dark", ["#d9762f", "#1d232b", "#3f9bd8"]),
)

DPI = 130
DEFAULTS: dict[Any, Any] = {  # names of classes may hold a dollar sign, and letters stay letters in an SVG
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "residual_kernels",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid.axis": "y",
    "grid.color": LINE,
}

Arguments = ParamSpec("Arguments")


@contextlib.contextmanager
def defaults() -> Iterator[None]:
    """A context in which matplotlib has this style's defaults, whatever it is set to outside."""
    with rc_context():
        rcdefaults()
        rcParams.update(DEFAULTS)
        yield


def _drawable(value: Any) -> Any:
    """The value with every text in it as fonts and SVG have it: names of classes may hold any sign."""
    if type(value) is str:
        return visible(value)
    if type(value) in (list, tuple):
        return type(value)(map(_drawable, value))
    if type(value) is dict:
        return {_drawable(key): _drawable(one) for key, one in value.items()}
    return value


def styled(draw: Callable[Arguments, Figure]) -> Callable[Arguments, Figure]:
    """A function that draws a figure, with the defaults of this style whatever matplotlib's own are."""

    @functools.wraps(draw)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Figure:
        with defaults():
            shown: Any = draw
            return shown(*map(_drawable, args), **{name: _drawable(one) for name, one in kwargs.items()})

    return call


class Picture(Figure):
    """A figure that a notebook shows, also where pyplot was never imported."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        with defaults():
            self.savefig(buffer, format="png", dpi=DPI * 0.6)
        return buffer.getvalue()


def new_figure(width: float, height: float, paper: str = PAPER) -> Figure:
    """An empty figure of a size in inches."""
    return Picture(figsize=(width, height), layout="constrained", facecolor=paper)


def save(figure: Figure, folder: Path, name: str, formats: Iterable[str] = ("png", "svg")) -> list[Path]:
    """Writes NAME.png and NAME.svg into a folder: the same bytes for the same numbers. Returns the paths."""
    paths = []
    with defaults():
        for form in formats:
            path = folder / f"{name}.{form}"
            with atomic_path(path) as temporary:
                figure.savefig(
                    temporary, format=form, dpi=DPI, metadata={"Date": None} if form == "svg" else {}
                )
            figure.set_layout_engine("none")  # laid out once
            paths.append(path)
    return paths


def percents(axis: Axis) -> None:
    """Writes an axis of shares in per cent."""
    axis.set_major_formatter(lambda value, _: f"{100 * value:g}%")


def plain_log(axes: Axes, which: str) -> None:
    """Makes an axis ("x" or "y") logarithmic, with ticks 1, 2, 5, 10 ... as plain numbers."""
    axes.set(**{f"{which}scale": "log"})
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:g}")


def bare(axes: Axes) -> None:
    """Takes ticks and frame away."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def cells(axes: Axes) -> None:
    """A grid of cells has labels, but no ticks and no frame."""
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def colour_bar(figure: Figure, drawn: ScalarMappable, axes: Axes, label: str = "", shrink: float = 1.0):
    """A colour bar without a frame."""
    bar = figure.colorbar(drawn, ax=axes, label=label, shrink=shrink, pad=0.015)
    bar.outline.set_visible(False)
    return bar


def ink_on(colour: tuple[float, ...]) -> str:
    """Black or white, whichever stands out more from a colour: 4.5 to 1 at least."""
    red, green, blue = (x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in colour[:3])
    return "#000000" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else "#ffffff"


def cell_ink(scale: Colormap, share: float) -> str:
    """Black or white for text on a cell whose place on a scale is `share`."""
    return ink_on(scale(share))
