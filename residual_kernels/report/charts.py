"""The interactive figures, as plotly.js reads them. Colours are named, not fixed: the page fills them in for its theme.

A colour is "@blue", "@orange", "@green", "@grey", "@ink", "@line", or "@depth:0.4" (a layer, first to last); a scale is
"@sequential" or "@diverging". Text that is not ours goes through :func:`plain`, because plotly.js reads tags.
"""

import html
from typing import Any

import torch

from residual_kernels.report.facts import ENERGY, Facts
from residual_kernels.report.names import percent, points, short, unit_code, unit_name

CLASSES_SHOWN = 40  # of a confusion matrix and of the chart of classes
Chart = dict[str, Any]  # data, layout, and what the page adds: height in pixels


def plain(text: str) -> str:
    """Text as it is, for a place where plotly.js reads tags and entities."""
    return html.escape(text, quote=False)


def rounded(values: torch.Tensor, digits: int = 4) -> list:
    """A tensor as nested lists of short numbers; None for NaN, which JSON has not."""
    if values.ndim > 1:
        return [rounded(row, digits) for row in values]
    return [None if value != value else round(value, digits) for value in values.tolist()]


def classes_shown(facts: Facts) -> list[int]:
    """Classes of the class figures: all that have images, or those whose accuracy changed most, in the head's order."""
    present = (facts.counts > 0).nonzero().flatten().tolist()
    if len(present) <= CLASSES_SHOWN:
        return present
    change = (facts.after.class_accuracy - facts.before.class_accuracy).abs()
    return sorted(sorted(present, key=lambda k: -float(change[k]))[:CLASSES_SHOWN])


def accuracy_range(facts: Facts, classes: list[int]) -> tuple[float, float]:
    """An axis that holds these classes' accuracies, from a multiple of 10% to a little over 100%."""
    lowest = min(float(outcome.class_accuracy[classes].min()) for outcome in (facts.before, facts.after))
    return min(0.8, int(10 * lowest) / 10) - 0.02, 1.02


def class_changes(facts: Facts) -> Chart:
    """One line per class from its accuracy before to its accuracy after, the largest gain on top."""
    before, after = facts.before.class_accuracy, facts.after.class_accuracy
    order = sorted(classes_shown(facts), key=lambda k: float(after[k] - before[k]))
    names = [plain(short(facts.class_names[k])) for k in order]
    rows = list(range(len(order)))
    lines_x, lines_y = [], []
    for row, k in enumerate(order):
        lines_x += [float(before[k]), float(after[k]), None]
        lines_y += [row, row, None]
    hover = [
        f"<b>{plain(facts.class_names[k])}</b><br>{percent(float(before[k]))} → {percent(float(after[k]))} "
        f"({points(float(after[k] - before[k]))}, {int(facts.counts[k])} images)"
        for k in order
    ]
    shared = {"type": "scatter", "y": rows, "text": hover, "hoverinfo": "text"}
    return {
        "data": [
            {
                "type": "scatter", "mode": "lines", "x": lines_x, "y": lines_y, "hoverinfo": "skip",
                "line": {"color": "@line-strong", "width": 3}, "showlegend": False,
            },
            {
                **shared, "mode": "markers", "name": "without the adapter", "x": rounded(before[order]),
                "marker": {"size": 11, "color": "@surface", "line": {"color": "@grey", "width": 2}},
            },
            {
                **shared, "mode": "markers", "name": "with the adapter", "x": rounded(after[order]),
                "marker": {"size": 11, "color": "@blue"},
            },
        ],
        "layout": {
            "xaxis": {"title": {"text": "accuracy"}, "tickformat": ".0%", "range": list(accuracy_range(facts, order))},
            "yaxis": {"tickvals": rows, "ticktext": names, "automargin": True, "range": [-0.7, len(rows) - 0.3]},
        },
        "height": 110 + 30 * len(rows),
    }  # fmt: skip


