"""What does a learned weight mean? effect_j = (weight_j - 1) * std_n(c[n,j]):
how far component j moves embeddings.

For a fitted ResiDual and a cache of labelled images: the components it raised and faded most, the classes
each one tells apart, the images at both its ends, and the accuracy that is lost when one head's weights
return to 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from residual_kernels.adapters.residual import ResiDual
from residual_kernels.adapters.tower_adapter import TowerAdapter
from residual_kernels.display import Table
from residual_kernels.ops.reference import coefficients
from residual_kernels.towers import Unit, UnitLayout
from residual_kernels.units.cache import UnitCache
from residual_kernels.units.source import ROWS, UnitSource, rows_within, unit_source
from residual_kernels.zeroshot import ZeroShotHead

BATCH_NUMBERS = 2**23  # coefficients or logits at a time
MOST_ROWS = 2 * ROWS  # likewise


@dataclass(frozen=True)
class Component:
    """One adapted component, as the data show it; `index` is its place in `component_weight()`."""

    index: int
    unit: Unit
    place: int  # in its unit, 0 for the largest variance
    weight: float
    explained: float  # share of its unit's variance in the set that the bases were fitted on
    std: float  # of its coefficient over the cache
    effect: float  # (weight - 1) * std
    separation: float  # share of the coefficient's variance that lies between classes; NaN without labels


@dataclass(frozen=True)
class WeightReading:
    """Every adapted component of a ResiDual over one cache; tensors are float64 on the CPU.

    unit, place: [J] int64, layout index and place in the unit. weight, explained, mean, std, effect: [J].
    class_means [K, J], class_counts [K] and separation [J] (eta squared: variance between classes over all
    variance; 0 where a coefficient is constant) are None where the cache has no labels.
    """

    layout: UnitLayout
    count: int
    unit: Tensor
    place: Tensor
    weight: Tensor
    explained: Tensor
    mean: Tensor
    std: Tensor
    effect: Tensor
    class_means: Tensor | None
    class_counts: Tensor | None
    separation: Tensor | None

    def __len__(self) -> int:
        return len(self.weight)

    def __getitem__(self, index: int) -> Component:
        return Component(
            index=int(index),
            unit=self.layout[int(self.unit[index])],
            place=int(self.place[index]),
            weight=float(self.weight[index]),
            explained=float(self.explained[index]),
            std=float(self.std[index]),
            effect=float(self.effect[index]),
            separation=float("nan") if self.separation is None else float(self.separation[index]),
        )

    def table(self) -> Table:
        """One dict per component: the fields of :class:`Component`, its unit as unit, kind,
        layer and head."""
        rows = []
        for found in (self[j] for j in range(len(self))):
            row = {**vars(found), "unit": found.unit.index}
            rows.append(row | {name: getattr(found.unit, name) for name in ("kind", "layer", "head")})
        return Table(rows)

    def raised(self, count: int) -> list[Component]:
        """At most `count` components with weights above 1, those that move embeddings farthest first."""
        return self._first(self.effect, self.weight > 1, count)

    def faded(self, count: int) -> list[Component]:
        """The same with weights below 1; below 0 a component is turned round."""
        return self._first(-self.effect, self.weight < 1, count)

    def _first(self, score: Tensor, chosen: Tensor, count: int) -> list[Component]:
        order = score.argsort(descending=True, stable=True)
        return [self[j] for j in order[chosen[order]][:count].tolist()]

    def of(self, unit: "int | Unit | tuple[int, int]") -> list[Component]:
        """A unit's components, those that move embeddings farthest first."""
        inside = (self.unit == self.layout.index(unit)).nonzero().flatten()
        order = self.effect[inside].abs().argsort(descending=True, stable=True)
        return [self[j] for j in inside[order].tolist()]

    def unit_weight(self, unit: "int | Unit | tuple[int, int]") -> float:
        """A unit's mean weight, its components counting in proportion to their variance over the cache."""
        inside = self.unit == self.layout.index(unit)
        share = self.std[inside].square()
        if share.sum() == 0:
            return float(self.weight[inside].mean())
        return float((self.weight[inside] * share).sum() / share.sum())

    def unit_effect(self, unit: "int | Unit | tuple[int, int]") -> float:
        """How far the unit's weights move an embedding: the root mean square over images,
        sqrt(sum of effects^2)."""
        return float(self.effect[self.unit == self.layout.index(unit)].square().sum().sqrt())

    def class_scores(self, index: int) -> Tensor:
        """[K]: how many standard deviations a class's mean coefficient lies from the mean of all;
        NaN for no images.

        Raises ValueError when the cache had no labels.
        """
        if self.class_means is None:
            raise ValueError("which classes a component separates needs labels; the cache holds only images")
        spread = self.std[index] if self.std[index] > 0 else 1.0
        return (self.class_means[:, index] - self.mean[index]) / spread


@dataclass(frozen=True)
class Ends:
    """Images at both ends of some components: `low` [M, count] rows of the cache with the lowest
    coefficients, lowest first; `high` with the highest, highest first; their coefficients beside them."""

    indices: tuple[int, ...]
    low: Tensor
    low_values: Tensor
    high: Tensor
    high_values: Tensor


