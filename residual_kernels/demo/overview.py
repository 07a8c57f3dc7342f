"""The demonstration in one picture: digits misread and read, the sum behind one of them,
and one component of it."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL.Image import Image
from torch import Tensor

from residual_kernels import train
from residual_kernels.adapters.residual import ResiDual
from residual_kernels.analysis.ends import words_for_ends
from residual_kernels.analysis.weights import ComponentReader, component_ends, directions, read_weights
from residual_kernels.analysis.words import TextDictionary
from residual_kernels.figures.overview import Read, ShownEnds, Sum, overview
from residual_kernels.towers import UnitLayout
from residual_kernels.units.cache import UnitCache
from residual_kernels.units.decomposition import decompose
from residual_kernels.zeroshot import ZeroShotHead

STRIP, AT_AN_END = 10, 5


def draw(
    adapter: ResiDual,
    head: ZeroShotHead,
    test: UnitCache,
    images: Sequence[Image],
    preprocess: Callable,
    class_words: TextDictionary,
    dark: bool = False,
) -> Figure:
    """The picture of a fitted anchored adapter.

    Args:
        adapter: with `rest="all"`, so that weights of one are the untouched model.
        test: images that nothing was fitted to or chosen by; their ids are places in `images`.
        class_words: one word or phrase for each class, in the order of the classes, of the same model.
        dark: for a dark page.
    """
    before, after = head(test.output).argmax(1), train.predict(adapter, head, test).labels
    names = head.class_names
    wrong = (before != test.truth).nonzero().flatten().tolist()
    reads = [
        Read(images[int(test.ids[n])], names[test.truth[n]], names[before[n]], names[after[n]]) for n in wrong
    ]
    mended = next(place for place, one in enumerate(reads) if one.after == one.truth)
    row = wrong[mended]
    lead = head.class_vectors[:, test.truth[row]] - head.class_vectors[:, before[row]]
    image = preprocess(reads[mended].image)[None]
    return overview(
        reads[:STRIP],
        (_share(before == test.truth), _share(after == test.truth)),
        len(test),
        reads[mended],
        _sums(adapter, test.subset(torch.tensor([row])), image, lead, float(head.logit_scale.exp())),
        len(adapter.weight),
        _ends(adapter, test, images, class_words),
        dark,
    )


@torch.no_grad()
def _sums(adapter: ResiDual, cache: UnitCache, image: Tensor, lead: Tensor, scale: float) -> tuple[Sum, Sum]:
    """What each part adds to the lead of one class over another, in logits: with weights of one,
    and as learned."""
    decomposition = decompose(adapter.tower, image)
    plain = decomposition.units()[0] @ lead
    terms = cache.terms(slice(0, 1), adapter.device, adapter.kinds)
    weight = adapter.component_weight()
    coefficient = ComponentReader(adapter)(terms)[0]
    moved = (weight - 1) * coefficient * (directions(adapter, range(len(weight))) @ lead)
    changed = plain.index_add(0, _owners(adapter), moved.to(plain.dtype))
    return (
        _sum(adapter.layout, scale * plain / decomposition.output.norm()),
        _sum(adapter.layout, scale * changed / adapter(image).norm()),
    )


def _share(right: Tensor) -> float:
    return float(right.double().mean())


def _owners(adapter: ResiDual) -> Tensor:
    """[J] layout index of every component's unit."""
    owners = []
    for kind in adapter.adapted:
        sizes = adapter.units[kind].unit_offsets.diff()
        first = adapter.layout.span(kind).start
        owners.append(first + torch.repeat_interleave(torch.arange(len(sizes)), sizes))
    return torch.cat(owners)


def _sum(layout: UnitLayout, values: Tensor) -> Sum:
    grid, rest = np.zeros((layout.layers, layout.heads + 1)), 0.0
    for unit in layout:
        if unit.layer is None:
            rest += float(values[unit.index])
        else:
            grid[unit.layer, layout.heads if unit.head is None else unit.head] += float(values[unit.index])
    return Sum(grid, rest)


def _ends(
    adapter: ResiDual, cache: UnitCache, images: Sequence[Image], class_words: TextDictionary
) -> ShownEnds:
    """Of the heads' components with a class's word at both ends: the one whose images fit these words best.

    Among equals, the one that moves embeddings farthest.
    """
    learned = read_weights(adapter, cache)
    heads = [one for one in (learned[j] for j in range(len(learned))) if one.unit.kind == "head"]
    words = words_for_ends(adapter, cache, class_words, heads, 1)
    named = [one for one in heads if all(words[one.index])]
    ends = component_ends(adapter, cache, [one.index for one in named], AT_AN_END)

    def of_their_class(place: int) -> int:
        """How many images at the ends are of the class whose word stands there."""
        found = 0
        for rows, said in zip((ends.high, ends.low), words[named[place].index], strict=True):
            found += int((cache.truth[rows[place]] == class_words.words.index(said[0][0])).sum())
        return found

    place = max(range(len(named)), key=lambda i: (of_their_class(i), abs(named[i].effect)))
    shown = named[place]
    high, low = (
        [images[int(cache.ids[row])] for row in rows[place].tolist()] for rows in (ends.high, ends.low)
    )
    (high_word, _), (low_word, _) = (end[0] for end in words[shown.index])
    return ShownEnds(
        f"layer {shown.unit.layer}, head {shown.unit.head}, component {shown.place}",
        shown.weight,
        high,
        low,
        high_word,
        low_word,
    )
