"""Every pair of dtypes of tower, cache and head goes through fit, tune, evaluate and predict."""

import math

import pytest
import torch
from test_towers import build, images_for

import residual_kernels as rk

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LABELS = torch.tensor([0] * 30 + [1] * 18 + [2] * 12)


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def made(request):
    """(tower, cache, bases) of a tower in one dtype."""
    tower = build()
    images = images_for(tower, 60) * 0.5 + (LABELS - 1.0)[:, None, None, None]
    tower = tower.to(request.param)
    cache = rk.encode(tower, [(images.to(request.param), LABELS)], kinds=("head", "mlp"), class_names="abc")
    return tower, cache, rk.fit_bases(tower, cache, kinds=("head", "mlp")).truncate(components=4)


def in_dtype(cache, dtype):
    z = {kind: value.to(dtype) for kind, value in cache.z.items()}
    output, order = cache.output.to(dtype), torch.randperm(60, generator=torch.Generator().manual_seed(0))
    whole = rk.UnitCache(
        z, cache.scale, cache.mean, output, cache.labels, cache.ids, cache.checksum, cache.class_names
    )
    return whole.subset(order[:40]), whole.subset(order[40:])


@pytest.mark.parametrize("stored", DTYPES, ids=str)
def test_any_dtypes(made, stored):
    tower, cache, bases = made
    tower_dtype = next(tower.parameters()).dtype
    vectors = DTYPES[(DTYPES.index(stored) + 2 * DTYPES.index(tower_dtype) + 1) % len(DTYPES)]
    train, test = in_dtype(cache, stored)
    drawn = torch.randn(32, 3, generator=torch.Generator().manual_seed(2)).to(vectors)
    head = rk.ZeroShotHead(drawn, "abc", math.log(10.0))
    adapter = rk.ResiDual(tower, bases, "all")
    fitted = rk.fit(adapter, head, train, test, freedoms=(10, 100))
    said = rk.evaluate(adapter, head, test).accuracy
    assert fitted.val_accuracy == pytest.approx(said, abs=1e-9)
    assert rk.predict(adapter, head, test).labels.shape == (20,)
    adapter.detach()
    for val in (None, test):
        found = rk.tune(tower, bases, head, train, val, freedoms=(10, 100))
        assert rk.evaluate(found.adapter, found.head, test).accuracy > 0.4
        if val is not None and found.winner == "anchored":  # the same fit, by the other door
            assert found.accuracy == pytest.approx(said, abs=0.051)
        found.adapter.detach()
