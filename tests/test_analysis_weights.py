"""What a weight means: against units made in full, scikit-learn's F test, sorting,
and one evaluation per head."""

from copy import deepcopy

import pytest
import torch
from sklearn.feature_selection import f_classif
from tolerance import absolute, assert_within, enough_to_notice

import residual_kernels as rk
from residual_kernels.analysis import weights
from residual_kernels.demo.story import DIGITS, digit_images
from residual_kernels.ops.reference import coefficients
from residual_kernels.units import decomposition


@pytest.fixture(scope="module")
def digits():
    """The bundled model in float64, 230 handwritten digits, their cache, and a head."""
    model, preprocess, tokenizer = rk.load_bundled()
    pictures, labels = digit_images()
    images = torch.stack([preprocess(picture) for picture in pictures[:230]]).double()
    head = rk.ZeroShotHead.from_text(model, tokenizer, DIGITS, ["the number {}"])
    tower = model.visual.double()
    cache = rk.encode(tower, [(images, labels[:230])], kinds=("head", "mlp"), class_names=DIGITS)
    return tower, images, cache, head.double()


def fitted(digits, kinds=("head",), rest="zero", components=5, seed=3):
    tower, _, cache, _ = digits
    bases = rk.fit_bases(tower, cache, kinds).truncate(components=components)
    return rk.ResiDual(tower, bases, rest, init="normal", seed=seed)


def terms_of_coefficients(tower, cache, bases, row):
    """[N, K]: the absolute terms of one unit's coefficients, from the tower's own parameters on."""
    sizes = deepcopy(tower)
    for parameter in sizes.parameters():
        parameter.detach().abs_()
    place = row.index - rk.towers.view(tower).layout.span(row.kind).start
    maps = rk.towers.view(sizes).maps(row.kind, [place])
    given = cache.terms(slice(None))
    z, scale, mean = given.z[row.kind][:, [place]].abs(), given.scale.abs(), given.mean.abs()
    units = decomposition.expand(maps, z, scale, -mean)[:, 0]  # it subtracts the mean
    return (units + bases.mean(row).abs()) @ bases.components(row).abs().T


@pytest.mark.parametrize("kinds", [("head",), ("mlp",), ("head", "mlp")])
@pytest.mark.parametrize("batch", [weights.BATCH_NUMBERS, 2000])
def test_a_reading_is_of_the_components_of_whole_units(digits, monkeypatch, kinds, batch):
    tower, images, cache, _ = digits
    monkeypatch.setattr(weights, "BATCH_NUMBERS", batch)  # one pass in one piece, and in ragged pieces
    residual = fitted(digits, kinds)
    reading = weights.read_weights(residual, cache)
    assert len(reading) == residual.weight.numel()
    assert reading.count == 230
    parts = rk.decompose(tower, images)
    for row in [residual.layout.select(kinds[0])[2], residual.layout.select(kinds[-1])[-1]]:
        whole = parts.units()[:, row.index]
        bases = residual.bases
        c = (whole - bases.mean(row)) @ bases.components(row).T
        inside = (reading.unit == row.index).nonzero().flatten()
        terms = terms_of_coefficients(tower, cache, bases, row)
        weight, std = residual.weight_of(row).detach(), c.std(0)
        assert torch.equal(reading.weight[inside], weight)
        assert torch.equal(reading.explained[inside], bases.explained_variance_ratio(row))
        # |c - shift| <= 2 terms; a variance errs with the sum of their squares, its root by that over 2 std
        squares = (2 * terms).square().sum(0)
        spread = squares / (len(c) - 1) / (2 * std)
        for name, want, size in (
            ("mean", c.mean(0), terms.mean(0)),
            ("std", std, spread),
            ("effect", (weight - 1) * std, (weight - 1).abs() * spread),
        ):
            assert_within(getattr(reading, name)[inside], want, size, name, length=len(c))
        assert reading.place[inside].tolist() == list(range(5))
        labels = cache.labels.numpy()
        F, _ = f_classif(c.numpy(), labels)
        eta = torch.from_numpy(F * 9 / (F * 9 + len(labels) - 10))
        size = 2 * squares / (c - c.mean(0)).square().sum(0)  # a ratio of two such sums
        assert_within(reading.separation[inside], eta, size, length=len(c))
        step = enough_to_notice(torch.ones_like(eta), size, torch.float64, length=len(c))
        assert step < 1e-6
        with pytest.raises(AssertionError, match="is off by"):
            assert_within(reading.separation[inside] + step, eta, size, length=len(c))
        scores = reading.class_scores(int(inside[0]))
        want = (c[cache.labels == 4, 0].mean() - c[:, 0].mean()) / c[:, 0].std()
        assert float(scores[4]) == pytest.approx(float(want), abs=1e-9)


def test_raised_and_faded_are_ordered_by_how_far_they_move(digits):
    residual = fitted(digits)
    reading = weights.read_weights(residual, digits[2])
    effect = (reading.weight - 1) * reading.std
    raised, faded = reading.raised(7), reading.faded(10_000)
    assert [c.index for c in raised] == effect.argsort(descending=True)[:7].tolist()
    assert {c.index for c in faded} == set((reading.weight < 1).nonzero().flatten().tolist())
    assert [c.effect for c in faded] == sorted(c.effect for c in faded)
    assert all(c.weight > 1 and c.effect > 0 for c in raised)
    own = reading.of((5, 3))
    assert {c.unit.layer for c in own} == {5}
    assert {c.unit.head for c in own} == {3}
    assert [abs(c.effect) for c in own] == sorted((abs(c.effect) for c in own), reverse=True)
    assert reading.unit_effect((5, 3)) == pytest.approx(sum(c.effect**2 for c in own) ** 0.5)
    share = sum(c.std**2 for c in own)
    assert reading.unit_weight((5, 3)) == pytest.approx(sum(c.weight * c.std**2 for c in own) / share)


