"""Which words describe the two ends of a component, and is a word near enough to be shown at all?

A dictionary always has a nearest word. It is shown only if it passes three tests. It lies nearer to the
component than the nearest word of a random direction does. Over all images, the coefficient rises together
with the model's similarity to the word. And to the images at that end, the model finds the word nearer than
most words of the dictionary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from residual_kernels.adapters.residual import ResiDual
from residual_kernels.analysis.weights import (
    BATCH_NUMBERS,
    MOST_ROWS,
    Component,
    ComponentReader,
    component_ends,
    units_read,
)
from residual_kernels.analysis.words import TextDictionary, words_at_ends
from residual_kernels.units.cache import UnitCache
from residual_kernels.units.source import rows_within

DIRECTIONS, SEED = 1000, 0  # random directions that say what chance gives
CHANCE = 0.99  # share of random directions whose nearest word is farther away than a word that is shown
TRIED = 4  # times the words wanted are tried at an end
NEAREST, IMAGES = 0.25, 8  # share of the dictionary that a word is among for the images of its end; how many
AGREEMENT = 0.5  # least correlation over images: the word and the component share a quarter of their variance

Words = tuple[tuple[str, float], ...]


def chance_level(dictionary: TextDictionary, share: float = CHANCE) -> float:
    """The score below which a word may be near by chance:
    a quantile over random directions of their best score.

    Args:
        dictionary: of W words in D dimensions.
        share: of the random directions that stay below the level, in (0, 1).

    Returns:
        A score as :func:`words_at_ends` gives it: a cosine less the dictionary's mean cosine.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must lie between 0 and 1; got {share}")
    generator = torch.Generator().manual_seed(SEED)
    vectors = dictionary.vectors
    directions = torch.randn(DIRECTIONS, vectors.shape[1], generator=generator, dtype=torch.float64)
    directions /= directions.norm(dim=1, keepdim=True)
    scores = directions @ (vectors - vectors.mean(0)).T
    return float(scores.abs().amax(1).quantile(share))


@torch.no_grad()
def word_agreement(
    residual: ResiDual, cache: UnitCache, vectors: Tensor, indices: Sequence[int]
) -> tuple[tuple[int, ...], Tensor]:
    """Over the images of a cache: do the model's similarity to a word and a component's coefficient rise
    together?

    Args:
        residual: with its bases; its tower's own output is what images are compared with words by.
        cache: at least 2 images of the same tower, with the adapted kinds.
        vectors: [W, D] directions of words in the output space.
        indices: M components, as places in `component_weight()`.

    Returns:
        The components in rising order, and Pearson correlations [M, W] in float64; 0 where either is
        constant.
    """
    chosen = tuple(sorted({int(j) for j in indices}))
    known = len(residual.component_weight())
    if not chosen or chosen[0] < 0 or chosen[-1] >= known:
        raise ValueError(f"indices must name components 0 to {known - 1}; got {list(indices)[:8]}")
    reader = ComponentReader(residual, chosen)
    words = vectors.double()
    number = len(chosen) + len(words)
    total = torch.zeros(number, dtype=torch.float64)
    moment = torch.zeros(number, number, dtype=torch.float64)
    shift = None
    for batch in units_read(residual, cache).batches(rows_within(number, BATCH_NUMBERS, MOST_ROWS)):
        image = batch.terms.output.double().cpu()
        similar = image / image.norm(dim=1, keepdim=True).clamp_min(1e-12) @ words.T
        both = torch.cat([reader(batch.terms).double().cpu(), similar], dim=1)
        shift = both.mean(0) if shift is None else shift  # a provisional mean, so that moments do not cancel
        both -= shift
        total += both.sum(0)
        moment += both.T @ both
    covariance = moment - torch.outer(total, total) / len(cache)
    spread = covariance.diagonal().clamp_min(0).sqrt()
    of_components, of_words = spread[: len(chosen), None], spread[None, len(chosen) :]
    product = of_components * of_words
    found = covariance[: len(chosen), len(chosen) :]
    return chosen, torch.where(product > 0, found / product.clamp_min(1e-300), 0.0)


