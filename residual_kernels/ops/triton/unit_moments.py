"""total[r] = sum_n (l[n,r] - shift[r]),  moment[r] = sum_n (l[n,r] - shift[r])(l[n,r] - shift[r])^T

with l = (scale*z, scale, scale*mean), in one pass over z. A program owns one unit and a run of rows; the C+2 columns
of l are split into C_MAIN coordinates and a tail [rest of z, scale, scale * mean], so that of the four blocks of the
moment three are computed and one is a mirror. Runs of rows accumulate in float32, which the shift keeps small, and are
merged in float64.

Each program writes half moments P with moment = P + P^T, so that the result is symmetric to the last bit and 16-bit z
gets more than its own precision cheaply: PCA lives on small differences, so l - shift is split into high + low bfloat16
parts, and P = high^T (high / 2) + high^T low takes two tensor-core products where a general one takes three. float32 z:
exact products, or tf32 by torch's switch.
"""

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from residual_kernels.ops.triton.tiles import INTERPRETED

ROWS_PER_SPLIT = 4096  # rows summed in float32 before the float64 merge, at most
PROGRAMS = 1056  # programs a launch aims at: four for each processor of a nominal chip


@triton.jit
def _unit_moments_kernel(
    z_ptr, scale_ptr, mean_ptr, shift_ptr, total_ptr, moment_ptr,
    N, R, rows_per_split,
    stride_zn, stride_zr, stride_zc, stride_sn, stride_mn,
    HAS_SCALE: tl.constexpr, HAS_MEAN: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    C: tl.constexpr, C_MAIN: tl.constexpr, C_TAIL: tl.constexpr, ALIGN_Z: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    unit = pid % R
    split = pid // R
    L: tl.constexpr = C + 2
    offs_m = tl.arange(0, C_MAIN)
    offs_t = C_MAIN + tl.arange(0, C_TAIL)
    shift_row_ptr = shift_ptr + unit.to(tl.int64) * L
    shift_main = tl.load(shift_row_ptr + offs_m)
    shift_tail = tl.load(shift_row_ptr + offs_t, mask=offs_t < L, other=0.0)
    z_unit_ptr = z_ptr + tl.multiple_of(unit.to(tl.int64) * stride_zr, ALIGN_Z)

    total_main = tl.zeros([C_MAIN], dtype=tl.float32)
    total_tail = tl.zeros([C_TAIL], dtype=tl.float32)
    main = tl.zeros([C_MAIN, C_MAIN], dtype=tl.float32)
    cross = tl.zeros([C_MAIN, C_TAIL], dtype=tl.float32)
    tail = tl.zeros([C_TAIL, C_TAIL], dtype=tl.float32)
    first = split.to(tl.int64) * rows_per_split
    last = tl.minimum(first + rows_per_split, N)
    for start in range(first, last, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < last
        offs_n = offs_n.to(tl.int64)
        offs_z = tl.multiple_of(offs_n * stride_zn, ALIGN_Z)
        z_main = tl.load(
            z_unit_ptr + offs_z[:, None] + offs_m[None, :] * stride_zc, mask=mask_n[:, None], other=0.0
        )
        mask = mask_n[:, None] & (offs_t < C)[None, :]
        z_tail = tl.load(z_unit_ptr + offs_z[:, None] + offs_t[None, :] * stride_zc, mask=mask, other=0.0)
        z_main = z_main.to(tl.float32)
        z_tail = z_tail.to(tl.float32)
        s = tl.full([BLOCK_N], 1.0, dtype=tl.float32)
        sm = tl.zeros([BLOCK_N], dtype=tl.float32)
        if HAS_SCALE:
            s = tl.load(scale_ptr + offs_n * stride_sn, mask=mask_n, other=0.0).to(tl.float32)
            z_main *= s[:, None]
            z_tail *= s[:, None]
        if HAS_MEAN:
            sm = s * tl.load(mean_ptr + offs_n * stride_mn, mask=mask_n, other=0.0).to(tl.float32)
        column = tl.broadcast_to(offs_t[None, :], [BLOCK_N, C_TAIL])
        z_tail = tl.where(column == C, s[:, None], tl.where(column == C + 1, sm[:, None], z_tail))
        l_main = tl.where(mask_n[:, None], z_main - shift_main[None, :], 0.0)  # [BLOCK_N, C_MAIN]
        l_tail = tl.where(mask_n[:, None], z_tail - shift_tail[None, :], 0.0)  # [BLOCK_N, C_TAIL]
        total_main += tl.sum(l_main, axis=0)
        total_tail += tl.sum(l_tail, axis=0)
        if SPLIT:
            high_main = l_main.to(tl.bfloat16)
            high_tail = l_tail.to(tl.bfloat16)
            low_main = (l_main - high_main.to(tl.float32)).to(tl.bfloat16)
            low_tail = (l_tail - high_tail.to(tl.float32)).to(tl.bfloat16)
            half_main = (0.5 * l_main).to(tl.bfloat16)  # exactly half of high_main
            half_tail = (0.5 * l_tail).to(tl.bfloat16)
            main = tl.dot(tl.trans(high_main), half_main, main)
            main = tl.dot(tl.trans(high_main), low_main, main)
            cross = tl.dot(tl.trans(high_main), high_tail, cross)
            cross = tl.dot(tl.trans(high_main), low_tail, cross)
            cross = tl.dot(tl.trans(low_main), high_tail, cross)
            tail = tl.dot(tl.trans(high_tail), half_tail, tail)
            tail = tl.dot(tl.trans(high_tail), low_tail, tail)
        else:
            main = tl.dot(tl.trans(l_main), l_main, main, input_precision=PRECISION)
            cross = tl.dot(tl.trans(l_main), l_tail, cross, input_precision=PRECISION)
            tail = tl.dot(tl.trans(l_tail), l_tail, tail, input_precision=PRECISION)
    cross *= 0.5
    if not SPLIT:
        main *= 0.5
        tail *= 0.5

    row = split.to(tl.int64) * R + unit
    mask_t = offs_t < L
    tl.store(total_ptr + row * L + offs_m, total_main)
    tl.store(total_ptr + row * L + offs_t, total_tail, mask=mask_t)
    moment_row_ptr = moment_ptr + row * (L * L)
    tl.store(moment_row_ptr + (offs_m * L)[:, None] + offs_m[None, :], main)
    tl.store(moment_row_ptr + (offs_m * L)[:, None] + offs_t[None, :], cross, mask=mask_t[None, :])
    tl.store(moment_row_ptr + (offs_t * L)[None, :] + offs_m[:, None], cross, mask=mask_t[None, :])
    mask = mask_t[:, None] & mask_t[None, :]
    tl.store(moment_row_ptr + (offs_t * L)[:, None] + offs_t[None, :], tail, mask=mask)


def tail_width(width: int, main: int) -> int:
    """Power of two, at least 16, that holds the coordinates behind `main` and the columns of scale and mean."""
    tail = 16
    while tail < width + 2 - main:
        tail *= 2
    return tail


def main_width(width: int) -> int:
    """Power of two of coordinates in the main block, at most `width`."""
    return 1 << (width.bit_length() - 1)


def unit_moments(
    z: Tensor, scale: Tensor | None, mean: Tensor | None, shift: Tensor, precision: str
) -> tuple[Tensor, Tensor]:
    """(total [R, C+2], moment [R, C+2, C+2]) in float64, for 16 <= C <= 128 and at least one row."""
    rows, units, width = z.shape
    size = width + 2
    main = main_width(width)
    split_precision = z.dtype.itemsize == 2
    if INTERPRETED and split_precision:  # the interpreter computes bfloat16 on its bits
        z, split_precision, precision = z.to(torch.float32), False, "ieee"
    block_n, warps, stages = 32, 8, 4 if precision == "tf32" or split_precision else 2
    if torch.version.hip is not None:
        stages = min(stages, 2)
    splits = max(1, min(-(-PROGRAMS // units), -(-rows // (4 * block_n))))
    per_split = -(-min(-(-rows // splits), ROWS_PER_SPLIT) // block_n) * block_n
    shift = shift.to(torch.float32).contiguous()
    total = moment = None
    for first in range(0, rows, splits * per_split):
        part = slice(first, first + splits * per_split)
        tile = z[part]
        count = -(-len(tile) // per_split)
        totals = torch.empty(count, units, size, dtype=torch.float32, device=z.device)
        moments = torch.empty(count, units, size, size, dtype=torch.float32, device=z.device)
        _unit_moments_kernel[(units * count,)](
            tile, None if scale is None else scale[part], None if mean is None else mean[part], shift, totals, moments,
            len(tile), units, per_split,
            z.stride(0), z.stride(1), z.stride(2),
            0 if scale is None else scale.stride(0), 0 if mean is None else mean.stride(0),
            HAS_SCALE=scale is not None, HAS_MEAN=mean is not None, SPLIT=split_precision, PRECISION=precision,
            C=width, C_MAIN=main, C_TAIL=tail_width(width, main), ALIGN_Z=gcd(z.stride(0), z.stride(1), 16),
            BLOCK_N=block_n, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        total_part = totals.sum(0, dtype=torch.float64)
        moment_part = moments.sum(0, dtype=torch.float64)
        total = total_part if total is None else total.add_(total_part)
        moment = moment_part if moment is None else moment.add_(moment_part)
    return total, moment + moment.transpose(1, 2)
