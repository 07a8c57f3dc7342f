"""scaled[n] = s[n] dy[n], with (sum_n scaled[n], sum_n m[n] scaled[n], sum_n dy[n]):
where the fold's gradient starts.

One pass over dy. A program owns a run of rows and some columns; its sums leave as partial sums in a fixed
order.
"""

import triton
import triton.language as tl
from torch import Tensor, float32, stack

from residual_kernels.ops.triton import routes
from residual_kernels.ops.triton.forward import sum_partials
from residual_kernels.ops.triton.launch import Launch, kept
from residual_kernels.ops.triton.tiles import rows_from, run_of_split

BLOCK_N, BLOCK_D = 32, 128


@triton.jit(do_not_specialize=["N", "rows_per_split"])
def _scaled_kernel(
    dy_ptr,
    scale_ptr,
    mean_ptr,
    scaled_ptr,
    sums_ptr,
    N,
    D,
    rows_per_split,
    stride_dyn,
    stride_dyd,
    stride_sn,
    stride_mn,
    HAS_SCALE: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    split = tl.program_id(0)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    total = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    tilted = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    plain = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    begin, end = run_of_split(split, rows_per_split, N)
    for start in range(begin, end, BLOCK_N):
        row, mask_n = rows_from(start, end, BLOCK_N)
        mask = mask_n[:, None] & mask_d[None, :]
        offs = (row * stride_dyn)[:, None] + offs_d.to(tl.int64)[None, :] * stride_dyd
        dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_D]
        plain += dy
        if HAS_SCALE:
            dy *= tl.load(scale_ptr + row * stride_sn, mask=mask_n, other=0.0)[:, None]
            rounded = dy.to(scaled_ptr.dtype.element_ty)  # the product reads it so, and the sums go with it
            tl.store(scaled_ptr + (row * D)[:, None] + offs_d[None, :], rounded, mask=mask)
            dy = rounded.to(tl.float32)
        total += dy
        if HAS_MEAN:
            tilted += tl.load(mean_ptr + row * stride_mn, mask=mask_n, other=0.0)[:, None] * dy
    out_ptr = sums_ptr + split.to(tl.int64) * 3 * D + offs_d
    tl.store(out_ptr, tl.sum(total, axis=0), mask=mask_d)
    tl.store(out_ptr + D, tl.sum(tilted, axis=0), mask=mask_d)
    tl.store(out_ptr + 2 * D, tl.sum(plain, axis=0), mask=mask_d)


def _plainly(dy: Tensor, scale: Tensor | None, mean: Tensor | None) -> tuple[Tensor, Tensor]:
    scaled = dy if scale is None else (scale[:, None] * dy).to(dy.dtype)
    wide = scaled.to(float32)
    tilted = dy.new_zeros(dy.shape[1], dtype=float32) if mean is None else mean @ wide
    return scaled, stack([wide.sum(0), tilted, dy.sum(0, dtype=float32)])


def scaled_with_sums(dy: Tensor, scale: Tensor | None, mean: Tensor | None) -> tuple[Tensor, Tensor]:
    """(s * dy [N, D] in dy's dtype, the three sums [3, D] in float32); without a scale dy itself."""
    rows, dim = dy.shape
    if dim < 16:  # nothing to save, and Triton 3.8's compiler ends on rows of one float32
        return _plainly(dy, scale, mean)
    key = (
        "scaled",
        rows,
        dy.stride(),
        dy.dtype,
        dy.device,
        *(None if x is None else x.stride() for x in (scale, mean)),
    )

    def make() -> tuple[Launch, int]:
        columns = -(-dim // BLOCK_D)
        splits = max(1, min(2 * routes.PROCESSORS // columns, -(-rows // BLOCK_N)))
        per_split = -(-rows // (splits * BLOCK_N)) * BLOCK_N
        splits = -(-rows // per_split)
        arguments = {
            "N": rows,
            "D": dim,
            "rows_per_split": per_split,
            "stride_dyn": dy.stride(0),
            "stride_dyd": dy.stride(1),
            "stride_sn": 0 if scale is None else scale.stride(0),
            "stride_mn": 0 if mean is None else mean.stride(0),
            "HAS_SCALE": scale is not None,
            "HAS_MEAN": mean is not None,
            "BLOCK_N": BLOCK_N,
            "BLOCK_D": BLOCK_D,
        }
        moving = ("dy_ptr", "scale_ptr", "mean_ptr", "scaled_ptr", "sums_ptr")
        return Launch(_scaled_kernel, (splits, columns), moving, arguments, 4, 2), splits

    launch, splits = kept(key, make)
    scaled = None if scale is None else dy.new_empty(dy.shape)
    partial = dy.new_empty((splits, 3, dim), dtype=float32)
    launch(dy, scale, mean, scaled, partial)
    if splits == 1:
        sums = partial[0]
    else:
        sums = dy.new_empty((3, dim), dtype=float32)
        sum_partials(partial, sums)
    return dy if scaled is None else scaled, sums
