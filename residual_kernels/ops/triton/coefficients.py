"""weight[j] * c[n,j] as [T, N, P]: the first half of the route `two_pass`.

The second is one product of the vendor.

A program owns BLOCK_N rows of one unit and walks the unit's components; z is read once whatever T is.
"""

import triton
import triton.language as tl
from torch import Tensor

from residual_kernels.ops.triton.kernel_layout import MOVING, Call
from residual_kernels.ops.triton.launch import Launch, kept
from residual_kernels.ops.triton.routes import Problem, Tiles
from residual_kernels.ops.triton.tiles import (
    contiguous_rows,
    load_proj,
    load_unit,
    load_vector,
    padded_weights,
    project_exactly,
    weight_stride,
)


@triton.jit(do_not_specialize=["N", "P"])
def _coefficients_kernel(
    z_ptr,
    scale_ptr,
    mean_ptr,
    weight_ptr,
    index_ptr,
    proj_ptr,
    bias_ptr,
    slope_ptr,
    offset_ptr,
    run_ptr,
    c_ptr,
    N,
    P,
    R,
    TASKS,
    stride_zn,
    stride_zr,
    stride_zc,
    stride_sn,
    stride_mn,
    stride_wt,
    HAS_SCALE: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
    C_MAIN: tl.constexpr,
    C_TAIL: tl.constexpr,
    STRIDE_PJ: tl.constexpr,
    ALIGN_Z: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    EXACT: tl.constexpr = PRECISION == "ieee" and z_ptr.dtype.element_ty == tl.float32
    unit = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = row < N
    row = row.to(tl.int64)
    begin = tl.multiple_of(tl.load(run_ptr + unit), 8)  # a hint on the loop variable would be lost
    end = tl.load(run_ptr + unit + 1)
    low, high = tl.load(run_ptr + R + 1 + unit), tl.load(run_ptr + R + 2 + unit)
    z_rows_ptr = z_ptr + tl.multiple_of(row * stride_zn, ALIGN_Z)
    z_rows_ptr += tl.multiple_of(unit.to(tl.int64) * stride_zr, ALIGN_Z)
    if not EXACT:
        z = load_unit(z_rows_ptr, mask_n, stride_zc, C, 0, C_MAIN)
        if C_TAIL > 0:
            z_tail = load_unit(z_rows_ptr, mask_n, stride_zc, C, C_MAIN, C_TAIL)
    if HAS_SCALE:
        s = tl.load(scale_ptr + row * stride_sn, mask=mask_n, other=0.0)
    if HAS_MEAN:
        m = tl.load(mean_ptr + row * stride_mn, mask=mask_n, other=0.0)
    if HAS_INDEX:
        task_rows_ptr = weight_ptr + tl.multiple_of(
            tl.load(index_ptr + row, mask=mask_n, other=0) * stride_wt, 8
        )
    pitch = tl.multiple_of(tl.cast(P, tl.int64), 8)  # a hint on the argument itself would be lost
    c_rows_ptr = c_ptr + row * pitch
    offs_k = tl.arange(0, BLOCK_K)
    for first in range(begin, end, BLOCK_K):
        mask_k = offs_k // 8 < (end - first) // 8
        tilt = load_vector(bias_ptr, first, mask_k, BLOCK_K)  # where the product starts from
        if HAS_MEAN:
            tilt = m[:, None] * load_vector(slope_ptr, first, mask_k, BLOCK_K) + tilt
        tilt = tl.broadcast_to(tilt, [BLOCK_N, BLOCK_K])
        if EXACT:
            c = tilt + project_exactly(
                z_rows_ptr, mask_n, stride_zc, proj_ptr, first, mask_k, C, STRIDE_PJ, BLOCK_N, BLOCK_K
            )
        else:
            p = load_proj(proj_ptr, first, mask_k, C, STRIDE_PJ, 0, C_MAIN, BLOCK_K)
            c = tl.dot(z, tl.trans(p), tilt, input_precision=PRECISION)  # [BLOCK_N, BLOCK_K]
            if C_TAIL > 0:
                p = load_proj(proj_ptr, first, mask_k, C, STRIDE_PJ, C_MAIN, C_TAIL, BLOCK_K)
                c = tl.dot(z_tail, tl.trans(p), c, input_precision=PRECISION)
        if HAS_SCALE:
            c *= s[:, None]
        c -= load_vector(offset_ptr, first, mask_k, BLOCK_K)
        mask = mask_n[:, None] & mask_k[None, :]
        if HAS_INDEX:
            w = tl.load(task_rows_ptr[:, None] + first + offs_k[None, :], mask=mask, other=0.0)
            tl.store(
                c_rows_ptr[:, None] + first + offs_k[None, :], (c * w).to(c_ptr.dtype.element_ty), mask=mask
            )
        else:
            real = low + first - begin + offs_k  # the components in the caller's order
            for task in range(0, TASKS):
                w = tl.load(
                    weight_ptr + tl.cast(task, tl.int64) * stride_wt + real, mask=real < high, other=0.0
                )
                out_ptr = c_rows_ptr + tl.cast(task, tl.int64) * N * pitch
                tl.store(
                    out_ptr[:, None] + first + offs_k[None, :],
                    (c * w[None, :]).to(c_ptr.dtype.element_ty),
                    mask=mask,
                )


def coefficients(call: Call, out: Tensor) -> None:
    """Writes weight * c to `out` [T, N, P], or [N, P] where rows choose their weights; padding gets 0."""
    constants, indexed = call.constants, call.index is not None

    def make() -> Launch:
        tiles, rows = tiles_of(call.problem), call.z.shape[0]
        stride_wt = constants.padded if indexed else weight_stride(call.weight)
        arguments = call.arguments() | {
            "N": rows,
            "P": constants.padded,
            "R": constants.units,
            "TASKS": call.weight.shape[0],
            "stride_wt": stride_wt,
            "HAS_INDEX": indexed,
            "BLOCK_N": tiles.block_n,
        }
        grid = (-(-rows // tiles.block_n), constants.units)
        moving = (*MOVING, "weight_ptr", "index_ptr", "run_ptr", "c_ptr")
        return Launch(_coefficients_kernel, grid, moving, arguments, tiles.warps, tiles.stages)

    weight = padded_weights(call.weight, constants) if indexed else contiguous_rows(call.weight)
    kept(("coefficients", call.key), make)(*call.leading(), weight, call.index, constants.runs, out)


def tiles_of(p: Problem) -> Tiles:
    """Rows by one step along a unit's components."""
    rows = 16 if p.rows <= 16 else 32 if p.kind == "fp32" else 128 if p.rows > 64 and p.kind == "half" else 64
    return Tiles(rows, 0, 4, 1 if p.kind == "half" else 2)  # a unit has a step or two: too few to prefetch


def instructions(p: Problem, tiles: Tiles) -> float:
    """Warp instructions of a launch over all rows: a rough fit to code for sm_90."""
    programs = -(-p.rows // tiles.block_n) * p.units
    elements = tiles.block_n * p.block_k / (32 * tiles.warps)
    return tiles.warps * (programs * 280.0 + -(-p.rows // tiles.block_n) * p.chunks * (60 + 6.0 * elements))
