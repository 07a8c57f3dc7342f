"""dweight, dz and the rest of y = scale * (z F + affine): the gradient of the fold, in Triton."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from residual_kernels.ops.triton import routes
from residual_kernels.ops.triton.fold import estimate, flat, fold, groups, shares_of, tiles_of
from residual_kernels.ops.triton.kernel_layout import Call, Constants
from residual_kernels.ops.triton.products import product, product_float32
from residual_kernels.ops.triton.routes import Problem, Tiles
from residual_kernels.ops.triton.scaled import scaled_with_sums
from residual_kernels.ops.triton.tiles import contiguous_rows, decode


@triton.jit(do_not_specialize=["UNIT", "LAST"])
def _fold_bwd_kernel(
    dfold_ptr,
    affine_ptr,
    proj_ptr,
    bias_ptr,
    slope_ptr,
    offset_ptr,
    basis_ptr,
    chunk_ptr,
    dweight_ptr,
    C,
    D,
    UNIT,
    LAST,
    stride_pj,
    stride_bj,
    stride_dfc,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    unit, first, length, low, mask_k = decode(tl.load(chunk_ptr + tl.program_id(0)), BLOCK_K)
    offs_k = tl.arange(0, BLOCK_K)
    offs_j = first + offs_k
    # dfold holds units UNIT .. LAST - 1; other chunks have nothing to do.
    inside = (unit >= UNIT) & (unit < LAST)
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
            # [BLOCK_K, BLOCK_C]
            p = tl.load(proj_ptr + offs_p, mask=mask_k[:, None] & mask_c[None, :], other=0.0)
            offs_f = ((offs_unit + offs_c) * stride_dfc)[:, None] + offs_d[None, :]
            # [BLOCK_C, BLOCK_D]
            f = tl.load(dfold_ptr + offs_f, mask=mask_c[:, None] & mask_d[None, :], other=0.0)
            g = tl.dot(p, f, g, input_precision=PRECISION)
        offs_b = (offs_j * stride_bj)[:, None] + offs_d[None, :]
        b = tl.load(basis_ptr + offs_b, mask=mask_k[:, None] & mask_d[None, :], other=0.0)
        acc += tl.sum(g * b.to(tl.float32), axis=1)
    tl.store(dweight_ptr + low + offs_k, acc, mask=(offs_k < length) & inside)


def folded_backward(
    dy: Tensor,
    z: Tensor,
    scale: Tensor | None,
    mean: Tensor | None,
    weight: Tensor,
    constants: Constants,
    precision: str,
    problem: Problem,
    wanted: list[bool],
) -> list[Tensor]:
    """The wanted ones of (dweight [T, J], dz, dscale, dmean); dy is [T, N, D]."""
    want_weight, want_z, want_scale, want_mean = wanted
    rows, units, width = z.shape
    dim = constants.dim
    tiles, gradient = tiles_of(problem), gradient_tiles(problem)
    float32: dict[str, Any] = {"dtype": torch.float32, "device": z.device}
    dweight = torch.empty(weight.shape, **float32) if want_weight else None
    dz = torch.zeros((rows, units * width), **float32) if want_z and len(weight) > 1 else None
    if want_z and dz is None:
        dz = z.new_empty((rows, units * width))
    dscale = torch.zeros(rows, **float32) if want_scale else None
    dmean = torch.zeros(rows, **float32) if want_mean else None
    weight = contiguous_rows(weight)
    affine = z.new_empty((shares_of(constants), 3, dim), dtype=torch.float32)
    for task, (row, upstream) in enumerate(zip(weight, dy, strict=True)):
        if dweight is not None:
            scaled, sums = scaled_with_sums(upstream, scale, mean)
            _folded_dweight(z, scaled, sums, constants, precision, gradient, dweight[task])
        if not (want_z or want_scale or want_mean):
            continue
        for first, last in groups(constants):
            matrix = fold(row, constants, precision, tiles, first, last, affine)
            if not (want_z or want_scale):
                continue
            # dy F^T of these units.
            raw = product(upstream, matrix.T) if len(weight) == 1 else product_float32(upstream, matrix.T)
            columns = slice(first * width, last * width)
            if dscale is not None:
                dscale += (raw * flat(z, first, last)).sum(1, dtype=torch.float32)
            if dz is not None:
                part = raw if scale is None else scale[:, None] * raw
                if len(weight) > 1:
                    dz[:, columns] += part
                else:
                    dz[:, columns] = part
        a, g, _ = affine.sum(0)
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
    """Writes dweight [J] of one task; `scaled` is scale * dy, `sums` [3, D] its sum, its sum by mean,
    the sum of dy."""
    for first, last in groups(constants):
        dfold = product(flat(z, first, last).T, scaled)  # [units * C, D]
        _fold_bwd_kernel[(len(constants.chunks),)](
            dfold,
            sums,
            constants.proj,
            constants.bias,
            constants.slope,
            constants.offset,
            constants.basis,
            constants.chunks,
            out,
            constants.coordinates,
            constants.dim,
            first,
            last,
            constants.proj.stride(0),
            constants.basis.stride(0),
            dfold.stride(0),
            PRECISION=precision,
            BLOCK_C=tiles.block_n,
            BLOCK_D=tiles.block_d,
            BLOCK_K=constants.block_k,
            num_warps=2 * tiles.warps,
            num_stages=tiles.stages,
        )


def gradient_tiles(p: Problem) -> Tiles:
    """Tile of the fold's gradient: coordinates by outputs."""
    return Tiles(32, 32, 4, 2) if p.kind == "fp32" else Tiles(64, 64, 4, 2 if p.hip else 3)


def run_backward(call: Call, dy: Tensor, wanted: list[bool]) -> list[Tensor]:
    return folded_backward(
        dy, call.z, call.scale, call.mean, call.weight, call.constants, call.precision, call.problem, wanted
    )


BACKWARD = routes.Route(
    "folded",
    # From t = dy . basis dz is almost free, so that this pays for dweight alone, or where no tile holds a
    # unit.
    serves=lambda p: (
        not p.indexed and (p.coordinates > routes.NARROW or (p.lone and p.kind == "half" and not p.plain))
    ),
    estimate=lambda p: estimate(p, backward=True),
    tiles=gradient_tiles,
    run=run_backward,
    reason=lambda p: (
        f"units of {p.coordinates} > {routes.NARROW} coordinates go to the vendor's products"
        if p.coordinates > routes.NARROW
        else f"with {p.rows} rows the gradient of F takes less memory traffic than t = dy . basis [N, J]"
    ),
)
