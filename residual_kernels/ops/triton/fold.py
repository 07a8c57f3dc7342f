"""F[r] = sum_{j in r} proj[j]^T weight[j] basis[j], as [R*C, D]: for one weight y = scale * (z F + affine).

The fold and its gradient, in Triton; the large products are the vendor's. With
(a, g, o) = sum_j weight[j] (bias, slope, offset)[j] basis[j]:

    forward    y[n]       = s[n] * (z[n] F + a + m[n] g) - o
    backward   dF         = (s z)^T dy
               dweight[j] = (proj[j] dF[r(j)] + bias[j] sum s dy + slope[j] sum s m dy - offset[j] sum dy) basis[j]^T
               dz         = s (dy F^T)
               dscale[n]  = z[n] . (dy F^T)[n] + dy[n] . (a + m[n] g);   dmean[n] = s[n] dy[n] . g
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from residual_kernels.ops.triton.forward import Constants, _decode
from residual_kernels.ops.triton.routes import WORKSPACE, Tiles


@triton.jit
def _fold_kernel(
    weight_ptr, proj_ptr, bias_ptr, slope_ptr, offset_ptr, basis_ptr, chunk_ptr, unit_chunk_ptr, fold_ptr, affine_ptr,
    UNIT, R, C, D, row_tiles, column_tiles, stride_pj, stride_wj,
    ALIGN_J: tl.constexpr, PRECISION: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    local = pid // (row_tiles * column_tiles)  # unit UNIT + local, row block `local` of F
    offs_c = (pid // column_tiles) % row_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_d = pid % column_tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_c = offs_c < C
    mask_d = offs_d < D
    acc = tl.zeros([BLOCK_C, BLOCK_D], dtype=tl.float32)
    a = tl.zeros([BLOCK_D], dtype=tl.float32)
    g = tl.zeros([BLOCK_D], dtype=tl.float32)
    o = tl.zeros([BLOCK_D], dtype=tl.float32)
    unit = local + UNIT
    for i in range(tl.load(unit_chunk_ptr + unit), tl.load(unit_chunk_ptr + unit + 1)):
        _, offs_j, mask_k = _decode(tl.load(chunk_ptr + i), ALIGN_J, BLOCK_K)
        offs_p = (offs_j * stride_pj)[:, None] + offs_c[None, :]
        mask = mask_k[:, None] & mask_c[None, :]
        p = tl.load(proj_ptr + offs_p, mask=mask, other=0.0)  # [BLOCK_K, BLOCK_C]
        offs_b = (offs_j * D)[:, None] + offs_d[None, :]
        mask = mask_k[:, None] & mask_d[None, :]
        b = tl.load(basis_ptr + offs_b, mask=mask, other=0.0)  # [BLOCK_K, BLOCK_D]
        w = tl.load(weight_ptr + offs_j * stride_wj, mask=mask_k, other=0.0)
        wb = w[:, None] * b
        acc = tl.dot(tl.trans(p), wb.to(b.dtype), acc, input_precision=PRECISION)
        a += tl.sum(tl.load(bias_ptr + offs_j, mask=mask_k, other=0.0)[:, None] * wb, axis=0)
        g += tl.sum(tl.load(slope_ptr + offs_j, mask=mask_k, other=0.0)[:, None] * wb, axis=0)
        o += tl.sum(tl.load(offset_ptr + offs_j, mask=mask_k, other=0.0)[:, None] * wb, axis=0)
    offs_f = ((local.to(tl.int64) * C + offs_c) * D)[:, None] + offs_d[None, :]
    tl.store(fold_ptr + offs_f, acc.to(fold_ptr.dtype.element_ty), mask=mask_c[:, None] & mask_d[None, :])
    mask_d &= (pid // column_tiles) % row_tiles == 0  # a unit's first row block hands out its affine rows
    affine_row_ptr = affine_ptr + unit.to(tl.int64) * D + offs_d  # affine is [3, R, D]
    plane = tl.cast(R, tl.int64) * D
    tl.store(affine_row_ptr, a, mask=mask_d)
    tl.store(affine_row_ptr + plane, g, mask=mask_d)
    tl.store(affine_row_ptr + 2 * plane, o, mask=mask_d)


@triton.jit
def _affine_kernel(
    product_ptr, affine_ptr, scale_ptr, mean_ptr, y_ptr,
    N, D, column_tiles, stride_sn, stride_mn,
    HAS_SCALE: tl.constexpr, HAS_MEAN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    offs_n = (pid // column_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = pid % column_tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_n = offs_n < N
    mask_d = offs_d < D
    mask = mask_n[:, None] & mask_d[None, :]
    offs = (offs_n * D)[:, None] + offs_d[None, :]
    y = tl.load(product_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_D]
    y += tl.load(affine_ptr + offs_d, mask=mask_d, other=0.0)[None, :]
    if HAS_MEAN:
        m = tl.load(mean_ptr + offs_n * stride_mn, mask=mask_n, other=0.0)
        y += m[:, None] * tl.load(affine_ptr + D + offs_d, mask=mask_d, other=0.0)[None, :]
    if HAS_SCALE:
        y *= tl.load(scale_ptr + offs_n * stride_sn, mask=mask_n, other=0.0)[:, None]
    y -= tl.load(affine_ptr + 2 * D + offs_d, mask=mask_d, other=0.0)[None, :]
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _fold_bwd_kernel(
    dfold_ptr, affine_ptr, proj_ptr, bias_ptr, slope_ptr, offset_ptr, basis_ptr, chunk_ptr, dweight_ptr,
    C, D, UNIT, LAST, stride_pj, stride_dfc,
    PRECISION: tl.constexpr, ALIGN_J: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    unit, offs_j, mask_k = _decode(tl.load(chunk_ptr + tl.program_id(0)), ALIGN_J, BLOCK_K)
    inside = (unit >= UNIT) & (
        unit < LAST
    )  # dfold holds units UNIT .. LAST - 1; other chunks have nothing to do
    offs_unit = (unit - UNIT) * C
    bias = tl.load(bias_ptr + offs_j, mask=mask_k, other=0.0)
    slope = tl.load(slope_ptr + offs_j, mask=mask_k, other=0.0)
    offset = tl.load(offset_ptr + offs_j, mask=mask_k, other=0.0)
    acc = tl.zeros([BLOCK_K], dtype=tl.float32)
    for d in range(0, tl.where(inside, D, 0), BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        total = tl.load(affine_ptr + offs_d, mask=mask_d, other=0.0)  # sum s dy
        tilted = tl.load(affine_ptr + D + offs_d, mask=mask_d, other=0.0)  # sum s m dy
        plain = tl.load(affine_ptr + 2 * D + offs_d, mask=mask_d, other=0.0)  # sum dy
        g = (
            bias[:, None] * total[None, :]
            + slope[:, None] * tilted[None, :]
            - offset[:, None] * plain[None, :]
        )
        for c in range(0, C, BLOCK_C):
            offs_c = c + tl.arange(0, BLOCK_C)
            mask_c = offs_c < C
            offs_p = (offs_j * stride_pj)[:, None] + offs_c[None, :]
            p = tl.load(
                proj_ptr + offs_p, mask=mask_k[:, None] & mask_c[None, :], other=0.0
            )  # [BLOCK_K, BLOCK_C]
            offs_f = ((offs_unit + offs_c) * stride_dfc)[:, None] + offs_d[None, :]
            f = tl.load(
                dfold_ptr + offs_f, mask=mask_c[:, None] & mask_d[None, :], other=0.0
            )  # [BLOCK_C, BLOCK_D]
            g = tl.dot(p, f, g, input_precision=PRECISION)
        offs_b = (offs_j * D)[:, None] + offs_d[None, :]
        b = tl.load(basis_ptr + offs_b, mask=mask_k[:, None] & mask_d[None, :], other=0.0)
        acc += tl.sum(g * b.to(tl.float32), axis=1)
    tl.store(dweight_ptr + offs_j, acc, mask=mask_k & inside)


def groups(constants: Constants) -> list[tuple[int, int]]:
    """Runs of units (first, last) whose share of F stays inside the workspace; never less than one unit."""
    unit_bytes = constants.coordinates * constants.dim * constants.proj.element_size()
    count = max(1, WORKSPACE // max(unit_bytes, 1))
    if unit_bytes * constants.units <= 2 * WORKSPACE:  # one product is worth a workspace a little larger
        count = constants.units
    return [(first, min(first + count, constants.units)) for first in range(0, constants.units, count)]


def fold(
    weight: Tensor, constants: Constants, precision: str, tiles: Tiles, first: int, last: int, affine: Tensor
) -> Tensor:
    """F of units first .. last - 1 for one weight [J], [units * C, D]; their part of `affine` [3, R, D] is written."""
    width, dim = constants.coordinates, constants.dim
    out = constants.proj.new_empty(((last - first) * width, dim))
    row_tiles, column_tiles = triton.cdiv(width, tiles.block_n), triton.cdiv(dim, tiles.block_d)
    _fold_kernel[((last - first) * row_tiles * column_tiles,)](
        weight, constants.proj, constants.bias, constants.slope, constants.offset, constants.basis,
        constants.chunks, constants.unit_chunks, out, affine,
        first, constants.units, width, dim, row_tiles, column_tiles, constants.proj.stride(0), weight.stride(0),
        ALIGN_J=constants.align_j, PRECISION=precision, BLOCK_C=tiles.block_n, BLOCK_D=tiles.block_d,
        BLOCK_K=constants.block_k, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out


def _flat(z: Tensor, first: int, last: int) -> Tensor:
    """Units first .. last - 1 of z as [N, units * C]: a view where the strides allow it."""
    return z[:, first:last].reshape(len(z), -1)


def _product_float32(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, accumulated and returned in float32."""
    if left.dtype == torch.float32:
        return left @ right
    if left.is_cuda and torch.version.hip is None:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.to(torch.float32) @ right.to(torch.float32)


