"""The operators on CUDA and ROCm devices, and in Triton's interpreter: layout, choice of route, dispatch.

Each route is a file with its kernels, its estimate and a record; the tables below name them all.
No function here waits for the device, except `pack`, which reads the unit offsets once per module.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor

from residual_kernels.ops import torch_backend
from residual_kernels.ops.triton import (
    backward,
    fold,
    fold_gradient,
    forward,
    kernel_layout,
    matmul,
    routes,
    spectral_sum,
    two_pass,
)
from residual_kernels.ops.triton import unit_moments as moments
from residual_kernels.ops.triton.kernel_layout import Call, Constants
from residual_kernels.ops.triton.launch import kept, on
from residual_kernels.ops.triton.routes import NARROW, Explanation, Problem
from residual_kernels.ops.triton.tiles import INTERPRETED

FORWARD = (forward.ROUTE, two_pass.FORWARD, fold.FORWARD, matmul.FORWARD)
BACKWARD = (backward.ROUTE, two_pass.BACKWARD, fold_gradient.BACKWARD, matmul.BACKWARD)


def pack(
    proj: Tensor, bias: Tensor, slope: Tensor, offset: Tensor, basis: Tensor, unit_offsets: Tensor
) -> tuple[list[Tensor], list[int]]:
    """Tensors and sizes of `kernel_layout.Constants` in their order.

    For wide units those of the torch backend behind them.
    """
    _refuse_float64(proj.dtype)
    tensors, sizes = kernel_layout.pack(proj, bias, slope, offset, basis, unit_offsets)
    if proj.shape[1] > NARROW:
        more, more_sizes = torch_backend.pack(
            proj, bias, slope, offset, basis.contiguous(), unit_offsets.to(proj.device)
        )
        tensors, sizes = [*tensors, *more], [*sizes, *more_sizes]
    return tensors, sizes


def shape(tensors: Sequence[Tensor], sizes: Sequence[int]) -> tuple[int, int, int, int]:
    """(R, C, J, D); ValueError when tensors and sizes of a pack contradict each other.

    Values on a device are not looked at: a look would wait for it.
    """
    if len(tensors) < kernel_layout.TENSORS or len(sizes) < kernel_layout.SIZES:
        raise ValueError(
            f"a pack of the Triton backend has at least {kernel_layout.TENSORS} tensors and "
            f"{kernel_layout.SIZES} sizes; got {len(tensors)} and {len(sizes)}"
        )
    found = kernel_layout.constants_of(tensors, sizes)
    padded = (found.padded,)
    if not (
        found.proj.shape == (*padded, -(-found.coordinates // 16) * 16)
        and found.basis.shape == (*padded, -(-found.dim // 8) * 8)
        and found.bias.shape == found.slope.shape == found.offset.shape == padded
        and found.runs.shape == (2, found.units + 1)
        and found.slots.shape == (found.components,)
        and found.sources.shape == padded
        and found.chunks.shape == (found.chunk_count,)
        and found.proj.dtype == found.basis.dtype
        and found.chunks.dtype == found.slots.dtype == torch.int64
        and found.runs.dtype == torch.int32
        and 0 <= found.longest <= padded[0]
        and 0 < found.block_k <= 128
        and all(x.device == found.proj.device and x.is_contiguous() for x in tensors[: kernel_layout.TENSORS])
    ):
        raise ValueError(
            "the packed tensors are not those that pack_units made for the Triton backend. "
            f"Got {[(x.dtype, tuple(x.shape)) for x in tensors]} for {list(sizes)}"
        )
    if len(tensors) > kernel_layout.TENSORS:
        torch_backend.shape(tensors[kernel_layout.TENSORS :], sizes[kernel_layout.SIZES :])
    return found.units, found.coordinates, found.components, found.dim


def _refuse_float64(dtype: torch.dtype) -> None:
    if dtype == torch.float64:
        raise ValueError(
            "the Triton backend computes bfloat16, float16 and float32, not float64; use backend='torch' "
            "for float64"
        )


def _precision(dtype: torch.dtype) -> str:
    """How float32 tiles are multiplied: exactly, unless torch's own switch allows tf32."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


def problem_of(
    rows: int,
    tasks: int,
    indexed: bool,
    plain: bool,
    dtype: torch.dtype,
    constants: Constants,
    precision: str,
    wanted: tuple[bool, ...] = (True, False, False, False),
) -> Problem:
    """The shape of a call, as routes see it."""
    kind = "half" if dtype.itemsize == 2 else "tf32" if precision == "tf32" else "fp32"
    return Problem(
        rows=rows,
        tasks=tasks,
        indexed=indexed,
        plain=plain,
        units=constants.units,
        coordinates=constants.coordinates,
        components=constants.components,
        padded=constants.padded,
        dim=constants.dim,
        chunks=constants.chunk_count,
        block_k=constants.block_k,
        longest=constants.longest,
        kind=kind,
        hip=torch.version.hip is not None,
        wanted=cast("tuple[bool, bool, bool, bool]", tuple(wanted)),
        workspace=routes.allowed_workspace(),
    )


