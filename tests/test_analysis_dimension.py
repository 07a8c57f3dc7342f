"""How many dimensions a unit uses: the authors' numbers,
and nearest neighbours against distances written out."""

import golden
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import residual_kernels as rk
from residual_kernels.analysis import dimension, reading

KINDS = ("emb", "head", "mlp")


@pytest.fixture(scope="module")
def fitted():
    tower = golden.model().visual
    images = golden.images()
    return (
        tower,
        rk.fit_bases(tower, images.split(20), kinds=KINDS),
        rk.encode(tower, images.split(20), kinds=KINDS),
    )


def written_out(points):
    """Both distances from all differences, in float64."""
    distances = torch.cdist(
        points.double(), points.double(), compute_mode="donot_use_mm_for_euclid_dist"
    ).fill_diagonal_(float("inf"))
    return distances.topk(2, largest=False, sorted=True).values.unbind(1)


def assert_exact(points):
    ours, truth = dimension.nearest_two(points), written_out(points)
    for got, expected in zip(ours, truth, strict=True):
        assert ((got - expected).abs() <= 1e-12 * expected).all()  # and zeros are zeros


def test_authors_linear_dimension_and_participation_ratio(fitted):
    _, bases, _ = fitted
    expected = golden.numbers("pca")
    for kind, span in (("emb", slice(0, 1)), ("head", slice(1, 10)), ("mlp", slice(10, 13))):
        theirs = golden.THEIRS[span]
        ratio = dimension.participation_ratio(bases, kind)
        assert (ratio - expected["participation_ratio"][theirs]).abs().max() < 1e-8
        for column, energy in enumerate(expected["thresholds"].tolist()):
            if energy < 1:  # never exceeded: one there, all here
                ours = dimension.linear_dimension(bases, energy, kind)
                assert ours.tolist() == expected["k_by_evr"][theirs, column].tolist()
    assert dimension.linear_dimension(bases, 1.0).tolist() == [18] * 9


def test_authors_two_nn(fitted):
    tower, _, cache = fitted
    expected = golden.numbers("metrics")
    ours = torch.cat([dimension.two_nn_dimension(tower, cache, kind) for kind in KINDS])
    assert ((ours - expected["twonn_units_exactdist"][golden.THEIRS]) / ours).abs().max() < 1e-8
    assert abs(dimension.two_nn(cache.output) - float(expected["twonn_output_exactdist"])) < 1e-8
    assert abs(dimension.two_nn(cache.output, 0.5) - float(expected["twonn_output_fraction05"])) < 1e-8
    # the comparison can fail: another fraction is another number
    assert abs(dimension.two_nn(cache.output, 0.8) - float(expected["twonn_output_exactdist"])) > 1e-3


def test_truncated_bases_are_refused_where_their_spectrum_is_needed(fitted):
    _, bases, _ = fitted
    short = bases.truncate(components=3)
    with pytest.raises(ValueError, match="truncated"):
        dimension.participation_ratio(short)
    with pytest.raises(ValueError, match="truncated"):
        dimension.linear_dimension(short, 0.999)
    assert dimension.linear_dimension(short, 0.05).tolist() == [1] * 9
    with pytest.raises(ValueError, match="energy must lie"):
        dimension.linear_dimension(bases, 0.0)
    with pytest.raises(ValueError, match="these bases hold"):
        dimension.participation_ratio(bases.of("head"), "mlp")


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    count=st.integers(3, 300),
    size=st.integers(1, 40),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    far=st.sampled_from([0.0, 1.0, 1e3, 1e6]),
    copies=st.integers(0, 40),
)
def test_nearest_two_is_exact(count, size, seed, dtype, far, copies):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(count, size, generator=generator, dtype=dtype) + far
    chosen = torch.randint(count, (copies,), generator=generator)
    points[torch.randint(count, (copies,), generator=generator)] = points[chosen]
    assert_exact(points)


def test_nearest_two_where_products_are_blind():
    """Two tight clusters far apart, a lattice, one outlier, all points equal."""
    generator = torch.Generator().manual_seed(0)
    tight = torch.randn(200, 8, generator=generator, dtype=torch.float64) * 1e-9
    tight[100:] += 1.0
    assert_exact(tight)
    lattice = torch.cartesian_prod(*[torch.arange(6.0)] * 3)
    assert_exact(lattice)
    first, second = dimension.nearest_two(lattice)
    assert (first == second).all()  # ties are ties, wherever the mean lies
    outlier = torch.randn(300, 5, generator=generator)
    outlier[7] *= 1e6
    assert_exact(outlier)
    assert_exact(torch.ones(50, 3))


