"""shared: one number per component index, which all heads of a layer have in common."""

import copy
import math

import pytest
import torch
from test_towers import build, images_for, plain, relative

import residual_kernels as rk
from residual_kernels.analysis.weights import read_weights


@pytest.fixture(scope="module")
def tower():
    return build().double()


@pytest.fixture(scope="module")
def bases(tower):
    return rk.fit_bases(tower, [images_for(tower, 40, torch.float64, seed=7)], kinds=("emb", "head", "mlp"))


def by_hand(tower, images, adapter, bases):
    """The formula on units made in full; the k-th component of a head has its layer's k-th number."""
    with torch.no_grad():
        parts = rk.decompose(tower, images)
    y, place = plain(tower, images), 0
    for kind in adapter.adapted:
        for layer in range(2):
            units = parts.layout.select(kind, layer=layer)
            longest = max(len(bases.components(unit)) for unit in units)
            own = adapter.weight.detach()[place : place + longest]
            place += longest
            for unit in units:
                phi, x = bases.components(unit), parts.units()[:, unit.index] - bases.mean(unit)
                y = y + (x @ phi.T * (own[: len(phi)] - 1)) @ phi
    assert place == len(adapter.weight)
    return y


def test_it_is_the_formula_by_every_door(tower, bases):
    kept = bases.of("head", "mlp").truncate(energy=0.8)  # ragged: heads of a layer keep different numbers
    sizes = kept.parts["head"].offsets.diff()
    assert len(set(sizes.tolist())) > 1
    adapter = rk.build("shared", tower, bases, energy=0.8, init="normal", seed=3)
    images = images_for(tower, 5, torch.float64)
    expected = by_hand(tower, images, adapter, kept)
    terms = rk.encode(tower, [images], kinds=("head", "mlp")).terms(slice(None))
    other = rk.build("shared", tower, bases, energy=0.8, init="normal", seed=4)
    both = torch.stack([adapter.weight.detach(), other.weight.detach()])
    features = adapter.features(terms)
    adapters = rk.AdapterSet(tower, {"a": adapter, "b": other})
    assert adapters.groups == (("a", "b"),)
    doors = {
        "call": adapter(images),
        "units": adapter.from_units(terms),
        "tasks": adapter.from_features(features, [both])[0],
        "merged": adapter.merge()(images),
        "set": adapters(images),
        "rows of a set": adapters(images, ["a", "b", "a", "a", "b"])[[0, 2, 3]],
    }
    for door, y in doors.items():
        assert relative(y, expected[[0, 2, 3]] if door == "rows of a set" else expected) < 1e-11, door
    assert relative(adapter.from_features(features, [both])[1], other(images)) < 1e-11
    assert relative(other(images), expected) > 1e-3


def test_its_gradient_is_the_sum_over_heads(tower, bases):
    shared = rk.build("shared", tower, bases, init="normal", components=3)
    images = images_for(tower, 3, torch.float64)
    each = rk.ResiDual(
        tower,
        bases.of("head", "mlp").truncate(components=3),
        "all",
        init=shared.component_weight().detach(),
    )
    upstream = torch.randn(3, 32, dtype=torch.float64)
    (grad,) = torch.autograd.grad((shared(images) * upstream).sum(), shared.weight)
    (single,) = torch.autograd.grad((each(images) * upstream).sum(), each.weight)
    heads = single[: 6 * 3].view(2, 3, 3).sum(1).flatten()
    assert relative(grad, torch.cat([heads, single[6 * 3 :]])) < 1e-12


def test_it_fits_is_kept_and_is_read(tower, bases, tmp_path):
    labels = torch.arange(60) % 3
    images = images_for(tower, 60, torch.float64) * 0.5 + (labels - 1.0)[:, None, None, None]
    cache = rk.encode(tower, [(images, labels)], kinds=("head", "mlp"), class_names="abc")
    vectors = torch.randn(32, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    head = rk.ZeroShotHead(vectors, "abc", math.log(10.0))
    adapter = rk.build("shared", tower, bases)
    sizes = bases.parts["head"].offsets.diff().view(2, 3)
    assert len(adapter.weight) == int(sizes.amax(1).sum()) + 2 * 32
    assert len(adapter.component_weight()) == int(sizes.sum()) + 2 * 32
    result = rk.fit(adapter, head, cache, cache, epochs=4)
    assert result.parameters == len(adapter.weight)
    assert result.val_accuracy >= result.history[0].val_accuracy
    rk.save_adapter(adapter, tmp_path / "a")
    again = rk.load_adapter(copy.deepcopy(tower), tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(again(images[:4]), adapter(images[:4]))
    reading = read_weights(adapter, cache)
    assert torch.equal(reading.weight, adapter.component_weight().detach())
    low = copy.deepcopy(adapter).to(torch.bfloat16)
    assert low.weight.dtype == torch.float32
    assert low.spread.index.dtype == torch.int64
