"""How many dimensions does a head use?

Linear (explained variance, participation ratio) and nonlinear (TwoNN).
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from residual_kernels.analysis import compiled
from residual_kernels.analysis.reading import coordinates
from residual_kernels.bases.principal import KindBases
from residual_kernels.bases.spectral_bases import SpectralBases
from residual_kernels.units.cache import UnitCache
from residual_kernels.units.source import cache_of

# Of distances at a time: in the cache of a core, or many at once.
TILE_BYTES = {
    "cpu": 4 * 2**20,
    "cuda": 256 * 2**20,
}
GROUPED = 32  # points whose smallest distance stands for them in the first look
CANDIDATES = 4  # neighbours of a point whose distances are computed exactly
FAR = 1e30  # a distance that is never the smallest, where true ones are at most 8


def _part(bases: SpectralBases, kind: str) -> KindBases:
    if kind not in bases.parts:
        raise ValueError(f"these bases hold {', '.join(bases.parts)}, not {kind}")
    return bases.parts[kind]


def _whole(part: KindBases, kind: str) -> None:
    """Raises ValueError when components with variance were cut off."""
    for unit in range(len(part.mean)):
        kept = float(part.ratio(unit).sum())
        if part.total_variance[unit] > 0 and kept < 1 - 1e-6:
            raise ValueError(
                f"{kind} {unit} keeps {kept:.4f} of its variance: these bases were truncated; give the "
                "whole ones"
            )


def linear_dimension(bases: SpectralBases, energy: float = 0.99, kind: str = "head") -> Tensor:
    """Components needed for a given explained variance, per unit.

    Args:
        bases: whole, or truncated ones that still reach `energy`.
        energy: share of the variance, in (0, 1].
        kind: of the units, or "output".

    Returns:
        [R] int64: the first k whose cumulative share lies strictly above `energy`; one for a constant unit,
        all where none is above, as :meth:`SpectralBases.truncate` keeps them.

    Raises:
        ValueError: truncated bases whose components do not reach `energy`.
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy must lie in (0, 1]; got {energy}")
    part = _part(bases, kind)
    found = []
    for unit in range(len(part.mean)):
        ratio = part.ratio(unit)
        count = int((ratio.cumsum(0) <= energy).sum()) + 1 if ratio.any() else 1
        if count > len(ratio) and energy < 1:
            _whole(part, kind)
        found.append(min(count, len(ratio)))
    return torch.tensor(found)


def participation_ratio(bases: SpectralBases, kind: str = "head") -> Tensor:
    """How many components carry weight: (sum of eigenvalues)^2 / sum of their squares.

    Args:
        bases: not truncated.
        kind: of the units, or "output".

    Returns:
        [R] float64; 0 for a constant unit.

    Raises:
        ValueError: truncated bases.
    """
    part = _part(bases, kind)
    _whole(part, kind)
    ratios = []
    for unit in range(len(part.mean)):
        variance = part.variance[part.run(unit)]
        square = variance.square().sum()
        ratios.append(variance.sum().square() / square if square > 0 else square)
    return torch.stack(ratios)