def confusion(facts: Facts, after: bool) -> Chart:
    """Of the images of each class (a row), the share that got each label."""
    outcome, shown = facts.after if after else facts.before, classes_shown(facts)
    table = outcome.confusion[shown]
    share = (table / table.sum(1, keepdim=True))[:, shown]
    names = [plain(short(facts.class_names[k], 18)) for k in shown]
    written = [[f"{value:.0%}" if value >= 0.005 else "" for value in row] for row in share.tolist()]
    hover = [
        [
            f"<b>{plain(facts.class_names[true])}</b> called <b>{plain(facts.class_names[named])}</b><br>"
            f"{int(outcome.confusion[true, named])} of {int(facts.counts[true])} images"
            for named in shown
        ]
        for true in shown
    ]
    places = list(range(len(shown)))
    chart = {
        "data": [
            {
                "type": "heatmap", "z": rounded(share, 3), "x": places, "y": places, "hovertext": hover,
                "hoverinfo": "text", "colorscale": "@sequential", "zmin": 0, "zmax": 1, "xgap": 1, "ygap": 1,
                "colorbar": {"tickformat": ".0%", "thickness": 10, "outlinewidth": 0, "len": 0.8},
            }
        ],
        "layout": {
            "xaxis": {"title": {"text": "label given"}, "tickvals": places, "ticktext": names, "tickangle": -45,
                      "automargin": True, "showgrid": False},
            "yaxis": {"title": {"text": "true class"}, "tickvals": places, "ticktext": names, "autorange": "reversed",
                      "automargin": True, "showgrid": False},
        },
        "height": 200 + max(220, 24 * len(shown)),
    }  # fmt: skip
    if len(shown) <= 12:
        chart["data"][0] |= {"text": written, "texttemplate": "%{text}", "textfont": {"size": 10}}
    return chart


def _depth(facts: Facts, layer: int) -> str:
    return f"@depth:{layer / max(1, facts.layout.layers - 1):.3f}"


def spectra(facts: Facts) -> Chart:
    """Cumulative explained variance of every head, one colour a layer."""
    data = []
    for layer in range(facts.layout.layers):
        x, y, text = [], [], []
        for unit in facts.layout.select("head", layer=layer):
            curve = rounded(facts.bases.explained_variance_ratio(unit).cumsum(0), 4)
            x += [*range(1, len(curve) + 1), None]
            y += [*curve, None]
            text += [unit_name(unit)] * len(curve) + [None]
        data.append(
            {
                "type": "scatter", "mode": "lines", "name": f"layer {layer}", "x": x, "y": y, "text": text,
                "hovertemplate": "%{text}<br>%{x} components: %{y:.1%}<extra></extra>",
                "line": {"color": _depth(facts, layer), "width": 1.6}, "opacity": 0.8,
            }
        )  # fmt: skip
    return {
        "data": data,
        "layout": {
            "xaxis": {"title": {"text": "principal components kept"}, "type": "log", "dtick": "D2"},
            "yaxis": {"title": {"text": "share of the head's variance"}, "tickformat": ".0%", "range": [0, 1.02]},
            "shapes": [
                {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": ENERGY, "y1": ENERGY,
                 "line": {"color": "@orange", "width": 1.5, "dash": "dash"}}
            ],
        },
        "height": 440,
    }  # fmt: skip


def _medians(facts: Facts, values: torch.Tensor) -> list[float | None]:
    grid = values.double().view(facts.layout.layers, facts.layout.heads)
    return rounded(grid.nanmedian(1).values, 3)


