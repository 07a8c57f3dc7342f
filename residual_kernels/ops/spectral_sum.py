"""y[t,n] = sum_j weight[t,j] * c[n,j] * basis[j]

The second half of :func:`spectral_reweight`, for coefficients that are known already: every step of a fit on
cached units. Only `weight` learns. On a CPU the compiled backend reweights a block of coefficients in cache,
reads the basis once for all tasks, and never stores c * weight or dy . basis; on a GPU the Triton backend
does so in registers, where that is estimated to be faster than the vendor's product. Elsewhere write (c *
weight) @ basis.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from residual_kernels.ops import backends
from residual_kernels.ops.operands import check_pack, check_upstream, has_tangent, refuse_tangents
from residual_kernels.ops.packing import PackedUnits, wide

BACKENDS_WITH_SUMS = {"triton": 4, "cpp": 2}  # and which of their packed tensors has the dtype of the sums


@torch.library.custom_op("residual_kernels::spectral_sum", mutates_args=())
def _spectral_sum(
    c: Tensor, weight: Tensor, tensors: list[Tensor], sizes: list[int], dim: int, backend: str
) -> Tensor:
    refuse_tangents(c, weight)
    shape = check_pack(tensors, sizes, backend)
    _check(c, weight, tensors, shape, backend)
    if dim != shape[3]:
        raise ValueError(f"the call states D = {dim}, but the constants are packed for D = {shape[3]}")
    if 0 in (*c.shape, len(weight), dim):
        return c.new_zeros(len(weight), len(c), dim)
    return backends.load_summing(backend).spectral_sum_forward(c, weight, tensors, sizes)


def _check(
    c: Tensor, weight: Tensor, tensors: list[Tensor], shape: tuple[int, int, int, int], backend: str
) -> None:
    """What the loops rely on, asked inside the registered operators; see residual_kernels.ops.operands."""
    components = shape[2]
    if backend not in BACKENDS_WITH_SUMS:
        raise ValueError(f"spectral_sum is computed by {', '.join(BACKENDS_WITH_SUMS)}; got {backend!r}")
    if c.ndim != 2 or weight.ndim != 2 or not c.shape[1] == weight.shape[1] == components:
        raise ValueError(
            f"c must be [N, J] and weight [T, J] with J = {components} as packed; got {tuple(c.shape)} and "
            f"{tuple(weight.shape)}"
        )
    basis = tensors[BACKENDS_WITH_SUMS[backend]]
    if not c.dtype == weight.dtype == basis.dtype or c.layout is not torch.strided:
        raise ValueError(
            f"c and weight must be dense and {basis.dtype} as packed; got {c.dtype} and {weight.dtype}"
        )
    if not c.device == weight.device == basis.device:
        raise ValueError(f"c is on {c.device}, weight on {weight.device}, the constants on {basis.device}")


@_spectral_sum.register_fake
def _(c, weight, tensors, sizes, dim, backend):
    return c.new_empty(len(weight), len(c), dim)


@torch.library.custom_op("residual_kernels::spectral_sum_backward", mutates_args=())
def _spectral_sum_backward(
    dy: Tensor, c: Tensor, weight: Tensor, tensors: list[Tensor], sizes: list[int], backend: str
) -> Tensor:
    refuse_tangents(dy, c, weight)
    shape = check_pack(tensors, sizes, backend)
    _check(c, weight, tensors, shape, backend)
    check_upstream(dy, (len(weight), len(c), shape[3]), c)
    if 0 in (*c.shape, len(weight), shape[3]):
        return torch.zeros_like(weight)
    return backends.load_summing(backend).spectral_sum_backward(dy, c, weight, tensors, sizes)


@_spectral_sum_backward.register_fake
def _(dy, c, weight, tensors, sizes, backend):
    return weight.new_empty(weight.shape)


def _setup_context(ctx, inputs, output) -> None:
    c, weight, tensors, sizes, _, backend = inputs
    ctx.save_for_backward(c, weight, *tensors)
    ctx.sizes, ctx.backend = sizes, backend


def _backward(ctx, dy: Tensor):
    c, weight, *tensors = ctx.saved_tensors
    dweight = _spectral_sum_backward(dy, c, weight, tensors, ctx.sizes, ctx.backend)
    return None, dweight, [None] * len(tensors), None, None, None


_spectral_sum.register_autograd(_backward, setup_context=_setup_context)


def _registered(c: Tensor, weight: Tensor, pack: PackedUnits) -> Tensor:
    return torch.ops.residual_kernels.spectral_sum(
        c, weight, list(pack.tensors), list(pack.sizes), pack.dim, pack.backend
    )


class _Sum(torch.autograd.Function):
    """The operator for forward mode and the transforms of torch.func."""

    @staticmethod
    def forward(c: Tensor, weight: Tensor, pack: PackedUnits) -> Tensor:
        return _registered(c, weight, pack)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        c, weight, ctx.pack = inputs
        ctx.save_for_backward(c, weight)
        ctx.save_for_forward(c, weight)

    @staticmethod
    def backward(ctx, dy: Tensor):
        c, weight = ctx.saved_tensors
        return None, _SumGradient.apply(dy, c, weight, ctx.pack), None

    @staticmethod
    def jvp(ctx, c_t: Tensor | None, weight_t: Tensor | None, _):
        c, weight = ctx.saved_tensors
        terms = []
        if weight_t is not None:
            terms.append(_Sum.apply(c, weight_t, ctx.pack))
        if c_t is not None:
            terms.append(_Sum.apply(c_t, weight, ctx.pack))
        return terms[0] if len(terms) == 1 else terms[0] + terms[1]

    @staticmethod
    def vmap(info, in_dims, c, weight, pack):
        calls = _each(info.batch_size, in_dims[:2], (c, weight))
        return torch.stack([_Sum.apply(*one, pack) for one in calls]), 0


class _SumGradient(torch.autograd.Function):
    """The gradient of the weight, as a function of its own."""

    @staticmethod
    def forward(dy: Tensor, c: Tensor, weight: Tensor, pack: PackedUnits) -> Tensor:
        return torch.ops.residual_kernels.spectral_sum_backward(
            dy, c, weight, list(pack.tensors), list(pack.sizes), pack.backend
        )

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("spectral_sum is once differentiable: its gradient has none of its own")

    jvp: Any = backward

    @staticmethod
    def vmap(info, in_dims, dy, c, weight, pack):
        calls = _each(info.batch_size, in_dims[:3], (dy, c, weight))
        return torch.stack([_SumGradient.apply(*one, pack) for one in calls]), 0


def _each(
    count: int, in_dims: Sequence[int | None], tensors: Sequence[Tensor]
) -> Iterator[tuple[Tensor, ...]]:
    """The tensors of every call that a vmap stands for."""
    for number in range(count):
        yield tuple(
            x if dim is None else x.select(dim, number) for x, dim in zip(tensors, in_dims, strict=True)
        )


def spectral_sum(c: Tensor, weight: Tensor, pack: PackedUnits) -> Tensor:
    """y = (c * weight) @ basis: the step of a fit on coefficients that are already computed.

    Args:
        c: [N, J] coefficients, which must not require grad; float32 or float64 (cpp), float32 (triton), in
            the dtype of the packed constants; any strides.
        weight: [J], or [T, J] for T tasks on the same coefficients. Its gradient is the only one.
        pack: made by :func:`pack_units` for cpp or triton; for torch, a plain product is as fast.

    Returns:
        [N, D]; [T, N, D] for weight [T, J].

    Raises:
        ValueError: shapes, dtypes or packs that do not fit.

    Deterministic, for any number of threads. Triton multiplies exactly unless
    torch.set_float32_matmul_precision allows tf32 ("high") or bfloat16 ("medium").
    """
    if (
        pack.backend not in BACKENDS_WITH_SUMS
        or c.requires_grad
        or not c.dtype == wide(c.dtype) == pack.dtype
    ):
        raise ValueError(
            "spectral_sum takes float32 or float64 coefficients without grad, packed alike for cpp or "
            f"triton; got {c.dtype}, requires_grad={c.requires_grad}, and constants packed in {pack.dtype} "
            f"for {pack.backend}"
        )
    if c.ndim != 2 or weight.ndim not in (1, 2) or {c.shape[-1], weight.shape[-1]} != {pack.components}:
        raise ValueError(
            f"c must be [N, J] and weight [J] or [T, J] with J = {pack.components}; got {tuple(c.shape)} and "
            f"{tuple(weight.shape)}"
        )
    for name, tensor in (("c", c), ("weight", weight)):
        if tensor.device != pack.device:  # the loops read addresses: those of a device would end the process
            raise ValueError(
                f"{name} is on {tensor.device} but the packed constants are on {pack.device}; move one of "
                "them"
            )
    tasks = weight.to(c.dtype) if weight.ndim == 2 else weight.to(c.dtype).unsqueeze(0)
    transformed = torch._C._are_functorch_transforms_active() or has_tangent(c, tasks)
    y = _Sum.apply(c, tasks, pack) if transformed else _registered(c, tasks, pack)
    return y if weight.ndim == 2 else y.squeeze(0)
