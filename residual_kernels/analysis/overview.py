"""What do all the analyses say of one tower on one data set? Every table at once, as JSON and CSV."""

import csv
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from residual_kernels import towers
from residual_kernels.analysis.dimension import (
    linear_dimension,
    participation_ratio,
    sample,
    two_nn,
    two_nn_dimension,
)
from residual_kernels.analysis.reading import output_bases
from residual_kernels.analysis.scores import (
    component_pearson,
    cross_moments,
    own_accuracy,
    pearson,
    rank_correlations,
    variance_between_classes,
)
from residual_kernels.analysis.selection import FRACTIONS, SelectionCurves, selection_curves
from residual_kernels.analysis.similarity import similarity_matrix
from residual_kernels.analysis.words import Description, TextDictionary, component_words, words_of_units
from residual_kernels.bases.pca import fit_bases
from residual_kernels.bases.spectral_bases import OUTPUT, SpectralBases
from residual_kernels.files import SCHEMA, atomic_path, read_json, write_json
from residual_kernels.towers import Tower
from residual_kernels.units.cache import UnitCache
from residual_kernels.units.source import cache_of
from residual_kernels.zeroshot import ZeroShotHead

WHAT, FILE = "analysis", "analysis.json"
ENERGIES = (0.5, 0.9, 0.95, 0.99)


@dataclass(frozen=True)
class UnitRow:
    """One unit. `linear` has one number per energy of the analysis; a NaN or None was not (or could not be) measured.

    variance: summed over its components; share: of the variance of all units of its kind. pearson, spearman: with the
    output, over all coordinates; *_classes: over the span of the class vectors. accuracy: of the unit alone.
    """

    index: int
    kind: str
    layer: int | None
    head: int | None
    variance: float
    share: float
    linear: tuple[int, ...]
    participation: float
    two_nn: float
    pearson: float
    spearman: float
    pearson_classes: float | None
    spearman_classes: float | None
    accuracy: float | None
    words: Description | None


@dataclass(frozen=True)
class ComponentRow:
    """One component: of `unit` (layout index), at `place` (0 for the largest variance). explained: its share of its
    unit's variance; pearson: of its coefficient with the output along it; between_classes: the variance between its
    classes' mean coefficients; words: of the first few components of each unit."""

    unit: int
    place: int
    explained: float
    pearson: float
    between_classes: float | None
    words: Description | None


