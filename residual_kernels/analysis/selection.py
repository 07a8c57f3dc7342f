"""How few heads, or components, does a task need?

Accuracy with the best of them kept and the rest zeroed or averaged.

Accuracy needs only the dot products with K class vectors (the largest does not depend on an embedding's
length), so a unit is K numbers an image here, whatever D is.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from residual_kernels import towers
from residual_kernels.analysis.reading import (
    BasisReader,
    constants,
    map_rows,
    output_bases,
    short,
    units_of,
)
from residual_kernels.analysis.scores import class_maps
from residual_kernels.bases.spectral_bases import OUTPUT, SpectralBases
from residual_kernels.towers import KINDS, Terms, Tower
from residual_kernels.units.cache import UnitCache
from residual_kernels.units.source import cached_source, rows_within, unit_source
from residual_kernels.zeroshot import ZeroShotHead

FRACTIONS = (0.01, 0.02, 0.05, 0.10, 0.20, 0.30, 0.50, 0.75, 1.0)
RESTS = ("zero", "mean")
BATCH_BYTES = 128 * 2**20  # of units' dot products with the class vectors at a time


@dataclass(frozen=True)
class Curve:
    """Accuracy when only some units are kept; `low` and `high` are the range over seeds,
    where there are several."""

    name: str
    kept: tuple[int, ...]
    accuracy: tuple[float, ...]
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None


@dataclass(frozen=True)
class SelectionCurves:
    """Accuracy against how much is kept. Made by :func:`selection_curves`.

    Attributes:
        of: "units" or "components".
        kind: of the units.
        rest: "zero" or "mean".
        total: how many units or components there are.
        fractions: F shares that were kept.
        kept: [F], the number that each share is.
        accuracy: name of a score -> [F] accuracies.
        random: for each seed, [F] accuracies with a random order.
        seeds: of the random orders.
        base: the accuracy of the untouched model.
    """

    of: str
    kind: str
    rest: str
    total: int
    fractions: tuple[float, ...]
    kept: tuple[int, ...]
    accuracy: dict[str, tuple[float, ...]]
    random: tuple[tuple[float, ...], ...]
    seeds: tuple[int, ...]
    base: float

    def curves(self, names: Mapping[str, str] | None = None) -> tuple[Curve, ...]:
        """A curve for each score, and one for the random orders.

        Args:
            names: score -> the name of its curve; all scores under their own names by default.

        Returns:
            The curves; that of the random orders comes last, with its lowest and highest values.
        """
        kept = tuple(dict.fromkeys(self.kept))  # small shares of few units are the same number of them
        first = [self.kept.index(count) for count in kept]
        names = {score: score for score in self.accuracy} if names is None else names
        found = [
            Curve(name, kept, tuple(self.accuracy[score][i] for i in first)) for score, name in names.items()
        ]
        if not self.random:
            return tuple(found)
        random = torch.tensor(self.random, dtype=torch.float64)[:, first]
        low, mean, high = (tuple(x.tolist()) for x in (random.amin(0), random.mean(0), random.amax(0)))
        return (*found, Curve(f"at random ({len(random)} times)", kept, mean, low, high))


def ablate(
    tower: nn.Module,
    data: "UnitCache | Iterable",
    keep: Iterable,
    rest: str = "zero",
    *,
    bases: SpectralBases | None = None,
) -> Tensor:
    """The embeddings with some units kept, and all others dropped or replaced by their mean.

    Args:
        tower: a supported image tower, or an adapter around one.
        data: a UnitCache of this tower with the kinds of the units kept, or a loader.
        keep: layout indices, rows or (layer, head), of any kinds; each once.
        rest: what happens to the others: "zero", or "mean" (their fitted mean).
        bases: for "mean": of this tower, whole or truncated, with the kinds kept.

    Returns:
        [N, D]. One image's result never depends on the others.

    Raises:
        ValueError: a unit named twice, no bases for "mean", or data of another tower.
    """
    view = towers.view_inside(tower)
    chosen = [view.layout[view.layout.index(unit)] for unit in keep]
    if len({unit.index for unit in chosen}) < len(chosen):
        raise ValueError("a unit is named twice among those to keep")
    kinds = tuple(kind for kind in KINDS if any(unit.kind == kind for unit in chosen))
    _check_rest(view, rest, bases, kinds)
    offset = torch.zeros(view.dim, dtype=torch.float64)
    if rest == "mean" and bases is not None:  # which _check_rest has seen to
        offset = bases.parts[OUTPUT].mean[0].clone()
    chosen_maps = []
    for kind in kinds:
        units = [unit for unit in chosen if unit.kind == kind]
        if rest == "mean" and bases is not None:
            for unit in units:
                offset -= bases.mean(unit)
        chosen_maps.append((units, view.layout.span(kind).start, map_rows(view, units)))
        offset += len(units) * constants(view, kind).cpu()
    found = []
    for batch in unit_source(data, view.module, kinds).batches():
        terms = batch.terms
        dtype = terms.output.dtype
        y = offset.to(terms.output).expand(len(terms.output), -1)
        for units, first, rows in chosen_maps:
            local = short(terms, units, first).to(dtype)
            flat = local.sum(1) if len(rows) == 1 else local.flatten(1)
            y = y + flat @ rows.flatten(0, 1).to(dtype)
        found.append(y.cpu())
    if not found:
        raise ValueError("there are no images to embed")
    return torch.cat(found)


def _check_rest(view: Tower, rest: str, bases: SpectralBases | None, kinds: Iterable[str]) -> None:
    if rest not in RESTS:
        raise ValueError(f"rest must be one of {', '.join(RESTS)}; got {rest!r}")
    if rest == "mean":
        if bases is None:
            raise ValueError('rest="mean" needs bases: the mean is the fitted one, not the batch\'s')
        output_bases(view, bases, kinds)


class _UnitProducts:
    """Every unit's dot products with the class vectors, batch by batch."""

    def __init__(self, view: Tower, kind: str, head: ZeroShotHead, bases: SpectralBases | None):
        self.units, self.first = units_of(view, kind), view.layout.span(kind).start
        maps, constant = class_maps(view, self.units, head)
        self.total, self.classes = len(self.units), maps.shape[2]
        self.maps = maps
        if bases is None:
            self.offset = constant[None, None]
            self.base = torch.zeros_like(constant)
        else:  # a unit that is kept adds what it is beyond its mean to the mean of all
            V = head.class_vectors.to(maps)
            self.offset = (constant - bases.parts[kind].mean.to(maps) @ V)[:, None]
            self.base = bases.parts[OUTPUT].mean[0].to(maps) @ V
        self.bytes_a_row = self.total * self.classes * 8

    def load(self, terms: Terms) -> None:
        dtype = terms.output.dtype
        local = short(terms, self.units, self.first).to(dtype).transpose(0, 1)
        self.products = local @ self.maps.to(dtype) + self.offset.to(dtype)  # [R, n, K]

    def add(self, items: Tensor) -> Tensor:
        return self.products[items].sum(0)