def dimension(facts: Facts) -> Chart:
    """Dimensions of every head by depth: linear, TwoNN and participation ratio, with the layers' medians."""
    heads, layers = facts.layout.heads, facts.layout.layers
    names = [unit_name(unit) for unit in facts.heads]
    data = []
    for name, values, colour, symbol in (
        (f"components for {ENERGY:.0%} of the variance", facts.linear, "@blue", "circle"),
        ("participation ratio", facts.participation, "@green", "square"),
        ("TwoNN", facts.nonlinear, "@orange", "diamond"),
    ):
        aside = [unit.layer + (unit.head - (heads - 1) / 2) * 0.6 / heads for unit in facts.heads]
        data.append(
            {
                "type": "scatter", "mode": "markers", "x": [round(a, 3) for a in aside],
                "y": rounded(values.double(), 2), "text": names, "name": name, "legendgroup": name,
                "hovertemplate": "%{text}<br>" + name + ": %{y:.1f}<extra></extra>",
                "marker": {"color": colour, "symbol": symbol, "size": 6, "opacity": 0.45}, "showlegend": False,
            }
        )  # fmt: skip
        data.append(
            {
                "type": "scatter", "mode": "lines+markers", "x": list(range(layers)), "y": _medians(facts, values),
                "name": name, "legendgroup": name, "hovertemplate": "median of layer %{x}: %{y:.1f}<extra></extra>",
                "line": {"color": colour, "width": 2.5}, "marker": {"symbol": symbol, "size": 9},
            }
        )  # fmt: skip
    return {
        "data": data,
        "layout": {
            "xaxis": {"title": {"text": "layer (one faint mark per head)"}, "dtick": max(1, layers // 12)},
            "yaxis": {"title": {"text": "dimensions"}, "type": "log", "dtick": "D2"},
        },
        "height": 440,
    }


def similarity(facts: Facts) -> Chart:
    """Normalised spectral cosine of every two heads."""
    units = facts.heads[-len(facts.similarity) :]
    codes = [unit_code(unit) for unit in units]
    places = list(range(len(units)))
    heads = facts.layout.heads
    starts = places[::heads]
    edges = [
        {"type": "line", "x0": a, "x1": b, "y0": c, "y1": d, "line": {"color": "@surface", "width": 1}}
        for at in starts[1:]
        for a, b, c, d in (
            (at - 0.5, at - 0.5, -0.5, len(units) - 0.5),
            (-0.5, len(units) - 0.5, at - 0.5, at - 0.5),
        )
    ]
    axis = {
        "type": "category",
        "tickvals": [start + (heads - 1) / 2 for start in starts],
        "ticktext": [str(units[start].layer) for start in starts],
        "showgrid": False,
        "title": {"text": "head, by layer"},
    }
    return {
        "data": [
            {
                "type": "heatmap", "z": rounded(facts.similarity, 2), "x": codes, "y": codes,
                "colorscale": "@sequential", "zmin": 0, "zmax": 1,
                "colorbar": {"thickness": 10, "outlinewidth": 0, "len": 0.8, "title": {"text": ""}},
                "hovertemplate": "heads %{y} and %{x}: %{z:.2f}<extra></extra>",
            }
        ],
        "layout": {
            "xaxis": axis, "yaxis": {**axis, "autorange": "reversed"}, "shapes": edges if len(edges) < 150 else [],
        },
        "height": 620,
    }  # fmt: skip


def selection(facts: Facts) -> Chart:
    """Accuracy when only the best heads by each score are kept, against random ones."""
    colours = ("@blue", "@green", "@purple", "@sky", "@yellow")
    symbols = ("circle", "square", "diamond", "triangle-up", "cross")
    data, heads = [], len(facts.heads)
    named = [curve for curve in facts.curves if curve.low is None]
    for curve in facts.curves:
        x = [kept / heads for kept in curve.kept]
        text = [f"{kept} of {heads} heads" for kept in curve.kept]
        random = curve.low is not None
        if random:
            data.append(
                {
                    "type": "scatter", "mode": "lines", "x": [*x, *x[::-1]], "y": [*curve.high, *curve.low[::-1]],
                    "fill": "toself", "fillcolor": "@band", "line": {"width": 0}, "hoverinfo": "skip",
                    "showlegend": False,
                }
            )  # fmt: skip
        place = len(named) if random else named.index(curve)
        colour = "@grey" if random else colours[place % len(colours)]
        data.append(
            {
                "type": "scatter", "mode": "lines+markers", "name": curve.name, "x": x, "y": list(curve.accuracy),
                "text": text, "hovertemplate": "%{text}: %{y:.1%}<extra>" + curve.name + "</extra>",
                "line": {"color": colour, "width": 2.5, "dash": "dot" if random else "solid"},
                "marker": {"size": 8, "symbol": "circle-open" if random else symbols[place % len(symbols)]},
            }
        )  # fmt: skip
    whole = facts.before.accuracy
    return {
        "data": data,
        "layout": {
            "xaxis": {"title": {"text": "share of the heads kept"}, "tickformat": ".0%", "type": "log",
                      "tickvals": [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1]},
            "yaxis": {"title": {"text": "accuracy"}, "tickformat": ".0%", "rangemode": "tozero"},
            "shapes": [
                {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": whole, "y1": whole,
                 "line": {"color": "@ink", "width": 1, "dash": "dash"}}
            ],
            "annotations": [
                {"xref": "paper", "x": 0, "y": whole, "text": f"whole model {percent(whole)}", "showarrow": False,
                 "xanchor": "left", "yanchor": "bottom"}
            ],
        },
        "height": 440,
    }  # fmt: skip


def charts(facts: Facts) -> dict[str, Chart]:
    """Every interactive figure that these facts have, by name."""
    found = {
        "classes": class_changes(facts),
        "confusion-before": confusion(facts, after=False),
        "confusion-after": confusion(facts, after=True),
        "spectra": spectra(facts),
        "dimension": dimension(facts),
        "similarity": similarity(facts),
    }
    if facts.curves:
        found["selection"] = selection(facts)
    return found
