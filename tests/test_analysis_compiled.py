"""The compiled loops of the analyses: what plain torch and NumPy give, on every instruction set here."""

import math

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from scipy import stats

_cpp = pytest.importorskip("residual_kernels._cpp", reason="the extension was not built (no C++ compiler)")
from residual_kernels.analysis import compiled, dimension, scores, similarity  # noqa: E402
from residual_kernels.ops import backends, cpp_backend  # noqa: E402

SETS = [name for name, reason in _cpp.instruction_sets().items() if reason is None]


@pytest.fixture(params=SETS)
def instruction_set(request, monkeypatch):
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setenv(cpp_backend.ENVIRONMENT_VARIABLE, request.param)
    return request.param


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def scattered(count, size, copies=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(count, size, generator=generator)
    points[torch.randint(count, (copies,), generator=generator)] = points[
        torch.randint(count, (copies,), generator=generator)
    ]
    return points


def two_looks(points, monkeypatch):
    """nearest_two by the compiled loop, and by products of torch."""
    found = []
    for backend in ("cpp", "torch"):
        monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, backend)
        assert compiled.runs(points) == (backend == "cpp")
        found.append(torch.stack(dimension.nearest_two(points)))
    return found


@pytest.mark.parametrize(
    "shape", [(3, 1), (4, 2), (5, 3), (16, 1), (17, 40), (113, 66), (500, 9), (241, 130)], ids=str
)
@pytest.mark.parametrize("copies", [0, 30])
def test_nearest_neighbours(shape, copies, instruction_set, threads, monkeypatch):
    ours, theirs = two_looks(scattered(*shape, copies), monkeypatch)
    assert_allclose(ours, theirs, rtol=1e-13, atol=0)  # duplicates are at zero in both


def test_candidates_and_bounds_are_what_they_say(instruction_set):
    """Against all products in float64: four candidates, and the fifth smallest bound for everything else."""
    points = scattered(97, 12, copies=5).double()
    unit = (points - points.mean(0)).div(10).float()
    bounds = unit.double().square().sum(1) * 0.999
    squares, outside = compiled.nearest(points, unit, bounds)
    wide = unit.double()
    products = bounds[None] - 2 * wide @ wide.T
    products.fill_diagonal_(math.inf)
    smallest = products.topk(5, largest=False, sorted=True)
    distances = (points[:, None] - points[smallest.indices[:, :4]]).square().sum(2)
    assert_allclose(squares, distances.sort(1).values[:, :2], rtol=1e-13)
    assert_allclose(outside, smallest.values[:, 4], atol=1e-5)


def test_too_few_points_have_no_second_neighbour(instruction_set):
    squares, outside = compiled.nearest(torch.ones(2, 3).double(), torch.zeros(2, 3), torch.zeros(2))
    assert squares.tolist() == [[0.0, math.inf]] * 2
    assert (outside > 1e29).all()


@pytest.mark.parametrize("count", [1, 2, 3, 40, 1000])
def test_rank_sums(count, threads):
    generator = torch.Generator().manual_seed(count)
    values = torch.randn(6, count, generator=generator)
    values[1] = torch.randint(-3, 4, (count,), generator=generator) * 0.1
    values[2], values[3] = 1.5, torch.arange(count).float() - count // 2
    values[4, ::2], values[4, 1::2] = 0.0, -0.0  # equal, whatever their bits
    values[5] *= torch.tensor([1e-40, 1e30])[
        torch.arange(count) % 2
    ]  # numbers of every size, and denormal ones
    target = torch.from_numpy(stats.rankdata(torch.randn(6, count, generator=generator).numpy(), axis=1))
    target = target - (count + 1) / 2
    shared, square = compiled.rank_sums(values, target)
    ranks = torch.from_numpy(stats.rankdata(values.numpy(), axis=1)) - (count + 1) / 2
    assert torch.equal(shared, (ranks * target).sum(1))  # sums of halves: exact
    assert torch.equal(square, ranks.square().sum(1))
    assert torch.equal(square[[2, 4]], torch.zeros(2, dtype=torch.float64))


def test_spearman_with_and_without(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    points, axes = torch.randn(80, 6, generator=generator), torch.randn(6, 20, generator=generator)
    target = scores._centred_ranks(torch.randn(20, 80, generator=generator))
    ours, theirs = (scores._spearman(points, axes, target, fast) for fast in (True, False))
    assert abs(float(ours - theirs)) < 1e-14
    other = scores._spearman(points, axes, target.flip(1), True)
    assert abs(float(ours - other)) > 1e-3  # the comparison can fail


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 4), (3, 4, 9), (6, 30, 30)], ids=str)
def test_greedy_matching(shape, threads, monkeypatch):
    generator = torch.Generator().manual_seed(3)
    entries = torch.rand(shape, generator=generator, dtype=torch.float64)
    entries[:, :, ::3] = (entries[:, :, ::3] * 4).round() / 4  # equal entries, zeros among them
    given = entries.clone()
    ours = similarity._greedy(entries)
    assert torch.equal(entries, given)
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "torch")
    theirs = similarity._greedy(entries.clone())
    assert_allclose(ours, theirs, rtol=1e-14)
    assert_allclose(ours, [by_hand(matrix) for matrix in given.numpy()], rtol=1e-14)


def by_hand(matrix):
    matrix, total = matrix.copy(), 0.0
    for _ in range(min(matrix.shape)):
        row, column = np.unravel_index(matrix.argmax(), matrix.shape)
        total += matrix[row, column] ** 2
        matrix[row], matrix[:, column] = -1, -1
    return math.sqrt(total)


def test_what_is_no_number_stays_none():
    entries = torch.full((2, 3, 3), math.nan, dtype=torch.float64)
    entries[0] = 0.5
    found = compiled.greedy_squares(entries)
    assert float(found[0]) == 0.75
    assert math.isnan(found[1])


def test_sizes_are_checked():
    for call in (
        lambda: _cpp.nearest(0, 1, (-1, 2), 0, 0, 0, 0, 0),
        lambda: _cpp.rank_sums(1, (2, -1), 0, 0, 0, 0),
        lambda: _cpp.greedy_matching(1, (1, -1, 1), 0, 0),
    ):
        with pytest.raises(ValueError, match="negative"):
            call()