@dataclass(frozen=True)
class ResetReading:
    """accuracy: the fitted one; reset [R]: what it becomes when one unit's weights return to 1,
    units in order."""

    units: tuple[Unit, ...]
    accuracy: float
    reset: Tensor

    @property
    def lost(self) -> Tensor:
        """[R] accuracy lost, negative where the data do better without the unit's weights."""
        return self.accuracy - self.reset


def units_read(residual: ResiDual, cache: UnitCache, **options) -> UnitSource:
    """The units of a cache that a ResiDual reads; a ValueError where its weights cannot be read at all."""
    if not isinstance(residual, TowerAdapter) or residual.weights_on != "components":
        raise ValueError(f"weights are read from a ResiDual; got {type(residual).__name__}")
    if residual.placement != "output":
        raise ValueError(
            "weights are read where units are shares of the output; this ResiDual has "
            f'placement="{residual.placement}"'
        )
    if residual.bases is None:
        raise ValueError("this ResiDual holds no bases, so nothing is known of its components")
    return unit_source(cache, residual.tower, residual.adapted, also=residual.kinds, **options)


def _starts(residual: ResiDual) -> dict[str, int]:
    """Where each adapted kind's components begin in `weight`."""
    starts, total = {}, 0
    for kind in residual.adapted:
        starts[kind] = total
        total += len(residual.units[kind].basis)
    return starts


def directions(residual: ResiDual, indices: Sequence[int]) -> Tensor:
    """[M, D]: the directions of the output space along which these components write, unit length."""
    basis = torch.cat([residual.units[kind].basis for kind in residual.adapted])
    return basis[torch.as_tensor(indices, dtype=torch.int64, device=basis.device)]


class ComponentReader:
    """Coefficients of chosen components (rising indices, all by default),
    reading only the units they belong to."""

    def __init__(self, residual: ResiDual, indices: Sequence[int] | None = None):
        self.device = residual.device
        self._parts = []
        for kind, start in _starts(residual).items():
            constants = residual.units[kind]
            total = len(constants.basis)
            if indices is None:
                inside = torch.arange(total, device=self.device)
            else:
                inside = torch.tensor(
                    [j - start for j in indices if start <= j < start + total],
                    dtype=torch.int64,
                    device=self.device,
                )
            if not len(inside):
                continue
            owner = torch.searchsorted(constants.unit_offsets, inside, right=True) - 1
            units, sizes = torch.unique_consecutive(owner, return_counts=True)
            offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
            named = {name: getattr(constants, name)[inside] for name in ("proj", "bias", "slope", "offset")}
            self._parts.append((kind, units, {**named, "unit_offsets": offsets}))

    def __call__(self, terms) -> Tensor:
        read = []
        for kind, units, named in self._parts:
            z = terms.z[kind][:, units].to(named["proj"].dtype)
            scale, mean = (value.to(z.dtype) for value in (terms.scale, terms.mean))
            read.append(coefficients(z, scale, mean, **named))
        return torch.cat(read, dim=1)


@torch.no_grad()
def read_weights(residual: ResiDual, cache: UnitCache, classes: int | None = None) -> WeightReading:
    """What every weight of a fitted ResiDual does on the images of a cache, in one pass.

    Args:
        residual: fitted, with its bases.
        cache: of the same tower, with the adapted kinds; labels are used where it has them.
        classes: how many classes there are, where some may have no image here; the largest label + 1 by
            default.

    Raises ValueError for a module that is no ResiDual, another tower's cache, or fewer than 2 images.
    """
    source = units_read(residual, cache)
    if len(cache) < 2:
        raise ValueError(f"a spread needs at least 2 images; the cache holds {len(cache)}")
    reader, layout = ComponentReader(residual), residual.layout
    total, device = len(residual.component_weight()), residual.device
    labels = cache.labels
    kinds = 0 if labels is None else max(classes or 0, int(labels.max()) + 1)
    sums = torch.zeros(max(kinds, 1), total, dtype=torch.float64, device=device)
    squares = torch.zeros(total, dtype=torch.float64, device=device)
    shift = None
    for batch in source.batches(rows_within(total, BATCH_NUMBERS, MOST_ROWS)):
        c = reader(batch.terms).double()
        shift = c.mean(0) if shift is None else shift  # a provisional mean, so that squares do not cancel
        c -= shift
        squares += c.square().sum(0)
        place = torch.zeros(len(c), dtype=torch.int64) if labels is None else batch.truth.long()
        sums.index_add_(0, place.to(device), c)
    assert shift is not None  # there are two images at least
    whole = sums.sum(0)
    scatter = (squares - whole.square() / len(cache)).clamp_min(0)
    std = (scatter / (len(cache) - 1)).sqrt().cpu()
    class_means = counts = separation = None
    if labels is not None:
        counts = torch.bincount(labels, minlength=kinds).double()
        between = (sums.cpu().square() / counts[:, None]).nan_to_num(0).sum(0)
        between = between - whole.cpu().square() / len(cache)
        inside = scatter.cpu()
        separation = torch.where(inside > 0, between / inside, 0.0).clamp(0, 1)
        class_means = sums.cpu() / counts[:, None] + shift.cpu()
    unit, place, explained = _owners(residual)
    weight = residual.component_weight().detach().double().cpu()
    return WeightReading(
        layout=layout,
        count=len(cache),
        unit=unit,
        place=place,
        weight=weight,
        explained=explained,
        mean=(whole / len(cache) + shift).cpu(),
        std=std,
        effect=(weight - 1) * std,
        class_means=class_means,
        class_counts=counts,
        separation=separation,
    )


