"""What goes into a report? An :class:`Analysis` of the tower, and what the adapter changed and learned."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from residual_kernels import train
from residual_kernels.adapters.residual import ResiDual
from residual_kernels.adapters.tower_adapter import TowerAdapter
from residual_kernels.analysis.ends import Words, words_for_ends
from residual_kernels.analysis.findings import Analysis
from residual_kernels.analysis.selection import Curve
from residual_kernels.analysis.summary import analyze
from residual_kernels.analysis.weights import (
    Component,
    Ends,
    WeightReading,
    component_ends,
    read_weights,
    reset_accuracy,
)
from residual_kernels.analysis.words import TextDictionary
from residual_kernels.bases.pca import fit_bases
from residual_kernels.bases.spectral_bases import SpectralBases
from residual_kernels.towers import Unit, UnitLayout
from residual_kernels.units.cache import UnitCache
from residual_kernels.visible import visible
from residual_kernels.zeroshot import ZeroShotHead

ENERGY = 0.99  # explained variance of the linear dimension, the paper's
POINTS = 2000  # images that TwoNN looks at: its time grows with their square
SIMILAR = 400  # heads compared with each other, counted from the last layer
SHOWN = 6  # components raised and faded most that are shown in full
PER_UNIT = 4  # components of a unit that come with images
CLASSES_SHOWN = 40  # in the figures of classes
STRIP = 8  # images at each end of a component
WORDS = 3  # at each end of a component
TABLES = ("dimension", "similarity", "correlation", "accuracy", "selection")  # of the analysis
SCORES = {  # of heads, as a reader knows them
    "pearson": "correlation with the output",
    "pearson_classes": "correlation along the class vectors",
    "accuracy": "their own accuracy",
}


@dataclass(frozen=True)
class Source:
    """Where a report's numbers come from, as a reader would name it."""

    model: str
    data: str
    run: str


@dataclass(frozen=True)
class Facts:
    """Everything that a report says.

    What an adapter has no part in (components without a basis, say) is None or empty.

    unit_weight, unit_effect and unit_lost are keyed by layout index: a unit's mean weight, how far its
    weights move an embedding, and the accuracy lost when they return to 1. `analysis` is of the heads on
    these very images, `bases` the whole bases that it was made with.
    """

    source: Source
    adapter: str  # its class
    adapted: tuple[str, ...]
    rest: str | None
    learned: int
    class_names: tuple[str, ...]
    labels: tuple[int, ...]  # of every image
    before: train.Evaluation
    after: train.Evaluation
    mended: int  # images misread before and right after
    broken: int
    layout: UnitLayout
    bases: SpectralBases
    analysis: Analysis
    points: int  # images that TwoNN looked at
    unit_weight: dict[int, float]
    unit_effect: dict[int, float]
    unit_lost: dict[int, float]
    reading: WeightReading | None
    ends: Ends | None
    # Of a component: at its high end, at its low end.
    words: dict[int, tuple[tuple[str, ...], tuple[str, ...]]]

    @cached_property
    def linear(self) -> Tensor:
        """[R] components for ENERGY of a head's variance."""
        return torch.tensor([row.linear[-1] for row in self.analysis.units])

    @cached_property
    def participation(self) -> Tensor:
        """[R] participation ratios."""
        return torch.tensor([row.participation for row in self.analysis.units], dtype=torch.float64)

    @cached_property
    def nonlinear(self) -> Tensor:
        """[R] TwoNN dimensions."""
        return torch.tensor([row.two_nn for row in self.analysis.units], dtype=torch.float64)

    @cached_property
    def similarity(self) -> Tensor:
        """[S, S], of the last S heads."""
        matrix = torch.tensor(self.analysis.similarity["explained_variance"], dtype=torch.float64)
        return matrix[-SIMILAR:, -SIMILAR:]

    @cached_property
    def curves(self) -> tuple[Curve, ...]:
        """What the best heads by every score are worth alone, all else dropped, and as many random ones."""
        return self.analysis.selections[0].curves(SCORES) if self.analysis.selections else ()

    def of_components(self) -> tuple[WeightReading, Ends]:
        """`reading` and `ends` of an adapter whose weights are on components.

        Only these have components to ask for.
        """
        assert self.reading is not None
        assert self.ends is not None
        return self.reading, self.ends

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
    def classes_shown(self) -> list[int]:
        """Those of the class figures: all that have images, or those that changed most,
        in the head's order."""
        present = (self.counts > 0).nonzero().flatten().tolist()
        if len(present) <= CLASSES_SHOWN:
            return present
        change = (self.after.class_accuracy - self.before.class_accuracy).abs()
        return sorted(sorted(present, key=lambda k: -float(change[k]))[:CLASSES_SHOWN])

    @property
    def raised(self) -> list[Component]:
        return [] if self.reading is None else self.reading.raised(SHOWN)

    @property
    def faded(self) -> list[Component]:
        return [] if self.reading is None else self.reading.faded(SHOWN)