class _ComponentProducts:
    """Every kept component's coefficient, and its direction's dot products with the class vectors."""

    def __init__(self, view: Tower, kind: str, head: ZeroShotHead, bases: SpectralBases, rest: str):
        self.read = BasisReader(view, bases, kind)
        part = bases.parts[kind]
        V = head.class_vectors.double()
        if V.shape[0] != bases.dim:
            raise ValueError(
                f"embeddings have {bases.dim} numbers but the class vectors {V.shape[0]}: "
                "they come from two different models"
            )
        self.directions = part.components.to(V) @ V  # [J, K]
        self.total, self.classes = self.directions.shape
        mean = bases.parts[OUTPUT].mean[0].to(V) @ V
        self.base = mean if rest == "mean" else torch.zeros_like(mean)
        self.bytes_a_row = self.total * 8

    def load(self, terms: Terms) -> None:
        self.coefficients = self.read(terms)
        self.narrow = self.directions.to(self.coefficients)

    def add(self, items: Tensor) -> Tensor:
        return self.coefficients[items].T @ self.narrow[items]


@torch.no_grad()
def selection_curves(
    tower: nn.Module,
    data: "UnitCache | Iterable",
    head: ZeroShotHead,
    scores: Mapping[str, Tensor],
    *,
    kind: str = "head",
    of: str = "units",
    rest: str = "zero",
    bases: SpectralBases | None = None,
    fractions: Sequence[float] = FRACTIONS,
    seeds: Iterable[int] = range(10),
) -> SelectionCurves:
    """Accuracy with only the highest-scored units (or components) kept, and with random ones.

    Args:
        tower: a supported image tower, or an adapter around one.
        data: labelled; a UnitCache of this tower with `kind`, or a loader (encoded in memory first).
        head: the classifier.
        scores: name -> [R] numbers per unit of the kind, or [J] per kept component; the first of equals is
            taken first.
        kind: of the units.
        of: "units" (x_u is kept whole) or "components" (c_j phi_j is kept, as in a ResiDual with weights of 1
            and 0).
        rest: what happens to everything else, the other kinds included: "zero", or "mean" (its fitted mean).
        bases: needed for "mean" and for components.
        fractions: of the total, in (0, 1], rising; at least one is kept.
        seeds: of the random orders that serve as control.

    Returns:
        :class:`SelectionCurves`.

    Raises:
        ValueError: no labels, scores of another length, fractions out of range, or bases that are missing.
    """
    view = towers.view_inside(tower)
    towers.check_kinds((kind,), view.layout)
    _check_rest(view, rest, bases, (kind,))
    if of not in ("units", "components"):
        raise ValueError(f'of must be "units" or "components"; got {of!r}')
    if of == "components" and bases is None:
        raise ValueError("selecting components needs bases")
    fractions = tuple(float(f) for f in fractions)
    if (
        not fractions
        or list(fractions) != sorted(set(fractions))
        or not 0 < fractions[0] <= fractions[-1] <= 1
    ):
        raise ValueError(f"fractions must rise within (0, 1]; got {fractions}")
    source = cached_source(data, view.module, (kind,), labelled=True, class_names=head.class_names)
    candidates = (
        _ComponentProducts(view, kind, head, bases, rest)
        if of == "components" and bases is not None
        else _UnitProducts(view, kind, head, bases if rest == "mean" else None)
    )
    orders: dict[str | int, Tensor] = {}
    for name, score in scores.items():
        if score.shape != (candidates.total,) or score.isnan().any():
            raise ValueError(
                f"score {name!r} must be {candidates.total} numbers, one per {of[:-1]}, without NaN; "
                f"got {tuple(score.shape)}"
            )
        orders[name] = score.argsort(descending=True, stable=True)
    seeds = list(seeds)
    for seed in seeds:
        orders[seed] = torch.randperm(candidates.total, generator=torch.Generator().manual_seed(seed))
    kept = tuple(max(1, round(fraction * candidates.total)) for fraction in fractions)
    hits = {name: torch.zeros(len(kept), dtype=torch.float64) for name in orders}
    right = 0
    bounds = list(zip((0, *kept[:-1]), kept, strict=True))
    for batch in source.batches(rows_within(candidates.bytes_a_row, BATCH_BYTES)):
        terms, labels = batch.terms, batch.truth
        named = head(terms.output.to(head.class_vectors.device)).argmax(1)
        right += int((named.cpu() == labels).sum())
        candidates.load(terms)
        for key, order in orders.items():
            products = candidates.base.to(terms.output).expand(len(labels), -1)
            for place, (low, high) in enumerate(bounds):
                if high > low:
                    products = products + candidates.add(order[low:high].to(source.device))
                hits[key][place] += (products.argmax(1).cpu() == labels).sum()
    share = {name: tuple((count / source.count).tolist()) for name, count in hits.items()}
    return SelectionCurves(
        of=of,
        kind=kind,
        rest=rest,
        total=candidates.total,
        fractions=fractions,
        kept=kept,
        accuracy={name: share[name] for name in scores},
        random=tuple(share[seed] for seed in seeds),
        seeds=tuple(seeds),
        base=right / source.count,
    )
