"""How alike two units are: the authors' numbers where they are right, and the measure written out by hand."""

from dataclasses import replace

import golden
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

import residual_kernels as rk
from residual_kernels.analysis import similarity, similarity_matrix, spectral_cosine


@pytest.fixture(scope="module")
def bases():
    return rk.fit_bases(golden.model().visual, golden.images().split(20), kinds=("head", "mlp"))


def by_hand(phi_a, phi_b, weight_a, weight_b):
    cosines = np.abs(phi_a @ phi_b.T) * np.outer(weight_a, weight_b)
    best = np.linalg.norm([a * b for a, b in zip(weight_a, weight_b, strict=False)])
    matched = []
    for _ in range(min(cosines.shape)):
        row, column = np.unravel_index(cosines.argmax(), cosines.shape)
        matched.append(cosines[row, column])
        cosines[row], cosines[:, column] = -1, -1
    return np.linalg.norm(matched) / best


def test_authors_cosines(bases):
    expected = golden.numbers("metrics")
    a, b = (golden.THEIRS.index(int(unit)) for unit in expected["spectral_units"])
    theirs = {"explained_variance": "explained_variance", "singular": "singular", "eigenvalues": "eigs"}
    for ours, name in theirs.items():
        for tag, components in (("k8", 8), ("k6_10", (6, 10))):
            got = spectral_cosine(bases, a, bases, b, weights=ours, components=components)
            assert abs(got - float(expected[f"spectral_{tag}_{name}"])) < 1e-6
    got = spectral_cosine(bases, a, bases, b)
    assert abs(got - float(expected["spectral_full_eigenvalues"])) < 1e-6
    matrix = similarity_matrix(bases, weights="eigenvalues", components=8)
    assert (matrix - expected["spectral_matrix_k8_eigs"]).abs().max() < 1e-6
    assert (
        matrix - expected["spectral_matrix_k8_eigs"].flip(0)
    ).abs().max() > 0.1  # another order is far away


def test_uniform_weights_match_components_too(bases):
    """Their unweighted measure compares equal positions only; a permuted basis is the same basis."""
    phi = bases.components((1, 1))[:8].numpy()
    other = bases.components((2, 0))[:8].numpy()
    got = spectral_cosine(bases, (1, 1), bases, (2, 0), weights="uniform", components=8)
    ones = np.ones(8)
    assert_allclose(got, by_hand(phi, other, ones, ones), atol=1e-12)
    assert_allclose(got, by_hand(phi[::-1], other, ones, ones), atol=1e-12)
    theirs = golden.numbers("metrics")["spectral_matrix_k8_unweighted"][4, 6]
    assert got > float(theirs) + 0.1


@pytest.mark.parametrize("weights", similarity.WEIGHTS)
def test_matrix_between_data_sets_and_ragged_bases(bases, weights, monkeypatch):
    monkeypatch.setattr(similarity, "PAIR_BYTES", 8 * 18 * 18 * 4)  # four pairs at a time
    half = rk.fit_bases(golden.model().visual, [golden.images()[:32]]).truncate(energy=0.9)
    matrix = similarity_matrix(bases, half, weights=weights)
    assert matrix.shape == (9, 9)
    for a, b in ((0, 0), (3, 7), (8, 2)):
        units = [(unit // 3, unit % 3) for unit in (a, b)]
        scale = {
            "explained_variance": lambda s, u: s.explained_variance_ratio(u),
            "singular": lambda s, u: s.explained_variance(u).sqrt(),
            "eigenvalues": lambda s, u: s.explained_variance(u),
            "uniform": lambda s, u: torch.ones(len(s.components(u))),
        }[weights]
        hand = by_hand(
            bases.components(units[0]).numpy(),
            half.components(units[1]).numpy(),
            scale(bases, units[0]).numpy(),
            scale(half, units[1]).numpy(),
        )
        assert_allclose(float(matrix[a, b]), hand, atol=1e-12)
        assert_allclose(spectral_cosine(bases, units[0], half, units[1], weights=weights), hand, atol=1e-12)


def test_a_unit_is_like_itself_and_a_constant_one_like_nothing(bases):
    matrix = similarity_matrix(bases)
    assert_allclose(matrix.diagonal(), 1.0, atol=1e-12)
    assert torch.equal(matrix, matrix.T)
    assert 0 <= float(matrix.min()) < float(matrix.max()) <= 1 + 1e-12
    part = bases.parts["head"]
    variance, total = part.variance.clone(), part.total_variance.clone()
    variance[part.run(4)], total[4] = 0.0, 0.0
    blank = replace(bases, parts={"head": replace(part, variance=variance, total_variance=total)})
    assert (similarity_matrix(blank)[4] == 0).all()


def test_what_cannot_be_compared(bases):
    with pytest.raises(ValueError, match="32 and 48 dimensions"):
        similarity_matrix(bases, replace(bases, dim=48))
    with pytest.raises(ValueError, match="weights must be one of"):
        similarity_matrix(bases, weights="none")
    with pytest.raises(ValueError, match="not emb"):
        similarity_matrix(bases, kind="emb")
    with pytest.raises(ValueError, match="at least 1"):
        spectral_cosine(bases, 1, bases, 2, components=0)
