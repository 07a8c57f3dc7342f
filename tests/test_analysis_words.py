"""Words of heads and components: the authors' choices where they are right,
and both algorithms written out."""

import golden
import pytest
import torch
from torch.nn import functional as F

import residual_kernels as rk
from residual_kernels.analysis import (
    TextDictionary,
    component_words,
    reading,
    unit_words,
    words,
    words_at_ends,
    words_of_units,
)

UNIT = 11  # theirs


@pytest.fixture(scope="module")
def made():
    tower = golden.model().visual
    cache = rk.encode(tower, golden.images().split(20))
    bases = rk.fit_bases(tower, cache)
    dictionary = TextDictionary(tuple(map(str, range(200))), golden.numbers("inputs")["dictionary"])
    return tower, cache, bases, dictionary, golden.THEIRS.index(UNIT)


def floats(values):
    return torch.tensor(values, dtype=torch.float64)


def data():
    return golden.numbers("units")["encodings"][:, UNIT]


def plain_somp(X, D, count, criterion):
    """Residuals of all rows, least squares by LAPACK."""
    residual, chosen = X.clone(), []
    for _ in range(count):
        products = residual @ D.T
        products[:, chosen] = 0
        score = products.abs().sum(0) if criterion == "l1" else products.square().sum(0)
        chosen.append(int(score.argmax()))
        weights = torch.linalg.lstsq(D[chosen].T, X.T).solution
        residual = X - (D[chosen].T @ weights).T
    return chosen, weights.norm(dim=1)


@pytest.mark.parametrize("criterion", words.CRITERIA)
def test_authors_somp(made, criterion):
    tower, cache, bases, dictionary, unit = made
    tag = f"somp_{criterion}_pcNone__"
    expected = {k.removeprefix(tag): v for k, v in golden.numbers("sparse").items() if k.startswith(tag)}
    (found,) = words_of_units(tower, cache, dictionary, count=10, units=[unit], criterion=criterion)
    results = [found]
    if criterion == "std":  # second moments are enough
        results.append(unit_words(bases, dictionary, unit, 10))
    X = data()
    for result in results:
        assert list(result.chosen) == expected["chosen"].tolist()
        assert result.words == tuple(map(str, result.chosen))
        weights, explained = floats(result.weights), floats(result.explained)
        assert (weights / expected["weights"] - 1).abs().max() < 1e-6
        assert (explained - expected["evr"]).abs().max() < 1e-6
        left = X.var(0).sum() * 63 / 64 / 32  # mean square per entry
        assert ((1 - explained) * left - expected["l2"]).abs().max() < 1e-6
        chosen = dictionary.vectors[list(result.chosen)]
        again = X.mean(0) + (X - X.mean(0)) @ torch.linalg.pinv(chosen) @ chosen
        assert abs(F.cosine_similarity(X, again).mean() - expected["cosine"][-1]) < 1e-6


@pytest.mark.parametrize("criterion", words.CRITERIA)
def test_authors_somp_of_components_depends_on_signs(made, criterion):
    """Theirs centres over the components, whose signs are arbitrary: one of the choices gives their words.

    Ours does not centre there, so that no sign matters."""
    _, _, bases, dictionary, unit = made
    expected = golden.numbers("sparse")[f"somp_{criterion}_pc3__chosen"].tolist()
    phi, scatter = bases.components(unit)[:3], bases.explained_variance(unit)[:3] * 63
    theirs = []
    for signs in torch.cartesian_prod(*[floats([1.0, -1.0])] * 3):
        X = phi * (signs * scatter)[:, None]
        theirs.append(plain_somp(X - X.mean(0), dictionary.vectors, 10, criterion)[0])
    assert expected in theirs
    assert any(other[:1] != expected[:1] for other in theirs)
    ours = unit_words(bases, dictionary, unit, 10, criterion=criterion, components=3)
    chosen, weights = plain_somp(phi * scatter[:, None], dictionary.vectors, 10, criterion)
    assert list(ours.chosen) == chosen
    assert (floats(ours.weights) / weights - 1).abs().max() < 1e-9


def test_authors_omp(made):
    _, _, bases, dictionary, unit = made
    expected = golden.numbers("sparse")
    found = component_words(bases, dictionary, unit, 0, 10)
    assert list(found.chosen) == expected["omp_pc1_k10_f32__chosen"].tolist()
    weights = floats(found.weights)
    assert (weights.abs() - expected["omp_pc1_k10_f32__weights"]).abs().max() < 1e-6
    phi = bases.components(unit)[0]
    solved = torch.linalg.lstsq(dictionary.vectors[list(found.chosen)].T, phi[:, None]).solution[:, 0]
    assert (weights - solved).abs().max() < 1e-9
    kept = dictionary.vectors[list(found.chosen)].T @ solved
    assert abs(found.explained[-1] - float(kept.square().sum())) < 1e-9


def gandelsman(X, D, count, rank):
    """TextSpan as published: project texts onto the data's leading directions, take the largest spread,
    remove it."""
    V = torch.linalg.svd(X, full_matrices=False).Vh[:rank]
    D = F.normalize(D) @ V.T @ V
    total = X.var(0).sum()
    X = X - X.mean(0)
    chosen, weights, explained, again = [], [], [], torch.zeros_like(X)
    for _ in range(count):
        products = X @ D.T
        best = int(products.std(0).argmax())
        atom = D[best] / D[best].norm()
        chosen.append(best)
        weights.append(products[:, best].norm())
        part = torch.outer(X @ atom, atom)
        X, again = X - part, again + part
        D = D - torch.outer(D @ atom, atom)
        explained.append(again.var(0).sum() / total)
    return chosen, torch.stack(weights), torch.stack(explained)


