"""y[n] = sum_j weight[j] * c[n,j] * basis[j]: the route `fused`, one kernel for the whole sum.

With c[n,j] = scale[n] * (z[n,r(j)] . proj[j] + bias[j] + mean[n] * slope[j]) - offset[j]. Components are
walked in chunks of at most BLOCK_K, each inside one unit, so that ragged units cost no more than their own
components. A program owns [BLOCK_N, BLOCK_D] of y and a run of chunks; nothing of size N x J exists. Best
while reading the constants is what takes the time (few rows).
"""

import triton
import triton.language as tl
from torch import Tensor, float32

from residual_kernels.ops.triton import routes
from residual_kernels.ops.triton.kernel_layout import MOVING, Call
from residual_kernels.ops.triton.launch import Launch, kept
from residual_kernels.ops.triton.routes import Problem, Tiles
from residual_kernels.ops.triton.tiles import (
    contiguous_rows,
    decode,
    load_proj,
    load_unit,
    load_vector,
    padded_weights,
    project_exactly,
    weight_stride,
)


@triton.jit(do_not_specialize=["N", "PAIRS", "steps", "rest", "row_tiles"])
def _spectral_reweight_fwd_kernel(
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
    chunk_ptr,
    y_ptr,
    N,
    PAIRS,
    D,
    steps,
    rest,
    row_tiles,
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
    PER_ROW: tl.constexpr,
    SINGLE: tl.constexpr,
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
    tile, split = tl.program_id(0), tl.program_id(2)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    if PER_ROW:  # a tile is any BLOCK_N outputs, each with a weight of its own
        pair = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = pair < PAIRS
        if HAS_INDEX:
            row = pair
            task = tl.load(index_ptr + pair, mask=mask_n, other=0)
        else:
            row = pair % N
            task = (pair // N).to(tl.int64)
        weight_rows_ptr = weight_ptr + tl.multiple_of(task * stride_wt, 8)
    elif SINGLE:
        row = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = row < N
        pair = row
    else:  # a tile is BLOCK_N rows of one task
        row = (tile % row_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = row < N
        pair = (tile // row_tiles) * N + row
        weight_ptr += (tile // row_tiles).to(tl.int64) * stride_wt
    row = row.to(tl.int64)
    z_rows_ptr = z_ptr + tl.multiple_of(row * stride_zn, ALIGN_Z)
    mask_d = offs_d < D
    if HAS_SCALE:
        s = tl.load(scale_ptr + row * stride_sn, mask=mask_n, other=0.0)
    if HAS_MEAN:
        m = tl.load(mean_ptr + row * stride_mn, mask=mask_n, other=0.0)

    acc = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    begin = split * steps + tl.minimum(split, rest)
    end = begin + steps + (split < rest).to(tl.int32)
    code = tl.load(chunk_ptr + begin)
    for i in range(begin, end):
        unit, first, length, low, mask_k = decode(code, BLOCK_K)
        # One step ahead, so that addresses never wait for the table and the pipeline's stages go to the
        # tiles.
        code = tl.load(chunk_ptr + tl.minimum(i + 1, end - 1))
        unit_rows_ptr = z_rows_ptr + tl.multiple_of(unit * stride_zr, ALIGN_Z)
        if EXACT:
            c = project_exactly(
                unit_rows_ptr, mask_n, stride_zc, proj_ptr, first, mask_k, C, STRIDE_PJ, BLOCK_N, BLOCK_K
            )
        else:
            z = load_unit(unit_rows_ptr, mask_n, stride_zc, C, 0, C_MAIN)
            p = load_proj(proj_ptr, first, mask_k, C, STRIDE_PJ, 0, C_MAIN, BLOCK_K)
            c = tl.dot(z, tl.trans(p), input_precision=PRECISION)  # [BLOCK_N, BLOCK_K]
            if C_TAIL > 0:
                z = load_unit(unit_rows_ptr, mask_n, stride_zc, C, C_MAIN, C_TAIL)
                p = load_proj(proj_ptr, first, mask_k, C, STRIDE_PJ, C_MAIN, C_TAIL, BLOCK_K)
                c = tl.dot(z, tl.trans(p), c, input_precision=PRECISION)
        # c + bias would become the product's accumulator, whose load is not prefetched; a difference is left
        # alone
        tilt = load_vector(bias_ptr, first, mask_k, BLOCK_K)
        if HAS_MEAN:
            tilt = m[:, None] * load_vector(slope_ptr, first, mask_k, BLOCK_K) + tilt
        if HAS_SCALE:
            c *= s[:, None]
            tilt = s[:, None] * tilt
        c -= load_vector(offset_ptr, first, mask_k, BLOCK_K) - tilt
        offs_k = tl.arange(0, BLOCK_K)
        if PER_ROW:
            w_ptr = weight_rows_ptr[:, None] + first + offs_k[None, :]
            c *= tl.load(w_ptr, mask=mask_n[:, None] & mask_k[None, :], other=0.0)
        else:
            c *= tl.load(weight_ptr + low + offs_k, mask=offs_k < length, other=0.0)[None, :]
        offs_b = (offs_k * stride_bj)[:, None] + offs_d[None, :]
        # [BLOCK_K, BLOCK_D]
        b = tl.load(basis_ptr + first * stride_bj + offs_b, mask=mask_k[:, None] & mask_d[None, :], other=0.0)
        acc = tl.dot(c.to(b.dtype), b, acc, input_precision=PRECISION)

    offs_y = (split.to(tl.int64) * PAIRS + pair)[:, None] * D + offs_d[None, :]
    tl.store(y_ptr + offs_y, acc.to(y_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_d[None, :])


@triton.jit(do_not_specialize=["size", "SPLITS"])
def _sum_partials_kernel(
    partial_ptr, y_ptr, size, SPLITS, ALIGN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_S: tl.constexpr
):
    """y = sum of partial [SPLITS, size], in a fixed order."""
    size = tl.multiple_of(tl.cast(size, tl.int64), ALIGN)  # a hint on an argument itself would be lost
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs // ALIGN < size // ALIGN
    acc = tl.zeros([BLOCK_S, BLOCK], dtype=tl.float32)
    for first in range(0, SPLITS, BLOCK_S):
        offs_s = first + tl.arange(0, BLOCK_S)
        offs_p = offs_s.to(tl.int64)[:, None] * size + offs[None, :]
        acc += tl.load(partial_ptr + offs_p, mask=(offs_s < SPLITS)[:, None] & mask[None, :], other=0.0)
    tl.store(y_ptr + offs, tl.sum(acc, axis=0).to(y_ptr.dtype.element_ty), mask=mask)


def sum_partials(partial: Tensor, out: Tensor) -> None:
    """Writes the sum of float32 partial [splits, ...] over its first axis into `out`, cast to its dtype."""
    size, splits = out.numel(), partial.shape[0]

    def make() -> Launch:
        arguments = {
            "size": size,
            "SPLITS": splits,
            "ALIGN": 4 if size % 4 == 0 else 1,
            "BLOCK": 128,
            "BLOCK_S": 8,
        }
        return Launch(_sum_partials_kernel, (-(-size // 128),), ("partial_ptr", "y_ptr"), arguments, 1, 1)

    kept(("sum", size, splits, out.dtype, out.device), make)(partial, out)


def fused_forward(call: Call) -> Tensor:
    """weight [T, J] -> y [T, N, D], or [N, D] with weight_index: partial sums over the chunks,
    then their sum."""
    launch, per_row, splits, shape, pairs = kept(("fused", call.key), lambda: _prepare(call))
    z, constants = call.z, call.constants
    weight = padded_weights(call.weight, constants) if per_row else contiguous_rows(call.weight)
    y = z.new_empty(shape)
    partial = y if splits == 1 else z.new_empty((splits, pairs, constants.dim), dtype=float32)
    launch(*call.leading(), weight, call.index, constants.basis, constants.chunks, partial)
    if splits > 1:
        sum_partials(partial, y)
    return y


def _prepare(call: Call) -> tuple[Launch, bool, int, tuple[int, ...], int]:
    p, constants = call.problem, call.constants
    tiles = tiles_of(p)
    splits = splits_of(p, tiles)
    per_row = p.indexed or (p.tasks > 1 and p.rows < tiles.block_n)
    row_tiles = -(-p.rows // tiles.block_n)
    grid_tiles = -(-p.pairs // tiles.block_n) if per_row else p.tasks * row_tiles
    steps, rest = divmod(p.chunks, splits)
    stride_wt = constants.padded if per_row else weight_stride(call.weight)
    arguments = call.arguments() | {
        "N": p.rows,
        "PAIRS": p.pairs,
        "D": p.dim,
        "steps": steps,
        "rest": rest,
        "row_tiles": row_tiles,
        "stride_wt": stride_wt,
        "stride_bj": constants.basis.stride(0),
        "SINGLE": p.tasks == 1,
        "HAS_INDEX": p.indexed,
        "PER_ROW": per_row,
        "BLOCK_N": tiles.block_n,
        "BLOCK_D": tiles.block_d,
    }
    moving = (*MOVING, "weight_ptr", "index_ptr", "basis_ptr", "chunk_ptr", "y_ptr")
    grid = (grid_tiles, -(-p.dim // tiles.block_d), splits)
    launch = Launch(_spectral_reweight_fwd_kernel, grid, moving, arguments, tiles.warps, tiles.stages)
    shape = (p.rows, p.dim) if p.indexed else (p.tasks, p.rows, p.dim)
    return launch, per_row, splits, shape, p.pairs


def tiles_of(p: Problem) -> Tiles:
    """[rows, columns of y]. Wide in D: every column tile reads z and proj again."""
    if p.hip:  # 64 KB of shared memory
        rows, columns, warps, most = (64, 128, 4, 2) if p.kind == "half" else (32, 32, 4, 2)
    elif p.kind == "half":
        rows, columns, warps, most = (64, 256, 4, 4) if p.pairs <= 64 else (128, 256, 8, 3)
        if p.indexed or (p.tasks > 1 and p.rows < rows):  # weights of every row take registers too
            rows, columns, warps, most = 64, 128, 4, 3
        elif rows == 64 and p.block_k == 16 and routes.pieces(p.coordinates)[1] == 16:
            columns = 128  # a tail beside short chunks: 256 would spill
    else:
        rows, columns, warps, most = (64, 64, 4, 3) if p.kind == "tf32" else (32, 64, 4, 2)
    if p.pairs <= 16:
        columns = 512 if p.kind == "half" and p.dim > 256 and not p.hip else columns
        rows, warps = 16, 8 if columns > 256 else 4
    step = ((rows + p.block_k) * sum(routes.pieces(p.coordinates)) + p.block_k * columns) * p.itemsize
    spare = 1 if rows == 16 else 0  # mma.sync needs one buffer fewer than wgmma
    return Tiles(rows, columns, warps, max(2, min(most, 150 * 1024 // step + spare)))


def splits_of(p: Problem, tiles: Tiles) -> int:
    """Partial sums of the fused forward: enough programs to fill a nominal chip,
    few enough to add up cheaply."""
    programs = -(-p.pairs // tiles.block_n) * -(-p.dim // tiles.block_d)
    slots = routes.PROCESSORS
    step_bytes = p.block_k * (tiles.block_d + p.coordinates) * p.itemsize
    step_flops = 2.0 * tiles.block_n * p.block_k * (tiles.block_d + sum(routes.pieces(p.coordinates)))
    step = max(step_bytes / (routes.BANDWIDTH / slots), step_flops / (routes.KERNEL_RATE[p.kind] / slots))
    most = max(1, min(p.chunks, routes.WORKSPACE // (4 * p.pairs * p.dim)))

    def cost(splits: int) -> float:
        waves = -(-programs * splits // slots)
        return waves * -(-p.chunks // splits) * step + merge(splits, p)

    return min(range(1, min(most, 2 * slots) + 1), key=cost)


def merge(splits: int, p: Problem) -> float:
    """Writing, reading and adding float32 partial sums of y."""
    return 0.0 if splits == 1 else routes.LAUNCH + 8.0 * splits * p.pairs * p.dim / routes.CACHE_BANDWIDTH


def estimate(p: Problem) -> float:
    """Nominal seconds of this route."""
    z, proj, basis = routes.sizes(p)
    tiles = tiles_of(p)
    row_tiles, column_tiles = -(-p.pairs // tiles.block_n), -(-p.dim // tiles.block_d)
    operations = 2.0 * row_tiles * tiles.block_n * p.chunks * p.block_k
    operations *= column_tiles * (tiles.block_d + sum(routes.pieces(p.coordinates)))
    cached = (row_tiles - 1) * basis + (row_tiles * column_tiles - 1) * proj - z
    # Every chunk reads its unit's z.
    cached += column_tiles * float(p.chunks) * p.pairs * p.coordinates * p.itemsize
    steps = float(row_tiles) * column_tiles * p.chunks
    splits = splits_of(p, tiles)
    programs = row_tiles * column_tiles * splits
    issued = tiles.warps * (programs * 700.0 + steps * step_instructions(p, tiles))
    moved = routes.launch(z + proj + basis, operations, routes.KERNEL_RATE[p.kind], cached, issued)
    return moved + merge(splits, p)


def step_instructions(p: Problem, tiles: Tiles) -> float:
    """Warp instructions of a step of the loop over chunks: a rough fit to code for sm_90."""
    return 150.0 + 0.05 * tiles.block_n * p.block_k / tiles.warps


ROUTE = routes.Route(
    "fused",
    serves=lambda p: p.coordinates <= routes.NARROW,
    estimate=estimate,
    tiles=tiles_of,
    run=fused_forward,
    reason=lambda p: f"with {p.pairs} rows of output, reading the constants once is what takes the time",
    splits=lambda p: splits_of(p, tiles_of(p)),
)
