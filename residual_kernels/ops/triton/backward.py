"""dweight[j] = sum_n c[n,j] t[n,j],  dz[n,r] = scale[n] * sum_{j in r} weight[j] t[n,j] proj[j]

with t[n,j] = dy[n] . basis[j], and

dmean[n]  = scale[n] * sum_j weight[j] t[n,j] slope[j]
dscale[n] = sum_j weight[j] t[n,j] * (z[n,r(j)] . proj[j] + bias[j] + mean[n] * slope[j])

Every gradient of the direct form in one Triton kernel. t is made inside it, or read where one product of the vendor has
made it. Sums over rows and units leave as partial sums and are added in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from residual_kernels.ops.triton.forward import (
    Constants,
    _decode,
    _load_proj,
    _load_unit,
    _project_exactly,
    shared_arguments,
)
from residual_kernels.ops.triton.routes import Tiles


@triton.jit
def _spectral_reweight_bwd_kernel(
    dy_ptr, t_ptr, z_ptr, scale_ptr, mean_ptr, weight_ptr, index_ptr, proj_ptr, bias_ptr, slope_ptr, offset_ptr,
    basis_ptr, chunk_ptr, unit_chunk_ptr, dweight_ptr, dz_ptr, dscale_ptr, dmean_ptr,
    N, TASKS, D, J, R, tiles,
    stride_dyt, stride_dyn, stride_dyd, stride_zn, stride_zr, stride_zc, stride_sn, stride_mn, stride_wt, stride_wj,
    HAS_SCALE: tl.constexpr, HAS_MEAN: tl.constexpr, HAS_INDEX: tl.constexpr, HAS_T: tl.constexpr,
    WANT_WEIGHT: tl.constexpr, WANT_Z: tl.constexpr, WANT_SCALE: tl.constexpr, WANT_MEAN: tl.constexpr,
    PRECISION: tl.constexpr, C: tl.constexpr, C_MAIN: tl.constexpr, C_TAIL: tl.constexpr, STRIDE_PJ: tl.constexpr,
    ALIGN_Z: tl.constexpr, ALIGN_J: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    WANT_Q: tl.constexpr = (
        WANT_Z or WANT_SCALE or WANT_MEAN
    )  # dL/dc, summed over a unit's chunks: one program a unit
    WHOLE_UNIT: tl.constexpr = WANT_Q or HAS_T
    NEED_INNER: tl.constexpr = WANT_WEIGHT or WANT_SCALE
    EXACT: tl.constexpr = PRECISION == "ieee" and z_ptr.dtype.element_ty == tl.float32
    pid = tl.program_id(0)
    tile = pid % tiles
    if WHOLE_UNIT:
        unit = pid // tiles
        first = tl.load(unit_chunk_ptr + unit)
        last = tl.load(unit_chunk_ptr + unit + 1)
    else:
        first = pid // tiles
        last = first + 1
        unit = tl.load(chunk_ptr + first) >> 40
    row = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = row < N
    row = row.to(tl.int64)
    if HAS_SCALE:
        s = tl.load(scale_ptr + row * stride_sn, mask=mask_n, other=0.0)
    if HAS_MEAN:
        m = tl.load(mean_ptr + row * stride_mn, mask=mask_n, other=0.0)
    if HAS_INDEX:
        offs_w = tl.load(index_ptr + row, mask=mask_n, other=0) * stride_wt
    if NEED_INNER:
        offs_z = tl.multiple_of(row * stride_zn, ALIGN_Z) + tl.multiple_of(
            unit.to(tl.int64) * stride_zr, ALIGN_Z
        )
        if not EXACT:
            z = _load_unit(z_ptr, offs_z, mask_n, stride_zc, C, 0, C_MAIN)
            if C_TAIL > 0:
                z_tail = _load_unit(z_ptr, offs_z, mask_n, stride_zc, C, C_MAIN, C_TAIL)
    if WANT_Z:
        dz = tl.zeros([BLOCK_N, C_MAIN], dtype=tl.float32)
        if C_TAIL > 0:
            dz_tail = tl.zeros([BLOCK_N, C_TAIL], dtype=tl.float32)
    if WANT_SCALE:
        ds = tl.zeros([BLOCK_N], dtype=tl.float32)
    if WANT_MEAN:
        dm = tl.zeros([BLOCK_N], dtype=tl.float32)

    for i in range(first, last):
        _, offs_j, mask_k = _decode(tl.load(chunk_ptr + i), ALIGN_J, BLOCK_K)
        mask = mask_n[:, None] & mask_k[None, :]
        if (NEED_INNER and not EXACT) or WANT_Z:
            p = _load_proj(proj_ptr, offs_j, mask_k, C, STRIDE_PJ, 0, C_MAIN)
            if C_TAIL > 0:
                p_tail = _load_proj(proj_ptr, offs_j, mask_k, C, STRIDE_PJ, C_MAIN, C_TAIL)
        if NEED_INNER:
            if EXACT:
                inner = _project_exactly(
                    z_ptr, offs_z, mask_n, stride_zc, proj_ptr, offs_j, mask_k, C, STRIDE_PJ, BLOCK_N, BLOCK_K
                )
            else:
                inner = tl.dot(z, tl.trans(p), input_precision=PRECISION)  # [BLOCK_N, BLOCK_K]
                if C_TAIL > 0:
                    inner = tl.dot(z_tail, tl.trans(p_tail), inner, input_precision=PRECISION)
            inner += tl.load(bias_ptr + offs_j, mask=mask_k, other=0.0)[None, :]
            if HAS_MEAN:
                inner += m[:, None] * tl.load(slope_ptr + offs_j, mask=mask_k, other=0.0)[None, :]
        if WANT_WEIGHT:
            c = inner
            if HAS_SCALE:
                c *= s[:, None]
            c -= tl.load(offset_ptr + offs_j, mask=mask_k, other=0.0)[None, :]
        if WANT_Q:
            q = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
        for task in range(0, TASKS):
            if HAS_T:
                offs_t = ((tl.cast(task, tl.int64) * N + row) * J)[:, None] + offs_j[None, :]
                t = tl.load(t_ptr + offs_t, mask=mask, other=0.0).to(tl.float32)
            else:
                t = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
                dy_row_ptr = dy_ptr + tl.cast(task, tl.int64) * stride_dyt + row * stride_dyn
                for d in range(0, D, BLOCK_D):
                    offs_d = d + tl.arange(0, BLOCK_D)
                    mask_d = (offs_d < D)[None, :]
                    offs_dy = offs_d.to(tl.int64)[None, :] * stride_dyd
                    dy = tl.load(dy_row_ptr[:, None] + offs_dy, mask=mask_n[:, None] & mask_d, other=0.0)
                    offs_b = (offs_j * D)[:, None] + offs_d[None, :]
                    b = tl.load(
                        basis_ptr + offs_b, mask=mask_k[:, None] & mask_d, other=0.0
                    )  # [BLOCK_K, BLOCK_D]
                    t = tl.dot(dy, tl.trans(b), t, input_precision=PRECISION)
            if WANT_WEIGHT:
                product = tl.where(mask, c * t, 0.0)
                if (
                    HAS_INDEX
                ):  # rows of one tile belong to several tasks: hand out the terms, a product adds them up
                    tl.store(dweight_ptr + (row * J)[:, None] + offs_j[None, :], product, mask=mask)
                else:
                    offs = (tile.to(tl.int64) * TASKS + task) * J + offs_j
                    tl.store(dweight_ptr + offs, tl.sum(product, axis=0), mask=mask_k)
            if WANT_Q:
                if HAS_INDEX:
                    w = tl.load(
                        weight_ptr + offs_w[:, None] + offs_j[None, :] * stride_wj, mask=mask, other=0.0
                    )
                    q += w * t
                else:
                    offs = tl.cast(task, tl.int64) * stride_wt + offs_j * stride_wj
                    w = tl.load(weight_ptr + offs, mask=mask_k, other=0.0)
                    q += w[None, :] * t
        if WANT_SCALE:
            ds += tl.sum(q * inner, axis=1)
        if WANT_Q:
            if HAS_SCALE:
                q *= s[:, None]
        if WANT_MEAN:
            dm += tl.sum(q * tl.load(slope_ptr + offs_j, mask=mask_k, other=0.0)[None, :], axis=1)
        if WANT_Z:
            dz = tl.dot(q.to(p.dtype), p, dz, input_precision=PRECISION)
            if C_TAIL > 0:
                dz_tail = tl.dot(q.to(p.dtype), p_tail, dz_tail, input_precision=PRECISION)

    if WANT_Z:
        offs_c = tl.arange(0, C_MAIN)
        offs_row = (row * R + unit) * C
        mask_c = mask_n[:, None] & (offs_c < C)[None, :]
        tl.store(dz_ptr + offs_row[:, None] + offs_c[None, :], dz.to(dz_ptr.dtype.element_ty), mask=mask_c)
        if C_TAIL > 0:
            offs_c = C_MAIN + tl.arange(0, C_TAIL)
            mask_c = mask_n[:, None] & (offs_c < C)[None, :]
            tl.store(
                dz_ptr + offs_row[:, None] + offs_c[None, :], dz_tail.to(dz_ptr.dtype.element_ty), mask=mask_c
            )
    if WANT_SCALE:
        tl.store(dscale_ptr + unit.to(tl.int64) * N + row, ds, mask=mask_n)
    if WANT_MEAN:
        tl.store(dmean_ptr + unit.to(tl.int64) * N + row, dm, mask=mask_n)


def backward(
    dy: Tensor,
    t: Tensor | None,
    z: Tensor,
    scale: Tensor | None,
    mean: Tensor | None,
    weight: Tensor,
    weight_index: Tensor | None,
    constants: Constants,
    precision: str,
    tiles: Tiles,
    wanted: list[bool],
    dz: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dweight [T, J], dscale, dmean) of these rows, None where not wanted; dz is written into the buffer given.

    dy is [T, N, D], with T = 1 when rows choose their weights; t = dy . basis [T, N, J] where it was made beforehand.
    """
    want_weight, want_z, want_scale, want_mean = wanted
    rows, tasks, units = len(z), len(weight), constants.units
    indexed = weight_index is not None
    width = constants.components
    row_tiles = triton.cdiv(rows, tiles.block_n)
    float32 = {"dtype": torch.float32}
    dweight = None
    if want_weight:
        dweight = z.new_empty((rows, width) if indexed else (row_tiles, tasks, width), **float32)
    dscale = z.new_empty((units, rows), **float32) if want_scale else None
    dmean = z.new_empty((units, rows), **float32) if want_mean else None
    owners = units if t is not None or want_z or want_scale or want_mean else len(constants.chunks)
    _spectral_reweight_bwd_kernel[(row_tiles * owners,)](
        **shared_arguments(z, scale, mean, constants, precision),
        dy_ptr=None if t is not None else dy, t_ptr=t, weight_ptr=weight, index_ptr=weight_index,
        basis_ptr=constants.basis, unit_chunk_ptr=constants.unit_chunks,
        dweight_ptr=dweight, dz_ptr=dz, dscale_ptr=dscale, dmean_ptr=dmean,
        N=rows, TASKS=len(dy), D=constants.dim, J=width, R=units, tiles=row_tiles,
        stride_dyt=dy.stride(0), stride_dyn=dy.stride(1), stride_dyd=dy.stride(2),
        stride_wt=weight.stride(0), stride_wj=weight.stride(1),
        HAS_INDEX=indexed, HAS_T=t is not None,
        WANT_WEIGHT=want_weight, WANT_Z=want_z, WANT_SCALE=want_scale, WANT_MEAN=want_mean,
        BLOCK_N=tiles.block_n, BLOCK_D=max(tiles.block_d, 16), num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    if dweight is not None:
        if indexed:
            chosen = (weight_index[None, :] == torch.arange(tasks, device=z.device)[:, None]).to(
                torch.float32
            )
            dweight = chosen @ dweight
        else:
            dweight = dweight[0] if row_tiles == 1 else dweight.sum(0)
    return dweight, None if dscale is None else dscale.sum(0), None if dmean is None else dmean.sum(0)