def test_a_constant_unit_and_an_absent_class(digits):
    """The token embedding is nearly constant: no NaN anywhere; a class without images has no mean."""
    tower, images, _, _ = digits
    cache = rk.encode(tower, [(images[:40], torch.arange(40) % 3)], kinds=("emb",))
    residual = rk.ResiDual(tower, rk.fit_bases(tower, cache, ("emb",)), "zero")
    reading = weights.read_weights(residual, cache, classes=5)
    for tensor in (reading.explained, reading.std, reading.effect, reading.separation):
        assert tensor.isfinite().all()
    assert reading.class_counts.tolist() == [14, 13, 13, 0, 0]
    assert reading.class_scores(0)[3:].isnan().all()
    assert reading.class_scores(0)[:3].isfinite().all()
    assert reading.unit_weight(0) == pytest.approx(1.0)


def coefficient_arguments(residual, given, kind):
    names = ("proj", "bias", "slope", "offset", "unit_offsets")
    constants = {name: getattr(residual.units[kind], name) for name in names}
    return {"z": given.z[kind], "scale": given.scale, "mean": given.mean, **constants}


@pytest.mark.parametrize("batch", [weights.BATCH_NUMBERS, 300])
def test_ends_are_those_of_a_sort(digits, monkeypatch, batch):
    _, _, cache, _ = digits
    residual = fitted(digits, ("head", "mlp"))
    given = cache.terms(slice(None))
    every = weights.ComponentReader(residual)(given)
    terms = torch.cat(
        [coefficients(**absolute(coefficient_arguments(residual, given, kind))) for kind in residual.adapted],
        1,
    )
    monkeypatch.setattr(weights, "BATCH_NUMBERS", batch)
    chosen = [31, 4, 260, 4, 249]  # out of order, repeated, of both kinds
    ends = weights.component_ends(residual, cache, chosen, count=6)
    for place, j in enumerate(chosen):
        order = every[:, j].argsort(stable=True)
        assert ends.low[place].tolist() == order[:6].tolist()
        assert ends.high[place].tolist() == order.flip(0)[:6].tolist()
        assert_within(ends.high_values[place], every[ends.high[place], j], terms[ends.high[place], j])
    few = weights.component_ends(residual, cache.subset(torch.arange(3)), [0], count=6)
    assert few.low.shape == (1, 3)
    directions = weights.directions(residual, [4, 31])
    assert torch.equal(directions[1], residual.units["head"].basis[31])


@pytest.mark.parametrize("rest", ["zero", "sum", "mean"])
@pytest.mark.parametrize("classes", [10, 150])  # fewer and more than D
def test_reset_is_one_evaluation_per_head(digits, monkeypatch, rest, classes):
    _, _, cache, head = digits
    if classes > 10:
        names = [*head.class_names, *map(str, range(classes - 10))]
        more = torch.nn.functional.normalize(
            torch.randn(128, classes - 10, generator=torch.Generator().manual_seed(0)).double(), dim=0
        )
        head = rk.ZeroShotHead(torch.cat([head.class_vectors, more], 1), names, float(head.logit_scale))
    residual = fitted(digits, ("head", "mlp"), rest)
    with torch.no_grad():
        residual.weight.sub_(1).mul_(0.7).add_(1)
    monkeypatch.setattr(weights, "BATCH_NUMBERS", 50 * 1000)
    seen = weights.reset_accuracy(residual, cache, head)
    assert seen.accuracy == rk.evaluate(residual, head, cache).accuracy
    assert len(seen.units) == len(seen.reset) == 48
    kept = residual.weight.detach().clone()
    for place in (0, 17, 47):
        with torch.no_grad():
            residual.weight_of(seen.units[place]).fill_(1)
        assert float(seen.reset[place]) == rk.evaluate(residual, head, cache).accuracy
        residual.weight.data.copy_(kept)
    assert torch.equal(seen.lost, seen.accuracy - seen.reset)
    assert seen.lost.abs().max() > 0


def test_errors(digits):
    tower, images, cache, head = digits
    residual = fitted(digits)
    unlabelled = rk.encode(tower, [images[:4]], kinds=("head",))
    with pytest.raises(ValueError, match="got OutputLinear"):
        weights.read_weights(rk.OutputLinear(tower), cache)
    with pytest.raises(ValueError, match="at least 2 images"):
        weights.read_weights(residual, cache.subset(torch.arange(1)))
    with pytest.raises(ValueError, match="needs labels"):
        weights.read_weights(residual, unlabelled).class_scores(0)
    with pytest.raises(ValueError, match="needs labels"):
        weights.reset_accuracy(residual, unlabelled, head)
    with pytest.raises(ValueError, match="not adapted"):
        weights.reset_accuracy(fitted(digits, ("mlp",)), cache, head)
    with pytest.raises(ValueError, match="head's classes are not the data's: 0 is 'a'"):
        weights.reset_accuracy(residual, cache, rk.ZeroShotHead(head.class_vectors[:, :2], ("a", "b")))
    for wrong in ([], [-1], [240]):
        with pytest.raises(ValueError, match="components 0 to 239"):
            weights.component_ends(residual, cache, wrong)
    with pytest.raises(ValueError, match="count must be"):
        weights.component_ends(residual, cache, [0], count=0)
    with pytest.raises(ValueError, match="no terms of kind mlp"):
        weights.read_weights(fitted(digits, ("mlp",)), unlabelled)
