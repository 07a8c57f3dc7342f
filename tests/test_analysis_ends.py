"""Words at the ends of components: what chance gives, what images confirm, and that nothing else is shown."""

import numpy as np
import pytest
import torch
from test_towers import build, images_for

import residual_kernels as rk
from residual_kernels.analysis import TextDictionary, ends, weights


@pytest.fixture(scope="module")
def made():
    tower = build()
    cache = rk.encode(tower, [images_for(tower, 80)], kinds=("head", "mlp"))
    bases = rk.fit_bases(tower, cache, ("head", "mlp")).truncate(components=3)
    return rk.ResiDual(tower, bases, rest="all"), cache


def test_chance_is_what_random_directions_give():
    generator = torch.Generator().manual_seed(1)
    dictionary = TextDictionary(tuple(map(str, range(40))), torch.randn(40, 64, generator=generator))
    level = ends.chance_level(dictionary, 0.9)
    directions = torch.randn(4000, 64, generator=generator, dtype=torch.float64)
    scores = directions / directions.norm(dim=1, keepdim=True) @ dictionary.vectors.T
    best = (scores - scores.mean(1, keepdim=True)).abs().amax(1)
    assert float((best < level).double().mean()) == pytest.approx(0.9, abs=0.03)
    assert ends.chance_level(dictionary, 0.5) < level < ends.chance_level(dictionary, 0.99)
    for share in (0, 1):
        with pytest.raises(ValueError, match="between 0 and 1"):
            ends.chance_level(dictionary, share)


@pytest.mark.parametrize("batch", [weights.BATCH_NUMBERS, 200])
def test_agreement_is_numpy_s_correlation(made, monkeypatch, batch):
    monkeypatch.setattr(ends, "BATCH_NUMBERS", batch)
    residual, cache = made
    words = torch.randn(5, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    words[4] = 0  # a constant similarity
    chosen, found = ends.word_agreement(residual, cache, words, [7, 2, 20, 7])
    assert chosen == (2, 7, 20)
    terms = cache.terms(slice(None))
    coefficients = weights.ComponentReader(residual, chosen)(terms).double()
    similar = cache.output.double() / cache.output.double().norm(dim=1, keepdim=True) @ words.T
    for row in range(3):
        for column in range(4):
            truth = np.corrcoef(coefficients[:, row].numpy(), similar[:, column].numpy())[0, 1]
            assert float(found[row, column]) == pytest.approx(truth, abs=1e-6)
    assert found[:, 4].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match=r"components 0 to 23; got \[3, 30\]"):
        ends.word_agreement(residual, cache, words, [3, 30])


def test_a_word_is_shown_where_direction_and_images_agree(made):
    """The planted word of a component whose coefficient follows the output.

    The rest of the dictionary is noise.
    """
    residual, cache = made
    reading = weights.read_weights(residual, cache)
    direction = weights.directions(residual, range(len(reading))).double()
    own = torch.tensor(
        [
            float(ends.word_agreement(residual, cache, direction[j : j + 1], [j])[1])
            for j in range(len(reading))
        ]
    )
    followed, against = int(own.argmax()), int(own.argmin())
    assert own[followed] > 0.7
    noise = torch.randn(60, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def words(j, sign):
        """A dictionary with one word at one end of component j, and its words."""
        names = (*map(str, range(60)), "planted")
        dictionary = TextDictionary(names, torch.cat([noise, sign * direction[j : j + 1]]))
        return ends.words_for_ends(residual, cache, dictionary, [reading[j]], nearest=1)[j]

    assert words(followed, 1)[0][0][0] == "planted"
    assert words(followed, -1)[1][0][0] == "planted"
    # Near, but no image confirms it.
    assert all(word != "planted" for end in words(against, 1) for word, _ in end)
    dictionary = TextDictionary(tuple(map(str, range(60))), noise)
    for high, low in ends.words_for_ends(
        residual, cache, dictionary, list(map(reading.__getitem__, range(9)))
    ).values():
        level = ends.chance_level(dictionary)
        assert all(score >= level for _, score in high)
        assert all(score <= -level for _, score in low)
    strict = ends.words_for_ends(residual, cache, dictionary, [reading[followed]], agreement=1.01)
    assert strict == {followed: ((), ())}


def test_a_word_is_among_the_nearest_to_the_images_of_its_end(made):
    residual, cache = made
    reading = weights.read_weights(residual, cache)
    some = [reading[j] for j in range(12)]
    names = tuple(map(str, range(40)))
    dictionary = TextDictionary(names, torch.randn(40, 32, generator=torch.Generator().manual_seed(5)))
    lenient = {"chance": 0.01, "agreement": -1.0, "count": 8}
    every = ends.words_for_ends(residual, cache, dictionary, some, nearest=1, **lenient)
    nearest = ends.words_for_ends(residual, cache, dictionary, some, nearest=0.3, **lenient)
    reader = weights.ComponentReader(residual, range(12))(cache.terms(slice(None))).double()
    unit = torch.nn.functional.normalize(cache.output.double(), dim=1)
    left_out = 0
    for one in some:
        order = reader[:, one.index].argsort()
        for side, rows in enumerate((order[-8:], order[:8])):
            similar = dictionary.vectors @ unit[rows].mean(0)
            allowed = {names[place] for place in similar.argsort(descending=True)[:12].tolist()}
            expected = [word for word, _ in every[one.index][side] if word in allowed]
            assert [word for word, _ in nearest[one.index][side]] == expected
            left_out += len(every[one.index][side]) - len(expected)
    assert left_out > 20
