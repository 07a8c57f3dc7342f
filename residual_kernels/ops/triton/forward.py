"""y[n] = sum_j weight[j] * c[n,j] * basis[j]

with c[n,j] = scale[n] * (z[n,r(j)] . proj[j] + bias[j] + mean[n] * slope[j]) - offset[j]: the Triton kernels of the
direct form, forward. Components are walked in chunks (unit, first component, length) of at most BLOCK_K, each inside
one unit, so that ragged units cost no more than their own components. Widths that are no power of two are split into
(C_MAIN, C_TAIL). Which kernel runs with which tiles is decided in triton_routes.
"""

from dataclasses import dataclass
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from residual_kernels.ops.triton.routes import Tiles, pieces

INTERPRETED = bool(
    triton.knobs.runtime.interpret
)  # what the kernels below were made as: NumPy programs on the CPU


@triton.jit
def _decode(chunk, ALIGN_J: tl.constexpr, BLOCK_K: tl.constexpr):
    """(unit, components of the chunk, which of them exist) from unit << 40 | length << 32 | first component."""
    offs_k = tl.arange(0, BLOCK_K)
    mask_k = offs_k < ((chunk >> 32) & 255).to(tl.int32)
    return chunk >> 40, tl.multiple_of(chunk & 0xFFFFFFFF, ALIGN_J) + offs_k, mask_k


@triton.jit
def _load_unit(z_ptr, offs_z, mask_n, stride_zc, C: tl.constexpr, FIRST: tl.constexpr, BLOCK_C: tl.constexpr):
    offs_c = FIRST + tl.arange(0, BLOCK_C)
    mask = mask_n[:, None] & (offs_c < C)[None, :]
    return tl.load(
        z_ptr + offs_z[:, None] + offs_c[None, :] * stride_zc, mask=mask, other=0.0
    )  # [BLOCK_N, BLOCK_C]


