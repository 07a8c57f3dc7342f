"""The figures once more as still pictures, drawn by matplotlib: PNG for slides, SVG for papers."""

from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import CenteredNorm, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from residual_kernels.analysis.weights import Component
from residual_kernels.data.images import Images
from residual_kernels.files import atomic_path
from residual_kernels.pictures import BLUE, GREEN, GREY, ORANGE
from residual_kernels.report.charts import accuracy_range, classes_shown
from residual_kernels.report.facts import ENERGY, Facts, Outcome
from residual_kernels.report.names import component_name, percent, short, signed
from residual_kernels.report.thumbnails import cropped

DPI = 130
PURPLE, SKY, YELLOW = "#CC79A7", "#56B4E9", "#E69F00"  # Okabe and Ito's, as in pictures.py
SEQUENTIAL = LinearSegmentedColormap.from_list("sequential", ["#f4f6f8", "#8dbbdc", BLUE, "#06304f"])
DIVERGING = LinearSegmentedColormap.from_list("diverging", ["#8f3d00", ORANGE, "#f1f1ef", BLUE, "#003f66"])
DEPTH = LinearSegmentedColormap.from_list("depth", ["#a9cfe8", BLUE, "#06304f"])
PLAIN = {  # class names may hold a dollar sign, and letters stay letters in an SVG
    "text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "residual_kernels", "font.size": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left", "axes.titlesize": 12,
}  # fmt: skip


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Writes NAME.png and NAME.svg, the same bytes for the same numbers."""
    paths = []
    for form, metadata in (("png", {}), ("svg", {"Date": None})):
        path = folder / f"{name}.{form}"
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format=form, dpi=DPI, metadata=metadata)
        figure.set_layout_engine("none")  # laid out once
        paths.append(path)
    return paths


def _percents(axis) -> None:
    axis.set_major_formatter(lambda value, _: f"{100 * value:g}%")


def _plain_log(axes: Axes, which: str) -> None:
    """A logarithmic axis ("x" or "y") whose ticks are 1, 2, 5, 10 ... as plain numbers."""
    axes.set(**{f"{which}scale": "log"})
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:g}")


def class_changes(facts: Facts) -> Figure:
    before, after = facts.before.class_accuracy.numpy(), facts.after.class_accuracy.numpy()
    order = sorted(classes_shown(facts), key=lambda k: float(after[k] - before[k]))
    figure = _figure(7.5, 1.3 + 0.32 * len(order))
    axes = figure.add_subplot()
    for row, k in enumerate(order):
        axes.plot([before[k], after[k]], [row, row], color="#cfd4da", lw=3, zorder=1, solid_capstyle="round")
    rows = range(len(order))
    axes.scatter(
        before[order], rows, s=52, facecolor="white", edgecolor=GREY, lw=1.6, zorder=2, label="without"
    )
    axes.scatter(after[order], rows, s=56, color=BLUE, zorder=3, label="with the adapter")
    axes.set_yticks(rows, [short(facts.class_names[k]) for k in order])
    axes.set_xlim(accuracy_range(facts, order))
    _percents(axes.xaxis)
    axes.set_xlabel("accuracy")
    axes.grid(axis="x", color="#eceef0")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return figure


def confusion(facts: Facts) -> Figure:
    shown = classes_shown(facts)
    size = 2.2 + 0.27 * len(shown)
    figure = _figure(2 * size + 1, size)
    for axes, outcome, title in zip(
        figure.subplots(1, 2, sharey=True), (facts.before, facts.after), ("without", "with"), strict=True
    ):
        drawn = _confusion(axes, outcome, shown, [short(facts.class_names[k], 18) for k in shown])
        axes.set_title(f"{title} the adapter: {percent(outcome.accuracy)} right")
    figure.axes[0].set_ylabel("true class")
    figure.colorbar(drawn, ax=figure.axes, shrink=0.7, format=lambda value, _: f"{100 * value:g}%")
    return figure


def _confusion(axes: Axes, outcome: Outcome, shown: list[int], names: list[str]):
    table = outcome.confusion[shown]
    share = (table / table.sum(1, keepdim=True))[:, shown].numpy()
    drawn = axes.imshow(share, cmap=SEQUENTIAL, vmin=0, vmax=1)
    axes.set_xticks(range(len(shown)), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(shown)), names)
    axes.tick_params(length=0)
    axes.set_xlabel("label given")
    axes.spines[:].set_visible(False)
    if len(shown) <= 12:
        for row in range(len(shown)):
            for column in range(len(shown)):
                value = float(share[row, column])
                if value >= 0.005:
                    axes.text(
                        column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8,
                        color="white" if value > 0.45 else "#222",
                    )  # fmt: skip
    return drawn


def _written(form: str, value: float) -> str:
    """A number with a true minus sign, and no sign before zero."""
    text = form.format(value)
    return text.lstrip("+-") if float(text) == 0 else text.replace("-", "−")


def unit_grid(
    facts: Facts, values: dict[int, float], title: str, *, centre: float | None, form: str, shift: float = 1
) -> Figure:
    """One cell per head, layers down, with an MLP column where MLPs have a value; `centre` of a diverging scale."""
    layers, heads = facts.layout.layers, facts.layout.heads
    grid = np.full((layers, heads + 1), np.nan)
    for unit in facts.layout:
        if unit.index in values and unit.layer is not None:
            grid[unit.layer, heads if unit.head is None else unit.head] = values[unit.index]
    if np.isnan(grid[:, heads]).all():
        grid = grid[:, :heads]
    figure = _figure(1.8 + 0.62 * grid.shape[1], 1.3 + 0.42 * layers)
    axes = figure.add_subplot()
    if centre is None:
        drawn = axes.imshow(grid, cmap=SEQUENTIAL, norm=Normalize(0, np.nanmax(grid) or 1), aspect="auto")
    else:
        drawn = axes.imshow(grid, cmap=DIVERGING, norm=CenteredNorm(centre), aspect="auto")
    if grid.size <= 220:
        for layer, column in np.argwhere(~np.isnan(grid)):
            depth = float(drawn.norm(grid[layer, column]))
            strong = depth > 0.6 if centre is None else abs(depth - 0.5) > 0.28
            axes.text(
                column, layer, _written(form, shift * grid[layer, column]), ha="center",
                va="center", fontsize=8, color="white" if strong else "#222",
            )  # fmt: skip
    labels = [str(head) for head in range(heads)] + ["MLP"] * (grid.shape[1] - heads)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_yticks(range(layers), [str(layer) for layer in range(layers)])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.set_title(title)
    bar = figure.colorbar(drawn, ax=axes, shrink=0.9)
    bar.formatter = lambda value, _: _written(form, shift * value)
    bar.outline.set_visible(False)
    bar.update_ticks()
    return figure


def spectra(facts: Facts) -> Figure:
    figure = _figure(7.5, 4.4)
    axes = figure.add_subplot()
    last = max(1, facts.layout.layers - 1)
    for unit in facts.heads:
        curve = facts.bases.explained_variance_ratio(unit).cumsum(0).numpy()
        axes.plot(range(1, len(curve) + 1), curve, color=DEPTH(unit.layer / last), alpha=0.6, lw=1.1)
    axes.axhline(ENERGY, color=ORANGE, lw=1.2, ls="--")
    axes.text(1, ENERGY - 0.01, f"{ENERGY:.0%} of the variance", color=ORANGE, va="top", fontsize=9)
    _plain_log(axes, "x")
    axes.set_ylim(0, 1.03)
    _percents(axes.yaxis)
    axes.set_xlabel("principal components kept")
    axes.set_ylabel("share of the head's variance")
    _depth_bar(figure, axes, last)
    return figure


def _depth_bar(figure: Figure, axes: Axes, last: int) -> None:
    bar = figure.colorbar(ScalarMappable(Normalize(0, last), DEPTH), ax=axes, label="layer", pad=0.01)
    bar.outline.set_visible(False)


def dimension(facts: Facts) -> Figure:
    figure = _figure(7.5, 4.4)
    axes = figure.add_subplot()
    layers, heads = facts.layout.layers, facts.layout.heads
    aside = [unit.layer + (unit.head - (heads - 1) / 2) * 0.6 / heads for unit in facts.heads]
    for name, values, colour, marker in (
        (f"components for {ENERGY:.0%} of the variance", facts.linear, BLUE, "o"),
        ("participation ratio", facts.participation, GREEN, "s"),
        ("TwoNN", facts.nonlinear, ORANGE, "D"),
    ):
        axes.scatter(aside, values.numpy(), color=colour, marker=marker, s=14, alpha=0.35, lw=0)
        medians = values.double().view(layers, heads).nanmedian(1).values.numpy()
        axes.plot(range(layers), medians, color=colour, marker=marker, lw=2, label=name)
    _plain_log(axes, "y")
    axes.set_xlabel("layer (lines: the layer's median, faint: its heads)")
    axes.set_ylabel("dimensions")
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=3, fontsize=9)
    return figure


def similarity(facts: Facts) -> Figure:
    figure = _figure(6.6, 5.6)
    axes = figure.add_subplot()
    drawn = axes.imshow(facts.similarity.numpy(), cmap=SEQUENTIAL, vmin=0, vmax=1)
    heads, units = facts.layout.heads, facts.heads[-len(facts.similarity) :]
    starts = range(0, len(units), heads)
    for at in starts[1:]:
        axes.axhline(at - 0.5, color="white", lw=0.8)
        axes.axvline(at - 0.5, color="white", lw=0.8)
    middle = [start + (heads - 1) / 2 for start in starts]
    names = [str(units[start].layer) for start in starts]
    axes.set_xticks(middle, names)
    axes.set_yticks(middle, names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("head, by layer")
    axes.set_ylabel("head, by layer")
    bar = figure.colorbar(drawn, ax=axes, shrink=0.8, label="normalised spectral cosine")
    bar.outline.set_visible(False)
    return figure


def selection(facts: Facts) -> Figure:
    figure = _figure(7.5, 4.4)
    axes = figure.add_subplot()
    styles = iter(zip((BLUE, GREEN, PURPLE, SKY, YELLOW), "osD^P", strict=True))
    for curve in facts.curves:
        share = np.array(curve.kept) / len(facts.heads)
        if curve.low is not None:
            axes.fill_between(share, curve.low, curve.high, color=GREY, alpha=0.2, lw=0)
            axes.plot(share, curve.accuracy, color=GREY, ls=":", marker="o", mfc="white", label=curve.name)
        else:
            colour, marker = next(styles, (GREY, "x"))
            axes.plot(share, curve.accuracy, color=colour, marker=marker, lw=2, label=curve.name)
    axes.axhline(facts.before.accuracy, color="#222", lw=1, ls="--")
    axes.text(1, facts.before.accuracy, "whole model", ha="right", va="bottom", fontsize=9)
    _plain_log(axes, "x")
    _percents(axes.xaxis)
    _percents(axes.yaxis)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("share of the heads kept")
    axes.set_ylabel("accuracy")
    axes.legend(frameon=False)
    return figure


def component_strip(facts: Facts, component: Component, ids: list[int], pictures: Images) -> Figure:
    """Images with the component's highest coefficients above, its lowest below, and its words where it has some."""
    place = facts.ends.indices.index(component.index)
    sides = (
        ("high", facts.ends.high[place].tolist(), facts.ends.high_values[place].tolist()),
        ("low", facts.ends.low[place].tolist(), facts.ends.low_values[place].tolist()),
    )
    words = facts.words.get(component.index, ((), ()))
    columns, tall = len(sides[0][1]), 1.62  # of a row: caption, image, coefficient
    figure = _figure(0.95 * columns + 0.2, 0.95 * (2 * tall + 0.4) + 0.2)
    axes = figure.add_subplot()
    for line, ((end, rows, values), side) in enumerate(zip(sides, words, strict=True)):
        top = line * tall
        axes.text(0, top - 0.08, f"{end} end" + (f": {', '.join(side)}" if side else ""), fontsize=9)
        for column, (row, value) in enumerate(zip(rows, values, strict=True)):
            image = np.asarray(cropped(pictures.picture(ids[row])[0], 96))
            axes.imshow(
                image, extent=(column, column + 0.95, top + 0.95, top), interpolation="nearest", zorder=2
            )
            axes.text(column + 0.475, top + 1.12, signed(value), ha="center", fontsize=7, color=GREY)
    name = f"{component_name(component)}: weight {signed(component.weight).lstrip('+')} (1 is unchanged)"
    axes.text(0, -0.5, name, fontsize=11)
    axes.set(xlim=(0, columns), ylim=(2 * tall - 0.4, -0.8), aspect="equal")
    axes.set_axis_off()
    return figure


