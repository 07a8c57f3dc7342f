"""total[r] = sum_n (l[n,r] - shift[r]),  moment[r] = sum_n (l[n,r] - shift[r])(l[n,r] - shift[r])^T

with l = (scale*z, scale, scale*mean), in one pass over z. A program owns one unit and a run of rows. The C
columns of scale*z are split into a main tile and, where C is no power of two, a tail; the two columns of
scale and mean stay out of the matrix products: their sums with every coordinate are taken where the
coordinates are in registers, element by element, and added up over rows once, behind the last. Runs of rows
accumulate in float32, which the shift keeps small, and are merged in float64.

Each program writes half moments P with moment = P + P^T, so that the result is symmetric to the last bit and
16-bit z gets more than its own precision cheaply: PCA lives on small differences, so l - shift is split into
high + low bfloat16 parts, and P = high^T high / 2 + high^T low takes two tensor-core products where a general
one takes three. float32 z: exact products, or tf32 by torch's switch.
"""

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from residual_kernels.ops.triton.tiles import INTERPRETED

ROWS_PER_SPLIT = 4096  # rows summed in float32 before the float64 merge, at most
PROGRAMS = 1056  # programs a launch aims at: eight for each processor of a nominal chip


@triton.jit
def _centred(
    z_rows_ptr,
    s,
    shift,
    mask_n,
    stride_zc,
    HAS_SCALE: tl.constexpr,
    C: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """scale * z - shift of a tile of columns, float32, 0 where there is no row or column."""
    offs_c = FIRST + tl.arange(0, BLOCK_C)
    mask = mask_n[:, None]
    if FIRST + BLOCK_C > C:
        mask = mask & (offs_c < C)[None, :]
    z = tl.load(z_rows_ptr[:, None] + offs_c[None, :] * stride_zc, mask=mask, other=0.0).to(tl.float32)
    if HAS_SCALE:
        z *= s[:, None]
    return tl.where(mask_n[:, None], z - shift[None, :], 0.0)  # [BLOCK_N, BLOCK_C]; shift is 0 behind C


@triton.jit
def _high_low(x):
    """x as a sum of two bfloat16: its upper 16 bits, which cost one instruction to cut off,
    and what is left."""
    high = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return high.to(tl.bfloat16), (x - high).to(tl.bfloat16)


@triton.jit
def _store_with_tails(
    total_ptr,
    moment_ptr,
    total,
    with_s,
    with_sm,
    offs,
    C: tl.constexpr,
    L: tl.constexpr,
):
    """Sums of a tile of columns, and their sums with the columns of scale and mean, halved, on both sides."""
    mask = offs < C
    tl.store(total_ptr + offs, tl.sum(total, axis=0), mask=mask)
    s = 0.5 * tl.sum(with_s, axis=0)
    sm = 0.5 * tl.sum(with_sm, axis=0)
    tl.store(moment_ptr + offs * L + C, s, mask=mask)
    tl.store(moment_ptr + C * L + offs, s, mask=mask)
    tl.store(moment_ptr + offs * L + C + 1, sm, mask=mask)
    tl.store(moment_ptr + (C + 1) * L + offs, sm, mask=mask)


@triton.jit(do_not_specialize=["N", "rows_per_split"])
def _unit_moments_kernel(
    z_ptr,
    scale_ptr,
    mean_ptr,
    shift_ptr,
    total_ptr,
    moment_ptr,
    N,
    rows_per_split,
    R,
    stride_zn,
    stride_zr,
    stride_zc,
    stride_sn,
    stride_mn,
    HAS_SCALE: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
    C_MAIN: tl.constexpr,
    C_TAIL: tl.constexpr,
    ALIGN_Z: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    split, unit = tl.program_id(0), tl.program_id(1)
    L: tl.constexpr = C + 2
    offs_m = tl.arange(0, C_MAIN)
    shift_row_ptr = shift_ptr + unit.to(tl.int64) * L
    shift_main = tl.load(shift_row_ptr + offs_m).to(tl.float32)
    shift_s, shift_sm = (
        tl.load(shift_row_ptr + C).to(tl.float32),
        tl.load(shift_row_ptr + C + 1).to(tl.float32),
    )
    z_unit_ptr = z_ptr + tl.multiple_of(unit.to(tl.int64) * stride_zr, ALIGN_Z)
    high_high = tl.zeros([C_MAIN, C_MAIN], dtype=tl.float32)
    rest = tl.zeros([C_MAIN, C_MAIN], dtype=tl.float32)
    total = tl.zeros([BLOCK_N, C_MAIN], dtype=tl.float32)
    with_s = tl.zeros([BLOCK_N, C_MAIN], dtype=tl.float32)
    with_sm = tl.zeros([BLOCK_N, C_MAIN], dtype=tl.float32)
    if C_TAIL > 0:
        offs_t = C_MAIN + tl.arange(0, C_TAIL)
        shift_tail = tl.load(shift_row_ptr + offs_t, mask=offs_t < C, other=0.0).to(tl.float32)
        cross = tl.zeros([C_MAIN, C_TAIL], dtype=tl.float32)
        tail_high = tl.zeros([C_TAIL, C_TAIL], dtype=tl.float32)
        tail_rest = tl.zeros([C_TAIL, C_TAIL], dtype=tl.float32)
        total_tail = tl.zeros([BLOCK_N, C_TAIL], dtype=tl.float32)
        with_s_tail = tl.zeros([BLOCK_N, C_TAIL], dtype=tl.float32)
        with_sm_tail = tl.zeros([BLOCK_N, C_TAIL], dtype=tl.float32)
    sum_s = tl.zeros([BLOCK_N], dtype=tl.float32)
    sum_sm = tl.zeros([BLOCK_N], dtype=tl.float32)
    s_s = tl.zeros([BLOCK_N], dtype=tl.float32)
    s_sm = tl.zeros([BLOCK_N], dtype=tl.float32)
    sm_sm = tl.zeros([BLOCK_N], dtype=tl.float32)
    first = split.to(tl.int64) * rows_per_split
    last = tl.minimum(first + rows_per_split, N)
    for start in range(first, last, BLOCK_N):
        offs_n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        mask_n = offs_n < last
        z_rows_ptr = z_unit_ptr + tl.multiple_of(offs_n * stride_zn, ALIGN_Z)
        s = tl.full([BLOCK_N], 1.0, dtype=tl.float32)
        sm = tl.zeros([BLOCK_N], dtype=tl.float32)
        if HAS_SCALE:
            s = tl.load(scale_ptr + offs_n * stride_sn, mask=mask_n, other=0.0)
        if HAS_MEAN:
            sm = s * tl.load(mean_ptr + offs_n * stride_mn, mask=mask_n, other=0.0)
        l_main = _centred(z_rows_ptr, s, shift_main, mask_n, stride_zc, HAS_SCALE, C, 0, C_MAIN)
        if C_TAIL > 0:
            l_tail = _centred(z_rows_ptr, s, shift_tail, mask_n, stride_zc, HAS_SCALE, C, C_MAIN, C_TAIL)
        s = tl.where(mask_n, s - shift_s, 0.0)
        sm = tl.where(mask_n, sm - shift_sm, 0.0)
        sum_s += s
        sum_sm += sm
        s_s += s * s
        s_sm += s * sm
        sm_sm += sm * sm
        total += l_main
        with_s += l_main * s[:, None]
        with_sm += l_main * sm[:, None]
        if C_TAIL > 0:
            total_tail += l_tail
            with_s_tail += l_tail * s[:, None]
            with_sm_tail += l_tail * sm[:, None]
        if SPLIT:
            high, low = _high_low(l_main)
            high_high = tl.dot(tl.trans(high), high, high_high)
            rest = tl.dot(tl.trans(high), low, rest)
            if C_TAIL > 0:
                high_tail, low_tail = _high_low(l_tail)
                cross = tl.dot(tl.trans(high), high_tail, cross)
                cross = tl.dot(tl.trans(high), low_tail, cross)
                cross = tl.dot(tl.trans(low), high_tail, cross)
                tail_high = tl.dot(tl.trans(high_tail), high_tail, tail_high)
                tail_rest = tl.dot(tl.trans(high_tail), low_tail, tail_rest)
        else:
            high_high = tl.dot(tl.trans(l_main), l_main, high_high, input_precision=PRECISION)
            if C_TAIL > 0:
                cross = tl.dot(tl.trans(l_main), l_tail, cross, input_precision=PRECISION)
                tail_high = tl.dot(tl.trans(l_tail), l_tail, tail_high, input_precision=PRECISION)

    row = split.to(tl.int64) * R + unit
    total_row_ptr = total_ptr + row * L
    moment_row_ptr = moment_ptr + row * (L * L)
    main_ptr = moment_row_ptr + (offs_m * L)[:, None] + offs_m[None, :]
    if SPLIT:
        high_high = 0.5 * high_high + rest
    else:
        high_high *= 0.5
    tl.store(main_ptr, high_high)
    _store_with_tails(total_row_ptr, moment_row_ptr, total, with_s, with_sm, offs_m, C, L)
    if C_TAIL > 0:
        mask_t = offs_t < C
        cross *= 0.5
        tl.store(moment_row_ptr + (offs_m * L)[:, None] + offs_t[None, :], cross, mask=mask_t[None, :])
        tl.store(moment_row_ptr + (offs_t * L)[None, :] + offs_m[:, None], cross, mask=mask_t[None, :])
        if SPLIT:
            tail_high = 0.5 * tail_high + tail_rest
        else:
            tail_high *= 0.5
        tail_ptr = moment_row_ptr + (offs_t * L)[:, None] + offs_t[None, :]
        tl.store(tail_ptr, tail_high, mask=mask_t[:, None] & mask_t[None, :])
        _store_with_tails(total_row_ptr, moment_row_ptr, total_tail, with_s_tail, with_sm_tail, offs_t, C, L)
    tl.store(total_row_ptr + C, tl.sum(sum_s, axis=0))
    tl.store(total_row_ptr + C + 1, tl.sum(sum_sm, axis=0))
    tl.store(moment_row_ptr + C * L + C, 0.5 * tl.sum(s_s, axis=0))
    both = 0.5 * tl.sum(s_sm, axis=0)
    tl.store(moment_row_ptr + C * L + C + 1, both)
    tl.store(moment_row_ptr + (C + 1) * L + C, both)
    tl.store(moment_row_ptr + (C + 1) * L + C + 1, 0.5 * tl.sum(sm_sm, axis=0))


@triton.jit(do_not_specialize=["COUNT", "R"])
def _merge_moments_kernel(
    total_ptr,
    moment_ptr,
    total_out_ptr,
    moment_out_ptr,
    COUNT,
    R,
    MORE: tl.constexpr,
    L: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Sums of COUNT partial sums in float64, moments with their transposes; MORE adds to what is there."""
    unit, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offs_i, offs_j = part * BLOCK_I + tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_L)
    mask = (offs_i < L)[:, None] & (offs_j < L)[None, :]
    here, there = offs_i[:, None] * L + offs_j[None, :], offs_j[None, :] * L + offs_i[:, None]
    moment_out_ptr += unit * L * L
    total_out_ptr += unit * L
    acc = tl.zeros([BLOCK_I, BLOCK_L], dtype=tl.float64)
    total = tl.zeros([BLOCK_L], dtype=tl.float64)
    if MORE:
        acc += tl.load(moment_out_ptr + here, mask=mask, other=0.0)
        total += tl.load(total_out_ptr + offs_j, mask=offs_j < L, other=0.0)
    for split in range(0, COUNT):
        row = tl.cast(split, tl.int64) * R + unit
        one = tl.load(moment_ptr + row * (L * L) + here, mask=mask, other=0.0).to(tl.float64)
        other = tl.load(moment_ptr + row * (L * L) + there, mask=mask, other=0.0).to(tl.float64)
        acc += one + other  # one sum for both triangles: the result is symmetric to the bit
        total += tl.load(total_ptr + row * L + offs_j, mask=offs_j < L, other=0.0).to(tl.float64)
    tl.store(moment_out_ptr + here, acc, mask=mask)
    if part == 0:
        tl.store(total_out_ptr + offs_j, total, mask=offs_j < L)


def pipelines(version: str, capability: int) -> bool:
    """Whether Triton can prefetch for these products:
    before 3.8 its compiler fails to on compute capability 10."""
    return capability < 10 or tuple(int(part) for part in version.split(".")[:2]) >= (3, 8)


def capability(device: torch.device) -> int | None:
    """The CUDA device's compute capability, its first number; None for other devices."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)[0]


def tiles_of(columns: int, split_precision: bool, capability: int | None) -> tuple[int, int, int]:
    """Rows of a step, warps, depth of the load pipeline."""
    if not split_precision:
        rows, stages = 32, 2
    elif 64 <= columns <= 80:  # wider units would spill, and narrow ones have no use for a tile that high
        rows, stages = 64, 3
    else:
        rows, stages = 32 if capability != 8 or columns <= 96 else 16, 3
    if torch.version.hip is not None:
        stages = min(stages, 2)
    elif capability is not None and not pipelines(triton.__version__, capability):
        stages = 1
    return rows, 8, stages


def column_tiles(width: int) -> tuple[int, int]:
    """Powers of two (main, tail), tail at least 16 or none: main coordinates,
    and room for the others behind them."""
    main = 1 << (width.bit_length() - 1)
    tail = 0 if main == width else max(16, 1 << (width - main - 1).bit_length())
    return main, tail


def unit_moments(
    z: Tensor, scale: Tensor | None, mean: Tensor | None, shift: Tensor, precision: str
) -> tuple[Tensor, Tensor]:
    """(total [R, C+2], moment [R, C+2, C+2]) in float64, for 16 <= C <= 128 and at least one row."""
    rows, units, width = z.shape
    size = width + 2
    main, tail = column_tiles(width)
    split_precision = z.dtype.itemsize == 2
    if INTERPRETED and split_precision:  # the interpreter computes bfloat16 on its bits
        z, split_precision, precision = z.to(torch.float32), False, "ieee"
    block_n, warps, stages = tiles_of(main + tail, split_precision, capability(z.device))
    splits = max(1, min(-(-PROGRAMS // units), -(-rows // (4 * block_n))))
    per_split = -(-min(-(-rows // splits), ROWS_PER_SPLIT) // block_n) * block_n
    shift = shift.contiguous()
    total = torch.empty(units, size, dtype=torch.float64, device=z.device)
    moment = torch.empty(units, size, size, dtype=torch.float64, device=z.device)
    for first in range(0, rows, splits * per_split):
        part = slice(first, first + splits * per_split)
        tile = z[part]
        count = -(-len(tile) // per_split)
        totals = torch.empty(count, units, size, dtype=torch.float32, device=z.device)
        moments = torch.empty(count, units, size, size, dtype=torch.float32, device=z.device)
        _unit_moments_kernel[(count, units)](
            tile,
            None if scale is None else scale[part],
            None if mean is None else mean[part],
            shift,
            totals,
            moments,
            len(tile),
            per_split,
            units,
            z.stride(0),
            z.stride(1),
            z.stride(2),
            0 if scale is None else scale.stride(0),
            0 if mean is None else mean.stride(0),
            HAS_SCALE=scale is not None,
            HAS_MEAN=mean is not None,
            SPLIT=split_precision,
            PRECISION=precision,
            C=width,
            C_MAIN=main,
            C_TAIL=tail,
            ALIGN_Z=gcd(z.stride(0), z.stride(1), 16),
            BLOCK_N=block_n,
            num_warps=warps,
            num_stages=stages,
        )
        _merge_moments_kernel[(units, -(-size // 16))](
            totals,
            moments,
            total,
            moment,
            count,
            units,
            MORE=first > 0,
            L=size,
            BLOCK_L=triton.next_power_of_2(size),
            BLOCK_I=16,
            num_warps=4,
            num_stages=1,
        )
    return total, moment
