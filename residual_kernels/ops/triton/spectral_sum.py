"""y[t,n] = sum_j weight[t,j] * c[n,j] * basis[j], and dweight[t,j] = sum_n c[n,j]
(dy[t,n] . basis[j]), in float32.

What a fit on cached units computes at every step. c * weight and t = dy . basis stay in registers, so that a
step reads c and the basis and writes y or dweight; partial sums are added in a fixed order. Products are
exact unless torch's switch allows tf32 ("high") or bfloat16 ("medium"). `pays` says where the vendor's
product on c * weight is estimated to be faster: exact float32 has no matrix unit on NVIDIA.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, float32

from residual_kernels.ops.triton import routes
from residual_kernels.ops.triton.forward import sum_partials
from residual_kernels.ops.triton.kernel_layout import Constants
from residual_kernels.ops.triton.launch import Launch, kept
from residual_kernels.ops.triton.routes import Tiles
from residual_kernels.ops.triton.tiles import (
    INTERPRETED,
    contiguous_rows,
    rows_from,
    run_of_split,
    weight_stride,
)


@triton.jit(do_not_specialize=["N", "J", "steps", "row_tiles"])
def _spectral_sum_fwd_kernel(
    c_ptr,
    weight_ptr,
    basis_ptr,
    slot_ptr,
    y_ptr,
    N,
    J,
    D,
    steps,
    row_tiles,
    stride_cn,
    stride_cj,
    stride_wt,
    stride_bj,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile, split = tl.program_id(0), tl.program_id(2)
    task = (tile // row_tiles).to(tl.int64)
    row = (tile % row_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = row < N
    row = row.to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    offs_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    begin = split * steps * BLOCK_K
    for first in range(begin, tl.minimum(begin + steps * BLOCK_K, J), BLOCK_K):
        j = first + offs_k
        mask_k = j < J
        offs_c = (row * stride_cn)[:, None] + j.to(tl.int64)[None, :] * stride_cj
        c = tl.load(c_ptr + offs_c, mask=mask_n[:, None] & mask_k[None, :], other=0.0)  # [BLOCK_N, BLOCK_K]
        c *= tl.load(weight_ptr + task * stride_wt + j, mask=mask_k, other=0.0)[None, :]
        slot = tl.load(slot_ptr + j, mask=mask_k, other=0)
        b_rows_ptr = basis_ptr + tl.multiple_of(slot * stride_bj, 8)
        b = tl.load(b_rows_ptr[:, None] + offs_d[None, :], mask=mask_k[:, None] & mask_d[None, :], other=0.0)
        if PRECISION == "bf16":
            acc = tl.dot(c.to(tl.bfloat16), b.to(tl.bfloat16), acc)
        else:
            acc = tl.dot(c, b, acc, input_precision=PRECISION)
    pair = (split.to(tl.int64) * (tl.num_programs(0) // row_tiles) + task) * N + row
    tl.store(y_ptr + (pair * D)[:, None] + offs_d[None, :], acc, mask=mask_n[:, None] & mask_d[None, :])


@triton.jit(do_not_specialize=["N", "J", "rows_per_split"])
def _spectral_sum_bwd_kernel(
    dy_ptr,
    c_ptr,
    basis_ptr,
    slot_ptr,
    dweight_ptr,
    N,
    J,
    D,
    rows_per_split,
    stride_dyt,
    stride_dyn,
    stride_dyd,
    stride_cn,
    stride_cj,
    stride_bj,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    split, task = tl.program_id(0), tl.program_id(2).to(tl.int64)
    j = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = j < J
    slot = tl.load(slot_ptr + j, mask=mask_k, other=0)
    b_rows_ptr = basis_ptr + tl.multiple_of(slot * stride_bj, 8)
    acc = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    begin, end = run_of_split(split, rows_per_split, N)
    for start in range(begin, end, BLOCK_N):
        row, mask_n = rows_from(start, end, BLOCK_N)
        dy_rows_ptr = dy_ptr + task * stride_dyt + row * stride_dyn
        t = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
        for d in range(0, D, BLOCK_D):
            offs_d = d + tl.arange(0, BLOCK_D)
            mask_d = (offs_d < D)[None, :]
            offs_dy = offs_d.to(tl.int64)[None, :] * stride_dyd
            dy = tl.load(dy_rows_ptr[:, None] + offs_dy, mask=mask_n[:, None] & mask_d, other=0.0)
            b = tl.load(b_rows_ptr[:, None] + offs_d[None, :], mask=mask_k[:, None] & mask_d, other=0.0)
            if PRECISION == "bf16":
                t = tl.dot(dy.to(tl.bfloat16), tl.trans(b.to(tl.bfloat16)), t)
            else:
                t = tl.dot(dy, tl.trans(b), t, input_precision=PRECISION)
        offs_c = (row * stride_cn)[:, None] + j.to(tl.int64)[None, :] * stride_cj
        acc += t * tl.load(c_ptr + offs_c, mask=mask_n[:, None] & mask_k[None, :], other=0.0)
    out_ptr = dweight_ptr + (split.to(tl.int64) * tl.num_programs(2) + task) * J + j
    tl.store(out_ptr, tl.sum(acc, axis=0), mask=mask_k)


def precision() -> str:
    """How float32 products are computed, by torch's own switch."""
    said = {"highest": "ieee", "high": "tf32", "medium": "bf16"}[torch.get_float32_matmul_precision()]
    return "tf32" if INTERPRETED and said == "bf16" else said  # the interpreter computes bfloat16 on its bits


