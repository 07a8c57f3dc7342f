"""What do all the analyses say of one tower on one data set? Every table at once, in one record."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from residual_kernels import towers
from residual_kernels.analysis.dimension import (
    linear_dimension,
    participation_ratio,
    sample,
    two_nn,
    two_nn_dimension,
)
from residual_kernels.analysis.findings import Analysis, ComponentRow, UnitRow
from residual_kernels.analysis.reading import output_bases
from residual_kernels.analysis.scores import (
    component_pearson,
    cross_moments,
    own_accuracy,
    pearson,
    rank_correlations,
    variance_between_classes,
)
from residual_kernels.analysis.selection import FRACTIONS, RESTS, selection_curves
from residual_kernels.analysis.similarity import similarity_matrices
from residual_kernels.analysis.words import Description, TextDictionary, component_words, words_of_units
from residual_kernels.bases.pca import fit_bases
from residual_kernels.bases.spectral_bases import OUTPUT, SpectralBases
from residual_kernels.towers import Tower
from residual_kernels.units.cache import UnitCache
from residual_kernels.units.source import cache_of, unit_source
from residual_kernels.zeroshot import ZeroShotHead

ENERGIES = (0.5, 0.9, 0.95, 0.99)
TABLES = ("dimension", "similarity", "correlation", "ranks", "accuracy", "selection", "components", "words")


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
    rests: Sequence[str] = RESTS,
    tables: Iterable[str] = TABLES,
    words: int = 5,
    described: int = 3,
    progress: Callable[[str], None] | None = None,
) -> Analysis:
    """All analyses of a tower's units of one kind on one data set.

    Args:
        tower: a supported image tower, or an adapter around one (whose tower is analysed).
        data: a UnitCache of it with `kind`, or a loader (encoded in memory first).
        head: for accuracies and selection curves, which need labels; None leaves them out.
        bases: whole bases of this tower with `kind`; fitted on `data` when None.
        dictionary: for words; None leaves them out.
        kind: of the units: "head", "mlp" ...
        energies: explained variances to count components for.
        similarities: weightings of the unit-by-unit spectral cosine.
        points, fraction: of TwoNN; its time grows with the square of the images, so at most `points` are
            drawn.
        fractions, seeds: of the selection curves, and of their random control.
        rests: what happens to the units that a selection leaves out: "zero", "mean", or both one after the
            other.
        tables: those to make, of TABLES; all by default. "ranks" (Spearman) sorts R * D columns and takes
            longest.
        words, described: words per unit and component, and components per unit that are described.
        progress: called with the name of each step as it begins.

    Returns:
        An :class:`Analysis`.

    Raises:
        ValueError: a head without labels, truncated bases, another tower's data, or a table that does not
            exist.

    Source: sections 3 and 4 of Basile et al., TMLR 2025 (arXiv 2411.00246).
    """
    wanted = set(tables)
    unknown = sorted(wanted - set(TABLES))
    if unknown:
        raise ValueError(f"tables must be of {', '.join(TABLES)}; got {', '.join(unknown)}")
    labelled = wanted if head is not None else wanted - {"accuracy", "selection", "components"}
    view = towers.view_inside(tower)
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
    nonlinear = torch.full((len(part.mean),), float("nan"), dtype=torch.float64)
    if "dimension" in wanted:
        with step("TwoNN dimension"):
            nonlinear = two_nn_dimension(view.module, cache, kind, fraction=fraction, points=points)
    matrices = {}
    if "similarity" in wanted:
        with step("similarity"):
            matrices = similarity_matrices(bases, kind=kind, weights=similarities)
    scores: dict[str, Tensor] = {}
    along = apart = None
    if "correlation" in wanted:
        with step("Pearson scores"):
            found = [
                (
                    pearson(moments),
                    None if head is None else pearson(moments, head),
                    component_pearson(moments, bases),
                )
                for moments in cross_moments(view.module, cache, kind)
            ]
            own, classes, of_components = zip(*found, strict=True)
            scores["pearson"], along = torch.cat(own).cpu(), torch.cat(of_components).cpu()
            if head is not None:
                scores["pearson_classes"] = torch.cat(classes).cpu()
    if "ranks" in wanted:
        with step("Spearman scores"):
            scores["spearman"] = rank_correlations(view.module, cache, kind)
            if head is not None:
                scores["spearman_classes"] = rank_correlations(view.module, cache, kind, properties=head)
    if head is not None and "components" in labelled:
        with step("variance between classes"):
            apart = variance_between_classes(view.module, cache, bases, len(head.class_names), kind)
    if head is not None and "accuracy" in labelled:
        with step("accuracy of units"):
            scores["accuracy"] = own_accuracy(view.module, cache, head, kind)
    curves = []
    options: dict[str, Any] = {"kind": kind, "bases": bases, "fractions": fractions, "seeds": list(seeds)}
    if head is not None and "selection" in labelled:
        with step("selection of units"):
            by = {**scores, "variance": part.total_variance}
            for rest in rests:
                curves.append(selection_curves(view.module, cache, head, by, rest=rest, **options))
    if head is not None and "components" in labelled:
        with step("selection of components"):
            every = {"variance": part.variance, "pearson": along, "between_classes": apart}
            by = {name: score for name, score in every.items() if score is not None}
            curves.append(selection_curves(view.module, cache, head, by, of="components", **options))
    spoken, told = None, {}
    if dictionary is not None and "words" in wanted:
        count = min(words, len(dictionary))
        with step("words of units"):
            spoken = words_of_units(view.module, cache, dictionary, kind, count)
        with step("words of components"):
            told = _component_descriptions(view, bases, dictionary, kind, count, described)
    with step("output"):
        output = _output_row(view, cache, bases, head, energies, points, fraction)
    return Analysis(
        tower=view.name,
        layers=view.layout.layers,
        heads=view.layout.heads,
        dim=view.dim,
        kind=kind,
        images=len(cache),
        fitted_images=bases.count,
        energies=tuple(energies),
        class_names=None if head is None else head.class_names,
        units=_unit_rows(view, kind, part.total_variance, linear, participation, nonlinear, scores, spoken),
        components=_component_rows(view, bases, kind, along, apart, told),
        output=output,
        similarity={name: tuple(map(tuple, matrix.tolist())) for name, matrix in matrices.items()},
        selections=tuple(curves),
        seconds=seconds,
    )


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
            **cast(Any, {name: float(scores[name][place]) if name in scores else None for name in named}),
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
                pearson=None if along is None else float(along[j]),
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
    view: Tower,
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
        for batch in unit_source(cache, view.module, labelled=True).batches():
            named = head(batch.terms.output.to(head.class_vectors.device)).argmax(1)
            hits += int((named.cpu() == batch.labels).sum())
        accuracy = hits / len(cache)
    classes = None if head is None else 1.0
    return UnitRow(
        index=-1,
        kind=OUTPUT,
        layer=None,
        head=None,
        variance=float(bases.parts[OUTPUT].total_variance[0]),
        share=1.0,
        linear=tuple(int(linear_dimension(bases, energy, OUTPUT)[0]) for energy in energies),
        participation=float(participation_ratio(bases, OUTPUT)[0]),
        two_nn=two_nn(cache.output if rows is None else cache.output[rows], fraction),
        pearson=1.0,
        spearman=1.0,
        pearson_classes=classes,
        spearman_classes=classes,
        accuracy=accuracy,
        words=None,
    )