def folded_forward(
    z: Tensor,
    scale: Tensor | None,
    mean: Tensor | None,
    weight: Tensor,
    constants: Constants,
    precision: str,
    tiles: Tiles,
) -> Tensor:
    """weight [T, J] -> y [T, N, D]."""
    dim = constants.dim
    y = z.new_empty((len(weight), len(z), dim))
    affine = z.new_empty((3, constants.units, dim), dtype=torch.float32)
    parts = groups(constants)
    for task, row in enumerate(weight):
        if len(parts) == 1 and scale is None and mean is None:
            matrix = fold(row, constants, precision, tiles, 0, constants.units, affine)
            a, _, o = affine.sum(1)
            torch.addmm((a - o).to(z.dtype), _flat(z, 0, constants.units), matrix, out=y[task])
            continue
        product = None
        for first, last in parts:
            matrix = fold(row, constants, precision, tiles, first, last, affine)
            part = _product_float32(_flat(z, first, last), matrix)
            product = part if product is None else product.add_(part)
        column_tiles = triton.cdiv(dim, 128)
        _affine_kernel[(triton.cdiv(len(z), 16) * column_tiles,)](
            product, affine.sum(1), scale, mean, y[task], len(z), dim, column_tiles,
            0 if scale is None else scale.stride(0), 0 if mean is None else mean.stride(0),
            HAS_SCALE=scale is not None, HAS_MEAN=mean is not None, BLOCK_N=16, BLOCK_D=128, num_warps=4, num_stages=1,
        )  # fmt: skip
    return y