def tiles_of(kind: str) -> Tiles:
    """[rows, columns of y] of the forward pass."""
    return Tiles(32, 64, 4, 2) if kind == "ieee" else Tiles(64, 64, 4, 2 if torch.version.hip else 3)


def gradient_tiles(kind: str) -> Tiles:
    """[rows, step along D] of the backward pass: 64 along D would spill on compute capability 8."""
    return tiles_of(kind) if kind == "ieee" else Tiles(64, 32, 4, 2 if torch.version.hip else 3)


def block_k(kind: str) -> int:
    """Components of a step (backward: of a program)."""
    return 16 if kind == "ieee" else 32 if torch.version.hip else 64


def pays(rows: int, tasks: int, components: int, dim: int) -> bool:
    """Whether the kernels' estimate is below that of c * weight and the vendor's product (see routes)."""
    if INTERPRETED:
        return True
    kind = precision()
    name = {"ieee": "fp32", "tf32": "tf32", "bf16": "half"}[kind]
    operations = 2.0 * tasks * rows * components * dim
    c, weighted, constants = 4.0 * rows * components, 4.0 * tasks * rows * components, 4.0 * components * dim
    tiles = tiles_of(kind)
    row_tiles, columns = tasks * -(-rows // tiles.block_n), -(-dim // tiles.block_d)
    read_again = (row_tiles - 1) * constants + (tasks * columns - 1) * c
    ours = routes.LAUNCH + routes.launch(c + constants, operations, routes.KERNEL_RATE[name], read_again)
    vendor = routes.launch(c + weighted, 0.0, 1.0)
    vendor += routes.launch(weighted + constants, operations, routes.VENDOR_RATE[name])
    return ours < vendor


def forward(c: Tensor, weight: Tensor, constants: Constants) -> Tensor:
    """c [N, J], weight [T, J] -> y [T, N, D]."""
    (rows, components), tasks, dim = c.shape, weight.shape[0], constants.dim
    kind = precision()
    weight = contiguous_rows(weight)
    key = (
        "sum",
        rows,
        tasks,
        components,
        dim,
        c.stride(),
        weight_stride(weight),
        c.device,
        constants.padded,
        kind,
    )

    def make() -> tuple[Launch, int]:
        tiles, step = tiles_of(kind), block_k(kind)
        row_tiles, columns = -(-rows // tiles.block_n), -(-dim // tiles.block_d)
        chunks = -(-components // step)
        most = max(1, routes.WORKSPACE // (4 * tasks * rows * dim))
        splits = max(1, min(4 * routes.PROCESSORS // (row_tiles * tasks * columns), chunks // 8, most))
        steps = -(-chunks // splits)
        splits = -(-chunks // steps)
        arguments = {
            "N": rows,
            "J": components,
            "D": dim,
            "steps": steps,
            "row_tiles": row_tiles,
            "stride_cn": c.stride(0),
            "stride_cj": c.stride(1),
            "stride_wt": weight_stride(weight),
            "stride_bj": constants.basis.stride(0),
            "PRECISION": kind,
            "BLOCK_N": tiles.block_n,
            "BLOCK_D": tiles.block_d,
            "BLOCK_K": step,
        }
        moving = ("c_ptr", "weight_ptr", "basis_ptr", "slot_ptr", "y_ptr")
        grid = (row_tiles * tasks, columns, splits)
        return Launch(_spectral_sum_fwd_kernel, grid, moving, arguments, tiles.warps, tiles.stages), splits

    launch, splits = kept(key, make)
    y = c.new_empty((tasks, rows, dim))
    partial = y if splits == 1 else c.new_empty((splits, tasks, rows, dim))
    launch(c, weight, constants.basis, constants.slots, partial)
    if splits > 1:
        sum_partials(partial, y)
    return y


def backward(dy: Tensor, c: Tensor, constants: Constants) -> Tensor:
    """dy [T, N, D], c [N, J] -> dweight [T, J]."""
    (tasks, rows, dim), components = dy.shape, c.shape[1]
    kind = precision()
    key = (
        "sum backward",
        rows,
        tasks,
        components,
        dim,
        c.stride(),
        dy.stride(),
        c.device,
        constants.padded,
        kind,
    )

    def make() -> tuple[Launch, int]:
        tiles, step = gradient_tiles(kind), block_k(kind)
        blocks = -(-components // step)
        splits = max(1, min(4 * routes.PROCESSORS // (blocks * tasks), -(-rows // (4 * tiles.block_n))))
        per_split = -(-rows // (splits * tiles.block_n)) * tiles.block_n
        splits = -(-rows // per_split)
        arguments = {
            "N": rows,
            "J": components,
            "D": dim,
            "rows_per_split": per_split,
            "stride_dyt": dy.stride(0),
            "stride_dyn": dy.stride(1),
            "stride_dyd": dy.stride(2),
            "stride_cn": c.stride(0),
            "stride_cj": c.stride(1),
            "stride_bj": constants.basis.stride(0),
            "PRECISION": kind,
            "BLOCK_N": tiles.block_n,
            "BLOCK_D": tiles.block_d,
            "BLOCK_K": step,
        }
        moving = ("dy_ptr", "c_ptr", "basis_ptr", "slot_ptr", "dweight_ptr")
        grid = (splits, blocks, tasks)
        return Launch(_spectral_sum_bwd_kernel, grid, moving, arguments, tiles.warps, tiles.stages), splits

    launch, splits = kept(key, make)
    partial = c.new_empty((splits, tasks, components), dtype=float32)
    launch(dy, c, constants.basis, constants.slots, partial)
    if splits == 1:
        return partial[0]
    out = c.new_empty((tasks, components), dtype=float32)
    sum_partials(partial, out)
    return out
