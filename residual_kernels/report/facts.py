"""What goes into a report? Every number of it, computed once from an adapter and a cache of labelled images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from residual_kernels.adapters.residual import ResiDual
from residual_kernels.adapters.tower_adapter import TowerAdapter
from residual_kernels.analysis.dimension import linear_dimension, participation_ratio, two_nn_dimension
from residual_kernels.analysis.scores import correlations, own_accuracy
from residual_kernels.analysis.selection import selection_curves
from residual_kernels.analysis.similarity import similarity_matrix
from residual_kernels.analysis.weights import (
    Component,
    Ends,
    WeightReading,
    component_ends,
    read_weights,
    reset_accuracy,
)
from residual_kernels.analysis.words import TextDictionary, words_at_ends
from residual_kernels.bases.pca import fit_bases
from residual_kernels.bases.spectral_bases import SpectralBases
from residual_kernels.towers import Unit, UnitLayout
from residual_kernels.units.cache import UnitCache
from residual_kernels.zeroshot import ZeroShotHead

ROWS = 512  # of the cache, labelled at a time
ENERGY = 0.99  # explained variance of the linear dimension, the paper's
POINTS = 2000  # images that TwoNN looks at: its time grows with their square
SIMILAR = 400  # heads compared with each other, counted from the last layer
SHOWN = 6  # components raised and faded most that are shown in full
PER_UNIT = 4  # components of a unit that come with images
STRIP = 8  # images at each end of a component
WORDS = 3  # at each end of a component


@dataclass(frozen=True)
class Outcome:
    """How the images were labelled: confusion [K, K] counts, rows the true class."""

    confusion: Tensor

    @property
    def accuracy(self) -> float:
        return float(self.confusion.diagonal().sum() / self.confusion.sum())

    @property
    def class_accuracy(self) -> Tensor:
        """[K]; NaN where a class has no image."""
        return self.confusion.diagonal() / self.confusion.sum(1)


@dataclass(frozen=True)
class Curve:
    """Accuracy when only some heads are kept; `low` and `high` are the range over seeds, where there are several."""

    name: str
    kept: tuple[int, ...]
    accuracy: tuple[float, ...]
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Source:
    """Where a report's numbers come from, as a reader would name it."""

    model: str
    data: str
    run: str


@dataclass(frozen=True)
class Facts:
    """Everything that a report says. What an adapter has no part in (components without a basis, say) is None or empty.

    unit_weight, unit_effect and unit_lost are keyed by layout index: a unit's mean weight, how far its weights move an
    embedding, and the accuracy lost when they return to 1.
    """

    source: Source
    adapter: str  # its class
    adapted: tuple[str, ...]
    rest: str | None
    learned: int
    class_names: tuple[str, ...]
    labels: tuple[int, ...]  # of every image
    before: Outcome
    after: Outcome
    mended: int  # images misread before and right after
    broken: int
    layout: UnitLayout
    bases: SpectralBases  # of the heads on these very images, whole
    linear: Tensor  # [R] components for ENERGY of the variance
    participation: Tensor  # [R]
    nonlinear: Tensor  # [R] TwoNN
    points: int  # images that TwoNN looked at
    similarity: Tensor  # [S, S], the last S heads
    curves: tuple[Curve, ...]
    unit_weight: dict[int, float]
    unit_effect: dict[int, float]
    unit_lost: dict[int, float]
    reading: WeightReading | None
    ends: Ends | None
    words: dict[
        int, tuple[tuple[str, ...], tuple[str, ...]]
    ]  # of a component: at its high end, at its low end

    @property
    def heads(self) -> tuple[Unit, ...]:
        return self.layout.select("head")

    @property
    def mapped(self) -> tuple[Unit, ...]:
        """Units of the weight map: all adapted ones that belong to a layer."""
        return tuple(
            unit for unit in self.layout if unit.index in self.unit_weight and unit.layer is not None
        )

    @property
    def counts(self) -> Tensor:
        """[K] images of each class."""
        return self.before.confusion.sum(1)

    @property
    def images(self) -> int:
        return int(self.counts.sum())

    @property
    def raised(self) -> list[Component]:
        return [] if self.reading is None else self.reading.raised(SHOWN)

    @property
    def faded(self) -> list[Component]:
        return [] if self.reading is None else self.reading.faded(SHOWN)


@torch.no_grad()
def _outcomes(
    adapter: TowerAdapter, head: ZeroShotHead, cache: UnitCache
) -> tuple[Outcome, Outcome, int, int]:
    """(without the adapter, with it, images it mended, images it broke)."""
    device, classes = next(adapter.tower.parameters()).device, len(head.class_names)
    head = head.to(device)
    tables = torch.zeros(2, classes * classes, dtype=torch.float64)
    mended = broken = 0
    for start in range(0, len(cache), ROWS):
        rows = slice(start, start + ROWS)
        terms, truth = cache.terms(rows, device), cache.labels[rows]
        named = [head(y).argmax(1).cpu() for y in (terms.output, adapter.from_units(terms))]
        for table, labels in zip(tables, named, strict=True):
            table += torch.bincount(truth * classes + labels, minlength=classes * classes)
        right = [labels == truth for labels in named]
        mended += int((right[1] & ~right[0]).sum())
        broken += int((right[0] & ~right[1]).sum())
    before, after = (Outcome(table.view(classes, classes)) for table in tables)
    return before, after, mended, broken