@triton.jit
def _load_proj(
    proj_ptr, offs_j, mask_k,
    C: tl.constexpr, STRIDE_PJ: tl.constexpr, FIRST: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    offs_c = FIRST + tl.arange(0, BLOCK_C)
    mask = mask_k[:, None] & (offs_c < C)[None, :]
    offs = offs_j[:, None] * STRIDE_PJ + offs_c[None, :]
    return tl.load(proj_ptr + offs, mask=mask, other=0.0)  # [BLOCK_K, BLOCK_C]


@triton.jit
def _project_exactly(
    z_ptr, offs_z, mask_n, stride_zc, proj_ptr, offs_j, mask_k,
    C: tl.constexpr, STRIDE_PJ: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """z . proj in exact float32, 16 coordinates at a time: without tensor cores a longer step overflows registers."""
    acc = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for first in range(0, C, 16):
        offs_c = first + tl.arange(0, 16)
        mask_c = (offs_c < C)[None, :]
        z = tl.load(
            z_ptr + offs_z[:, None] + offs_c[None, :] * stride_zc, mask=mask_n[:, None] & mask_c, other=0.0
        )
        p = tl.load(
            proj_ptr + offs_j[:, None] * STRIDE_PJ + offs_c[None, :], mask=mask_k[:, None] & mask_c, other=0.0
        )
        acc = tl.dot(z, tl.trans(p), acc, input_precision="ieee")
    return acc  # [BLOCK_N, BLOCK_K]


@triton.jit
def _spectral_reweight_fwd_kernel(
    z_ptr, scale_ptr, mean_ptr, weight_ptr, index_ptr, proj_ptr, bias_ptr, slope_ptr, offset_ptr, basis_ptr, chunk_ptr,
    y_ptr,
    N, PAIRS, D, CHUNKS, SPLITS, tiles, column_tiles,
    stride_zn, stride_zr, stride_zc, stride_sn, stride_mn, stride_wt, stride_wj,
    HAS_SCALE: tl.constexpr, HAS_MEAN: tl.constexpr, HAS_INDEX: tl.constexpr, PER_ROW: tl.constexpr,
    PRECISION: tl.constexpr, C: tl.constexpr, C_MAIN: tl.constexpr, C_TAIL: tl.constexpr, STRIDE_PJ: tl.constexpr,
    ALIGN_Z: tl.constexpr, ALIGN_J: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    EXACT: tl.constexpr = PRECISION == "ieee" and z_ptr.dtype.element_ty == tl.float32
    pid = tl.program_id(0)
    offs_d = (pid % column_tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    tile = (pid // column_tiles) % tiles
    split = pid // (column_tiles * tiles)
    if PER_ROW:  # a tile is any BLOCK_N outputs, each with a weight of its own
        pair = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = pair < PAIRS
        if HAS_INDEX:
            row = pair
            task = tl.load(index_ptr + pair, mask=mask_n, other=0)
        else:
            row = pair % N
            task = (pair // N).to(tl.int64)
        offs_w = task * stride_wt
    else:  # a tile is BLOCK_N rows of one task
        row_tiles = tiles // (PAIRS // N)
        row = (tile % row_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = row < N
        pair = (tile // row_tiles) * N + row
        weight_ptr += (tile // row_tiles).to(tl.int64) * stride_wt
    row = row.to(tl.int64)
    offs_n = tl.multiple_of(row * stride_zn, ALIGN_Z)
    mask_d = offs_d < D
    if HAS_SCALE:
        s = tl.load(scale_ptr + row * stride_sn, mask=mask_n, other=0.0)
    if HAS_MEAN:
        m = tl.load(mean_ptr + row * stride_mn, mask=mask_n, other=0.0)

    acc = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    first = (split.to(tl.int64) * CHUNKS // SPLITS).to(tl.int32)
    last = ((split + 1).to(tl.int64) * CHUNKS // SPLITS).to(tl.int32)
    chunk = tl.load(chunk_ptr + first)
    for i in range(first, last):
        unit, offs_j, mask_k = _decode(chunk, ALIGN_J, BLOCK_K)
        # One step ahead, so that addresses never wait for the table and the pipeline's stages go to the tiles.
        chunk = tl.load(chunk_ptr + tl.minimum(i + 1, CHUNKS - 1))
        offs_z = offs_n + tl.multiple_of(unit * stride_zr, ALIGN_Z)
        if EXACT:
            c = _project_exactly(
                z_ptr, offs_z, mask_n, stride_zc, proj_ptr, offs_j, mask_k, C, STRIDE_PJ, BLOCK_N, BLOCK_K
            )
        else:
            z = _load_unit(z_ptr, offs_z, mask_n, stride_zc, C, 0, C_MAIN)
            p = _load_proj(proj_ptr, offs_j, mask_k, C, STRIDE_PJ, 0, C_MAIN)
            c = tl.dot(z, tl.trans(p), input_precision=PRECISION)  # [BLOCK_N, BLOCK_K]
            if C_TAIL > 0:
                z = _load_unit(z_ptr, offs_z, mask_n, stride_zc, C, C_MAIN, C_TAIL)
                p = _load_proj(proj_ptr, offs_j, mask_k, C, STRIDE_PJ, C_MAIN, C_TAIL)
                c = tl.dot(z, tl.trans(p), c, input_precision=PRECISION)
        # c + bias would become the product's accumulator, whose load is not prefetched; a difference is left alone
        tilt = tl.load(bias_ptr + offs_j, mask=mask_k, other=0.0)[None, :]
        if HAS_MEAN:
            tilt = m[:, None] * tl.load(slope_ptr + offs_j, mask=mask_k, other=0.0)[None, :] + tilt
        if HAS_SCALE:
            c *= s[:, None]
            tilt = s[:, None] * tilt
        c -= tl.load(offset_ptr + offs_j, mask=mask_k, other=0.0)[None, :] - tilt
        if PER_ROW:
            offs = offs_w[:, None] + offs_j[None, :] * stride_wj
            c *= tl.load(weight_ptr + offs, mask=mask_n[:, None] & mask_k[None, :], other=0.0)
        else:
            c *= tl.load(weight_ptr + offs_j * stride_wj, mask=mask_k, other=0.0)[None, :]
        offs_b = (offs_j * D)[:, None] + offs_d[None, :]
        b = tl.load(
            basis_ptr + offs_b, mask=mask_k[:, None] & mask_d[None, :], other=0.0
        )  # [BLOCK_K, BLOCK_D]
        acc = tl.dot(c.to(b.dtype), b, acc, input_precision=PRECISION)

    offs_y = (split.to(tl.int64) * PAIRS + pair)[:, None] * D + offs_d[None, :]
    tl.store(y_ptr + offs_y, acc.to(y_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_d[None, :])


@triton.jit
def _sum_partials_kernel(partial_ptr, y_ptr, size, SPLITS, BLOCK: tl.constexpr, BLOCK_S: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, SPLITS, BLOCK_S):
        offs_s = first + tl.arange(0, BLOCK_S)
        mask = (offs_s < SPLITS)[:, None] & (offs < size)[None, :]
        part = tl.load(
            partial_ptr + offs_s.to(tl.int64)[:, None] * size + offs[None, :], mask=mask, other=0.0
        )
        acc += tl.sum(part, axis=0)
    tl.store(y_ptr + offs, acc.to(y_ptr.dtype.element_ty), mask=offs < size)


@triton.jit
def _coefficients_kernel(
    z_ptr, scale_ptr, mean_ptr, weight_ptr, index_ptr, proj_ptr, bias_ptr, slope_ptr, offset_ptr, chunk_ptr,
    unit_chunk_ptr, c_ptr,
    N, FIRST, PAIRS, J, tiles,
    stride_zn, stride_zr, stride_zc, stride_sn, stride_mn, stride_wt, stride_wj,
    HAS_SCALE: tl.constexpr, HAS_MEAN: tl.constexpr, HAS_INDEX: tl.constexpr,
    PRECISION: tl.constexpr, C: tl.constexpr, C_MAIN: tl.constexpr, C_TAIL: tl.constexpr, STRIDE_PJ: tl.constexpr,
    ALIGN_Z: tl.constexpr, ALIGN_J: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    EXACT: tl.constexpr = PRECISION == "ieee" and z_ptr.dtype.element_ty == tl.float32
    pid = tl.program_id(0)
    unit = pid // tiles
    local = (pid % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)  # row of the workspace; FIRST is its first output
    mask_n = local < PAIRS
    pair = local.to(tl.int64) + FIRST
    if HAS_INDEX:
        row = pair
        task = tl.load(index_ptr + pair, mask=mask_n, other=0)
    else:
        row = pair % N
        task = pair // N
    offs_z = tl.multiple_of(row * stride_zn, ALIGN_Z) + tl.multiple_of(unit.to(tl.int64) * stride_zr, ALIGN_Z)
    if not EXACT:
        z = _load_unit(z_ptr, offs_z, mask_n, stride_zc, C, 0, C_MAIN)
        if C_TAIL > 0:
            z_tail = _load_unit(z_ptr, offs_z, mask_n, stride_zc, C, C_MAIN, C_TAIL)
    if HAS_SCALE:
        s = tl.load(scale_ptr + row * stride_sn, mask=mask_n, other=0.0)
    if HAS_MEAN:
        m = tl.load(mean_ptr + row * stride_mn, mask=mask_n, other=0.0)
    for i in range(tl.load(unit_chunk_ptr + unit), tl.load(unit_chunk_ptr + unit + 1)):
        _, offs_j, mask_k = _decode(tl.load(chunk_ptr + i), ALIGN_J, BLOCK_K)
        if EXACT:
            c = _project_exactly(
                z_ptr, offs_z, mask_n, stride_zc, proj_ptr, offs_j, mask_k, C, STRIDE_PJ, BLOCK_N, BLOCK_K
            )
        else:
            p = _load_proj(proj_ptr, offs_j, mask_k, C, STRIDE_PJ, 0, C_MAIN)
            c = tl.dot(z, tl.trans(p), input_precision=PRECISION)  # [BLOCK_N, BLOCK_K]
            if C_TAIL > 0:
                p = _load_proj(proj_ptr, offs_j, mask_k, C, STRIDE_PJ, C_MAIN, C_TAIL)
                c = tl.dot(z_tail, tl.trans(p), c, input_precision=PRECISION)
        tilt = tl.load(bias_ptr + offs_j, mask=mask_k, other=0.0)[None, :]
        if HAS_MEAN:
            tilt = m[:, None] * tl.load(slope_ptr + offs_j, mask=mask_k, other=0.0)[None, :] + tilt
        if HAS_SCALE:
            c *= s[:, None]
            tilt = s[:, None] * tilt
        c -= tl.load(offset_ptr + offs_j, mask=mask_k, other=0.0)[None, :] - tilt
        mask = mask_n[:, None] & mask_k[None, :]
        c *= tl.load(
            weight_ptr + (task * stride_wt)[:, None] + offs_j[None, :] * stride_wj, mask=mask, other=0.0
        )
        offs_c = (local.to(tl.int64) * J)[:, None] + offs_j[None, :]
        tl.store(c_ptr + offs_c, c.to(c_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Constants:
    """The packed constants of narrow units, by name; `tensors` and `sizes` of triton_backend.pack in their order."""

    proj: Tensor  # [J, C rounded up to 16]
    bias: Tensor
    slope: Tensor
    offset: Tensor
    basis: Tensor  # [J, D]
    chunks: Tensor  # int64 [chunks]: unit << 40 | length << 32 | first component
    unit_chunks: Tensor  # int32 [R+1]: first chunk of each unit
    units: int
    coordinates: int
    block_k: int
    align_j: int  # divides every chunk's first component

    @property
    def components(self) -> int:
        return self.basis.shape[0]

    @property
    def dim(self) -> int:
        return self.basis.shape[1]


def shared_arguments(
    z: Tensor, scale: Tensor | None, mean: Tensor | None, constants: Constants, precision: str
) -> dict:
    """Arguments that every kernel reading z takes."""
    main, tail = pieces(constants.coordinates)
    return {
        "z_ptr": z,
        "scale_ptr": scale,
        "mean_ptr": mean,
        "proj_ptr": constants.proj,
        "bias_ptr": constants.bias,
        "slope_ptr": constants.slope,
        "offset_ptr": constants.offset,
        "chunk_ptr": constants.chunks,
        "stride_zn": z.stride(0),
        "stride_zr": z.stride(1),
        "stride_zc": z.stride(2),
        "stride_sn": 0 if scale is None else scale.stride(0),
        "stride_mn": 0 if mean is None else mean.stride(0),
        "HAS_SCALE": scale is not None,
        "HAS_MEAN": mean is not None,
        "PRECISION": precision,
        "C": constants.coordinates,
        "C_MAIN": main,
        "C_TAIL": tail,
        "STRIDE_PJ": constants.proj.stride(0),
        "ALIGN_Z": gcd(z.stride(0), z.stride(1), 16),
        "ALIGN_J": constants.align_j,
        "BLOCK_K": constants.block_k,
    }


def fused_forward(
    z: Tensor,
    scale: Tensor | None,
    mean: Tensor | None,
    weight: Tensor,
    weight_index: Tensor | None,
    constants: Constants,
    precision: str,
    tiles: Tiles,
    splits: int,
) -> Tensor:
    """weight [T, J] -> y [T, N, D], or [N, D] with weight_index; `splits` partial sums over the chunks."""
    rows, tasks, dim = len(z), len(weight), constants.dim
    indexed = weight_index is not None
    pairs = rows if indexed else rows * tasks
    per_row = indexed or (tasks > 1 and rows < tiles.block_n)
    row_tiles = triton.cdiv(pairs, tiles.block_n) if per_row else tasks * triton.cdiv(rows, tiles.block_n)
    column_tiles = triton.cdiv(dim, tiles.block_d)
    y = z.new_empty((rows, dim) if indexed else (tasks, rows, dim))
    partial = y if splits == 1 else z.new_empty((splits, pairs, dim), dtype=torch.float32)
    _spectral_reweight_fwd_kernel[(row_tiles * column_tiles * splits,)](
        **shared_arguments(z, scale, mean, constants, precision),
        weight_ptr=weight, index_ptr=weight_index, basis_ptr=constants.basis, y_ptr=partial,
        N=rows, PAIRS=pairs, D=dim, CHUNKS=len(constants.chunks), SPLITS=splits, tiles=row_tiles,
        column_tiles=column_tiles, stride_wt=weight.stride(0), stride_wj=weight.stride(1),
        HAS_INDEX=indexed, PER_ROW=per_row, BLOCK_N=tiles.block_n, BLOCK_D=tiles.block_d,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    if splits > 1:
        size = pairs * dim
        _sum_partials_kernel[(triton.cdiv(size, 256),)](
            partial, y, size, splits, BLOCK=256, BLOCK_S=8, num_warps=4, num_stages=2
        )
    return y


def coefficients(
    z: Tensor,
    scale: Tensor | None,
    mean: Tensor | None,
    weight: Tensor,
    weight_index: Tensor | None,
    constants: Constants,
    precision: str,
    tiles: Tiles,
    first: int,
    out: Tensor,
) -> None:
    """Writes weight * c of outputs first, first + 1, ... (rows, or tasks x rows) to `out` [outputs, J]."""
    row_tiles = triton.cdiv(len(out), tiles.block_n)
    _coefficients_kernel[(row_tiles * constants.units,)](
        **shared_arguments(z, scale, mean, constants, precision),
        weight_ptr=weight, index_ptr=weight_index, unit_chunk_ptr=constants.unit_chunks, c_ptr=out,
        N=len(z), FIRST=first, PAIRS=len(out), J=constants.components, tiles=row_tiles,
        stride_wt=weight.stride(0), stride_wj=weight.stride(1), HAS_INDEX=weight_index is not None,
        BLOCK_N=tiles.block_n, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
