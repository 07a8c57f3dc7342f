"""Which loops of the analyses does the compiled extension run?

Where it cannot, torch and NumPy give the same numbers.
"""

import torch
from torch import Tensor

from residual_kernels.ops import backends


def runs(tensor: Tensor) -> bool:
    """Whether the extension computes on the device of `tensor`, and nobody has chosen another backend."""
    return tensor.device.type == "cpu" and backends.resolve("auto", tensor.device) == "cpp"


def nearest(exact: Tensor, unit: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """The two smallest squared distances of every point among a few candidates, and a bound for all others.

    Args:
        exact: [N, r] float64, the points.
        unit: [N, r] float32, the same about their mean, with norms of at most one.
        bounds: [N], their squared norms less what rounding may add to a product.

    Returns:
        Squared distances [N, 2] float64 (infinite where a point has too few candidates), and [N] float64: no
        other point has a smaller squared norm less twice its product with the point than this.
    """
    from residual_kernels import _cpp
    from residual_kernels.ops.cpp_backend import set_number

    count, size = unit.shape
    points = torch.cat([unit, bounds.float()[:, None]], dim=1)
    queries = torch.cat([unit * -2, unit.new_ones(count, 1)], dim=1)
    exact = exact.contiguous()
    squares, outside = exact.new_empty(count, 2), exact.new_empty(count)
    addresses = (x.data_ptr() for x in (queries, points, exact, squares, outside))
    _cpp.nearest(set_number(), torch.get_num_threads(), (count, size), *addresses)
    return squares, outside


def rank_sums(values: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over each row of float32 `values` [k, N] of its centred ranks times `target` [k, N], and of their
    squares: [k] float64 each.

    Equal numbers share the mean of their ranks. Exact while N is below 130,000.
    """
    from residual_kernels import _cpp

    values, target = values.contiguous(), target.contiguous()
    shared, square = target.new_empty(len(values)), target.new_empty(len(values))
    addresses = (x.data_ptr() for x in (values, target, shared, square))
    _cpp.rank_sums(torch.get_num_threads(), tuple(values.shape), *addresses)
    return shared, square


def greedy_squares(entries: Tensor) -> Tensor:
    """Sum of squares [P] of what a greedy one-to-one matching takes of each matrix of [P, a, b], float64 and
    not negative."""
    from residual_kernels import _cpp

    entries = entries.contiguous()
    total = entries.new_empty(len(entries))
    _cpp.greedy_matching(torch.get_num_threads(), tuple(entries.shape), entries.data_ptr(), total.data_ptr())
    return total
