"""total[r] = sum_n (l[n,r] - shift[r]),  moment[r] = sum_n (l[n,r] - shift[r])(l[n,r] - shift[r])^T

with l = (scale*z, scale, scale*mean). All that PCA of a unit needs, in one pass over z and in C+2 numbers a
row whatever the output dimension is.
"""

import torch
from torch import Tensor

from residual_kernels.ops import backends
from residual_kernels.ops.operands import has_tangent, refuse_tangents
from residual_kernels.ops.packing import FLOATING


@torch.library.custom_op("residual_kernels::unit_moments", mutates_args=())
def _unit_moments(
    z: Tensor, scale: Tensor | None, mean: Tensor | None, shift: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    refuse_tangents(z, scale, mean)
    units, size = _sizes(z, shift)
    for name, tensor in (("scale", scale), ("mean", mean)):
        if tensor is not None and (tensor.shape != z.shape[:1] or tensor.device != z.device):
            raise ValueError(f"{name} must be [N] = ({len(z)},) on {z.device}; got {tuple(tensor.shape)}")
    if backend not in backends.BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; choose one of {', '.join(backends.BACKENDS)}")
    if len(z) == 0:
        total = torch.zeros(units, size, dtype=torch.float64, device=z.device)
        return total, torch.zeros(units, size, size, dtype=torch.float64, device=z.device)
    return backends.load(backend).unit_moments(z, scale, mean, shift)


def _sizes(z: Tensor, shift: Tensor) -> tuple[int, int]:
    """(R, C+2); ValueError unless z is dense, floating, [N, R, C], and shift float64 [R, C+2] beside it."""
    if z.ndim != 3 or z.dtype not in FLOATING or z.layout is not torch.strided:
        raise ValueError(
            f"z must be a dense floating tensor [N, R, C]; got {z.dtype} {tuple(z.shape)} ({z.layout})"
        )
    size = (z.shape[1], z.shape[2] + 2)
    if tuple(shift.shape) != size or shift.dtype != torch.float64 or shift.device != z.device:
        raise ValueError(
            f"shift must be float64 [R, C+2] = {size} on {z.device}; "
            f"got {shift.dtype} {tuple(shift.shape)} on {shift.device}"
        )
    return size[0], size[1]


@_unit_moments.register_fake
def _(z, scale, mean, shift, backend):
    units, size = shift.shape
    return (
        z.new_empty(units, size, dtype=torch.float64),
        z.new_empty(units, size, size, dtype=torch.float64),
    )


def unit_moments(
    z: Tensor,
    scale: Tensor | None,
    mean: Tensor | None,
    shift: Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Sums and second moments of units' coordinates about a shift, for PCA.

    Args:
        z: [N, R, C], any strides and floating dtype.
        scale, mean: [N], or None for 1 and 0.
        shift: [R, C+2], a rough mean of l (the first batch's serves); None for 0. Without one, float32 sums
            lose the small eigenvalues of units that lie far from the origin.
        backend: ``auto``, ``triton``, ``cpp`` or ``torch``.

    Returns:
        total [R, C+2] and moment [R, C+2, C+2], float64, not normalised by N. Tiles accumulate in float32
        (float64 for float64 z) and merge in float64. Not differentiable. Deterministic.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, with the values seen.
        RuntimeError: the backend asked for is missing.
    """
    if z.layout is not torch.strided or z.is_nested:
        raise ValueError(f"z must be a dense tensor [N, R, C]; got layout {z.layout}, nested: {z.is_nested}")
    if z.ndim != 3 or z.dtype not in FLOATING:
        raise ValueError(f"z must be a floating tensor [N, R, C]; got {z.dtype} {tuple(z.shape)}")
    rows, units, width = z.shape
    for name, tensor in (("scale", scale), ("mean", mean)):
        if tensor is not None and tensor.shape != (rows,):
            raise ValueError(f"{name} must be [N] = ({rows},) like z; got {tuple(tensor.shape)}")
    if shift is None:
        shift = torch.zeros(units, width + 2, dtype=torch.float64, device=z.device)
    if shift.shape != (units, width + 2):
        raise ValueError(f"shift must be [R, C+2] = ({units}, {width + 2}); got {tuple(shift.shape)}")
    for name, tensor in (("scale", scale), ("mean", mean), ("shift", shift)):
        if tensor is not None and tensor.device != z.device:
            raise ValueError(f"{name} is on {tensor.device} but z is on {z.device}; move one of them")
    if has_tangent(z, scale, mean):
        raise RuntimeError("unit_moments is not differentiable, in forward mode neither")
    with torch.no_grad():
        return torch.ops.residual_kernels.unit_moments(
            z.detach(),
            None if scale is None else scale.detach(),
            None if mean is None else mean.detach(),
            shift.detach().to(torch.float64),
            backends.resolve(backend, z.device, z.dtype),
        )
