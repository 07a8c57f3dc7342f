"""Scores of units: SciPy's correlations of units written out,
and each unit's own accuracy through the head."""

import golden
import pytest
import torch
from scipy import stats

import residual_kernels as rk
from residual_kernels.analysis import correlations, own_accuracy, rank_correlations, reading, scores
from residual_kernels.units import source

KINDS = ("emb", "head", "mlp")
SPANS = {"emb": slice(0, 1), "head": slice(1, 10), "mlp": slice(10, 13)}


@pytest.fixture(scope="module")
def tower():
    return golden.model().visual


@pytest.fixture(scope="module")
def cache(tower):
    labels = golden.numbers("inputs")["labels"]
    return rk.encode(tower, list(zip(golden.images().split(20), labels.split(20), strict=True)), kinds=KINDS)


@pytest.fixture(scope="module")
def units():
    return golden.numbers("units")["encodings"][:, golden.THEIRS]


def scipy_mean(method, x, out):
    return sum(float(method(x[:, d], out[:, d]).statistic) for d in range(x.shape[1])) / x.shape[1]


def test_authors_pearson(tower, cache):
    """Theirs is (n-1)/n of the true value, against the sum of the units they were given."""
    expected = golden.numbers("metrics")
    properties = golden.numbers("inputs")["property_encoding"].double()
    for tag, basis in (("noprop", None), ("prop", properties)):
        ours = torch.cat([correlations(tower, cache, kind, properties=basis) for kind in KINDS])
        theirs = expected[f"corr_pearson_{tag}_all"][golden.THEIRS] * 64 / 63
        assert (ours - theirs).abs().max() < 1e-8
    heads = golden.numbers("units")["encodings"][:, golden.THEIRS[SPANS["head"]]].sum(1)
    given = rk.UnitCache(
        {"head": cache.z["head"]}, cache.scale, cache.mean, heads, cache.labels, cache.ids, cache.checksum
    )
    for tag, basis in (("noprop", None), ("prop", properties)):
        theirs = expected[f"corr_pearson_{tag}_heads"] * 64 / 63
        assert (correlations(tower, given, properties=basis) - theirs).abs().max() < 1e-8


@pytest.mark.parametrize("kind", KINDS)
def test_scipy(tower, cache, units, kind):
    out = cache.output
    properties = golden.numbers("inputs")["property_encoding"].double()
    Q = torch.linalg.qr(properties.T).Q
    for basis, axes in ((None, torch.eye(32, dtype=torch.float64)), (properties, Q)):
        pearson = correlations(tower, cache, kind, properties=basis)
        spearman = rank_correlations(tower, cache, kind, properties=basis)
        for place, index in enumerate(range(*SPANS[kind].indices(13))):
            x, o = units[:, index] @ axes, out @ axes
            assert abs(float(pearson[place]) - scipy_mean(stats.pearsonr, x, o)) < 1e-10
            assert abs(float(spearman[place]) - scipy_mean(stats.spearmanr, x, o)) < 1e-10
    # the comparison can fail: the two are different scores
    assert (pearson - spearman).abs().max() > 1e-3


def test_float32_and_a_loader(tower, cache):
    loaded = correlations(tower, golden.images().split(20))
    assert (loaded - correlations(tower, cache)).abs().max() < 1e-12
    small = golden.model(torch.float32).visual
    narrow = rk.encode(small, golden.images(torch.float32).split(20))
    assert (correlations(small, narrow) - correlations(tower, cache)).abs().max() < 1e-6
    # ranks move by whole places where roundings swap neighbours
    assert (rank_correlations(small, narrow) - rank_correlations(tower, cache)).abs().max() < 1e-4


def test_ranks_with_ties():
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-3, 4, (5, 40), generator=generator)
    for dtype in (torch.float32, torch.float64):
        x = values.to(dtype) * 0.1
        x[4] = torch.randn(40, generator=generator, dtype=dtype)
        x[3, ::2], x[3, 1::2] = 0.0, -0.0  # equal, whatever their bits
        ranks = scores._centred_ranks(x)
        truth = torch.from_numpy(stats.rankdata(x.numpy(), axis=1)) - 20.5
        assert torch.equal(ranks, truth)