def folded_backward(
    dy: Tensor,
    z: Tensor,
    scale: Tensor | None,
    mean: Tensor | None,
    weight: Tensor,
    constants: Constants,
    precision: str,
    tiles: Tiles,
    wanted: list[bool],
) -> list[Tensor]:
    """The wanted ones of (dweight [T, J], dz, dscale, dmean); dy is [T, N, D]."""
    want_weight, want_z, want_scale, want_mean = wanted
    rows, units, width = z.shape
    dim = constants.dim
    float32 = {"dtype": torch.float32, "device": z.device}
    dweight = torch.zeros(weight.shape, **float32) if want_weight else None
    dz = torch.zeros((rows, units * width), **float32) if want_z and len(weight) > 1 else None
    if want_z and dz is None:
        dz = z.new_empty((rows, units * width))
    dscale = torch.zeros(rows, **float32) if want_scale else None
    dmean = torch.zeros(rows, **float32) if want_mean else None
    affine = z.new_empty((3, units, dim), dtype=torch.float32)
    for task, (row, upstream) in enumerate(zip(weight, dy, strict=True)):
        if dweight is not None:
            scaled = upstream if scale is None else (scale[:, None] * upstream).to(z.dtype)
            sums = torch.stack(
                [
                    scaled.sum(0, dtype=torch.float32),
                    torch.zeros(dim, **float32) if mean is None else mean @ scaled.to(torch.float32),
                    upstream.sum(0, dtype=torch.float32),
                ]
            )
            _folded_dweight(z, scaled, sums, constants, precision, tiles, dweight[task])
        if not (want_z or want_scale or want_mean):
            continue
        for first, last in groups(constants):
            matrix = fold(row, constants, precision, tiles, first, last, affine)
            if not (want_z or want_scale):
                continue
            raw = (
                upstream @ matrix.T if len(weight) == 1 else _product_float32(upstream, matrix.T)
            )  # dy F^T of these units
            columns = slice(first * width, last * width)
            if dscale is not None:
                dscale += (raw * _flat(z, first, last)).sum(1, dtype=torch.float32)
            if dz is not None:
                part = raw if scale is None else scale[:, None] * raw
                if len(weight) > 1:
                    dz[:, columns] += part
                else:
                    dz[:, columns] = part
        a, g, _ = affine.sum(1)
        if dscale is not None:
            dscale += upstream.to(torch.float32) @ a
        if (dscale is not None and mean is not None) or dmean is not None:
            tilt = upstream.to(torch.float32) @ g
            if dscale is not None and mean is not None:
                dscale += mean * tilt
            if dmean is not None:
                dmean += tilt if scale is None else scale * tilt
    if dz is not None:
        dz = dz.to(z.dtype).view(rows, units, width)
    return [grad for grad in (dweight, dz, dscale, dmean) if grad is not None]


def _folded_dweight(
    z: Tensor, scaled: Tensor, sums: Tensor, constants: Constants, precision: str, tiles: Tiles, out: Tensor
) -> None:
    """Writes dweight [J] of one task; `scaled` is scale * dy, `sums` [3, D] its sum, its sum by mean, the sum of dy."""
    for first, last in groups(constants):
        dfold = _flat(z, first, last).T @ scaled  # [units * C, D]
        _fold_bwd_kernel[(len(constants.chunks),)](
            dfold, sums, constants.proj, constants.bias, constants.slope, constants.offset, constants.basis,
            constants.chunks, out,
            constants.coordinates, constants.dim, first, last, constants.proj.stride(0), dfold.stride(0),
            PRECISION=precision, ALIGN_J=constants.align_j, BLOCK_C=tiles.block_n, BLOCK_D=tiles.block_d,
            BLOCK_K=constants.block_k, num_warps=2 * tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
