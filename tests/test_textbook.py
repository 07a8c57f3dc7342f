"""The library against the textbook: the same units, components, embeddings and fitted weights."""

import math

import pytest
import torch
from test_towers import build, images_for

import residual_kernels as rk
from residual_kernels import textbook

HEADS = 3


@pytest.fixture(scope="module")
def tower():
    """Two layers of three heads of 16, width 48, 32 output dimensions."""
    return build().double()


@pytest.fixture(scope="module")
def images(tower):
    return images_for(tower, 90, torch.float64)


@pytest.fixture(scope="module")
def labels():
    return torch.arange(90) % 3


@pytest.fixture(scope="module")
def units(tower, images):
    with torch.no_grad():
        return textbook.decompose(tower.state_dict(), images, HEADS)


@pytest.fixture(scope="module")
def heads(units):
    return units[:, 1:7]


@pytest.fixture(scope="module")
def bases(tower, images):
    return rk.fit_bases(tower, [images])


def close(a, b, bound=1e-9):
    return float((a - b).abs().max()) <= bound * float(b.abs().max())


def test_units(tower, images, units):
    with torch.no_grad():
        assert close(units, rk.decompose(tower, images).units())
        assert close(units.sum(1), tower(images))
    assert not close(units[:, 1:].sum(1), units.sum(1), 1e-3)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_components(heads, bases, energy):
    means, components = textbook.principal_components(heads, energy)
    kept = bases.truncate(energy=energy)
    for u, phi in enumerate(components):
        unit = (u // HEADS, u % HEADS)
        assert close(means[u], kept.mean(unit))
        assert phi.shape == kept.components(unit).shape
        assert close(phi.T @ phi, kept.components(unit).T @ kept.components(unit), 1e-6)  # whatever the signs


def test_a_reweighted_embedding_and_a_fit(tower, images, labels, heads, bases):
    kept = bases.truncate(energy=0.9)
    means, components = textbook.principal_components(heads, 0.9)
    vectors = torch.randn(32, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    head = rk.ZeroShotHead(vectors / vectors.norm(dim=0), "abc", math.log(10.0))
    residual = rk.ResiDual(tower, kept)
    options = {"epochs": 4, "batch_size": 32, "seed": 5}
    start = torch.ones(len(residual.weight), dtype=torch.float64)
    assert close(residual(images).detach(), textbook.reweight(heads, means, components, start))
    rk.fit(residual, head, rk.encode(tower, [(images, labels)]), **options)
    weight = textbook.fit(heads, labels, head.class_vectors, math.log(10.0), means, components, **options)
    assert close(residual.weight.detach(), weight, 1e-6)
    assert not close(start, weight, 0.1)
    assert close(residual(images).detach(), textbook.reweight(heads, means, components, weight), 1e-6)
