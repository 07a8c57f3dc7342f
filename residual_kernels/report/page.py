"""How does it become a file?

One self-contained HTML page, with its pictures and tables in a folder beside it.
"""

import base64
import hashlib
import math
from importlib import resources
from pathlib import Path
from typing import Any

from residual_kernels import extras
from residual_kernels.analysis.ends import AGREEMENT, CHANCE, NEAREST
from residual_kernels.analysis.weights import Component
from residual_kernels.data.images import Images
from residual_kernels.files import together, write_text
from residual_kernels.report import tables
from residual_kernels.report.facts import CLASSES_SHOWN, ENERGY, Facts
from residual_kernels.report.names import percent, points, unit_name
from residual_kernels.report.sentences import advice, captions, class_ends, findings
from residual_kernels.report.thumbnails import SIDE, thumbnails
from residual_kernels.towers import Unit
from residual_kernels.units.cache import UnitCache
from residual_kernels.visible import visible

COMPONENTS_LISTED = 12  # of a unit, in its panel


def write_report(
    facts: Facts, page: Path, cache: UnitCache, pictures: Images | None = None
) -> tuple[Path, list[Path]]:
    """Writes the page, and every figure and table into the folder of its name beside it
    (`report.html`, `report/`).

    Args:
        facts: of :func:`gather`.
        page: path of the HTML file; it and the files beside it are replaced where they exist.
        cache: the images that the facts are of: its ids say which `pictures` they are.
        pictures: the images themselves; None leaves them out.

    Returns the page's path and those of the files beside it. Raises ImportError when an optional library is
    missing.
    """
    check_page(page)
    from residual_kernels import figures
    from residual_kernels.report import charts

    folder = page.with_suffix("")
    ids = cache.ids.tolist()
    found = tables.tables(facts)
    drawn = charts.on_page(facts)
    shown = {name: charts.inline(figure, name) for name, figure in drawn.items()}
    text = _render(facts, ids, pictures, shown, found, folder.name)
    files = []
    with together():
        for name, figure in (*drawn.items(), *charts.in_folder(facts, ids, pictures)):
            files += figures.save(figure, folder, name)
        files += tables.write(found, folder)
        write_text(page, text)
    return page, files


def check_page(page: Path) -> None:
    """Raises ValueError or FileExistsError when no report can be written to `page`, ImportError without
    matplotlib."""
    folder = page.with_suffix("")
    if folder == page:
        raise ValueError(f"a report is an .html file; got {page}")
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(
            f"{folder} is a file; the report's pictures and tables need a folder of that name"
        )
    for library in ("jinja2", "matplotlib"):
        extras.need(library, "report", "a report")


