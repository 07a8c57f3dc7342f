"""Unit caches: what they hold, how they are read."""

import pytest
import torch
from test_towers import build, images_for

import residual_kernels as rk


@pytest.fixture(scope="module")
def tower():
    return build()


@pytest.fixture(scope="module")
def data(tower):
    return images_for(tower, 60), torch.arange(60) % 3


def test_batches_are_the_rows_in_order(tower, data):
    cache = rk.encode(tower, [data], kinds=("head", "mlp"))
    for size, sizes in ((25, [25, 25, 10]), (60, [60]), (100, [60])):
        parts = list(cache.batches(size))
        assert [len(part.output) for part in parts] == sizes
        for kind in ("head", "mlp"):
            assert torch.equal(torch.cat([part.z[kind] for part in parts]), cache.z[kind])
        assert torch.equal(torch.cat([part.scale for part in parts]), cache.scale)
    with pytest.raises(ValueError, match="at least one row"):
        next(cache.batches(0))