def nearest_two(points: Tensor) -> tuple[Tensor, Tensor]:
    """Distances of every point to its nearest and second nearest other point, in O(N) memory.

    Args:
        points: [N, r], floating, N >= 3, finite.

    Returns:
        Two tensors [N] float64.

    Raises:
        ValueError: fewer than three points, or NaN or Inf.

    One matrix product per tile gives lower bounds of squared distances, which leave a few candidates per
    point. Their distances are computed from differences in float64. A point is finished when no other point's
    bound lies below its second distance; the others are searched again in float64, and at last one by one. So
    duplicates and ties come out exactly, and points far from the origin lose nothing.
    """
    if points.ndim != 2 or len(points) < 3 or not points.is_floating_point():
        raise ValueError(
            f"points must be a floating tensor [N, r] of at least 3 points; got {tuple(points.shape)}"
        )
    if not points.isfinite().all():
        raise ValueError("points hold NaN or Inf")
    points = points.detach()
    exact = points.double()
    centred = exact - exact.mean(0)
    largest = centred.norm(dim=1).max()
    if largest == 0:
        return exact.new_zeros(len(points)), exact.new_zeros(len(points))
    unit = centred / largest
    # what subtracting the mean may have rounded away, as a squared distance of points with norms of at most
    # one
    blur = 8 * torch.finfo(torch.float64).eps * float(exact.abs().max() / largest) * exact.shape[1] ** 0.5
    squares = exact.new_full((len(points), 2), float("inf"))
    open_rows = torch.arange(len(points), device=points.device)
    for dtype in (torch.float32, torch.float64):
        if len(open_rows):
            found, done = _look(exact, unit.to(dtype), open_rows, float(largest) ** 2, blur)
            squares[open_rows] = found
            open_rows = open_rows[~done]
    for row in open_rows.tolist():
        square = (exact - exact[row]).square().sum(1)
        square[row] = float("inf")
        squares[row] = square.topk(2, largest=False, sorted=True).values
    first, second = squares.sqrt().unbind(1)
    return first, second


def _look(exact: Tensor, unit: Tensor, rows: Tensor, scale: float, blur: float) -> tuple[Tensor, Tensor]:
    """Two smallest squared distances [n, 2] of `rows` among a few candidates,
    and whether they are proven smallest.

    `unit` holds the points centred, with norms of at most one, in the dtype of the products; their squared
    distances times `scale` are true ones, to within `blur`.
    """
    # |computed - true| <= slack * (|q|^2 + |y|^2): r+3 roundings of a sum whose terms are at most (|q| +
    # |y|)^2, and those of its inputs. Taken off |y|^2 here and |q|^2 below, it makes every product a lower
    # bound.
    slack = 2 * (unit.shape[1] + 8) * torch.finfo(unit.dtype).eps
    bounds = unit.double().square().sum(1) * (1 - slack)
    if unit.dtype == torch.float32 and len(rows) == len(unit) and compiled.runs(unit):
        found, outside = compiled.nearest(exact, unit, bounds)
    else:
        found, outside = _nearest_candidates(exact, unit, bounds, rows)
    proven = (outside + bounds[rows] - blur) * scale
    # A distance of zero cannot be undercut; the last factor pays for the roundings of this very line.
    done = (found[:, 1] <= proven * (1 - 1e-12)) | (found[:, 1] == 0)
    return found, done


