"""Every number of a report as tables: a header and rows, written as CSV."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from residual_kernels.files import csv_text, write_text
from residual_kernels.report.facts import ENERGY, Facts
from residual_kernels.report.names import unit_code


@dataclass(frozen=True)
class CsvTable:
    """Rows of one CSV file; None is an empty cell."""

    name: str
    header: tuple[str, ...]
    rows: list[tuple]


def _number(value: object) -> object:
    if isinstance(value, float):
        return "" if value != value else f"{value:.6g}"
    return "" if value is None else value


def as_text(table: CsvTable) -> str:
    """The table as CSV."""
    return csv_text([table.header, *([_number(value) for value in row] for row in table.rows)])


def write(tables: Iterable[CsvTable], folder: Path) -> list[Path]:
    """Writes NAME.csv for every table, and returns the paths."""
    paths = []
    for table in tables:
        path = folder / f"{table.name}.csv"
        write_text(path, as_text(table))
        paths.append(path)
    return paths


def tables(facts: Facts) -> list[CsvTable]:
    """All tables that these facts have."""
    found = [
        _classes(facts),
        _confusion(facts, False),
        _confusion(facts, True),
        _heads(facts),
        _spectra(facts),
    ]
    found.append(_similarity(facts))
    if facts.curves:
        found.append(_selection(facts))
    if facts.unit_weight:
        found.append(_units(facts))
    if facts.reading is not None:
        found += [_components(facts), _class_scores(facts)]
    return found


def _classes(facts: Facts) -> CsvTable:
    before, after = facts.before.class_accuracy.tolist(), facts.after.class_accuracy.tolist()
    counts = [int(count) for count in facts.counts]
    rows = list(zip(facts.class_names, counts, before, after, strict=True))
    rows.append(("(all)", facts.images, facts.before.accuracy, facts.after.accuracy))
    return CsvTable("classes", ("class", "images", "accuracy_without", "accuracy_with"), rows)


def _confusion(facts: Facts, after: bool) -> CsvTable:
    outcome = facts.after if after else facts.before
    rows = [
        (name, *(int(count) for count in row))
        for name, row in zip(facts.class_names, outcome.confusion.tolist(), strict=True)
    ]
    return CsvTable(
        f"confusion-{'with' if after else 'without'}", ("true class \\ label given", *facts.class_names), rows
    )


def _heads(facts: Facts) -> CsvTable:
    rows = [
        (unit.layer, unit.head, int(linear), float(ratio), float(nonlinear))
        for unit, linear, ratio, nonlinear in zip(
            facts.heads, facts.linear, facts.participation, facts.nonlinear, strict=True
        )
    ]
    header = ("layer", "head", f"components_for_{ENERGY}_of_variance", "participation_ratio", "twonn")
    return CsvTable("dimension", header, rows)


def _spectra(facts: Facts) -> CsvTable:
    rows = [
        (unit.layer, unit.head, place, share)
        for unit in facts.heads
        for place, share in enumerate(facts.bases.explained_variance_ratio(unit).tolist())
    ]
    return CsvTable("spectra", ("layer", "head", "component", "explained_variance_ratio"), rows)


def _similarity(facts: Facts) -> CsvTable:
    codes = [unit_code(unit) for unit in facts.heads[-len(facts.similarity) :]]
    rows = [(code, *row) for code, row in zip(codes, facts.similarity.tolist(), strict=True)]
    return CsvTable("similarity", ("head", *codes), rows)


def _selection(facts: Facts) -> CsvTable:
    rows = [
        (
            curve.name,
            kept,
            curve.accuracy[i],
            None if curve.low is None else curve.low[i],
            None if curve.high is None else curve.high[i],
        )
        for curve in facts.curves
        for i, kept in enumerate(curve.kept)
    ]
    return CsvTable("selection", ("heads_kept_by", "heads", "accuracy", "lowest", "highest"), rows)


def _units(facts: Facts) -> CsvTable:
    rows = [
        (
            unit.kind,
            unit.layer,
            unit.head,
            facts.unit_weight[unit.index],
            facts.unit_effect.get(unit.index),
            facts.unit_lost.get(unit.index),
        )
        for unit in facts.layout
        if unit.index in facts.unit_weight
    ]
    return CsvTable("weights", ("kind", "layer", "head", "mean_weight", "reach", "accuracy_lost_at_1"), rows)


def _components(facts: Facts) -> CsvTable:
    reading, rows = facts.of_components()[0], []
    for index in range(len(reading)):
        c = reading[index]
        high, low = facts.words.get(index, ((), ()))
        rows.append(
            (
                c.unit.kind,
                c.unit.layer,
                c.unit.head,
                c.place,
                c.weight,
                c.explained,
                c.std,
                c.effect,
                c.separation,
                "; ".join(high),
                "; ".join(low),
            )
        )
    header = (
        "kind",
        "layer",
        "head",
        "component",
        "weight",
        "explained_variance_ratio",
        "std",
        "effect",
        "between_class_share",
        "words_high",
        "words_low",
    )
    return CsvTable("components", header, rows)


def _class_scores(facts: Facts) -> CsvTable:
    """Of the components shown: every class's mean coefficient,
    in standard deviations from the mean of all images."""
    (reading, ends), rows = facts.of_components(), []
    for index in sorted(ends.indices):
        c = reading[index]
        rows.append((c.unit.kind, c.unit.layer, c.unit.head, c.place, *reading.class_scores(index).tolist()))
    return CsvTable("component-classes", ("kind", "layer", "head", "component", *facts.class_names), rows)
