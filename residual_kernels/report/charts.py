"""Which figures does a report have?

Each drawn once: a PNG and an SVG in the folder, and the same SVG on the page.
"""

import io
import re
from collections.abc import Iterator

from matplotlib.figure import Figure

from residual_kernels import figures
from residual_kernels.analysis.weights import Component
from residual_kernels.data.images import Images
from residual_kernels.figures import style
from residual_kernels.report.facts import ENERGY, Facts
from residual_kernels.report.names import component_name, percent, short, signed
from residual_kernels.report.thumbnails import cropped

SIDE = 96  # pixels of an image in a figure
STRIPS = 3  # components raised and faded most that have a figure
THEMED = {  # colours that follow the page's theme, and their names in its style sheet
    style.BLUE: "blue",
    style.ORANGE: "orange",
    style.GREEN: "green",
    style.SKY: "sky",
    style.GREY: "grey",
    style.INK: "ink",
    style.LINE: "line",
    style.STRONG_LINE: "line-strong",
}


def on_page(facts: Facts) -> dict[str, Figure]:
    """The figures of the page, by name."""
    shown, layout = facts.classes_shown, facts.layout
    names = [short(facts.class_names[k]) for k in shown]
    before, after = facts.before, facts.after
    found = {
        "classes": figures.class_changes(names, before.class_accuracy[shown], after.class_accuracy[shown])
    }
    for name, outcome in (("without", before), ("with", after)):
        table = outcome.confusion[shown]
        title = f"{name} the adapter: {percent(outcome.accuracy)} right"
        found[f"confusion-{name}"] = figures.confusion(
            [short(facts.class_names[k], 18) for k in shown], table[:, shown], title, of=table.sum(1)
        )
    found["spectra"] = figures.spectra(facts.bases, ENERGY)
    found["dimension"] = figures.dimensions(
        layout,
        {
            f"components for {ENERGY:.0%} of the variance": facts.linear,
            "participation ratio": facts.participation,
            "TwoNN": facts.nonlinear,
        },
    )
    found["similarity"] = figures.similarity(layout, facts.similarity)
    if facts.curves:
        found["selection"] = figures.selection(facts.curves, len(facts.heads), before.accuracy)
    return found


def in_folder(facts: Facts, ids: list[int], pictures: Images | None) -> Iterator[tuple[str, Figure]]:
    """(name, figure) of what the page shows in another way: maps of the weights,
    and images at components' ends."""
    if facts.mapped:  # the token embedding alone has no place on a map of layers and heads
        for name, values, title, options in (
            ("weights", facts.unit_weight, "mean weight (1 is unchanged)", {"centre": 1.0}),
            ("reach", facts.unit_effect, "how far the weights move an embedding", {}),
            (
                "lost",
                facts.unit_lost,
                "accuracy lost when the weights return to 1, in points",
                {"centre": 0.0, "form": "{:+.1f}", "factor": 100},
            ),
        ):
            if values:
                yield name, figures.unit_map(facts.layout, values, title, **options)
    if pictures is not None and facts.ends is not None:
        for side, components in (("raised", facts.raised), ("faded", facts.faded)):
            for place, component in enumerate(components[:STRIPS], 1):
                yield f"{side}-{place}", _ends(facts, component, ids, pictures)


def _ends(facts: Facts, component: Component, ids: list[int], pictures: Images) -> Figure:
    ends = facts.of_components()[1]
    place = ends.indices.index(component.index)
    words = facts.words.get(component.index, ((), ()))
    sides = (
        (ends.high[place], ends.high_values[place], words[0]),
        (ends.low[place], ends.low_values[place], words[1]),
    )
    high, low = (
        figures.End(
            images=[cropped(pictures.picture(ids[row])[0], SIDE) for row in rows.tolist()],
            values=values.tolist(),
            classes=[facts.class_names[facts.labels[row]] for row in rows.tolist()],
            words=side,
        )
        for rows, values, side in sides
    )
    weight = signed(component.weight).lstrip("+")
    return figures.component_ends(f"{component_name(component)}: weight {weight} (1 is unchanged)", high, low)


def inline(figure: Figure, name: str) -> str:
    """A figure as an SVG element of an HTML page, in the colours of the page's theme;
    `name` keeps its ids apart."""
    buffer = io.StringIO()
    with style.defaults():
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>", "", text[text.index("<svg") :], flags=re.DOTALL
    )
    return re.sub(r"<[^>]*>", lambda found: _themed(found[0], name), text)


def _themed(tag: str, name: str) -> str:
    tag = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", tag)
    for colour, variable in THEMED.items():
        tag = tag.replace(colour.lower(), f"var(--{variable})")
    if not tag.startswith("<text"):  # text in the cells of a heat map keeps its colour, as the cells do
        tag = tag.replace(style.PAPER, "var(--paper)")
    return tag
