"""dweight and dz of the stream form (no scale, no mean) for one weight, from t = dy . basis.

    G[r] = t[:, r]^T z[:, r],   dweight[j] = proj[j] . G[j] + (bias[j] - offset[j]) sum_n t[n,j],
    dz[n,r] = t[n, r] . (weight proj)[r]

A program owns one unit, whole, and a run of rows: G grows in the matrix unit's registers, proj times weight
is made once, and a step over rows is two products and nothing else. Where every unit keeps C components and C
is a multiple of 8, t and dz have one shape: t is made in dz's memory, each tile of it is read and overwritten
by one program, and there is no workspace at all.
"""

from functools import partial

import triton
import triton.language as tl
from torch import Tensor, float32

from residual_kernels.ops.triton import routes
from residual_kernels.ops.triton.forward import sum_partials
from residual_kernels.ops.triton.kernel_layout import Call
from residual_kernels.ops.triton.launch import Launch, kept
from residual_kernels.ops.triton.products import product
from residual_kernels.ops.triton.routes import Problem, Tiles
from residual_kernels.ops.triton.tiles import contiguous_rows, load_unit, rows_from, run_of_split

WIDEST = 128  # components of a unit that one tile holds


@triton.jit(do_not_specialize=["N", "J", "R", "rows_per_split"])
def _stream_bwd_kernel(
    t_ptr,
    z_ptr,
    weight_ptr,
    proj_ptr,
    bias_ptr,
    offset_ptr,
    run_ptr,
    dweight_ptr,
    dz_ptr,
    N,
    J,
    R,
    rows_per_split,
    stride_tn,
    stride_zn,
    stride_zr,
    stride_zc,
    WANT_WEIGHT: tl.constexpr,
    WANT_Z: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
    STRIDE_PJ: tl.constexpr,
    ALIGN_Z: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    split, unit = tl.program_id(0), tl.program_id(1)
    begin, end = tl.multiple_of(tl.load(run_ptr + unit), 8), tl.load(run_ptr + unit + 1)
    low, high = tl.load(run_ptr + R + 1 + unit), tl.load(run_ptr + R + 2 + unit)
    offs_k, offs_c = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_C)
    mask_k = offs_k // 8 < (end - begin) // 8
    mask_c = offs_c < C
    p_ptr = proj_ptr + begin.to(tl.int64) * STRIDE_PJ + (offs_k * STRIDE_PJ)[:, None] + offs_c[None, :]
    p = tl.load(p_ptr, mask=mask_k[:, None] & mask_c[None, :], other=0.0)  # [BLOCK_K, BLOCK_C]
    if WANT_Z:
        w = tl.load(weight_ptr + low + offs_k, mask=low + offs_k < high, other=0.0)
        weighted = (w[:, None] * p).to(p.dtype)
    z_unit_ptr = z_ptr + tl.multiple_of(unit.to(tl.int64) * stride_zr, ALIGN_Z)
    if WANT_WEIGHT:
        gram = tl.zeros([BLOCK_K, BLOCK_C], dtype=tl.float32)
        total = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    start, stop = run_of_split(split, rows_per_split, N)
    for at in range(start, stop, BLOCK_N):
        row, mask_n = rows_from(at, stop, BLOCK_N)
        t_rows_ptr = t_ptr + tl.multiple_of(row * stride_tn, 8)
        t_tile_ptr = t_rows_ptr[:, None] + begin + offs_k[None, :]
        t = tl.load(t_tile_ptr, mask=mask_n[:, None] & mask_k[None, :], other=0.0)  # [BLOCK_N, BLOCK_K]
        if WANT_WEIGHT:
            z_rows_ptr = z_unit_ptr + tl.multiple_of(row * stride_zn, ALIGN_Z)
            z = load_unit(z_rows_ptr, mask_n, stride_zc, C, 0, BLOCK_C)
            gram = tl.dot(tl.trans(t), z, gram, input_precision=PRECISION)
            total += t.to(tl.float32)
        if WANT_Z:
            dz = tl.dot(t, weighted, input_precision=PRECISION)  # [BLOCK_N, BLOCK_C]
            dz_rows_ptr = dz_ptr + (row * R + unit) * C
            mask = mask_n[:, None] & mask_c[None, :]
            tl.store(dz_rows_ptr[:, None] + offs_c[None, :], dz.to(dz_ptr.dtype.element_ty), mask=mask)
    if WANT_WEIGHT:
        bias = tl.load(bias_ptr + begin + offs_k, mask=mask_k, other=0.0)
        bias -= tl.load(offset_ptr + begin + offs_k, mask=mask_k, other=0.0)
        dweight = tl.sum(gram * p.to(tl.float32), axis=1) + bias * tl.sum(total, axis=0)
        out_ptr = dweight_ptr + split.to(tl.int64) * J + low + offs_k
        tl.store(out_ptr, dweight, mask=low + offs_k < high)