def _owners(residual: ResiDual) -> tuple[Tensor, Tensor, Tensor]:
    """Layout index, place in the unit, and share of the unit's variance of every component."""
    unit, place, explained = [], [], []
    for kind in residual.adapted:
        part, first = residual.bases.parts[kind], residual.layout.span(kind).start
        sizes = part.offsets.diff()
        owner = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        unit.append(first + owner)
        place.append(torch.arange(len(owner)) - part.offsets[owner])
        total = part.total_variance[owner]
        explained.append(torch.where(total > 0, part.variance / total, 0.0))
    return torch.cat(unit), torch.cat(place), torch.cat(explained)


@torch.no_grad()
def component_ends(residual: ResiDual, cache: UnitCache, indices: Sequence[int], count: int = 8) -> Ends:
    """The images with the lowest and the highest coefficients on some components,
    in one pass over their units.

    Of equal coefficients the first image of the cache comes first; a smaller cache gives fewer than `count`
    columns. Raises ValueError for an index outside `weight`, no indices, or a count below 1.
    """
    source = units_read(residual, cache)
    wanted = sorted({int(j) for j in indices})
    total = len(residual.component_weight())
    if not wanted or wanted[0] < 0 or wanted[-1] >= total:
        raise ValueError(f"indices must name components 0 to {total - 1}; got {list(indices)[:8]}")
    if count < 1:
        raise ValueError(f"count must be at least 1; got {count}")
    reader = ComponentReader(residual, wanted)
    best = {
        sign: (torch.empty(0, len(wanted)), torch.empty(0, len(wanted), dtype=torch.int64))
        for sign in (1, -1)
    }
    for batch in source.batches(rows_within(len(wanted), BATCH_NUMBERS, MOST_ROWS)):
        c = reader(batch.terms).cpu()
        place = batch.rows[:, None].expand(-1, len(wanted))
        for sign, (values, places) in best.items():
            joined, where = torch.cat([values.to(c.dtype), c]), torch.cat([places, place])
            order = (joined * sign).argsort(dim=0, descending=True, stable=True)[:count]
            best[sign] = joined.gather(0, order), where.gather(0, order)
    back = torch.tensor([wanted.index(int(j)) for j in indices])
    (high_values, high), (low_values, low) = (
        tuple(value.T[back] for value in best[sign]) for sign in (1, -1)
    )
    return Ends(tuple(int(j) for j in indices), low, low_values, high, high_values)


@torch.no_grad()
def reset_accuracy(
    residual: ResiDual, cache: UnitCache, head: ZeroShotHead, kind: str = "head"
) -> ResetReading:
    """The accuracy when one unit's weights return to 1, for all units of a kind in one pass over the cache.

    A reset of unit u adds sum over its components of (1 - weight_j) c_j basis_j to the embedding, and the
    largest logit does not depend on the embedding's length: so each component is written onto the class
    vectors once, and all resets together cost what one embedding costs, not R + 1 (as that many weight
    vectors of the operator would).

    Raises ValueError when `kind` is not adapted, or the cache has no labels or labels the head does not know.
    """
    source = units_read(residual, cache, labelled=True, class_names=head.class_names)
    if kind not in residual.adapted:
        raise ValueError(f"units of kind {kind!r} are not adapted ({', '.join(residual.adapted)} are)")
    constants, device = residual.units[kind], residual.device
    vectors = head.class_vectors.to(device, constants.basis.dtype)
    bounds = constants.unit_offsets.tolist()
    runs = list(zip(bounds[:-1], bounds[1:], strict=True))
    start = _starts(residual)[kind]
    to_one = 1 - residual.component_weight().detach()[start : start + bounds[-1]]
    written = to_one[:, None] * (constants.basis @ vectors)  # [J, K]
    hits = torch.zeros(len(runs) + 1, dtype=torch.int64, device=device)
    for batch in source.batches(rows_within(max(bounds[-1], vectors.shape[1]), BATCH_NUMBERS, MOST_ROWS)):
        terms, truth = batch.terms, batch.truth.to(device)
        logits = residual.from_units(terms).to(vectors) @ vectors
        c = constants.features(terms.z[kind], terms.scale, terms.mean)["c"]
        hits[0] += (logits.argmax(1) == truth).sum()
        for unit, (low, high) in enumerate(runs, 1):
            moved = torch.addmm(logits, c[:, low:high], written[low:high])
            hits[unit] += (moved.argmax(1) == truth).sum()
    share = hits.double().cpu() / len(cache)
    return ResetReading(residual.layout.select(kind), float(share[0]), share[1:])
