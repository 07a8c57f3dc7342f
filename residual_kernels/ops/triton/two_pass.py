"""The route `two_pass`: half of the work is one product of the vendor, on [rows, P] in a bounded workspace.

Forward, coefficients are written and multiplied by basis; backward, t = dy . basis is made and a kernel reads
it. Products accumulate in float32 and round once (:mod:`residual_kernels.ops.triton.products`).
"""

import torch
from torch import Tensor

from residual_kernels.ops.triton import backward as general
from residual_kernels.ops.triton import coefficients, routes, stream
from residual_kernels.ops.triton import dweight as lone
from residual_kernels.ops.triton.forward import merge, sum_partials
from residual_kernels.ops.triton.kernel_layout import Call
from residual_kernels.ops.triton.launch import kept
from residual_kernels.ops.triton.products import product, product_float32
from residual_kernels.ops.triton.routes import Problem


def run_forward(call: Call) -> Tensor:
    """weight [T, J] -> y [T, N, D], or [N, D] with an index."""
    constants, z = call.constants, call.z
    rows, tasks = z.shape[0], 1 if call.index is not None else call.weight.shape[0]
    most = kept(("rows", call.key), lambda: min(routes.workspace_rows(call.problem), rows))
    y = z.new_empty((tasks, rows, constants.dim))
    workspace = z.new_empty(tasks * most * constants.padded)
    for first in range(0, rows, most):
        count = min(most, rows - first)
        block = workspace[: tasks * count * constants.padded].view(tasks, count, constants.padded)
        coefficients.coefficients(call.rows(first, count), block)
        # Several tasks are one product where all rows fit; else each task's rows are a contiguous part of y.
        if most == rows:
            pairs = [(block.view(-1, constants.padded), y.view(-1, constants.dim))]
        else:
            pairs = [(block[task], y[task, first : first + count]) for task in range(tasks)]
        for left, out in pairs:
            if torch.version.hip is None or z.dtype == torch.float32:
                product(left, constants.narrow_basis, out)
            else:  # whose library has no switch for how parts of a sum are added
                sum_partials(product_float32(left, constants.narrow_basis)[None], out)
    return y[0] if call.index is not None else y


def run_backward(call: Call, dy: Tensor, wanted: list[bool]) -> list[Tensor]:
    """The wanted ones of (dweight, dz, dscale, dmean); dy is [T, N, D], or [1, N, D] with an index."""
    p, constants, z = call.problem, call.constants, call.z
    if stream.serves(p, call):
        return stream.run_backward(call, dy, wanted)
    tasks, rows, _ = dy.shape
    dz = z.new_empty(z.shape) if wanted[1] else None
    most = kept(("rows", call.key), lambda: min(routes.workspace_rows(p), rows))
    workspace = z.new_empty(tasks * most * constants.padded)
    dweight: Tensor | None = None
    more: Tensor | None
    dscales: list[Tensor | None] = []
    dmeans: list[Tensor | None] = []
    for first in range(0, rows, most):
        count = min(most, rows - first)
        part, upstream = call.rows(first, count), dy[:, first : first + count]
        t = workspace[: tasks * count * constants.padded].view(tasks, count, constants.padded)
        if tasks == 1:
            product(upstream[0], constants.narrow_basis.T, t[0])
        else:
            product(upstream, constants.narrow_basis.T, t)
        if p.lone:
            more = lone.dweight(part, upstream[0], t[0])[None]
        else:
            own = None if dz is None else dz[first : first + count]
            more, dscale, dmean = general.backward(part, upstream, t, wanted, own)
            dscales.append(dscale)
            dmeans.append(dmean)
        dweight = more if dweight is None or more is None else dweight.add_(more)
    grads = [grad for grad in (dweight, dz) if grad is not None]
    pieces = [blocks for blocks, want in ((dscales, wanted[2]), (dmeans, wanted[3])) if want]
    return grads + [torch.cat([block for block in blocks if block is not None]) for blocks in pieces]


def blocks_of(p: Problem) -> int:
    return -(-p.rows // routes.workspace_rows(p))


def estimate_forward(p: Problem) -> float:
    """Nominal seconds: coefficients, a product and a cast per block of rows.

    The vendor too splits the long sum.
    """
    z, proj, basis = routes.sizes(p)
    blocks, pairs = blocks_of(p), float(p.pairs)
    tiles = coefficients.tiles_of(p)
    kept = pairs * p.padded * p.itemsize
    width = sum(routes.pieces(p.coordinates))
    narrow = 2.0 * pairs * p.chunks * p.block_k * width
    output = pairs * p.dim * p.itemsize
    issued = coefficients.instructions(p, tiles)
    first = routes.launch(z + proj, narrow, routes.KERNEL_RATE[p.kind], kept, issued)
    second = routes.launch(
        blocks * basis + output, 2.0 * pairs * p.padded * p.dim, routes.VENDOR_RATE[p.kind], kept
    )
    across = -(-min(p.pairs, routes.workspace_rows(p)) // 128) * -(-p.dim // 128)
    cast = routes.launch(3 * output, 0.0, 1.0) if p.kind == "half" and p.hip else 0.0
    launches = (blocks - 1) * (3 if p.kind == "half" and p.hip else 2)
    # What leaves the cache between the two passes.
    spilled = max(kept - blocks * (24 << 20), 0.0) / routes.BANDWIDTH
    return (
        launches * routes.LAUNCH
        + first
        + second
        + cast
        + spilled
        + merge(max(routes.PROCESSORS // across, 1), p)
    )


def estimate_backward(p: Problem) -> float:
    """Nominal seconds: t by the vendor and a kernel that reads it, per block of rows."""
    z, proj, basis = routes.sizes(p)
    blocks = blocks_of(p)
    pairs = float(p.rows if p.indexed else p.pairs)
    kept = pairs * p.padded * p.itemsize
    width = sum(routes.pieces(p.coordinates))
    passes = 2 if p.wanted[1] else 1
    narrow = passes * 2.0 * pairs * p.chunks * p.block_k * width
    first = routes.launch(
        blocks * basis + pairs * p.dim * p.itemsize,
        2.0 * pairs * p.padded * p.dim,
        routes.VENDOR_RATE[p.kind],
        kept,
    )
    second = routes.launch(
        passes * z + proj,
        narrow,
        routes.KERNEL_RATE[p.kind],
        kept,
        lone.instructions(p, lone.tiles_of(p, given=True)),
    )
    spilled = max(kept - blocks * (24 << 20), 0.0) / routes.BANDWIDTH
    return first + second + spilled + 2 * (blocks - 1) * routes.LAUNCH


FORWARD = routes.Route(
    "two_pass",
    serves=lambda p: p.coordinates <= routes.NARROW,
    estimate=estimate_forward,
    tiles=coefficients.tiles_of,
    run=run_forward,
    reason=lambda p: (
        f"with {p.pairs} rows the vendor's product over J = {p.components} pays for its workspace"
    ),
)
BACKWARD = routes.Route(
    "two_pass",
    serves=lambda p: p.coordinates <= routes.NARROW,
    estimate=estimate_backward,
    tiles=lambda p: lone.tiles_of(p, given=True) if p.lone else general.tiles_of(p, given=True),
    run=run_backward,
    reason=lambda p: (
        f"with {p.rows} rows the vendor's product makes t = dy . basis, not every chunk rereading dy"
    ),
)
