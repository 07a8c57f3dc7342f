"""dweight[j] = sum_n c[n,j] t[n,j],  dz[n,r] = scale[n] * sum_{j in r} weight[j] t[n,j] proj[j]

with t[n,j] = dy[n] . basis[j], and

dmean[n]  = scale[n] * sum_j weight[j] t[n,j] slope[j]
dscale[n] = sum_j weight[j] t[n,j] * (z[n,r(j)] . proj[j] + bias[j] + mean[n] * slope[j])

Every gradient of the direct form in one Triton kernel, for any number of weights. A program owns BLOCK_N rows
of one unit and walks the unit's components. t is made inside it, or read where one product of the vendor has
made it. Sums over rows and units leave as partial sums and are added in a fixed order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from residual_kernels.ops.triton import dweight as lone
from residual_kernels.ops.triton import routes
from residual_kernels.ops.triton.forward import sum_partials
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


@triton.jit(do_not_specialize=["N", "P", "J", "R"])
def _spectral_reweight_bwd_kernel(
    dy_ptr,
    t_ptr,
    z_ptr,
    scale_ptr,
    mean_ptr,
    weight_ptr,
    index_ptr,
    proj_ptr,
    bias_ptr,
    slope_ptr,
    offset_ptr,
    basis_ptr,
    run_ptr,
    dweight_ptr,
    dz_ptr,
    dscale_ptr,
    dmean_ptr,
    N,
    TASKS,
    D,
    J,
    P,
    R,
    stride_dyt,
    stride_dyn,
    stride_dyd,
    stride_zn,
    stride_zr,
    stride_zc,
    stride_sn,
    stride_mn,
    stride_wt,
    stride_bj,
    HAS_SCALE: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_T: tl.constexpr,
    WANT_WEIGHT: tl.constexpr,
    WANT_Z: tl.constexpr,
    WANT_SCALE: tl.constexpr,
    WANT_MEAN: tl.constexpr,
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
    WANT_Q: tl.constexpr = WANT_Z or WANT_SCALE or WANT_MEAN  # dL/dc
    NEED_INNER: tl.constexpr = WANT_WEIGHT or WANT_SCALE
    EXACT: tl.constexpr = PRECISION == "ieee" and z_ptr.dtype.element_ty == tl.float32
    tile, unit = tl.program_id(0), tl.program_id(1)
    begin = tl.multiple_of(tl.load(run_ptr + unit), 8)  # a hint on the loop variable would be lost
    end = tl.load(run_ptr + unit + 1)
    low, high = tl.load(run_ptr + R + 1 + unit), tl.load(run_ptr + R + 2 + unit)
    row = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = row < N
    row = row.to(tl.int64)
    pitch = tl.multiple_of(tl.cast(P, tl.int64), 8)  # of t, and of the terms of dweight
    if HAS_SCALE:
        s = tl.load(scale_ptr + row * stride_sn, mask=mask_n, other=0.0)
    if HAS_MEAN:
        m = tl.load(mean_ptr + row * stride_mn, mask=mask_n, other=0.0)
    if HAS_INDEX:
        task_rows_ptr = weight_ptr + tl.multiple_of(
            tl.load(index_ptr + row, mask=mask_n, other=0) * stride_wt, 8
        )
    if NEED_INNER:
        z_rows_ptr = z_ptr + tl.multiple_of(row * stride_zn, ALIGN_Z)
        z_rows_ptr += tl.multiple_of(unit.to(tl.int64) * stride_zr, ALIGN_Z)
        if not EXACT:
            z = load_unit(z_rows_ptr, mask_n, stride_zc, C, 0, C_MAIN)
            if C_TAIL > 0:
                z_tail = load_unit(z_rows_ptr, mask_n, stride_zc, C, C_MAIN, C_TAIL)
    if WANT_Z:
        dz = tl.zeros([BLOCK_N, C_MAIN], dtype=tl.float32)
        if C_TAIL > 0:
            dz_tail = tl.zeros([BLOCK_N, C_TAIL], dtype=tl.float32)
    if WANT_SCALE:
        ds = tl.zeros([BLOCK_N], dtype=tl.float32)
    if WANT_MEAN:
        dm = tl.zeros([BLOCK_N], dtype=tl.float32)

    offs_k = tl.arange(0, BLOCK_K)
    for first in range(begin, end, BLOCK_K):
        mask_k = offs_k // 8 < (end - first) // 8
        real = low + first - begin + offs_k  # the components in the caller's order
        mask = mask_n[:, None] & mask_k[None, :]
        if (NEED_INNER and not EXACT) or WANT_Z:
            p = load_proj(proj_ptr, first, mask_k, C, STRIDE_PJ, 0, C_MAIN, BLOCK_K)
            if C_TAIL > 0:
                p_tail = load_proj(proj_ptr, first, mask_k, C, STRIDE_PJ, C_MAIN, C_TAIL, BLOCK_K)
        if NEED_INNER:
            if EXACT:
                inner = project_exactly(
                    z_rows_ptr, mask_n, stride_zc, proj_ptr, first, mask_k, C, STRIDE_PJ, BLOCK_N, BLOCK_K
                )
            else:
                inner = tl.dot(z, tl.trans(p), input_precision=PRECISION)  # [BLOCK_N, BLOCK_K]
                if C_TAIL > 0:
                    inner = tl.dot(z_tail, tl.trans(p_tail), inner, input_precision=PRECISION)
            inner += load_vector(bias_ptr, first, mask_k, BLOCK_K)
            if HAS_MEAN:
                inner += m[:, None] * load_vector(slope_ptr, first, mask_k, BLOCK_K)
        if WANT_WEIGHT:
            c = inner
            if HAS_SCALE:
                c *= s[:, None]
            c -= load_vector(offset_ptr, first, mask_k, BLOCK_K)
        if WANT_Q:
            q = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
        for task in range(0, TASKS):
            if HAS_T:
                t_rows_ptr = t_ptr + (tl.cast(task, tl.int64) * N + row) * pitch
                t = tl.load(t_rows_ptr[:, None] + first + offs_k[None, :], mask=mask, other=0.0).to(
                    tl.float32
                )
            else:
                t = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
                dy_rows_ptr = dy_ptr + tl.cast(task, tl.int64) * stride_dyt + row * stride_dyn
                for d in range(0, D, BLOCK_D):
                    offs_d = d + tl.arange(0, BLOCK_D)
                    mask_d = (offs_d < D)[None, :]
                    offs_dy = offs_d.to(tl.int64)[None, :] * stride_dyd
                    dy = tl.load(dy_rows_ptr[:, None] + offs_dy, mask=mask_n[:, None] & mask_d, other=0.0)
                    offs_b = (offs_k * stride_bj)[:, None] + offs_d[None, :]
                    # [BLOCK_K, BLOCK_D]
                    b = tl.load(
                        basis_ptr + tl.cast(first, tl.int64) * stride_bj + offs_b,
                        mask=mask_k[:, None] & mask_d,
                        other=0.0,
                    )
                    t = tl.dot(dy, tl.trans(b), t, input_precision=PRECISION)
            if WANT_WEIGHT:
                product = tl.where(mask, c * t, 0.0)
                # Rows of a tile belong to several tasks: hand out the terms, a product adds them up.
                if HAS_INDEX:
                    out_ptr = dweight_ptr + row * pitch + first
                    tl.store(out_ptr[:, None] + offs_k[None, :], product, mask=mask)
                else:
                    out_ptr = dweight_ptr + (tile.to(tl.int64) * TASKS + task) * J
                    tl.store(out_ptr + real, tl.sum(product, axis=0), mask=real < high)
            if WANT_Q:
                if HAS_INDEX:
                    w = tl.load(task_rows_ptr[:, None] + first + offs_k[None, :], mask=mask, other=0.0)
                    q += w * t
                else:
                    w_ptr = weight_ptr + tl.cast(task, tl.int64) * stride_wt + real
                    q += tl.load(w_ptr, mask=real < high, other=0.0)[None, :] * t
        if WANT_SCALE:
            ds += tl.sum(q * inner, axis=1)
        if WANT_Q:
            if HAS_SCALE:
                q *= s[:, None]
        if WANT_MEAN:
            dm += tl.sum(q * load_vector(slope_ptr, first, mask_k, BLOCK_K), axis=1)
        if WANT_Z:
            dz = tl.dot(q.to(p.dtype), p, dz, input_precision=PRECISION)
            if C_TAIL > 0:
                dz_tail = tl.dot(q.to(p.dtype), p_tail, dz_tail, input_precision=PRECISION)

    if WANT_Z:
        offs_c = tl.arange(0, C_MAIN)
        dz_rows_ptr = dz_ptr + (row * R + unit) * C
        mask_c = mask_n[:, None] & (offs_c < C)[None, :]
        tl.store(dz_rows_ptr[:, None] + offs_c[None, :], dz.to(dz_ptr.dtype.element_ty), mask=mask_c)
        if C_TAIL > 0:
            offs_c = C_MAIN + tl.arange(0, C_TAIL)
            mask_c = mask_n[:, None] & (offs_c < C)[None, :]
            tl.store(dz_rows_ptr[:, None] + offs_c[None, :], dz_tail.to(dz_ptr.dtype.element_ty), mask=mask_c)
    if WANT_SCALE:
        tl.store(dscale_ptr + unit.to(tl.int64) * N + row, ds, mask=mask_n)
    if WANT_MEAN:
        tl.store(dmean_ptr + unit.to(tl.int64) * N + row, dm, mask=mask_n)


def backward(
    call: Call, dy: Tensor, t: Tensor | None, wanted: list[bool], dz: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dweight [T, J], dscale, dmean) of these rows, None where not wanted;
    dz is written into the buffer given.

    dy is [T, N, D], with T = 1 when rows choose their weights; t = dy . basis [T, N, P] where it was made
    beforehand.
    """
    want_weight, _, want_scale, want_mean = wanted
    z, constants, index = call.z, call.constants, call.index
    rows, tasks, units = z.shape[0], call.weight.shape[0], constants.units
    given, indexed = t is not None, index is not None
    float32: dict[str, Any] = {"dtype": torch.float32}
    key = ("backward", call.key, given, None if given else dy.stride(), tuple(wanted))
    launch, row_tiles = kept(key, lambda: _prepare(call, dy, given, wanted))
    dweight = None
    if want_weight:
        shape = (rows, constants.padded) if indexed else (row_tiles, tasks, constants.components)
        dweight = z.new_empty(shape, **float32)
    dscale = z.new_empty((units, rows), **float32) if want_scale else None
    dmean = z.new_empty((units, rows), **float32) if want_mean else None
    weight = padded_weights(call.weight, constants) if indexed else contiguous_rows(call.weight)
    launch(
        *call.leading(),
        None if given else dy,
        t,
        weight,
        index,
        constants.basis,
        constants.runs,
        dweight,
        dz,
        dscale,
        dmean,
    )
    if dweight is not None:
        if index is not None:
            chosen = index[None, :] == torch.arange(tasks, device=z.device)[:, None]
            dweight = (chosen.to(torch.float32) @ dweight).index_select(1, constants.slots)
        else:
            dweight = _total(dweight)
    return dweight, None if dscale is None else _total(dscale), None if dmean is None else _total(dmean)