@dataclass(frozen=True)
class Analysis:
    """All tables of one tower on one data set. Made by :func:`analyze`; :meth:`save` writes JSON and CSV."""

    tower: str
    layers: int
    heads: int
    dim: int
    kind: str
    images: int
    fitted_images: int  # that the bases were fitted on
    energies: tuple[float, ...]
    class_names: tuple[str, ...] | None
    units: tuple[UnitRow, ...]
    components: tuple[ComponentRow, ...]
    output: UnitRow  # the model's output as one unit
    similarity: dict[str, tuple[tuple[float, ...], ...]]  # weighting -> [R, R]
    selections: tuple[SelectionCurves, ...]
    seconds: dict[str, float]

    def spectrum(self, unit: int) -> tuple[float, ...]:
        """Explained variance ratios of a unit (a layout index), falling."""
        return tuple(row.explained for row in self.components if row.unit == unit)

    def to_dict(self) -> dict:
        """Plain dicts, lists, numbers and strings; NaN becomes None."""
        return _plain(asdict(self))

    def save(self, folder: str | os.PathLike) -> list[Path]:
        """Writes analysis.json, units.csv, components.csv, similarity-*.csv and selection.csv; returns their paths."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / FILE, {"schema": SCHEMA, "what": WHAT, **self.to_dict()})
        tables = {"units.csv": self._unit_table(), "components.csv": self._component_table()}
        names = [
            f"{row.kind} {row.index}" if row.head is None else f"L{row.layer}H{row.head}"
            for row in self.units
        ]
        for weights, matrix in self.similarity.items():
            rows = [["", *names], *([name, *line] for name, line in zip(names, matrix, strict=True))]
            tables[f"similarity-{weights}.csv"] = rows
        if self.selections:
            tables["selection.csv"] = self._selection_table()
        for name, rows in tables.items():
            with (
                atomic_path(folder / name) as temporary,
                temporary.open("w", newline="", encoding="utf-8") as file,
            ):
                csv.writer(file).writerows([_cell(value) for value in row] for row in rows)
        return [folder / FILE, *(folder / name for name in tables)]

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Analysis":
        """Reads what :meth:`save` wrote; FileNotFoundError or ValueError when it is absent or another file."""
        path = Path(folder) / FILE
        if not path.is_file():
            raise FileNotFoundError(f"no {WHAT} at {folder} ({FILE} is missing)")
        held_ = read_json(path, WHAT, cls.__dataclass_fields__)
        fields = {name: held_[name] for name in cls.__dataclass_fields__}
        fields["units"] = tuple(_unit_row(row) for row in fields["units"])
        fields["components"] = tuple(
            ComponentRow(**{**row, "words": _description(row["words"])}) for row in fields["components"]
        )
        fields["output"] = _unit_row(fields["output"])
        fields["selections"] = tuple(_curves(row) for row in fields["selections"])
        fields["similarity"] = {
            name: tuple(tuple(line) for line in matrix) for name, matrix in fields["similarity"].items()
        }
        for name in ("energies", "class_names"):
            fields[name] = None if fields[name] is None else tuple(fields[name])
        return cls(**fields)

    def _unit_table(self) -> Iterator[list]:
        plain = ["index", "kind", "layer", "head", "variance", "share"]
        scores = [
            "participation", "two_nn", "pearson", "spearman", "pearson_classes", "spearman_classes", "accuracy"
        ]  # fmt: skip
        yield [*plain, *(f"linear_{energy:g}" for energy in self.energies), *scores, "words"]
        for row in (*self.units, self.output):
            words = "" if row.words is None else "; ".join(row.words.words)
            yield [
                *(getattr(row, name) for name in plain), *row.linear, *(getattr(row, name) for name in scores), words
            ]  # fmt: skip

    def _component_table(self) -> Iterator[list]:
        yield ["unit", "layer", "head", "place", "explained", "pearson", "between_classes", "words"]
        unit_of = {row.index: row for row in self.units}
        for row in self.components:
            words = ""
            if row.words is not None:
                words = "; ".join(
                    f"{word} {weight:+.2f}"
                    for word, weight in zip(row.words.words, row.words.weights, strict=True)
                )
            unit = unit_of[row.unit]
            yield [
                row.unit, unit.layer, unit.head, row.place, row.explained, row.pearson, row.between_classes, words
            ]  # fmt: skip

    def _selection_table(self) -> Iterator[list]:
        yield ["of", "rest", "score", "seed", "fraction", "kept", "accuracy"]
        for curves in self.selections:
            named = [(name, "", values) for name, values in curves.accuracy.items()]
            named += [
                ("random", seed, values) for seed, values in zip(curves.seeds, curves.random, strict=True)
            ]
            for name, seed, values in named:
                for fraction, kept, accuracy in zip(curves.fractions, curves.kept, values, strict=True):
                    yield [curves.of, curves.rest, name, seed, fraction, kept, accuracy]


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(held_) for key, held_ in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(held_) for held_ in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _description(row: dict | None) -> Description | None:
    return None if row is None else Description(**{name: tuple(values) for name, values in row.items()})


def _unit_row(row: dict) -> UnitRow:
    two = float("nan") if row["two_nn"] is None else row["two_nn"]
    words = _description(row["words"])
    return UnitRow(**{**row, "linear": tuple(row["linear"]), "two_nn": two, "words": words})


def _curves(row: dict) -> SelectionCurves:
    tuples = {name: tuple(row[name]) for name in ("fractions", "kept", "seeds")}
    accuracy = {name: tuple(values) for name, values in row["accuracy"].items()}
    return SelectionCurves(
        **{**row, **tuples, "accuracy": accuracy, "random": tuple(tuple(curve) for curve in row["random"])}
    )


@torch.no_grad()
def analyze(
    tower: nn.Module,
    data: "UnitCache | Iterable",
    head: ZeroShotHead | None = None,
    bases: SpectralBases | None = None,
    dictionary: TextDictionary | None = None,
    *,
    kind: str = "head",
    energies: Sequence[float] = ENERGIES,
    similarities: Sequence[str] = ("explained_variance", "singular"),
    points: int | None = 10_000,
    fraction: float = 0.9,
    fractions: Sequence[float] = FRACTIONS,
    seeds: Iterable[int] = range(10),
    words: int = 5,
    described: int = 3,
    progress: Callable[[str], None] | None = None,
) -> Analysis:
    """Everything this package can say of a tower's units of one kind on one data set.

    Args:
        tower: a supported image tower, or an adapter around one (whose tower is analyzed).
        data: a UnitCache of it with `kind`, or a loader (encoded in memory first).
        head: for accuracies and selection curves, which need labels; None leaves them out.
        bases: whole bases of this tower with `kind`; fitted on `data` when None.
        dictionary: for words; None leaves them out.
        energies: explained variances to count components for.
        similarities: weightings of the unit-by-unit spectral cosine.
        points, fraction: of TwoNN; its time grows with the square of the images, so at most `points` are drawn.
        fractions, seeds: of the selection curves, and of their random control.
        words, described: words per unit and component, and components per unit that are described.
        progress: called with the name of each step as it begins.

    Returns:
        An :class:`Analysis`. Raises ValueError for a head without labels, truncated bases, or another tower's data.
    """
    view = towers.view(towers.unwrap(tower))
    towers.check_kinds((kind,), view.layout)
    seconds: dict[str, float] = {}

    @contextmanager
    def step(name: str) -> Iterator[None]:
        if progress is not None:
            progress(name)
        start = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - start

    if bases is not None:
        output_bases(view, bases, (kind,))
    with step("encoding"):
        cache = cache_of(data, view.module, (kind,))
    if head is not None and cache.labels is None:
        raise ValueError("a head needs labels; the data hold only images")
    if bases is None:
        with step("bases"):
            bases = fit_bases(view.module, cache, (kind,))
    part = bases.parts[kind]
    with step("linear dimension"):
        linear = torch.stack([linear_dimension(bases, energy, kind) for energy in energies], dim=1)
        participation = participation_ratio(bases, kind)
    with step("TwoNN dimension"):
        nonlinear = two_nn_dimension(view.module, cache, kind, fraction=fraction, points=points)
    with step("similarity"):
        matrices = {name: similarity_matrix(bases, kind=kind, weights=name) for name in similarities}
    scores = {}
    with step("Pearson scores"):
        groups = [
            (
                pearson(moments),
                None if head is None else pearson(moments, head),
                component_pearson(moments, bases),
            )
            for moments in cross_moments(view.module, cache, kind)
        ]
        scores["pearson"], scores["pearson_classes"], along = (
            None if parts[0] is None else torch.cat(parts).cpu() for parts in zip(*groups, strict=True)
        )
    with step("Spearman scores"):
        scores["spearman"] = rank_correlations(view.module, cache, kind)
        if head is not None:
            scores["spearman_classes"] = rank_correlations(view.module, cache, kind, properties=head)
    apart = None
    if head is not None:
        with step("variance between classes"):
            apart = variance_between_classes(view.module, cache, bases, len(head.class_names), kind)
    if head is not None:
        with step("accuracy of units"):
            scores["accuracy"] = own_accuracy(view.module, cache, head, kind)
    scores["variance"] = part.total_variance
    scores = {name: score for name, score in scores.items() if score is not None}
    curves = []
    if head is not None:
        with step("selection of units"):
            options = {"kind": kind, "bases": bases, "fractions": fractions, "seeds": list(seeds)}
            for rest in ("zero", "mean"):
                curves.append(selection_curves(view.module, cache, head, scores, rest=rest, **options))
        with step("selection of components"):
            by = {"variance": part.variance, "pearson": along, "between_classes": apart}
            curves.append(selection_curves(view.module, cache, head, by, of="components", **options))
    spoken, told = None, {}
    if dictionary is not None:
        count = min(words, len(dictionary))
        with step("words of units"):
            spoken = words_of_units(view.module, cache, dictionary, kind, count)
        with step("words of components"):
            told = _component_descriptions(view, bases, dictionary, kind, count, described)
    with step("output"):
        output = _output_row(cache, bases, head, energies, points, fraction)
    return Analysis(
        tower=view.name, layers=view.layout.layers, heads=view.layout.heads, dim=view.dim, kind=kind,
        images=len(cache), fitted_images=bases.count, energies=tuple(energies),
        class_names=None if head is None else head.class_names,
        units=_unit_rows(view, kind, part.total_variance, linear, participation, nonlinear, scores, spoken),
        components=_component_rows(view, bases, kind, along, apart, told),
        output=output,
        similarity={name: tuple(map(tuple, matrix.tolist())) for name, matrix in matrices.items()},
        selections=tuple(curves), seconds=seconds,
    )  # fmt: skip


def _unit_rows(view, kind, variance, linear, participation, nonlinear, scores, spoken) -> tuple[UnitRow, ...]:
    whole = float(variance.sum())
    named = ("pearson", "spearman", "pearson_classes", "spearman_classes", "accuracy")
    rows = []
    for place, unit in enumerate(view.layout[view.layout.span(kind)]):
        row = UnitRow(
            **vars(unit),
            variance=float(variance[place]),
            share=float(variance[place]) / whole if whole > 0 else 0.0,
            linear=tuple(linear[place].tolist()),
            participation=float(participation[place]),
            two_nn=float(nonlinear[place]),
            words=None if spoken is None else spoken[place],
            **{name: float(scores[name][place]) if name in scores else None for name in named},
        )
        rows.append(row)
    return tuple(rows)


def _component_rows(
    view: Tower, bases: SpectralBases, kind: str, along, apart, told
) -> tuple[ComponentRow, ...]:
    part, first, rows = bases.parts[kind], view.layout.span(kind).start, []
    for unit in range(len(part.mean)):
        run, ratio = part.run(unit), part.ratio(unit)
        for place, j in enumerate(range(run.start, run.stop)):
            row = ComponentRow(
                unit=first + unit,
                place=place,
                explained=float(ratio[place]),
                pearson=float(along[j]),
                between_classes=None if apart is None else float(apart[j]),
                words=told.get((first + unit, place)),
            )
            rows.append(row)
    return tuple(rows)


def _component_descriptions(
    view: Tower, bases: SpectralBases, dictionary: TextDictionary, kind: str, count: int, described: int
) -> dict[tuple[int, int], Description]:
    found = {}
    for unit in view.layout[view.layout.span(kind)]:
        variance = bases.explained_variance(unit)
        for place in range(min(described, int((variance > 0).sum()))):
            found[unit.index, place] = component_words(bases, dictionary, unit, place, count)
    return found


def _output_row(
    cache: UnitCache,
    bases: SpectralBases,
    head: ZeroShotHead | None,
    energies,
    points: int | None,
    fraction: float,
) -> UnitRow:
    """The model's output as one unit; it correlates with itself."""
    rows = sample(len(cache), points, 0)
    accuracy = None
    if head is not None:
        hits = 0
        for start in range(0, len(cache), 512):
            part = slice(start, start + 512)
            named = head(cache.output[part].to(head.class_vectors.device)).argmax(1)
            hits += int((named.cpu() == cache.labels[part]).sum())
        accuracy = hits / len(cache)
    classes = None if head is None else 1.0
    return UnitRow(
        index=-1, kind=OUTPUT, layer=None, head=None, variance=float(bases.parts[OUTPUT].total_variance[0]),
        share=1.0, linear=tuple(int(linear_dimension(bases, energy, OUTPUT)[0]) for energy in energies),
        participation=float(participation_ratio(bases, OUTPUT)[0]),
        two_nn=two_nn(cache.output if rows is None else cache.output[rows], fraction),
        pearson=1.0, spearman=1.0, pearson_classes=classes, spearman_classes=classes, accuracy=accuracy, words=None,
    )  # fmt: skip
