"""The operators in eager PyTorch calls on any device: the fallback, and what `backend="torch"` means.

Ragged units are padded to the longest (one batched product reads all coefficients) and gathered back to [N,
J] (one product writes all components). Matrix products run in z's dtype; everything else in float32 or
better.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from residual_kernels.ops.reference import unit_of_component

MOMENT_ROWS = 1024  # rows of z summed in z's precision before the float64 merge


class _Pack(NamedTuple):
    """The tensors of a pack, by name."""

    padded: Tensor  # proj [R, K, C], units padded to the largest K_u
    slots: Tensor  # int64 [J]: where each component stands among the R * K
    bias: Tensor
    slope: Tensor
    offset: Tensor
    basis: Tensor  # [J, D]


def pack(
    proj: Tensor, bias: Tensor, slope: Tensor, offset: Tensor, basis: Tensor, unit_offsets: Tensor
) -> tuple[list[Tensor], list[int]]:
    """Tensors as in :class:`_Pack`, and sizes (R, K); K is the largest K_u."""
    units = unit_offsets.numel() - 1
    if proj.device.type == "meta":  # sizes are not known yet; the layout is made again when values arrive
        longest = len(proj)
    else:
        longest = max(int(unit_offsets.diff().max()), 1)
    if longest * units == len(proj):
        slots = torch.arange(len(proj), device=proj.device)
        padded = proj.reshape(units, longest, -1)
    else:
        unit = unit_of_component(unit_offsets)
        slots = unit * longest + torch.arange(len(proj), device=proj.device) - unit_offsets[unit]
        padded = proj.new_zeros(units * longest, proj.shape[1]).index_copy_(0, slots, proj)
        padded = padded.view(units, longest, -1)
    return list(_Pack(padded, slots, bias, slope, offset, basis)), [units, longest]


def shape(tensors: Sequence[Tensor], sizes: Sequence[int]) -> tuple[int, int, int, int]:
    """(R, C, J, D); ValueError when tensors and sizes of a pack contradict each other."""
    if len(tensors) != 6 or len(sizes) != 2:
        raise ValueError(
            f"a pack of the torch backend has 6 tensors and 2 sizes; got {len(tensors)} and {len(sizes)}"
        )
    pack = _Pack(*tensors)
    components = pack.slots.shape
    if (
        pack.padded.ndim != 3
        or pack.padded.shape[:2] != tuple(sizes)
        or pack.basis.ndim != 2
        or len(components) != 1
        or not components == pack.bias.shape == pack.slope.shape == pack.offset.shape == pack.basis.shape[:1]
        or pack.padded.dtype != pack.basis.dtype
    ):
        raise ValueError(
            "the packed tensors do not have the sizes that the pack states; make it with pack_units. "
            f"Got {[tuple(x.shape) for x in tensors]} for {list(sizes)}"
        )
    return pack.padded.shape[0], pack.padded.shape[2], len(pack.slots), pack.basis.shape[1]


def _to_components(padded: Tensor, slots: Tensor) -> Tensor:
    """[N, R*K] with padding -> [N, J]."""
    return padded if padded.shape[1] == slots.numel() else padded.index_select(1, slots)


def _inner(z: Tensor, mean: Tensor | None, constants: _Pack) -> Tensor:
    """z . proj + bias + mean * slope, [N, J], in at least float32."""
    product = torch.matmul(z.transpose(0, 1), constants.padded.transpose(1, 2))  # [R, N, K]
    inner = _to_components(product.transpose(0, 1).flatten(1), constants.slots)
    inner = inner.to(constants.bias.dtype) + constants.bias
    return inner if mean is None else torch.addcmul(inner, mean[:, None], constants.slope)


def _apply_scale(inner: Tensor, scale: Tensor | None) -> Tensor:
    return inner if scale is None else scale[:, None] * inner


def spectral_reweight_forward(
    z: Tensor,
    scale: Tensor | None,
    mean: Tensor | None,
    weight: Tensor,
    weight_index: Tensor | None,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
) -> Tensor:
    """weight [T, J] -> y [T, N, D], or [N, D] with weight_index [N]."""
    constants = _Pack(*tensors)
    c = _apply_scale(_inner(z, mean, constants), scale) - constants.offset
    if weight_index is not None:
        return (c * weight[weight_index]).to(z.dtype) @ constants.basis
    return torch.stack([(c * row).to(z.dtype) @ constants.basis for row in weight])


def spectral_reweight_backward(
    dy: Tensor,
    z: Tensor,
    scale: Tensor | None,
    mean: Tensor | None,
    weight: Tensor,
    weight_index: Tensor | None,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    wanted: list[bool],
) -> list[Tensor]:
    """The wanted ones of (dweight, dz, dscale, dmean), in this order."""
    units, longest = sizes
    constants = _Pack(*tensors)
    padded, slots, bias, slope, offset, basis = constants
    want_weight, want_z, want_scale, want_mean = wanted
    upstream = dy.unsqueeze(0) if weight_index is not None else dy  # [T or 1, N, D]
    t = [(row @ basis.T).to(bias.dtype) for row in upstream]  # each [N, J]
    inner = _inner(z, mean, constants) if want_weight or want_scale else None

    grads = []
    if want_weight:
        c = _apply_scale(cast(Tensor, inner), scale) - offset
        if weight_index is not None:
            tasks = torch.arange(len(weight), device=z.device)
            # [T, N]; a product sums in a fixed order
            chosen = (weight_index[None, :] == tasks[:, None]).to(c.dtype)
            grads.append(chosen @ (c * t[0]))
        else:
            grads.append(torch.stack([(c * row).sum(0) for row in t]))
    if want_z or want_scale or want_mean:
        if weight_index is not None:
            q = weight[weight_index] * t[0]
        else:
            q = sum(w * row for w, row in zip(weight, t, strict=True))  # dL/dc, [N, J]
        sq = _apply_scale(q, scale)
        if want_z:
            full = sq.to(z.dtype)
            if full.shape[1] != units * longest:
                full = full.new_zeros(len(z), units * longest).index_copy_(1, slots, full)
            full = full.view(len(z), units, longest).transpose(0, 1)
            grads.append(torch.matmul(full, padded).transpose(0, 1).contiguous())  # [N, R, C]
        if want_scale:
            grads.append((q * inner).sum(1))
        if want_mean:
            grads.append(sq @ slope)
    return grads


def unit_moments(
    z: Tensor, scale: Tensor | None, mean: Tensor | None, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """Sums and second moments of l - shift.

    Tiles of rows are multiplied in float32 (float64 for float64 z).
    """
    rows, units, width = z.shape
    dtype = torch.promote_types(z.dtype, torch.float32)
    total = torch.zeros(units, width + 2, dtype=torch.float64, device=z.device)
    moment = torch.zeros(units, width + 2, width + 2, dtype=torch.float64, device=z.device)
    shift = shift.to(dtype)
    for start in range(0, rows, MOMENT_ROWS):
        part = slice(start, start + MOMENT_ROWS)
        tile = z[part].to(dtype)
        s = tile.new_ones(len(tile)) if scale is None else scale[part].to(dtype)
        sm = torch.zeros_like(s) if mean is None else s * mean[part].to(dtype)
        l = tile.new_empty(units, len(tile), width + 2)
        torch.sub(s[:, None, None] * tile, shift[:, :width], out=l[:, :, :width].transpose(0, 1))
        l[:, :, width] = s - shift[:, width, None]
        l[:, :, width + 1] = sm - shift[:, width + 1, None]
        total += l.sum(1, dtype=torch.float64)
        moment += torch.bmm(l.transpose(1, 2), l)
    return total, moment