@pytest.mark.parametrize("rank", [5, 12, 19, None])
def test_text_span(made, rank):
    _, _, bases, dictionary, unit = made
    found = unit_words(bases, dictionary, unit, 5, method="textspan", rank=rank)
    chosen, weights, explained = gandelsman(data(), dictionary.vectors, 5, rank or 19)
    assert list(found.chosen) == chosen
    assert (floats(found.weights) / weights - 1).abs().max() < 1e-8
    assert (floats(found.explained) - explained).abs().max() < 1e-8


def test_authors_text_span(made):
    """Their rank of 20 is one more than this unit has (C+2 and its mean): the last direction is rounding
    noise, which changes the lengths of the projected texts and so the later choices. The early ones agree."""
    _, _, bases, dictionary, unit = made
    expected = golden.numbers("sparse")
    found = unit_words(bases, dictionary, unit, 10, method="textspan", rank=20)
    assert torch.linalg.svdvals(data())[19] < 1e-12
    assert list(found.chosen[:9]) == expected["textspan_k10_rank20__chosen"].tolist()[:9]
    assert abs(found.weights[0] - float(expected["textspan_k10_rank20__weights"][0])) < 1e-6


def test_rows_in_float32_and_in_blocks(made, monkeypatch):
    tower, cache, _, dictionary, _ = made
    whole = words_of_units(tower, cache, dictionary)
    assert len(whole) == 9
    monkeypatch.setattr(words, "PRODUCT_BYTES", 8 * words.TRIED * 7)
    monkeypatch.setattr(words, "TRIED", 3)
    monkeypatch.setattr(reading, "GROUP_BYTES", 1)
    parts = words_of_units(tower, cache, dictionary)
    assert [p.chosen for p in parts] == [w.chosen for w in whole]
    small = golden.model(torch.float32).visual
    narrow = words_of_units(small, golden.images(torch.float32).split(20), dictionary)
    assert [n.chosen for n in narrow] == [w.chosen for w in whole]
    X = data()
    chosen, weights = plain_somp(X - X.mean(0), dictionary.vectors, 5, "l1")
    ours = whole[golden.THEIRS.index(UNIT) - 1]
    assert list(ours.chosen) == chosen
    assert (floats(ours.weights) / weights - 1).abs().max() < 1e-9


def test_near_copies_of_a_word_and_a_spent_dictionary(made):
    """A repeated atom is in the span of the first.

    A dictionary smaller than the unit ends when nothing is left.
    """
    _, _, bases, dictionary, unit = made
    twice = TextDictionary(tuple("abcd"), dictionary.vectors[[3, 3, 9, 9]])
    found = unit_words(bases, twice, unit, 4)
    assert sorted(word in "ab" for word in found.words) == [False, True]
    assert len(unit_words(bases, twice, unit, 4, method="textspan").words) == 2
    many = unit_words(bases, dictionary, unit, 32)
    assert len(many.chosen) <= 32
    assert abs(many.explained[-1] - 1) < 1e-9


def test_ends_of_a_component(made):
    _, _, bases, dictionary, unit = made
    low, high = words_at_ends(bases, dictionary, unit, 1, 3)
    products = dictionary.vectors @ bases.components(unit)[1]
    assert [int(word) for word, _ in high] == products.argsort(descending=True)[:3].tolist()
    assert [int(word) for word, _ in low] == products.argsort()[:3].tolist()
    assert low[0][1] < 0 < high[0][1]


def test_dictionaries(tmp_path):
    model, _, tokenizer = rk.load_bundled()
    bundled = TextDictionary.bundled(model, tokenizer)
    assert {
        "the number three",
        "the letter b",
        "a circle",
        "dots",
        "a photo of a ship",
        "something red",
    } <= set(bundled.words)
    assert bundled.vectors.shape == (len(bundled), 128)
    with torch.no_grad():
        three = model.encode_text(tokenizer(["the number three"]), normalize=True)[0]
    assert (bundled.vectors[bundled.words.index("the number three")] - three).abs().max() < 1e-6
    path = tmp_path / "words.txt"
    path.write_text("# mine\nred\n\nblue\nred\n", encoding="utf-8")
    mine = TextDictionary.from_file(model, tokenizer, path, templates=["something {}"])
    assert mine.words == ("red", "blue")
    assert (mine.vectors[0] - bundled.vectors[bundled.words.index("something red")]).abs().max() < 1e-6
    path.write_text("# nothing\n")
    with pytest.raises(ValueError, match="holds no words"):
        TextDictionary.from_file(model, tokenizer, path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="UTF-8"):
        TextDictionary.from_file(model, tokenizer, path)


def test_what_has_no_words(made):
    _, _, bases, dictionary, unit = made
    for call, match in (
        (lambda: unit_words(bases, dictionary, unit, 0), "count must lie"),
        (lambda: unit_words(bases, dictionary, unit, 33), "count must lie"),
        (lambda: unit_words(bases, dictionary, unit, method="lda"), "method must be"),
        (lambda: unit_words(bases, dictionary, unit, criterion="max", components=2), "criterion must be"),
        (lambda: unit_words(bases, dictionary, unit, criterion="l1"), "needs components"),
        (lambda: unit_words(bases, dictionary, unit, components=0), "at least 1"),
        (lambda: component_words(bases, dictionary, unit, 18), "outside the 18"),
        (lambda: words_at_ends(bases, dictionary, unit, -1), "outside the 18"),
        (lambda: unit_words(bases, TextDictionary(("a",), torch.ones(1, 8)), unit, 1), "encode it with"),
        (lambda: TextDictionary(("a", "b"), torch.ones(1, 8)), "one vector per word"),
        (lambda: TextDictionary(("a",), torch.zeros(1, 8)), "not zero"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