def chosen_components(reading: WeightReading, units: Sequence[Unit]) -> list[int]:
    """Components that come with words and images: those shown in full, then every unit's first,
    second and so on."""
    shown = [c.index for c in (*reading.raised(SHOWN), *reading.faded(SHOWN))]
    own = [reading.of(unit)[:PER_UNIT] for unit in units]
    for place in range(PER_UNIT):
        layer = [components[place] for components in own if len(components) > place]
        shown += [c.index for c in sorted(layer, key=lambda c: -abs(c.effect))]
    return list(dict.fromkeys(shown))


def _named(end: Words) -> tuple[str, ...]:
    return tuple(word for word, _ in end)


def _moved(head: ZeroShotHead, base_head: ZeroShotHead | None) -> int:
    """How many numbers of class vectors were learned too."""
    same = base_head is None or torch.equal(head.class_vectors, base_head.class_vectors)
    return 0 if same else head.class_vectors.numel()


def gather(
    adapter: TowerAdapter,
    head: ZeroShotHead,
    cache: UnitCache,
    source: Source,
    *,
    base_head: ZeroShotHead | None = None,
    dictionary: TextDictionary | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Facts:
    """Computes everything a report says.

    Args:
        adapter: fitted; any of this library's that works on a cache. A ResiDual is read component by
            component, CoarseHeads head by head.
        head: the classifier it was fitted with.
        cache: labelled images, with heads and the adapter's kinds.
        source: names for the reader.
        base_head: how the untouched model is read, where the fit moved the class vectors of `head`.
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
    change = train.compare(adapter, head, cache, base_head)

    reading = ends = None
    weight: dict[int, float] = {}
    effect: dict[int, float] = {}
    lost: dict[int, float] = {}
    words = {}
    units = [unit for kind in adapted for unit in layout[layout.span(kind)]]
    if adapter.weights_on == "components":
        say("reading the weights")
        residual = cast(ResiDual, adapter)  # the class whose weights are on components
        reading = read_weights(residual, cache, len(head.class_names))
        weight = {unit.index: reading.unit_weight(unit) for unit in units}
        effect = {unit.index: reading.unit_effect(unit) for unit in units}
        for kind in adapted:
            say(f"setting the weights of every {kind} back to 1 in turn")
            found = reset_accuracy(residual, cache, head, kind)
            lost |= {unit.index: value for unit, value in zip(found.units, found.lost.tolist(), strict=True)}
        say("looking for words, and for images at the ends of components")
        chosen = chosen_components(reading, units)
        ends = component_ends(residual, cache, chosen, STRIP)
        if dictionary is not None:
            found_words = words_for_ends(residual, cache, dictionary, [reading[j] for j in chosen], WORDS)
            words = {j: (_named(high), _named(low)) for j, (high, low) in found_words.items()}
    elif adapter.weights_on == "units":
        weight = dict(zip((unit.index for unit in units), adapter.component_weight().tolist(), strict=True))

    say("fitting principal components of every head")
    bases = fit_bases(tower, cache, ("head",))
    analysis = analyze(
        tower,
        cache,
        base_head or head,  # it looks at the model's own heads, before anything was learned
        bases,
        energies=(ENERGY,),
        similarities=("explained_variance",),
        points=POINTS,
        rests=("zero",),
        tables=TABLES,
        progress=say,
    )
    return Facts(
        source=source,
        adapter=type(adapter).__name__,
        adapted=adapted,
        rest=adapter.rest_name,
        learned=sum(p.numel() for p in adapter.trainable()) + _moved(head, base_head),
        class_names=tuple(map(visible, head.class_names)),
        labels=tuple(cache.labels.tolist()),
        before=change.before,
        after=change.after,
        mended=change.mended,
        broken=change.broken,
        layout=layout,
        bases=bases,
        analysis=analysis,
        points=min(len(cache), POINTS),
        unit_weight=weight,
        unit_effect=effect,
        unit_lost=lost,
        reading=reading,
        ends=ends,
        words=words,
    )