def test_nearest_two_needs_no_second_look_on_ordinary_points(monkeypatch):
    looks = []
    look = dimension._look

    def counted(exact, unit, rows, *more):
        looks.append((unit.dtype, len(rows)))
        return look(exact, unit, rows, *more)

    monkeypatch.setattr(dimension, "_look", counted)
    points = torch.randn(1500, 20, generator=torch.Generator().manual_seed(0))
    assert_exact(points)
    assert looks == [(torch.float32, 1500)]


def slope(first, second, fraction=0.9):
    """TwoNN from two distances, with NumPy's least squares."""
    usable = (first > 0) & (second > first)
    ratio = np.sort((second[usable] / first[usable]).numpy())
    taken = int(len(ratio) * fraction)
    height = -np.log(1 - np.arange(1, taken + 1) / len(ratio))
    return float(np.linalg.lstsq(np.log(ratio[:taken, None]), height, rcond=None)[0][0])


def test_duplicates_and_a_large_mean_do_not_change_the_dimension():
    """Distances through products give a duplicate a small distance instead of zero,
    and its ratio ruins the slope."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(600, 300, generator=generator)
    points = torch.cat([points, points[:200]])
    truth = slope(*written_out(points))
    assert truth > 60
    assert abs(dimension.two_nn(points) / truth - 1) < 1e-9
    far = points + 512
    truth = slope(*written_out(far))
    assert abs(dimension.two_nn(far) / truth - 1) < 1e-9
    products = torch.cdist(far, far, compute_mode="use_mm_for_euclid_dist").fill_diagonal_(float("inf"))
    blind = slope(*products.topk(2, largest=False, sorted=True).values.double().unbind(1))
    assert not abs(blind / truth - 1) < 0.5  # the way that is not taken


def test_two_nn_finds_the_dimension_of_a_sheet():
    generator = torch.Generator().manual_seed(0)
    sheet = torch.rand(3000, 2, generator=generator) @ torch.randn(2, 30, generator=generator)
    assert abs(dimension.two_nn(sheet) - 2) < 0.15
    assert dimension.two_nn(torch.ones(10, 3)) != dimension.two_nn(torch.ones(10, 3))  # NaN
    for bad, match in ((torch.ones(2, 3), "at least 3"), (torch.full((4, 3), float("nan")), "NaN")):
        with pytest.raises(ValueError, match=match):
            dimension.two_nn(bad)
    with pytest.raises(ValueError, match="fraction"):
        dimension.two_nn(sheet, 0.0)


def test_coordinates_are_the_units(fitted, monkeypatch):
    """Distances and inner products of x_u; in groups of one unit as in one group."""
    tower, _, cache = fitted
    whole = {}
    for kind in KINDS:
        (group,) = reading.coordinates(tower, cache, kind)
        whole[kind] = group
        for position, unit in enumerate(group.units):
            x = golden.numbers("units")["encodings"][:, golden.THEIRS[unit.index]]
            again = group.points[position] @ group.frame_of(position) + group.mean[position]
            assert (again - x).abs().max() < 1e-9
    monkeypatch.setattr(reading, "GROUP_BYTES", 1)
    parts = list(reading.coordinates(tower, cache, units=[(1, 2), 3], rows=torch.tensor([0, 2, 5])))
    assert [len(part.units) for part in parts] == [1, 1]
    x = golden.numbers("units")["encodings"][[0, 2, 5], golden.THEIRS[6]]
    assert (torch.cdist(parts[0].points[0], parts[0].points[0]) - torch.cdist(x, x)).abs().max() < 1e-9
    with pytest.raises(ValueError, match="is of kind 'mlp'"):
        list(reading.coordinates(tower, cache, units=[12]))


def test_a_loader_and_a_sample(fitted):
    tower, _, cache = fitted
    loaded = dimension.two_nn_dimension(tower, golden.images().split(20), units=[(0, 0)])
    assert (loaded - dimension.two_nn_dimension(tower, cache, units=[(0, 0)])).abs() < 1e-9
    part = dimension.two_nn_dimension(tower, cache, units=[(0, 0)], points=30, seed=1)
    assert part != loaded
    assert part == dimension.two_nn_dimension(tower, cache, units=[(0, 0)], points=30, seed=1)
    with pytest.raises(ValueError, match="at least 3"):
        dimension.two_nn_dimension(tower, cache, points=2)