def _prepare(call: Call, dy: Tensor, given: bool, wanted: list[bool]) -> tuple[Launch, int]:
    constants, rows, indexed = call.constants, call.z.shape[0], call.index is not None
    tiles = tiles_of(call.problem, given=given)
    row_tiles = -(-rows // tiles.block_n)
    strides = (0, 0, 0) if given else dy.stride()
    stride_wt = constants.padded if indexed else weight_stride(call.weight)
    arguments = call.arguments() | {
        "N": rows,
        "TASKS": dy.shape[0],
        "D": constants.dim,
        "J": constants.components,
        "P": constants.padded,
        "R": constants.units,
        "stride_dyt": strides[0],
        "stride_dyn": strides[1],
        "stride_dyd": strides[2],
        "stride_wt": stride_wt,
        "stride_bj": constants.basis.stride(0),
        "HAS_INDEX": indexed,
        "HAS_T": given,
        "BLOCK_N": tiles.block_n,
        "BLOCK_D": max(tiles.block_d, 16),
        **dict(zip(("WANT_WEIGHT", "WANT_Z", "WANT_SCALE", "WANT_MEAN"), wanted, strict=True)),
    }
    moving = (
        *MOVING,
        "dy_ptr",
        "t_ptr",
        "weight_ptr",
        "index_ptr",
        "basis_ptr",
        "run_ptr",
        "dweight_ptr",
        "dz_ptr",
        "dscale_ptr",
        "dmean_ptr",
    )
    grid = (row_tiles, constants.units)
    return Launch(
        _spectral_reweight_bwd_kernel, grid, moving, arguments, tiles.warps, tiles.stages
    ), row_tiles


def _total(partial: Tensor) -> Tensor:
    """Sum over the first axis, in a fixed order."""
    if partial.shape[0] == 1:
        return partial[0]
    out = torch.empty_like(partial[0])
    sum_partials(partial, out)
    return out


def tiles_of(p: Problem, *, given: bool) -> Tiles:
    """Rows by one step along a unit's components;
    block_d is the step along D where dy . basis is made inside."""
    rows = 16 if p.rows <= 16 else 32 if p.kind == "fp32" or (p.hip and p.kind == "tf32") else 64
    crowded = p.kind == "tf32" and rows > 16 and sum(routes.pieces(p.coordinates)) > 96
    warps = 8 if p.block_k > 32 or crowded else 4  # fewer would spill
    if given:
        return Tiles(64 if p.block_k > 32 else rows, 0, warps, 2)
    columns = 16 if p.kind == "fp32" else (128 if p.kind == "half" else 64) // (2 if p.hip else 1)
    resident = (rows + p.block_k) * sum(routes.pieces(p.coordinates)) * p.itemsize
    step = (rows + p.block_k) * columns * p.itemsize
    # A fourth would spill.
    most = 2 if p.hip or p.kind == "fp32" else 3 if rows == 16 and p.block_k > 32 else 4
    return Tiles(rows, columns, warps, max(2, min(most, (110 * 1024 - resident) // step)))


def estimate(p: Problem) -> float:
    """Nominal seconds of one kernel in which every chunk reads dy again."""
    z, proj, basis = routes.sizes(p)
    tiles = lone.tiles_of(p, given=False) if p.lone else tiles_of(p, given=False)
    row_tiles = -(-p.rows // tiles.block_n)
    tasks = 1 if p.indexed else p.tasks
    operations = 2.0 * row_tiles * tiles.block_n * p.chunks * p.block_k
    operations *= tasks * p.dim + sum(routes.pieces(p.coordinates))
    cached = (tasks * row_tiles - 1) * basis + (row_tiles - 1) * proj
    cached += float(p.chunks) * tasks * p.rows * p.dim * p.itemsize  # every chunk reads dy
    merged = routes.LAUNCH if row_tiles > 1 and not p.lone else 0.0
    return routes.launch(z + proj + basis, operations, routes.KERNEL_RATE[p.kind], cached) + merged


def run(call: Call, dy: Tensor, wanted: list[bool]) -> list[Tensor]:
    if call.problem.lone:
        return [lone.dweight(call, dy[0], None)[None]]
    dz = call.z.new_empty(call.z.shape) if wanted[1] else None
    dweight, dscale, dmean = backward(call, dy, None, wanted, dz)
    return [grad for grad in (dweight, dz, dscale, dmean) if grad is not None]


ROUTE = routes.Route(
    "fused",
    serves=lambda p: p.coordinates <= routes.NARROW,
    estimate=estimate,
    tiles=lambda p: lone.tiles_of(p, given=False) if p.lone else tiles_of(p, given=False),
    run=run,
    reason=lambda p: f"with {p.rows} rows dy stays in the cache while the constants are read once",
)