def _render(
    facts: Facts,
    ids: list[int],
    pictures: Images | None,
    shown: dict[str, str],
    found: list[tables.CsvTable],
    folder: str,
) -> str:
    from jinja2 import Environment, StrictUndefined

    from residual_kernels import __version__

    here = resources.files(__package__)
    files = {name: (here / f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    template = environment.from_string(files["html"])
    return template.render(
        **_context(facts),
        data=_data(facts, ids, pictures),
        tables=[_linked(table) for table in found],
        pictured=pictures is not None,
        folder=folder,
        version=__version__,
        figures=shown,
        style=files["css"],
        script=files["js"],
        policy=_policy(files["js"]),
    )


def _policy(script: str) -> str:
    """What the page may do: run this very script, show images it carries, and load nothing."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _linked(table: tables.CsvTable) -> dict[str, Any]:
    """A table as a link that carries it."""
    content = base64.b64encode(tables.as_text(table).encode()).decode("ascii")
    return {"name": table.name, "rows": len(table.rows), "uri": f"data:text/csv;base64,{content}"}


def _context(facts: Facts) -> dict[str, Any]:
    """What the template itself says; what its figures show is in :func:`_data`."""
    before, after = facts.before, facts.after
    shown, present = facts.classes_shown, int((facts.counts > 0).sum())
    measures = _measures(facts) if facts.mapped else []
    return {
        "title": f"{facts.source.data}: {percent(before.accuracy)} → {percent(after.accuracy)}",
        "source": facts.source,
        "before": percent(before.accuracy),
        "after": percent(after.accuracy),
        "gain": after.accuracy - before.accuracy,
        "findings": findings(facts),
        "advice": advice(facts),
        "tiles": _tiles(facts),
        "class_rows": _class_rows(facts),
        "total": _class_row("all", facts.images, before.accuracy, after.accuracy),
        "hidden_classes": present > CLASSES_SHOWN,
        "class_count": present,
        "shown_classes": len(shown),
        "grid": _grid(facts, measures) if measures else None,
        "has_components": facts.reading is not None,
        "relative": facts.rest == "zero",
        "cards": {"raised": bool(facts.raised), "faded": bool(facts.faded)}
        if facts.reading is not None
        else None,
        "captions": captions(facts),
        "energy": f"{ENERGY:.0%}",
        "terms": _terms(facts),
        "made_of": f"{facts.adapter} on {' and '.join(facts.adapted)}s, the rest: {facts.rest}"
        if facts.adapted
        else facts.adapter,
    }


def _tiles(facts: Facts) -> list[tuple[str, str, str]]:
    learned = "weights of the adapter"
    if facts.reading is not None:
        learned = "one per component"
        if facts.learned > len(facts.reading.weight):
            learned += ", and class vectors"
    classes = int((facts.counts > 0).sum())
    return [
        ("images", f"{facts.images:,}", f"of {classes:,} class{'' if classes == 1 else 'es'}"),
        ("learned numbers", f"{facts.learned:,}", learned),
        ("newly right", f"{facts.mended:,}", "misread before, right after"),
        ("newly wrong", f"{facts.broken:,}", "right before, misread after"),
    ]


def _class_row(name: str, count: int, before: float, after: float) -> dict[str, str]:
    return {
        "name": name,
        "count": f"{count:,}",
        "before": percent(before),
        "after": percent(after),
        "change": points(after - before),
    }


def _class_rows(facts: Facts) -> list[dict[str, str]]:
    counts = [int(count) for count in facts.counts]
    values = zip(
        facts.class_names,
        counts,
        facts.before.class_accuracy.tolist(),
        facts.after.class_accuracy.tolist(),
        strict=True,
    )
    return [_class_row(*row) for row in values if row[1]]


def _measures(facts: Facts) -> list[dict[str, Any]]:
    """What the weight map can show of a unit: its key, what it is called and means, and how it is written."""
    found = []
    if facts.mapped:
        hint = "1 is unchanged, blue is raised, orange is faded."
        if facts.reading is not None:
            hint = f"The mean over a head's components, in proportion to their variance. {hint}"
        found.append(
            {
                "key": "weight",
                "name": "mean weight",
                "hint": hint,
                "centre": 1,
                "factor": 1,
                "digits": 2,
                "unit": "",
                "signed": False,
            }
        )
    if facts.unit_effect:
        hint = (
            "How far a head's weights move an embedding: the root mean square over the images. Weights "
            "start from random numbers around 1, so a weight with little reach may mean nothing."
        )
        found.append(
            {
                "key": "effect",
                "name": "reach",
                "hint": hint,
                "centre": None,
                "factor": 1,
                "digits": 2,
                "unit": "",
                "signed": False,
            }
        )
    if facts.unit_lost:
        hint = "Accuracy lost when all weights of this head alone return to 1. Orange: accuracy would rise."
        found.append(
            {
                "key": "lost",
                "name": "worth",
                "hint": hint,
                "centre": 0,
                "factor": 100,
                "digits": 1,
                "unit": " points",
                "signed": True,
            }
        )
    return found


def _grid(facts: Facts, measures: list[dict[str, Any]]) -> dict[str, Any]:
    layers, heads = facts.layout.layers, facts.layout.heads
    cells: list[list[Unit | None]] = [[None] * (heads + 1) for _ in range(layers)]
    for unit in facts.mapped:
        assert unit.layer is not None  # mapped units have one
        cells[unit.layer][heads if unit.head is None else unit.head] = unit
    with_mlp = any(row[heads] is not None for row in cells)
    return {
        "measures": measures,
        "columns": [*map(str, range(heads)), *(["MLP"] if with_mlp else [])],
        "rows": cells if with_mlp else [row[:heads] for row in cells],
    }


def _data(facts: Facts, ids: list[int], pictures: Images | None) -> dict[str, Any]:
    """What the page's script draws."""
    strips, images = _strips(facts, ids, pictures)
    units = {
        unit.index: _unit(facts, unit, strips) for unit in facts.layout if unit.index in facts.unit_weight
    }
    where = {
        component["index"]: (index, place)
        for index, unit in units.items()
        for place, component in enumerate(unit["components"])
    }
    score = facts.unit_lost or facts.unit_effect or facts.unit_weight
    return {
        "measures": _measures(facts),
        "units": units,
        "first": max((unit.index for unit in facts.mapped), key=lambda i: score[i], default=None),
        "cards": {
            "raised": [where[component.index] for component in facts.raised],
            "faded": [where[component.index] for component in facts.faded],
        },
        **images,
    }


def _strips(
    facts: Facts, ids: list[int], pictures: Images | None
) -> tuple[dict[int, list[list[list]]], dict[str, Any]]:
    """(images at the high and at the low end by component, as [id, coefficient]; the images themselves)."""
    empty = {"images": {}, "thumbnails": {}, "small": False}
    if facts.ends is None or pictures is None:
        return {}, empty
    strips = {}
    for place, index in enumerate(facts.ends.indices):
        sides = (
            (facts.ends.high[place], facts.ends.high_values[place]),
            (facts.ends.low[place], facts.ends.low_values[place]),
        )
        strips[index] = [
            [[ids[row], round(value, 3)] for row, value in zip(rows.tolist(), values.tolist(), strict=True)]
            for rows, values in sides
        ]
    wanted = [[image for side in strip for image, _ in side] for strip in strips.values()]
    shown, kept = thumbnails(pictures, wanted)
    labels = dict(zip(ids, facts.labels, strict=True))
    images = {image: [pictures.names[image], facts.class_names[labels[image]]] for image in shown}
    small = min(min(pictures.picture(image)[0].size) for image in list(shown)[:1]) < SIDE // 2
    return dict(list(strips.items())[:kept]), {"images": images, "thumbnails": shown, "small": small}


def _unit(facts: Facts, unit: Unit, strips: dict[int, list]) -> dict[str, Any]:
    values = {"weight": facts.unit_weight, "effect": facts.unit_effect, "lost": facts.unit_lost}
    own = [] if facts.reading is None else facts.reading.of(unit)
    shown = {component.index for component in (*facts.raised, *facts.faded)}
    listed = [c for place, c in enumerate(own) if place < COMPONENTS_LISTED or c.index in shown]
    dimension = None
    if unit.kind == "head":
        head = unit.index - facts.heads[0].index
        dimension = f"{int(facts.linear[head])} components hold {ENERGY:.0%} of its variance"
        if not math.isnan(float(facts.nonlinear[head])):
            dimension += f", TwoNN {float(facts.nonlinear[head]):.1f}"
    return {
        "name": unit_name(unit),
        "kind": "MLP" if unit.kind == "mlp" else unit.kind if unit.kind == "head" else "unit",
        "values": {key: round(of[unit.index], 6) for key, of in values.items() if unit.index in of},
        "dimension": dimension,
        "total": len(own),
        "components": [_component(facts, component, strips) for component in listed],
    }


def _component(facts: Facts, component: Component, strips: dict[int, list]) -> dict[str, Any]:
    high, low = facts.words.get(component.index, ((), ()))
    classes = [
        [[name, round(score, 3)] for name, score in side] for side in class_ends(facts, component.index)
    ]
    return {
        "index": component.index,
        "place": component.place,
        "weight": round(component.weight, 4),
        "effect": round(component.effect, 4),
        "explained": round(component.explained, 4),
        "separation": round(component.separation, 4),
        "classes": classes,
        "high": list(high),
        "low": list(low),
        "strip": strips.get(component.index),
    }


def _terms(facts: Facts) -> list[tuple[str, str]]:
    """What the page's words mean."""
    said = []
    if facts.reading is not None:
        said += [
            (
                "component",
                "a principal direction of what one head (or MLP) adds to the embedding, counted from 0 by "
                "falling variance in the images that the bases were fitted on",
            ),
            ("variance", "the share of the unit's variance along a component, in those images"),
            ("weight", "the learned number that multiplies the component; 1 leaves it as it is"),
            (
                "reach",
                "(weight − 1) × the standard deviation of the component's coefficient over the images of "
                "this report: how far an embedding moves, in the units of the embedding",
            ),
            (
                "between classes",
                "the share of a coefficient's variance that lies between the means of the classes (eta "
                "squared): 100% separates the classes perfectly, 0% not at all",
            ),
            ("σ", "how many standard deviations a class's mean lies from the mean of all images"),
            ("worth", "accuracy lost when the weights of one unit return to 1 and all others stay"),
        ]
    if facts.words:
        said.append(
            (
                "words",
                "phrases of a dictionary, nearest first. A phrase is shown only if it passes three tests: "
                f"its text embedding is nearer to the component than the nearest phrase of {CHANCE:.0%} of "
                "random directions; over these images, the component's coefficient and the model's "
                f"similarity to the phrase correlate by {AGREEMENT} or more; and the phrase is among the "
                f"nearest {NEAREST:.0%} of the dictionary to the images at that end",
            )
        )
    said += [
        (
            f"components for {ENERGY:.0%}",
            "how many principal components hold this much of a head's variance on these images",
        ),
        (
            "TwoNN",
            f"intrinsic dimension from the distances to the two nearest neighbours (Facco et al., 2017), on "
            f"{facts.points:,} of the images",
        ),
        ("participation ratio", "(Σ variance)² / Σ variance²: how many components carry weight"),
        (
            "similarity",
            "normalised spectral cosine: cosines between the components of two heads, weighted by explained "
            "variance and matched one to one",
        ),
    ]
    return said