def test_a_constant_unit_scores_nothing(tower, cache):
    """Head 3 of the cache says the same of every image; s and m are the same too, or it would follow them."""
    z = cache.z["head"].clone()
    z[:, 3] = z[0, 3]
    still = torch.full_like(cache.scale, 1.3)
    frozen = rk.UnitCache(
        {"head": z}, still, still * 0.1, cache.output, cache.labels, cache.ids, cache.checksum
    )
    for score in (correlations, rank_correlations):
        found = score(tower, frozen)
        assert found[3] == 0
        assert found.isfinite().all()
        assert found.abs().sum() > 0.1


def test_groups_give_the_same(tower, cache, monkeypatch):
    head = rk.ZeroShotHead(golden.numbers("inputs")["centroids"].double(), range(5))
    whole = [correlations(tower, cache), rank_correlations(tower, cache), own_accuracy(tower, cache, head)]
    monkeypatch.setattr(reading, "GROUP_BYTES", 1)
    monkeypatch.setattr(reading, "ROWS", 7)
    monkeypatch.setattr(source, "ROWS", 7)
    monkeypatch.setattr(scores, "RANK_BYTES", 8 * 64 * 5)
    parts = [correlations(tower, cache), rank_correlations(tower, cache), own_accuracy(tower, cache, head)]
    for a, b in zip(whole, parts, strict=True):
        assert (a - b).abs().max() < 1e-12
    some = correlations(tower, cache, units=[(2, 1), (0, 0)])
    assert (some - whole[0][[7, 0]]).abs().max() < 1e-12


def test_own_accuracy(tower, cache, units):
    head = rk.ZeroShotHead(golden.numbers("inputs")["centroids"].double(), range(5))
    for kind in KINDS:
        ours = own_accuracy(tower, cache, head, kind)
        for place, index in enumerate(range(*SPANS[kind].indices(13))):
            named = head(units[:, index]).argmax(1)
            assert float(ours[place]) == float((named == cache.labels).double().mean())
    with pytest.raises(ValueError, match="labels"):
        own_accuracy(tower, golden.images().split(20), head)
    with pytest.raises(ValueError, match="classes"):
        own_accuracy(tower, cache, rk.ZeroShotHead(head.class_vectors[:, :2], range(2)))
    with pytest.raises(ValueError, match="two different models"):
        own_accuracy(tower, cache, rk.ZeroShotHead(head.class_vectors[:-1], range(5)))


def test_property_basis():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 8, generator=generator, dtype=torch.float64)
    for given in (rows[:3], rows, torch.cat([rows[:2], rows[:2].sum(0, keepdim=True)])):
        basis = scores.property_basis(given, 8)
        rank = int(torch.linalg.matrix_rank(given))
        assert basis.shape == (8, rank)
        assert (basis.T @ basis - torch.eye(rank)).abs().max() < 1e-12
        assert (given @ basis @ basis.T - given).abs().max() < 1e-12
    # more rows than dimensions: all of them count, not the first eight
    other = rows.clone()
    other[20:] *= 3
    assert (scores.property_basis(rows, 8) - scores.property_basis(other, 8)).abs().max() > 1e-3
    for bad, match in (
        (torch.zeros(2, 8), "zero"),
        (torch.ones(2, 7), "rows of 8"),
        (torch.full((1, 8), float("inf")), "NaN"),
    ):
        with pytest.raises(ValueError, match=match):
            scores.property_basis(bad, 8)


def test_too_few_images(tower, cache):
    with pytest.raises(ValueError, match="at least 2"):
        correlations(tower, cache.subset(torch.tensor([0])))
    other = golden.model().visual
    torch.nn.init.normal_(other.proj)
    with pytest.raises(ValueError, match="another|other weights"):
        correlations(other, cache)
