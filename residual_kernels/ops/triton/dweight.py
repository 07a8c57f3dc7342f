"""dweight[j] = sum_n c[n,j] * t[n,j] with t[n,j] = dy[n] . basis[j], for one weight: what a fit asks for.

A program owns a chunk of components and a run of rows. It keeps the chunk's constants and adds c * t up in
registers while it walks the rows, so that nothing is reduced and nothing leaves before the last row. t is
made inside (few rows), or read where one product of the vendor has made it.
"""

import triton
import triton.language as tl
from torch import Tensor, float32

from residual_kernels.ops.triton import routes
from residual_kernels.ops.triton.forward import sum_partials
from residual_kernels.ops.triton.kernel_layout import MOVING, Call
from residual_kernels.ops.triton.launch import Launch, kept
from residual_kernels.ops.triton.routes import Problem, Tiles
from residual_kernels.ops.triton.tiles import (
    decode,
    load_proj,
    load_unit,
    load_vector,
    project_exactly,
    rows_from,
    run_of_split,
)


@triton.jit(do_not_specialize=["N", "P", "J", "rows_per_split"])
def _dweight_kernel(
    dy_ptr,
    t_ptr,
    z_ptr,
    scale_ptr,
    mean_ptr,
    proj_ptr,
    bias_ptr,
    slope_ptr,
    offset_ptr,
    basis_ptr,
    chunk_ptr,
    dweight_ptr,
    N,
    P,
    J,
    D,
    rows_per_split,
    stride_dyn,
    stride_dyd,
    stride_zn,
    stride_zr,
    stride_zc,
    stride_sn,
    stride_mn,
    stride_bj,
    HAS_SCALE: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_T: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
    C_MAIN: tl.constexpr,
    C_TAIL: tl.constexpr,
    STRIDE_PJ: tl.constexpr,
    ALIGN_Z: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    EXACT: tl.constexpr = PRECISION == "ieee" and z_ptr.dtype.element_ty == tl.float32
    split = tl.program_id(0)
    unit, first, length, low, mask_k = decode(tl.load(chunk_ptr + tl.program_id(1)), BLOCK_K)
    offs_k = tl.arange(0, BLOCK_K)
    z_unit_ptr = z_ptr + tl.multiple_of(unit * stride_zr, ALIGN_Z)
    if not EXACT:
        p = load_proj(proj_ptr, first, mask_k, C, STRIDE_PJ, 0, C_MAIN, BLOCK_K)
        if C_TAIL > 0:
            p_tail = load_proj(proj_ptr, first, mask_k, C, STRIDE_PJ, C_MAIN, C_TAIL, BLOCK_K)
    bias = load_vector(bias_ptr, first, mask_k, BLOCK_K)
    slope = load_vector(slope_ptr, first, mask_k, BLOCK_K)
    offset = load_vector(offset_ptr, first, mask_k, BLOCK_K)
    acc = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    begin, end = run_of_split(split, rows_per_split, N)
    for start in range(begin, end, BLOCK_N):
        row, mask_n = rows_from(start, end, BLOCK_N)
        z_rows_ptr = z_unit_ptr + tl.multiple_of(row * stride_zn, ALIGN_Z)
        tilt = bias  # where the product starts from
        if HAS_MEAN:
            tilt = tl.load(mean_ptr + row * stride_mn, mask=mask_n, other=0.0)[:, None] * slope + bias
        tilt = tl.broadcast_to(tilt, [BLOCK_N, BLOCK_K])
        if EXACT:
            c = tilt + project_exactly(
                z_rows_ptr, mask_n, stride_zc, proj_ptr, first, mask_k, C, STRIDE_PJ, BLOCK_N, BLOCK_K
            )
        else:
            z = load_unit(z_rows_ptr, mask_n, stride_zc, C, 0, C_MAIN)
            c = tl.dot(z, tl.trans(p), tilt, input_precision=PRECISION)  # [BLOCK_N, BLOCK_K]
            if C_TAIL > 0:
                z_tail = load_unit(z_rows_ptr, mask_n, stride_zc, C, C_MAIN, C_TAIL)
                c = tl.dot(z_tail, tl.trans(p_tail), c, input_precision=PRECISION)
        if HAS_SCALE:
            c *= tl.load(scale_ptr + row * stride_sn, mask=mask_n, other=0.0)[:, None]
        c -= offset
        if HAS_T:
            t_rows_ptr = t_ptr + row * tl.multiple_of(tl.cast(P, tl.int64), 8)
            mask = mask_n[:, None] & mask_k[None, :]
            t = tl.load(t_rows_ptr[:, None] + first + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)
        else:
            t = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
            dy_rows_ptr = dy_ptr + row * stride_dyn
            for d in range(0, D, BLOCK_D):
                offs_d = d + tl.arange(0, BLOCK_D)
                mask_d = (offs_d < D)[None, :]
                dy = tl.load(
                    dy_rows_ptr[:, None] + offs_d[None, :] * stride_dyd,
                    mask=mask_n[:, None] & mask_d,
                    other=0.0,
                )
                offs_b = (offs_k * stride_bj)[:, None] + offs_d[None, :]
                # [BLOCK_K, BLOCK_D]
                b = tl.load(basis_ptr + first * stride_bj + offs_b, mask=mask_k[:, None] & mask_d, other=0.0)
                t = tl.dot(dy, tl.trans(b), t, input_precision=PRECISION)
        acc += c * t
    out_ptr = dweight_ptr + split.to(tl.int64) * J + low + offs_k
    tl.store(out_ptr, tl.sum(acc, axis=0), mask=offs_k < length)


def dweight(call: Call, dy: Tensor, t: Tensor | None) -> Tensor:
    """dweight [J] of dy [N, D]; t = dy . basis [N, P] where it was made beforehand."""
    given, constants = t is not None, call.constants
    key = ("dweight", call.key, given, None if given else dy.stride())
    launch, splits = kept(key, lambda: _prepare(call, dy, given))
    partial = call.z.new_empty((splits, constants.components), dtype=float32)
    launch(*call.leading(), None if given else dy, t, constants.basis, constants.chunks, partial)
    if splits == 1:
        return partial[0]
    out = call.z.new_empty(constants.components, dtype=float32)
    sum_partials(partial, out)
    return out


def _prepare(call: Call, dy: Tensor, given: bool) -> tuple[Launch, int]:
    constants, rows = call.constants, call.z.shape[0]
    tiles = tiles_of(call.problem, given=given)
    per_split = rows_of_split(rows, constants.chunk_count, tiles)
    splits = -(-rows // per_split)
    arguments = call.arguments() | {
        "N": rows,
        "P": constants.padded,
        "J": constants.components,
        "D": constants.dim,
        "rows_per_split": per_split,
        "stride_dyn": 0 if given else dy.stride(0),
        "stride_dyd": 0 if given else dy.stride(1),
        "stride_bj": constants.basis.stride(0),
        "HAS_T": given,
        "BLOCK_N": tiles.block_n,
        "BLOCK_D": max(tiles.block_d, 16),
    }
    moving = (*MOVING, "dy_ptr", "t_ptr", "basis_ptr", "chunk_ptr", "dweight_ptr")
    grid = (splits, constants.chunk_count)
    return Launch(_dweight_kernel, grid, moving, arguments, tiles.warps, tiles.stages), splits


def rows_of_split(rows: int, chunks: int, tiles: Tiles) -> int:
    """Rows a program walks: all of them where the chunks fill a nominal chip."""
    splits = max(1, min(2 * routes.PROCESSORS // max(chunks, 1), -(-rows // (4 * tiles.block_n))))
    return -(-rows // (splits * tiles.block_n)) * tiles.block_n


def tiles_of(p: Problem, *, given: bool) -> Tiles:
    """Rows by one chunk; block_d is the step along D where dy . basis is made inside."""
    rows = 16 if p.rows <= 16 else 32 if p.kind == "fp32" or (p.hip and p.kind == "tf32") else 64
    warps = 8 if p.block_k > 32 and p.kind != "half" else 4
    if given:
        return Tiles(rows, 0, warps, 2 if p.kind == "fp32" or p.hip else 3)
    columns = 16 if p.kind == "fp32" else (128 if p.kind == "half" else 64) // (2 if p.hip else 1)
    resident = (2 * rows + p.block_k) * sum(routes.pieces(p.coordinates)) * p.itemsize
    step = (rows + p.block_k) * columns * p.itemsize
    most = 2 if p.hip or p.kind == "fp32" else 4
    return Tiles(rows, columns, warps, max(2, min(most, (110 * 1024 - resident) // step)))


def instructions(p: Problem, tiles: Tiles) -> float:
    """Warp instructions of a launch that is given t, over all rows: a rough fit to code for sm_90."""
    elements = tiles.block_n * p.block_k / (32 * tiles.warps)
    return tiles.warps * p.chunks * (300.0 + -(-p.rows // tiles.block_n) * (60 + 6.0 * elements))
