"""What do all kernels of `spectral_reweight` share? Chunks, loads of tiles, and weights as they read them."""

import triton
import triton.language as tl
from torch import Tensor

from residual_kernels.ops.triton.kernel_layout import Constants

INTERPRETED = bool(triton.knobs.runtime.interpret)  # what the kernels were made as: NumPy programs on the CPU


@triton.jit
def run_of_split(split, rows_per_split, N):
    """First row of a split of N rows, and the row behind its last one."""
    begin = split * rows_per_split
    return begin, tl.minimum(begin + rows_per_split, N)


@triton.jit
def rows_from(start, end, BLOCK_N: tl.constexpr):
    """The BLOCK_N rows from `start` on, int64, and which of them are before `end`."""
    row = start + tl.arange(0, BLOCK_N)
    return row.to(tl.int64), row < end


@triton.jit
def decode(code, BLOCK_K: tl.constexpr):
    """(unit, first padded component, components, first in the caller's order, mask of the padded run) of a
    chunk."""
    first = ((code >> 24) & 0x1FFFFF) * 8
    length = ((code >> 17) & 127).to(tl.int32)
    offs_k = tl.arange(0, BLOCK_K)
    mask_k = offs_k // 8 < (length + 7) // 8
    return code >> 45, tl.multiple_of(first, 8), length, first - (code & 0x1FFFF), mask_k


@triton.jit
def load_unit(z_rows_ptr, mask_n, stride_zc, C: tl.constexpr, FIRST: tl.constexpr, BLOCK_C: tl.constexpr):
    """Coordinates FIRST .. FIRST + BLOCK_C - 1 of a unit for the rows at `z_rows_ptr` [BLOCK_N]."""
    offs_c = FIRST + tl.arange(0, BLOCK_C)
    mask = mask_n[:, None]
    if FIRST + BLOCK_C > C:
        mask = mask & (offs_c < C)[None, :]
    # [BLOCK_N, BLOCK_C]
    return tl.load(z_rows_ptr[:, None] + offs_c[None, :] * stride_zc, mask=mask, other=0.0)


@triton.jit
def load_proj(
    proj_ptr,
    first,
    mask_k,
    C: tl.constexpr,
    STRIDE_PJ: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows first .. first + BLOCK_K - 1 of proj; behind C it holds zeros up to its row length."""
    offs_c = FIRST + tl.arange(0, BLOCK_C)
    mask = mask_k[:, None]
    if FIRST + BLOCK_C > STRIDE_PJ:
        mask = mask & (offs_c < C)[None, :]
    offs = (tl.arange(0, BLOCK_K) * STRIDE_PJ)[:, None] + offs_c[None, :]
    # [BLOCK_K, BLOCK_C]
    return tl.load(proj_ptr + tl.cast(first, tl.int64) * STRIDE_PJ + offs, mask=mask, other=0.0)


@triton.jit
def project_exactly(
    z_rows_ptr,
    mask_n,
    stride_zc,
    proj_ptr,
    first,
    mask_k,
    C: tl.constexpr,
    STRIDE_PJ: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """z . proj in exact float32, 16 coordinates at a time:
    without tensor cores a longer step overflows registers."""
    acc = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    offs_p = (tl.arange(0, BLOCK_K) * STRIDE_PJ)[:, None]
    for c in range(0, C, 16):
        offs_c = c + tl.arange(0, 16)
        mask_c = (offs_c < C)[None, :]
        z = tl.load(
            z_rows_ptr[:, None] + offs_c[None, :] * stride_zc, mask=mask_n[:, None] & mask_c, other=0.0
        )
        p = tl.load(
            proj_ptr + tl.cast(first, tl.int64) * STRIDE_PJ + offs_p + offs_c[None, :],
            mask=mask_k[:, None],
            other=0.0,
        )
        acc = tl.dot(z, tl.trans(p), acc, input_precision="ieee")
    return acc  # [BLOCK_N, BLOCK_K]


@triton.jit
def load_vector(ptr, first, mask_k, BLOCK_K: tl.constexpr):
    """A constant of the chunk's components, float32 [1, BLOCK_K]."""
    return tl.load(ptr + first + tl.arange(0, BLOCK_K), mask=mask_k, other=0.0)[None, :]


def padded_weights(weight: Tensor, constants: Constants) -> Tensor:
    """weight [T, J] as [T, P], for tiles in which every row has weights of its own:
    read 16 bytes at a time."""
    return weight.index_select(1, constants.sources)


def contiguous_rows(weight: Tensor) -> Tensor:
    """weight [T, J] with its components side by side."""
    return weight if weight.stride(1) == 1 else weight.contiguous()


def weight_stride(weight: Tensor) -> int:
    """Distance of two tasks' weights in what :func:`contiguous_rows` returns."""
    return weight.stride(0) if weight.stride(1) == 1 else weight.shape[1]
