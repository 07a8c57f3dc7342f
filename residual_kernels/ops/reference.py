"""What the operators are: plain, differentiable PyTorch, one short function each.

These are the definitions the fast backends are tested against (in float64) and the honest baselines they are
measured against. Letters: N rows, R units, C coordinates of a unit, J kept components over all units, D
output dimension, T weight vectors. Shapes and meanings are those of
:func:`residual_kernels.ops.spectral_reweight`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def unit_of_component(unit_offsets: Tensor) -> Tensor:
    """r(j): the unit that owns component j, as an int64 tensor [J]."""
    sizes = unit_offsets.diff()
    return torch.arange(sizes.numel(), device=unit_offsets.device).repeat_interleave(sizes)


def coefficients(
    z: Tensor,
    scale: Tensor | None,
    mean: Tensor | None,
    proj: Tensor,
    bias: Tensor,
    slope: Tensor,
    offset: Tensor,
    unit_offsets: Tensor | Sequence[int],
) -> Tensor:
    """c[n,j] = scale[n] * (z[n,r(j)] . proj[j] + bias[j] + mean[n] * slope[j]) - offset[j], as [N, J].

    `unit_offsets` as plain numbers spare a device the question.
    """
    bounds = unit_offsets.tolist() if isinstance(unit_offsets, Tensor) else list(unit_offsets)
    runs = [
        z[:, r] @ proj[low:high].T for r, (low, high) in enumerate(zip(bounds[:-1], bounds[1:], strict=True))
    ]
    inner = torch.cat(runs, dim=1) + bias
    if mean is not None:
        inner = inner + mean[:, None] * slope
    if scale is not None:
        inner = scale[:, None] * inner
    return inner - offset


def spectral_reweight(
    z: Tensor,
    scale: Tensor | None,
    mean: Tensor | None,
    proj: Tensor,
    bias: Tensor,
    slope: Tensor,
    offset: Tensor,
    weight: Tensor,
    basis: Tensor,
    unit_offsets: Tensor,
    *,
    weight_index: Tensor | None = None,
) -> Tensor:
    """y[n] = sum_j weight[j] * c[n,j] * basis[j]: the low-rank (direct) form."""
    c = coefficients(z, scale, mean, proj, bias, slope, offset, unit_offsets)
    if weight_index is not None:
        return (c * weight[weight_index]) @ basis
    return (c * weight.unsqueeze(-2)) @ basis


def spectral_reweight_folded(
    z: Tensor,
    scale: Tensor | None,
    mean: Tensor | None,
    proj: Tensor,
    bias: Tensor,
    slope: Tensor,
    offset: Tensor,
    weight: Tensor,
    basis: Tensor,
    unit_offsets: Tensor,
) -> Tensor:
    """The same y for one weight [J], with the constants folded first: y = (scale * z) F + affine,
    one large product."""
    weighted = weight[:, None] * basis  # [J, D]
    bounds = unit_offsets.tolist()
    fold = torch.cat(
        [proj[low:high].T @ weighted[low:high] for low, high in zip(bounds[:-1], bounds[1:], strict=True)]
    )
    y = z.flatten(1) @ fold + bias @ weighted
    if mean is not None:
        y = y + mean[:, None] * (slope @ weighted)
    if scale is not None:
        y = scale[:, None] * y
    return y - offset @ weighted


def unit_coordinates(z: Tensor, scale: Tensor | None, mean: Tensor | None) -> Tensor:
    """l = (scale * z, scale, scale * mean) as [N, R, C+2]: a unit's output is linear in l."""
    rows, units, _ = z.shape
    s = torch.ones(rows, dtype=z.dtype, device=z.device) if scale is None else scale
    sm = torch.zeros_like(s) if mean is None else s * mean
    columns = torch.stack([s, sm], dim=-1)[:, None, :].expand(rows, units, 2)
    return torch.cat([s[:, None, None] * z, columns], dim=-1)


def unit_moments(
    z: Tensor, scale: Tensor | None, mean: Tensor | None, shift: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sums over n of (l - shift) [R, C+2] and of (l - shift)(l - shift)^T [R, C+2, C+2], in float64."""
    wide = [None if x is None else x.double() for x in (scale, mean)]
    centred = unit_coordinates(z.double(), *wide)
    if shift is not None:
        centred = centred - shift.double()
    return centred.sum(0), torch.einsum("nri,nrj->rij", centred, centred)
