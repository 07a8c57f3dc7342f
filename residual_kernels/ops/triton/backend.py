"""The operators on CUDA and ROCm devices, and in Triton's interpreter: layout, choice of route, dispatch.

Kernels and launchers are in triton_spectral_reweight, triton_spectral_reweight_backward, triton_fold and
triton_unit_moments, the decision is in triton_routes.
No function here waits for the device, except `pack`, which reads the unit offsets once per module.
"""

from math import gcd

import torch
from torch import Tensor

from residual_kernels.ops import torch_backend
from residual_kernels.ops.triton import backward as direct_backward
from residual_kernels.ops.triton import fold as folding
from residual_kernels.ops.triton import forward as direct
from residual_kernels.ops.triton import routes as triton_routes
from residual_kernels.ops.triton import unit_moments as moments
from residual_kernels.ops.triton.forward import INTERPRETED, Constants
from residual_kernels.ops.triton.routes import NARROW, Explanation, Problem

ROUTES = ("fused", "two_pass", "folded", "matmul")


def pack(
    proj: Tensor, bias: Tensor, slope: Tensor, offset: Tensor, basis: Tensor, unit_offsets: Tensor
) -> tuple[list[Tensor], list[int]]:
    """Tensors of `Constants` in their order (wide units: then those of the torch backend) and its sizes.

    proj gets rows of a multiple of 16 coordinates, zeros behind the last, so that every row starts aligned.
    """
    _refuse_float64(proj.dtype)
    bounds = unit_offsets.tolist()
    components, width = proj.shape
    runs = [high - low for low, high in zip(bounds[:-1], bounds[1:], strict=True)]
    block_k = triton_routes.block_components(runs, proj.dtype.itemsize)
    chunks, first = triton_routes.cut_runs(bounds, block_k)
    padded = proj.contiguous()
    if width % 16:
        padded = proj.new_zeros(components, -(-width // 16) * 16)
        padded[:, :width] = proj
    codes = [unit << 40 | length << 32 | start for unit, start, length in chunks]
    table = torch.tensor(codes, dtype=torch.int64, device=proj.device)
    unit_chunks = torch.tensor(first, dtype=torch.int32, device=proj.device)
    tensors = [padded, bias, slope, offset, basis.contiguous(), table, unit_chunks]
    tensors[1:4] = [tensor.contiguous() for tensor in tensors[1:4]]
    sizes = [len(bounds) - 1, width, block_k, gcd(16, *(start for _, start, _ in chunks))]
    if width > NARROW:
        extra, extra_sizes = torch_backend.pack(
            proj, bias, slope, offset, basis, unit_offsets.to(proj.device)
        )
        tensors += extra[:2]
        sizes += extra_sizes
    return tensors, sizes


def _refuse_float64(dtype: torch.dtype) -> None:
    if dtype == torch.float64:
        raise ValueError(
            "the Triton backend computes bfloat16, float16 and float32, not float64; use backend='torch' for float64"
        )


def _torch_layout(tensors: list[Tensor], sizes: list[int]) -> tuple[list[Tensor], list[int]]:
    """The torch backend's view of a pack of wide units."""
    return [*tensors[7:9], *tensors[1:5]], sizes[4:6]


def _constants(tensors: list[Tensor], sizes: list[int]) -> Constants:
    return Constants(*tensors[:7], *sizes[:4])


def _precision(dtype: torch.dtype) -> str:
    """How float32 tiles are multiplied: exactly, unless torch's own switch allows tf32."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


def _problem(
    rows: int,
    tasks: int,
    indexed: bool,
    plain: bool,
    dtype: torch.dtype,
    constants: Constants,
    precision: str,
) -> Problem:
    kind = "half" if dtype.itemsize == 2 else "tf32" if precision == "tf32" else "fp32"
    return Problem(
        rows=rows,
        tasks=tasks,
        indexed=indexed,
        plain=plain,
        units=constants.units,
        coordinates=constants.coordinates,
        components=constants.components,
        dim=constants.dim,
        chunks=len(constants.chunks),
        block_k=constants.block_k,
        kind=kind,
        hip=torch.version.hip is not None,
    )


def explain(
    dtype: torch.dtype,
    tensors: list[Tensor],
    sizes: list[int],
    rows: int,
    tasks: int,
    indexed: bool,
    plain: bool,
) -> tuple[Explanation, Explanation]:
    """The plans of the forward and the backward pass for so many rows."""
    problem = _problem(rows, tasks, indexed, plain, dtype, _constants(tensors, sizes), _precision(dtype))
    return triton_routes.plan_forward(problem), triton_routes.plan_backward(problem)


def _detour(*tensors: Tensor | None) -> list[Tensor | None]:
    """bfloat16 as float32: the interpreter computes bfloat16 on its bits."""
    return [x.to(torch.float32) if x is not None and x.dtype == torch.bfloat16 else x for x in tensors]


def spectral_reweight_forward(
    z: Tensor,
    scale: Tensor | None,
    mean: Tensor | None,
    weight: Tensor,
    weight_index: Tensor | None,
    tensors: list[Tensor],
    sizes: list[int],
    route: str | None = None,
) -> Tensor:
    """weight [T, J] -> y [T, N, D], or [N, D] with weight_index [N]. `route` overrides the planned one."""
    _refuse_float64(z.dtype)
    dtype = z.dtype
    if INTERPRETED:
        z, *tensors = _detour(z, *tensors)
    constants = _constants(tensors, sizes)
    rows, indexed = len(z), weight_index is not None
    if rows == 0 or len(weight) == 0 or constants.components == 0:
        return z.new_zeros(
            (rows, constants.dim) if indexed else (len(weight), rows, constants.dim), dtype=dtype
        )
    precision = _precision(dtype)
    plain = scale is None and mean is None
    problem = _problem(rows, len(weight), indexed, plain, dtype, constants, precision)
    plan = triton_routes.plan_forward(problem)
    route = route or plan.route
    if route == "fused":
        tiles = triton_routes.forward_tiles(problem)
        splits = triton_routes.splits_of(problem, tiles)
        y = direct.fused_forward(z, scale, mean, weight, weight_index, constants, precision, tiles, splits)
    elif route == "two_pass":
        y = _two_pass_forward(z, scale, mean, weight, weight_index, constants, precision, problem)
    elif route == "folded":
        tiles = triton_routes.fold_tiles(problem)
        y = folding.folded_forward(z, scale, mean, weight, constants, precision, tiles)
    else:
        y = torch_backend.spectral_reweight_forward(
            z, scale, mean, weight, weight_index, *_torch_layout(tensors, sizes)
        )
    return y.to(dtype)


def _two_pass_forward(
    z: Tensor,
    scale: Tensor | None,
    mean: Tensor | None,
    weight: Tensor,
    weight_index: Tensor | None,
    constants: Constants,
    precision: str,
    problem: Problem,
) -> Tensor:
    """Coefficients of a block of outputs, then one product with basis; the workspace is the same for every block."""
    y = z.new_empty((problem.pairs, constants.dim))
    tiles = triton_routes.coefficient_tiles(problem)
    most = min(triton_routes.workspace_rows(problem), problem.pairs)
    workspace = z.new_empty((most, constants.components))
    for first in range(0, problem.pairs, most):
        block = workspace[: min(most, problem.pairs - first)]
        direct.coefficients(z, scale, mean, weight, weight_index, constants, precision, tiles, first, block)
        torch.mm(block, constants.basis, out=y[first : first + len(block)])
    return y if weight_index is not None else y.view(len(weight), len(z), constants.dim)


def spectral_reweight_backward(
    dy: Tensor,
    z: Tensor,
    scale: Tensor | None,
    mean: Tensor | None,
    weight: Tensor,
    weight_index: Tensor | None,
    tensors: list[Tensor],
    sizes: list[int],
    wanted: list[bool],
    route: str | None = None,
) -> list[Tensor]:
    """The wanted ones of (dweight, dz, dscale, dmean), in this order. `route` overrides the planned one."""
    _refuse_float64(z.dtype)
    dtype = z.dtype
    if INTERPRETED:
        dy, z, *tensors = _detour(dy, z, *tensors)
    constants = _constants(tensors, sizes)
    rows, indexed = len(z), weight_index is not None
    if rows == 0 or len(weight) == 0 or constants.components == 0:
        shapes = [weight.shape, z.shape, z.shape[:1], z.shape[:1]]
        dtypes = [torch.float32, dtype, torch.float32, torch.float32]
        return [
            z.new_zeros(shape, dtype=kind)
            for shape, kind, want in zip(shapes, dtypes, wanted, strict=True)
            if want
        ]
    precision = _precision(dtype)
    plain = scale is None and mean is None
    problem = _problem(rows, len(weight), indexed, plain, dtype, constants, precision)
    route = route or triton_routes.plan_backward(problem).route
    upstream = dy.unsqueeze(0) if indexed else dy
    if route == "matmul":
        grads = torch_backend.spectral_reweight_backward(
            dy, z, scale, mean, weight, weight_index, *_torch_layout(tensors, sizes), wanted
        )
    elif route == "folded":
        tiles = triton_routes.fold_tiles(problem)
        grads = folding.folded_backward(upstream, z, scale, mean, weight, constants, precision, tiles, wanted)
    else:
        grads = _direct_backward(
            route, upstream, z, scale, mean, weight, weight_index, constants, precision, problem, wanted
        )  # fmt: skip
    if wanted[1]:
        at = int(wanted[0])
        grads[at] = grads[at].to(dtype)
    return grads


def _direct_backward(
    route: str,
    dy: Tensor,
    z: Tensor,
    scale: Tensor | None,
    mean: Tensor | None,
    weight: Tensor,
    weight_index: Tensor | None,
    constants: Constants,
    precision: str,
    problem: Problem,
    wanted: list[bool],
) -> list[Tensor]:
    """Every gradient from t = dy . basis, made inside the kernel (fused) or by one product per block of rows."""
    tasks, rows, _ = dy.shape
    components = constants.components
    tiles = triton_routes.backward_tiles(problem, given=route == "two_pass")
    dz = z.new_empty(z.shape) if wanted[1] else None
    if route == "fused":
        dweight, dscale, dmean = direct_backward.backward(
            dy, None, z, scale, mean, weight, weight_index, constants, precision, tiles, wanted, dz
        )
        return [grad for grad in (dweight, dz, dscale, dmean) if grad is not None]
    most = min(max(triton_routes.workspace_rows(problem) // tasks, 1), rows)
    workspace = z.new_empty(tasks * most * components)
    dweight, dscales, dmeans = None, [], []
    for first in range(0, rows, most):
        part = slice(first, first + most)
        count = min(most, rows - first)
        t = workspace[: tasks * count * components].view(tasks, count, components)
        torch.matmul(dy[:, part], constants.basis.T, out=t)
        more, dscale, dmean = direct_backward.backward(
            dy, t, z[part],
            None if scale is None else scale[part], None if mean is None else mean[part],
            weight, None if weight_index is None else weight_index[part],
            constants, precision, tiles, wanted, None if dz is None else dz[part],
        )  # fmt: skip
        dweight = more if dweight is None else dweight.add_(more)
        dscales.append(dscale)
        dmeans.append(dmean)
    grads = [grad for grad in (dweight, dz) if grad is not None]
    return grads + [torch.cat(parts) for parts, want in ((dscales, wanted[2]), (dmeans, wanted[3])) if want]


def unit_moments(
    z: Tensor, scale: Tensor | None, mean: Tensor | None, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """Sums and second moments of l - shift, float64."""
    _refuse_float64(z.dtype)
    if not 16 <= z.shape[2] <= NARROW or z.numel() == 0:
        return torch_backend.unit_moments(z, scale, mean, shift)
    return moments.unit_moments(z, scale, mean, shift, _precision(z.dtype))