def _call(
    z: Tensor,
    scale: Tensor | None,
    mean: Tensor | None,
    weight: Tensor,
    index: Tensor | None,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    dtype: torch.dtype,
    wanted: tuple[bool, ...] | None,
) -> Call:
    """A call with its problem; `dtype` is the caller's, before the interpreter's detour."""
    constants = kernel_layout.constants_of(tensors, sizes)
    precision = _precision(dtype)
    key = (
        tuple(sizes),
        z.shape[0],
        z.stride(),
        dtype,
        z.dtype,
        z.device,
        None if scale is None else scale.stride(),
        None if mean is None else mean.stride(),
        weight.shape,
        weight.stride(),
        index is None,
        precision,
        wanted,
        torch.version.hip,
        routes.workspace_said(),
    )

    def problem() -> Problem:
        plain = scale is None and mean is None
        return problem_of(
            z.shape[0],
            weight.shape[0],
            index is not None,
            plain,
            dtype,
            constants,
            precision,
            wanted or (True, *3 * (False,)),
        )

    found = kept(("problem", key), problem)
    return Call(z, scale, mean, weight, index, constants, precision, found, (tensors, sizes), key)


@lru_cache(maxsize=4096)
def plan_forward(p: Problem) -> Explanation:
    """The route of the forward pass."""
    return routes.choose(p, "forward", FORWARD)


@lru_cache(maxsize=4096)
def plan_backward(p: Problem) -> Explanation:
    """The route of the backward pass."""
    return routes.choose(p, "backward", BACKWARD)


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
    constants = kernel_layout.constants_of(tensors, sizes)
    problem = problem_of(rows, tasks, indexed, plain, dtype, constants, _precision(dtype))
    return plan_forward(problem), plan_backward(problem)


def _detour(*tensors: Tensor) -> list[Tensor]:
    """bfloat16 as float32: the interpreter computes bfloat16 on its bits."""
    return [x.to(torch.float32) if x.dtype == torch.bfloat16 else x for x in tensors]


def _named(table: tuple[routes.Route, ...], name: str) -> routes.Route:
    return next(route for route in table if route.name == name)


def spectral_reweight_forward(
    z: Tensor,
    scale: Tensor | None,
    mean: Tensor | None,
    weight: Tensor,
    weight_index: Tensor | None,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    route: str | None = None,
) -> Tensor:
    """weight [T, J] -> y [T, N, D], or [N, D] with weight_index [N]. `route` overrides the planned one."""
    _refuse_float64(z.dtype)
    dtype = z.dtype
    if INTERPRETED:
        z, *tensors = _detour(z, *tensors)
    rows, indexed = z.shape[0], weight_index is not None
    call = _call(z, scale, mean, weight, weight_index, tensors, sizes, dtype, None)
    if rows == 0 or weight.shape[0] == 0 or call.constants.components == 0:
        dim = call.constants.dim
        return z.new_zeros((rows, dim) if indexed else (weight.shape[0], rows, dim), dtype=dtype)
    chosen = kept(
        ("forward", call.key, route), lambda: _named(FORWARD, route or plan_forward(call.problem).route)
    )
    with on(z.device):
        y = chosen.run(call)
    return y if y.dtype == dtype else y.to(dtype)


def spectral_reweight_backward(
    dy: Tensor,
    z: Tensor,
    scale: Tensor | None,
    mean: Tensor | None,
    weight: Tensor,
    weight_index: Tensor | None,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    wanted: list[bool],
    route: str | None = None,
) -> list[Tensor]:
    """The wanted ones of (dweight, dz, dscale, dmean), in this order. `route` overrides the planned one."""
    _refuse_float64(z.dtype)
    dtype = z.dtype
    if INTERPRETED:
        dy, z, *tensors = _detour(dy, z, *tensors)
    call = _call(z, scale, mean, weight, weight_index, tensors, sizes, dtype, tuple(wanted))
    if z.shape[0] == 0 or weight.shape[0] == 0 or call.constants.components == 0:
        shapes = [weight.shape, z.shape, z.shape[:1], z.shape[:1]]
        dtypes = [torch.float32, dtype, torch.float32, torch.float32]
        return [
            z.new_zeros(shape, dtype=kind)
            for shape, kind, want in zip(shapes, dtypes, wanted, strict=True)
            if want
        ]
    chosen = kept(
        ("backward route", call.key, route),
        lambda: _named(BACKWARD, route or plan_backward(call.problem).route),
    )
    upstream = dy if weight_index is None else dy.unsqueeze(0)
    with on(z.device):
        grads = chosen.run(call, upstream, wanted)
    if wanted[1]:
        at = int(wanted[0])
        grads[at] = grads[at].to(dtype)
    return grads


def spectral_sum_pays(rows: int, tasks: int, components: int, dim: int) -> bool:
    """Whether :func:`spectral_sum_forward` is estimated to be faster than c * weight and the vendor's
    product."""
    return spectral_sum.pays(rows, tasks, components, dim)


def spectral_sum_forward(
    c: Tensor, weight: Tensor, tensors: Sequence[Tensor], sizes: Sequence[int]
) -> Tensor:
    """c [N, J] and weight [T, J], float32 -> y [T, N, D]."""
    with on(c.device):
        return spectral_sum.forward(c, weight, kernel_layout.constants_of(tensors, sizes))


def spectral_sum_backward(
    dy: Tensor, c: Tensor, weight: Tensor, tensors: Sequence[Tensor], sizes: Sequence[int]
) -> Tensor:
    """dy [T, N, D] -> dweight [T, J]."""
    with on(c.device):
        return spectral_sum.backward(dy, c, kernel_layout.constants_of(tensors, sizes))


def unit_moments(
    z: Tensor, scale: Tensor | None, mean: Tensor | None, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """Sums and second moments of l - shift, float64."""
    _refuse_float64(z.dtype)
    if not 16 <= z.shape[2] <= NARROW or z.numel() == 0:
        return torch_backend.unit_moments(z, scale, mean, shift)
    with on(z.device):
        return moments.unit_moments(z, scale, mean, shift, _precision(z.dtype))