def serves(p: Problem, call: Call) -> bool:
    """Whether this kernel computes a backward pass: the stream form, one weight, units that fit one tile."""
    one = p.plain and p.tasks == 1 and not p.indexed and call.index is None
    return one and p.kind != "fp32" and 0 < p.longest <= WIDEST and not (p.wanted[2] or p.wanted[3])


def run_backward(call: Call, dy: Tensor, wanted: list[bool]) -> list[Tensor]:
    """The wanted ones of (dweight [1, J], dz); dy is [1, N, D]."""
    p, constants, z = call.problem, call.constants, call.z
    rows, units, width = z.shape
    want_weight, want_z = wanted[:2]
    dz = z.new_empty(z.shape) if want_z else None
    one_shape = want_z and width % 8 == 0 and constants.padded == units * width and p.longest == width
    most = rows if one_shape else min(routes.workspace_rows(p), rows)
    t = dz.view(rows, -1) if one_shape and dz is not None else z.new_empty((most, constants.padded))
    weight = contiguous_rows(call.weight)
    dweight = None
    for first in range(0, rows, most):
        count = min(most, rows - first)
        part = call.rows(first, count)
        product(dy[0, first : first + count], constants.narrow_basis.T, t[:count])
        launch, splits = kept(("stream", part.key, want_weight, want_z), partial(_prepare, part, wanted))
        sums = z.new_empty((splits, constants.components), dtype=float32) if want_weight else None
        out = None if dz is None else dz[first : first + count]
        launch(t, part.z, weight, constants.proj, constants.bias, constants.offset, constants.runs, sums, out)
        if sums is not None:
            more = z.new_empty(constants.components, dtype=float32)
            sum_partials(sums, more)
            dweight = more[None] if dweight is None else dweight.add_(more)
    return [grad for grad in (dweight, dz) if grad is not None]


def _prepare(call: Call, wanted: list[bool]) -> tuple[Launch, int]:
    p, constants, (rows, units, width) = call.problem, call.constants, call.z.shape
    tiles = tiles_of(p)
    per_split = rows_of_split(rows, units, tiles)
    splits = -(-rows // per_split)
    arguments = call.arguments() | {
        "N": rows,
        "J": constants.components,
        "R": units,
        "rows_per_split": per_split,
        "stride_tn": constants.padded,
        "WANT_WEIGHT": wanted[0],
        "WANT_Z": wanted[1],
        "BLOCK_N": tiles.block_n,
        "BLOCK_C": max(16, 1 << (width - 1).bit_length()),
        "BLOCK_K": max(16, 1 << (p.longest - 1).bit_length()),
    }
    moving = (
        "t_ptr",
        "z_ptr",
        "weight_ptr",
        "proj_ptr",
        "bias_ptr",
        "offset_ptr",
        "run_ptr",
        "dweight_ptr",
        "dz_ptr",
    )
    return Launch(_stream_bwd_kernel, (splits, units), moving, arguments, tiles.warps, tiles.stages), splits


def rows_of_split(rows: int, units: int, tiles: Tiles) -> int:
    """Rows a program walks: four programs for each processor of a nominal chip."""
    splits = max(1, min(4 * routes.PROCESSORS // units, -(-rows // (4 * tiles.block_n))))
    return -(-rows // (splits * tiles.block_n)) * tiles.block_n


def tiles_of(p: Problem) -> Tiles:
    """Rows of a step; block_d is not used."""
    wide = max(p.longest, p.coordinates) > 64
    rows = 32 if p.hip or (p.kind == "tf32" and wide) else 64
    return Tiles(rows, 0, 8 if wide else 4, 2 if p.hip or p.kind == "tf32" else 3)