def words_for_ends(
    residual: ResiDual,
    cache: UnitCache,
    dictionary: TextDictionary,
    components: Sequence[Component],
    count: int = 3,
    *,
    chance: float = CHANCE,
    agreement: float = AGREEMENT,
    nearest: float = NEAREST,
) -> dict[int, tuple[Words, Words]]:
    """Words for both ends of some components; an end that no word describes has none.

    Args:
        residual: with its bases.
        cache: images that confirm words, of the same tower, with the adapted kinds.
        dictionary: of the same model's text tower.
        components: of this residual, as :func:`~residual_kernels.analysis.weights.read_weights` gives them.
        count: words at an end, at most.
        chance: a word must be nearer than the nearest word of this share of random directions.
        agreement: the least correlation, over the images, of a component's coefficient with the model's
            similarity to a word.
        nearest: a word must be among this share of the dictionary, in the order of the model's similarity to
            the images at that end (8 of them, or as many as there are); 1 leaves this test out.

    Returns:
        index of a component -> (words of its high end, of its low end), each ((word, score), ...), nearest
        first; scores are those of :func:`~residual_kernels.analysis.words.words_at_ends`.
    """
    level = chance_level(dictionary, chance)
    place_of = {word: place for place, word in enumerate(dictionary.words)}
    near = {}
    for one in components:
        low, high = words_at_ends(
            residual.bases,
            dictionary,
            one.unit,
            one.place,
            min(TRIED * count, len(dictionary), residual.bases.dim),
        )
        near[one.index] = tuple(tuple(word for word in end if abs(word[1]) >= level) for end in (high, low))
    wanted = sorted({place_of[word] for ends in near.values() for end in ends for word, _ in end})
    if not wanted:
        return dict.fromkeys(near, ((), ()))
    centred = (dictionary.vectors - dictionary.vectors.mean(0))[wanted]  # what all words share says nothing
    chosen, agrees = word_agreement(residual, cache, centred, list(near))
    row = {index: place for place, index in enumerate(chosen)}
    column = {dictionary.words[place]: at for at, place in enumerate(wanted)}

    def confirmed(index: int, end: Words, sign: int) -> Words:
        return tuple(one for one in end if sign * float(agrees[row[index], column[one[0]]]) >= agreement)

    found = {
        index: (confirmed(index, high, 1), confirmed(index, low, -1)) for index, (high, low) in near.items()
    }
    if nearest < 1:
        found = _nearest_only(residual, cache, dictionary, found, nearest)
    return {index: (high[:count], low[:count]) for index, (high, low) in found.items()}


def _nearest_only(
    residual: ResiDual,
    cache: UnitCache,
    dictionary: TextDictionary,
    found: dict[int, tuple[Words, Words]],
    share: float,
) -> dict[int, tuple[Words, Words]]:
    """Of the words found, those that are also among the nearest to the images at their end."""
    named = [index for index, sides in found.items() if any(sides)]
    if not named:
        return found
    ends = component_ends(residual, cache, named, IMAGES)
    places = {word: place for place, word in enumerate(dictionary.words)}

    def near(words: Words, rows: Tensor) -> Words:
        images = cache.terms(rows, kinds=()).output.double().cpu()
        similar = dictionary.vectors @ torch.nn.functional.normalize(images, dim=1).mean(0)
        nearer = {word: int((similar > similar[places[word]]).sum()) for word, _ in words}
        return tuple(one for one in words if nearer[one[0]] < share * len(dictionary))

    kept = {
        index: (near(found[index][0], ends.high[at]), near(found[index][1], ends.low[at]))
        for at, index in enumerate(named)
    }
    return {**found, **kept}