def chosen_components(reading: WeightReading, units: Sequence[Unit]) -> list[int]:
    """Components that come with words and images: those shown in full, then every unit's first, second and so on."""
    shown = [c.index for c in (*reading.raised(SHOWN), *reading.faded(SHOWN))]
    own = [reading.of(unit)[:PER_UNIT] for unit in units]
    for place in range(PER_UNIT):
        layer = [components[place] for components in own if len(components) > place]
        shown += [c.index for c in sorted(layer, key=lambda c: -abs(c.effect))]
    return list(dict.fromkeys(shown))


def _curves(adapter: TowerAdapter, head: ZeroShotHead, cache: UnitCache) -> tuple[Curve, ...]:
    """What the best heads by every score are worth alone, all else dropped, and as many random ones."""
    tower = adapter.tower
    scores = {
        "correlation with the output": correlations(tower, cache),
        "correlation along the class vectors": correlations(tower, cache, properties=head),
        "their own accuracy": own_accuracy(tower, cache, head),
    }
    found = selection_curves(tower, cache, head, scores)
    kept = tuple(dict.fromkeys(found.kept))  # small shares of few heads are the same number of them
    first = [found.kept.index(count) for count in kept]
    random = torch.tensor(found.random, dtype=torch.float64)[:, first]
    curves = [Curve(name, kept, tuple(values[i] for i in first)) for name, values in found.accuracy.items()]
    low, mean, high = (tuple(x.tolist()) for x in (random.amin(0), random.mean(0), random.amax(0)))
    return (*curves, Curve(f"at random ({len(random)} times)", kept, mean, low, high))


def _words(
    residual: ResiDual, dictionary: TextDictionary, reading: WeightReading, indices: Sequence[int]
) -> dict[int, tuple[tuple[str, ...], tuple[str, ...]]]:
    """(words at the high end, words at the low end) of every component."""
    found, count = {}, min(WORDS, len(dictionary))
    for index in indices:
        component = reading[index]
        ends = words_at_ends(residual.bases, dictionary, component.unit, component.place, count)
        low, high = (tuple(word for word, _ in end) for end in ends)
        found[index] = high, low
    return found


def gather(
    adapter: TowerAdapter,
    head: ZeroShotHead,
    cache: UnitCache,
    source: Source,
    *,
    dictionary: TextDictionary | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Facts:
    """Computes everything a report says.

    Args:
        adapter: fitted; any of this library's that works on a cache. A ResiDual is read component by component,
            CoarseHeads head by head.
        head: the classifier it was fitted with.
        cache: labelled images, with heads and the adapter's kinds.
        source: names for the reader.
        dictionary: words for the components; none without.
        say: called with what is being done.

    Raises ValueError when the cache has no labels, too few images, or belongs to another tower.
    """
    tower, layout = adapter.tower, adapter.layout
    adapted = adapter.adapted
    cache.check(tower, {"head", *adapted})
    if cache.labels is None:
        raise ValueError("a report needs labelled images; this cache holds only images")
    if len(cache) < 3:
        raise ValueError(f"a report needs at least 3 images; there are {len(cache)}")
    say("labelling the images with and without the adapter")
    before, after, mended, broken = _outcomes(adapter, head, cache)

    reading = ends = None
    weight: dict[int, float] = {}
    effect: dict[int, float] = {}
    lost: dict[int, float] = {}
    words = {}
    units = [unit for kind in adapted for unit in layout[layout.span(kind)]]
    if adapter.weights_on == "components":
        say("reading the weights")
        reading = read_weights(adapter, cache, len(head.class_names))
        weight = {unit.index: reading.unit_weight(unit) for unit in units}
        effect = {unit.index: reading.unit_effect(unit) for unit in units}
        for kind in adapted:
            say(f"setting the weights of every {kind} back to 1 in turn")
            found = reset_accuracy(adapter, head, cache, kind)
            lost |= {unit.index: value for unit, value in zip(found.units, found.lost.tolist(), strict=True)}
        say("looking for words, and for images at the ends of components")
        chosen = chosen_components(reading, units)
        ends = component_ends(adapter, cache, chosen, STRIP)
        if dictionary is not None:
            words = _words(adapter, dictionary, reading, chosen)
    elif adapter.weights_on == "units":
        weight = dict(zip((unit.index for unit in units), adapter.component_weight().tolist(), strict=True))

    say("fitting principal components of every head")
    bases = fit_bases(tower, cache, ("head",))
    say("comparing heads")
    similarity = similarity_matrix(bases)[-SIMILAR:, -SIMILAR:]
    say("counting dimensions")
    points = min(len(cache), POINTS)
    nonlinear = two_nn_dimension(tower, cache, points=points)
    say("keeping a few heads at a time")
    return Facts(
        source=source,
        adapter=type(adapter).__name__,
        adapted=adapted,
        rest=adapter.rest.rest if adapted else None,
        learned=sum(p.numel() for p in adapter.trainable()),
        class_names=head.class_names,
        labels=tuple(cache.labels.tolist()),
        before=before,
        after=after,
        mended=mended,
        broken=broken,
        layout=layout,
        bases=bases,
        linear=linear_dimension(bases, ENERGY),
        participation=participation_ratio(bases),
        nonlinear=nonlinear,
        points=points,
        similarity=similarity,
        curves=_curves(adapter, head, cache),
        unit_weight=weight,
        unit_effect=effect,
        unit_lost=lost,
        reading=reading,
        ends=ends,
        words=words,
    )