def draw(facts: Facts, folder: Path, ids: list[int], pictures: Images | None) -> list[Path]:
    """Writes every figure that these facts have into a folder, and returns the paths."""
    made = {
        "classes": class_changes, "confusion": confusion, "spectra": spectra, "dimension": dimension,
        "similarity": similarity,
    }  # fmt: skip
    if facts.curves:
        made["selection"] = selection
    paths = []
    with rc_context(PLAIN):
        for name, make in made.items():
            paths += save(make(facts), folder, name)
        for name, values, title, options in grids(facts):
            paths += save(unit_grid(facts, values, title, **options), folder, name)
        if pictures is not None and facts.ends is not None:
            for name, components in (("raised", facts.raised), ("faded", facts.faded)):
                for place, component in enumerate(components[:3], 1):
                    figure = component_strip(facts, component, ids, pictures)
                    paths += save(figure, folder, f"{name}-{place}")
    return paths


def grids(facts: Facts) -> list[tuple[str, dict[int, float], str, dict]]:
    """(name, value of a unit, title, how it is drawn) of the weight maps that these facts have."""
    found = []
    if not facts.mapped:  # the token embedding alone has no place on a map of layers and heads
        return found
    if facts.unit_weight:
        found.append(
            ("weights", facts.unit_weight, "mean weight (1 is unchanged)", {"centre": 1.0, "form": "{:.2f}"})
        )
    if facts.unit_effect:
        found.append(
            ("reach", facts.unit_effect, "how far the weights move an embedding", {"centre": None, "form": "{:.2f}"})
        )  # fmt: skip
    if facts.unit_lost:
        title = "accuracy lost when the weights return to 1, in points"
        found.append(
            ("lost", facts.unit_lost, title, {"centre": 0.0, "form": "{:+.1f}", "shift": 100}),
        )
    return found