def _nearest_candidates(exact: Tensor, unit: Tensor, bounds: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`compiled.nearest` of some rows, by products of torch."""
    count, size = unit.shape
    # Columns j, j + runs, j + 2 runs ... are one group: minima go along whole vectors.
    runs = -(-count // GROUPED)
    columns = torch.zeros(size + 1, runs * GROUPED, dtype=unit.dtype, device=unit.device)
    columns[:size, :count] = unit.T * -2
    columns[size, :count] = bounds
    columns[size, count:] = FAR
    queries = torch.cat([unit, unit.new_ones(count, 1)], dim=1)
    budget = TILE_BYTES.get(unit.device.type, TILE_BYTES["cuda"])
    block = max(64, budget // (columns.shape[1] * unit.dtype.itemsize))
    best_groups = min(4, runs)
    spread = torch.arange(GROUPED, device=unit.device) * runs
    keep = min(CANDIDATES, best_groups * GROUPED)
    tile = unit.new_empty(min(block, len(rows)), columns.shape[1])
    picked, beyond = [], []
    for part in rows.split(block):
        bound = torch.mm(queries[part], columns, out=tile[: len(part)])
        bound[torch.arange(len(part), device=part.device), part] = FAR
        smallest = bound.view(len(part), GROUPED, runs).amin(1)
        low, group = smallest.topk(min(best_groups + 1, runs), largest=False, sorted=True)
        inside = (group[:, :best_groups, None] + spread).flatten(1)  # [n, groups * GROUPED] columns
        value, place = bound.gather(1, inside).topk(
            min(keep + 1, inside.shape[1]), largest=False, sorted=True
        )
        picked.append(inside.gather(1, place[:, :keep]))
        outside = value[:, keep] if value.shape[1] > keep else value.new_full((len(part),), FAR)
        if low.shape[1] > best_groups:
            outside = torch.minimum(outside, low[:, best_groups])
        beyond.append(outside)
    candidates, outside = torch.cat(picked), torch.cat(beyond).double()
    squares = exact.new_empty(len(rows), keep)
    size_block = max(1, budget // (keep * exact.shape[1] * 8))
    for start in range(0, len(rows), size_block):
        part = slice(start, start + size_block)
        index = candidates[part]
        other = exact[index.clamp_max(count - 1)]
        square = (other - exact[rows[part], None]).square().sum(2)
        square[(index >= count) | (index == rows[part, None])] = float("inf")
        squares[part] = square
    return squares.topk(2, largest=False, sorted=True).values, outside


def two_nn(points: Tensor, fraction: float = 0.9) -> float:
    """Intrinsic dimension of points by TwoNN (Facco et al. 2017).

    Args:
        points: [N, r].
        fraction: the smallest ratios that are used, in (0, 1].

    Returns:
        The slope of -log(1 - F(mu)) against log(mu) through the origin, with mu = r2 / r1, the distances to
        the two nearest neighbours. Points with a duplicate (r1 = 0) or a tie (r1 = r2) are left out; NaN
        where fewer than 3 are usable.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must lie in (0, 1]; got {fraction}")
    first, second = nearest_two(points)
    usable = (first > 0) & (second > first)
    ratio = (second[usable].log() - first[usable].log()).sort().values
    count = len(ratio)
    # where F = 1 its logarithm is infinite; the one before goes too, as in the usual implementations
    taken = min(int(count * fraction), count - 2)
    if taken < 1:
        return float("nan")
    rank = torch.arange(1, taken + 1, dtype=torch.float64, device=ratio.device)
    height = -torch.log1p(-rank / count)
    x = ratio[:taken]
    return float((x @ height) / (x @ x))


def two_nn_dimension(
    tower: nn.Module,
    data: "UnitCache | Iterable",
    kind: str = "head",
    *,
    units: Iterable | None = None,
    fraction: float = 0.9,
    points: int | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """TwoNN dimension of every unit, from its C+2 coordinates.

    Args:
        tower: a supported image tower, or an adapter around one.
        data: a UnitCache of this tower, or a loader (encoded in memory first).
        kind: of the units.
        units: some of the kind's units; all by default.
        fraction: see :func:`two_nn`.
        points: at most this many images, drawn with `seed`; all by default. Time grows with their square,
            memory does not: units are taken in groups.
        seed: random seed of the draw.
        progress: called with the number of units after each.

    Returns:
        [R] float64; NaN for a unit whose points are constant or all tied.

    Raises:
        ValueError: data of another tower or without the kind, or fewer than three images.
    """
    cache = cache_of(data, tower, (kind,))
    rows = sample(len(cache), points, seed)
    device = next(tower.parameters()).device
    found = []
    for group in coordinates(tower, cache, kind, units, rows):
        for local in group.points:
            found.append(two_nn(local.to(device), fraction))
            if progress is not None:
                progress(1)
    return torch.tensor(found, dtype=torch.float64)


def sample(count: int, points: int | None, seed: int) -> Tensor | None:
    """Sorted positions of `points` of `count` images, drawn with `seed`; None for all of them."""
    if points is not None and points < 3:
        raise ValueError(f"points must be at least 3; got {points}")
    if points is None or points >= count:
        return None
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:points].sort().values
