"""F[r] = sum_{j in r} proj[j]^T weight[j] basis[j], as [R*C, D]: for one weight y = scale * (z F + affine).

The fold and its gradient, in Triton; the large products are the vendor's. With
(a, g, o) = sum_j weight[j] (bias, slope, offset)[j] basis[j]:

    forward    y[n]       = s[n] * (z[n] F + a + m[n] g) - o
    backward   dF         = (s z)^T dy
               dweight[j] = (proj[j] dF[r(j)] + bias[j] sum s dy + slope[j] sum s m dy
                             - offset[j] sum dy) basis[j]^T
               dz         = s (dy F^T)
               dscale[n]  = z[n] . (dy F^T)[n] + dy[n] . (a + m[n] g);   dmean[n] = s[n] dy[n] . g
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from residual_kernels.ops.triton import routes
from residual_kernels.ops.triton.forward import sum_partials
from residual_kernels.ops.triton.kernel_layout import Call, Constants
from residual_kernels.ops.triton.products import float32_sums, product_float32
from residual_kernels.ops.triton.routes import WORKSPACE, Problem, Tiles
from residual_kernels.ops.triton.tiles import contiguous_rows

AFFINE_COMPONENTS = 1024  # components that one program sums into affine rows: fixed, so that bits repeat


@triton.jit(do_not_specialize=["UNIT", "COUNT", "J"])
def _fold_kernel(
    weight_ptr,
    proj_ptr,
    bias_ptr,
    slope_ptr,
    offset_ptr,
    basis_ptr,
    run_ptr,
    slot_ptr,
    fold_ptr,
    affine_ptr,
    UNIT,
    COUNT,
    R,
    C,
    D,
    J,
    stride_pj,
    stride_bj,
    PLAIN: tl.constexpr,
    SHARE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    local = tl.program_id(2)  # unit UNIT + local; behind the last unit: a share of the affine rows
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    offs_k = tl.arange(0, BLOCK_K)
    if local < COUNT:
        unit = local + UNIT
        offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        begin = tl.multiple_of(tl.load(run_ptr + unit), 8)  # a hint on the loop variable would be lost
        end = tl.load(run_ptr + unit + 1)
        low, high = tl.load(run_ptr + R + 1 + unit), tl.load(run_ptr + R + 2 + unit)
        acc = tl.zeros([BLOCK_C, BLOCK_D], dtype=tl.float32)
        for at in range(begin, end, BLOCK_K):
            first = tl.cast(at, tl.int64)
            mask_k = offs_k // 8 < (end - at) // 8
            offs_p = (offs_k * stride_pj)[:, None] + offs_c[None, :]
            mask = mask_k[:, None] & mask_c[None, :]
            p = tl.load(proj_ptr + first * stride_pj + offs_p, mask=mask, other=0.0)  # [BLOCK_K, BLOCK_C]
            offs_b = (offs_k * stride_bj)[:, None] + offs_d[None, :]
            mask = mask_k[:, None] & mask_d[None, :]
            b = tl.load(basis_ptr + first * stride_bj + offs_b, mask=mask, other=0.0)  # [BLOCK_K, BLOCK_D]
            real = low + at - begin + offs_k  # the components in the caller's order
            w = tl.load(weight_ptr + real, mask=real < high, other=0.0)
            acc = tl.dot(tl.trans((w[:, None] * p).to(b.dtype)), b, acc, input_precision=PRECISION)
        offs_f = ((local.to(tl.int64) * C + offs_c) * D)[:, None] + offs_d[None, :]
        tl.store(fold_ptr + offs_f, acc.to(fold_ptr.dtype.element_ty), mask=mask_c[:, None] & mask_d[None, :])
    elif tl.program_id(1) == 0:
        share = local - COUNT
        a = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
        g = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
        o = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
        for at in range(share * SHARE, tl.minimum(share * SHARE + SHARE, J), BLOCK_K):
            real = at + offs_k
            mask_k = real < J
            slot = tl.load(slot_ptr + real, mask=mask_k, other=0)
            w = tl.load(weight_ptr + real, mask=mask_k, other=0.0)
            mask = mask_k[:, None] & mask_d[None, :]
            b = tl.load(basis_ptr + (slot * stride_bj)[:, None] + offs_d[None, :], mask=mask, other=0.0)
            b = b.to(tl.float32)
            bias = tl.load(bias_ptr + slot, mask=mask_k, other=0.0)
            offset = tl.load(offset_ptr + slot, mask=mask_k, other=0.0)
            if PLAIN:
                a += (w * (bias - offset))[:, None] * b
            else:
                a += (w * bias)[:, None] * b
                g += (w * tl.load(slope_ptr + slot, mask=mask_k, other=0.0))[:, None] * b
                o += (w * offset)[:, None] * b
        if PLAIN:  # one row, affine is [shares, D]
            out_ptr = affine_ptr + share.to(tl.int64) * D + offs_d
            tl.store(out_ptr, tl.sum(a, axis=0).to(affine_ptr.dtype.element_ty), mask=mask_d)
        else:  # affine is [shares, 3, D]
            out_ptr = affine_ptr + share.to(tl.int64) * 3 * D + offs_d
            tl.store(out_ptr, tl.sum(a, axis=0), mask=mask_d)
            tl.store(out_ptr + D, tl.sum(g, axis=0), mask=mask_d)
            tl.store(out_ptr + 2 * D, tl.sum(o, axis=0), mask=mask_d)


@triton.jit(do_not_specialize=["N", "SHARES"])
def _affine_kernel(
    product_ptr,
    affine_ptr,
    scale_ptr,
    mean_ptr,
    y_ptr,
    N,
    SHARES,
    D,
    stride_sn,
    stride_mn,
    HAS_SCALE: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_n = offs_n < N
    mask_d = offs_d < D
    mask = mask_n[:, None] & mask_d[None, :]
    offs = (offs_n * D)[:, None] + offs_d[None, :]
    a = tl.zeros([BLOCK_D], dtype=tl.float32)
    g = tl.zeros([BLOCK_D], dtype=tl.float32)
    o = tl.zeros([BLOCK_D], dtype=tl.float32)
    for share in range(0, SHARES):
        share_ptr = affine_ptr + tl.cast(share, tl.int64) * 3 * D + offs_d
        a += tl.load(share_ptr, mask=mask_d, other=0.0)
        if HAS_MEAN:
            g += tl.load(share_ptr + D, mask=mask_d, other=0.0)
        o += tl.load(share_ptr + 2 * D, mask=mask_d, other=0.0)
    y = tl.load(product_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_D]
    y += a[None, :]
    if HAS_MEAN:
        y += tl.load(mean_ptr + offs_n * stride_mn, mask=mask_n, other=0.0)[:, None] * g[None, :]
    if HAS_SCALE:
        y *= tl.load(scale_ptr + offs_n * stride_sn, mask=mask_n, other=0.0)[:, None]
    y -= o[None, :]
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


def groups(constants: Constants) -> list[tuple[int, int]]:
    """Runs of units (first, last) whose share of F stays inside the workspace; never less than one unit."""
    unit_bytes = constants.coordinates * constants.dim * constants.proj.element_size()
    count = units_of_a_group(unit_bytes, constants.units, routes.allowed_workspace())
    return [(first, min(first + count, constants.units)) for first in range(0, constants.units, count)]


def units_of_a_group(unit_bytes: int, units: int, allowed: int | None) -> int:
    """Units whose shares of F, `unit_bytes` each, take what the caller allows, or the usual workspace."""
    if allowed is None and unit_bytes * units <= 2 * WORKSPACE:
        return max(units, 1)  # one product is worth a workspace a little larger
    return max(1, (WORKSPACE if allowed is None else allowed) // max(unit_bytes, 1))


def shares_of(constants: Constants) -> int:
    """Programs that the components are dealt to for the affine rows."""
    return -(-constants.components // AFFINE_COMPONENTS)


def fold(
    weight: Tensor,
    constants: Constants,
    precision: str,
    tiles: Tiles,
    first: int,
    last: int,
    affine: Tensor,
    *,
    plain: bool = False,
) -> Tensor:
    """F of units first .. last - 1 for one weight [J], [units * C, D].

    `affine` [shares, 3, D] (`plain`: [shares, D] for a - o) is written with the first units.
    """
    width, dim = constants.coordinates, constants.dim
    out = constants.proj.new_empty(((last - first) * width, dim))
    shares = 0 if first else shares_of(constants)
    grid = (-(-dim // tiles.block_d), -(-width // tiles.block_n), last - first + shares)
    _fold_kernel[grid](
        weight,
        constants.proj,
        constants.bias,
        constants.slope,
        constants.offset,
        constants.basis,
        constants.runs,
        constants.slots,
        out,
        affine,
        first,
        last - first,
        constants.units,
        width,
        dim,
        constants.components,
        constants.proj.stride(0),
        constants.basis.stride(0),
        PLAIN=plain,
        SHARE=AFFINE_COMPONENTS,
        PRECISION=precision,
        BLOCK_C=tiles.block_n,
        BLOCK_D=tiles.block_d,
        BLOCK_K=constants.block_k,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return out


def flat(z: Tensor, first: int, last: int) -> Tensor:
    """Units first .. last - 1 of z as [N, units * C]: a view where the strides allow it."""
    return z[:, first:last].reshape(len(z), -1)


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
    weight = contiguous_rows(weight)
    y = z.new_empty((len(weight), len(z), dim))
    spans = groups(constants)
    shares = shares_of(constants)
    plain = len(spans) == 1 and scale is None and mean is None
    dtype = z.dtype if plain and shares == 1 else torch.float32
    affine = z.new_empty((shares, dim) if plain else (shares, 3, dim), dtype=dtype)
    for task, row in enumerate(weight):
        if plain:
            matrix = fold(row, constants, precision, tiles, 0, constants.units, affine, plain=True)
            bias = affine[0]
            if shares > 1:
                bias = z.new_empty(dim)
                sum_partials(affine, bias)
            with float32_sums(z):
                torch.addmm(bias, flat(z, 0, constants.units), matrix, out=y[task])
            continue
        product = None
        for first, last in spans:
            matrix = fold(row, constants, precision, tiles, first, last, affine)
            part = product_float32(flat(z, first, last), matrix)
            product = part if product is None else product.add_(part)
        _affine_kernel[(-(-len(z) // 64), -(-dim // 128))](
            product,
            affine,
            scale,
            mean,
            y[task],
            len(z),
            shares,
            dim,
            0 if scale is None else scale.stride(0),
            0 if mean is None else mean.stride(0),
            HAS_SCALE=scale is not None,
            HAS_MEAN=mean is not None,
            BLOCK_N=64,
            BLOCK_D=128,
            num_warps=8,
            num_stages=1,
        )
    return y


def tiles_of(p: Problem) -> Tiles:
    """Tile of the fold F[r] [C, D]; rows are coordinates here."""
    if p.kind == "fp32":
        return Tiles(32, 32, 4, 2)
    return Tiles(64, 64, 4, 2) if p.hip or p.kind == "tf32" else Tiles(64, 128, 4, 3)


def estimate(p: Problem, *, backward: bool) -> float:
    """Nominal seconds of the fold or its gradient, and one product, for every task."""
    z, proj, basis = routes.sizes(p)
    width = float(p.units) * p.coordinates
    operations = 2.0 * p.chunks * p.block_k * p.coordinates * p.dim
    matrix = width * p.dim * p.itemsize
    product = 2.0 * p.rows * width * p.dim
    output = float(p.rows) * p.dim * p.itemsize
    small = routes.launch(proj + 2 * basis + matrix, operations, routes.KERNEL_RATE[p.kind])
    large = routes.launch(z + matrix + output, product, routes.VENDOR_RATE[p.kind])
    # Else the product adds it.
    affine = 0.0 if p.plain else routes.launch((5 if backward else 4) * output, 0.0, 1.0)
    if not backward:
        return p.tasks * (small + large + affine)
    of_unit = max(1, int(matrix) // max(p.units, 1))
    count = -(-p.units // units_of_a_group(of_unit, p.units, p.workspace))
    return p.tasks * (count * small + large + affine + 2 * count * routes.LAUNCH)


def run_forward(call: Call) -> Tensor:
    return folded_forward(
        call.z, call.scale, call.mean, call.weight, call.constants, call.precision, tiles_of(call.problem)
    )


FORWARD = routes.Route(
    "folded",
    serves=lambda p: not p.indexed,
    estimate=lambda p: estimate(p, backward=False),
    tiles=tiles_of,
    run=run_forward,
    reason=lambda p: (
        f"J = {p.components} is too near R*C = {p.units * p.coordinates} to beat one product over R*C"
    ),
)
