"""y[n] = sum_j weight[j] * c[n,j] * basis[j]

with c[n,j] = scale[n] * (z[n,r(j)] . proj[j] + bias[j] + mean[n] * slope[j]) - offset[j]: the operator of
ResiDual: coefficients of N rows on the J principal components of R units, reweighted and written back to D
dimensions. Source: Basile et al., "ResiDual Transformer Alignment with Spectral Decomposition", TMLR 2025;
the low-rank form is derived in docs/HOW_IT_WORKS.md.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from residual_kernels.ops import backends, transforms
from residual_kernels.ops.operands import (
    check_call,
    check_index_values,
    check_pack,
    check_upstream,
    has_tangent,
    refuse_compiled_tangents,
    refuse_tangents,
)
from residual_kernels.ops.packing import PackedUnits, check_constants, remembered_pack, wide


def _forward(
    z: Tensor,
    scale: Tensor | None,
    mean: Tensor | None,
    weight: Tensor,
    weight_index: Tensor | None,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    dim: int,
    backend: str,
) -> Tensor:
    """weight [T, J] -> y [T, N, D], or [N, D] with weight_index [N]."""
    if 0 in (*weight.shape, z.shape[0], dim):
        return z.new_zeros(_result_shape(z, weight, weight_index, dim))
    return backends.load(backend).spectral_reweight_forward(
        z, scale, mean, weight, weight_index, tensors, sizes
    )


def _backward(
    dy: Tensor,
    z: Tensor,
    scale: Tensor | None,
    mean: Tensor | None,
    weight: Tensor,
    weight_index: Tensor | None,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    wanted: list[bool],
    backend: str,
) -> list[Tensor]:
    """The wanted ones of (dweight, dz, dscale, dmean), in this order."""
    if 0 in (*weight.shape, z.shape[0], dy.shape[-1]):
        return [x.zero_() for x in _empty_gradients(z, weight, wanted)]
    return backends.load(backend).spectral_reweight_backward(
        dy, z, scale, mean, weight, weight_index, tensors, sizes, wanted
    )


def _result_shape(z: Tensor, weight: Tensor, weight_index: Tensor | None, dim: int) -> tuple[int, ...]:
    return (z.shape[0], dim) if weight_index is not None else (weight.shape[0], z.shape[0], dim)


def _empty_gradients(z: Tensor, weight: Tensor, wanted: list[bool]) -> list[Tensor]:
    least = wide(z.dtype)
    shapes = [weight.shape, z.shape, z.shape[:1], z.shape[:1]]
    dtypes = [least, z.dtype, least, least]
    return [
        z.new_empty(shape, dtype=dtype)
        for shape, dtype, want in zip(shapes, dtypes, wanted, strict=True)
        if want
    ]


class _Reweight(torch.autograd.Function):
    """The operator in eager mode: a custom op with lists of tensors costs several times as much a call."""

    @staticmethod
    def forward(
        z, scale, mean, weight, weight_index, pack: PackedUnits | Callable[[], PackedUnits]
    ) -> Tensor:
        pack = pack() if callable(pack) else pack
        check_index_values(weight_index, len(weight))
        return _forward(
            z, scale, mean, weight, weight_index, pack.tensors, pack.sizes, pack.dim, pack.backend
        )

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        *operands, ctx.pack = inputs
        ctx.save_for_backward(*operands)
        ctx.save_for_forward(*operands)

    @staticmethod
    def backward(ctx, dy: Tensor):
        return _once_backward(ctx, dy)

    @staticmethod
    def jvp(ctx, z_t, scale_t, mean_t, weight_t, *_):
        tangents = (z_t, scale_t, mean_t, weight_t)
        return transforms.derivative(_Reweight.apply, ctx.saved_tensors, tangents, ctx.pack)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        *operands, pack = arguments
        return transforms.reweight(_Reweight.apply, info.batch_size, in_dims[:-1], operands, pack)


def _gradients_of(ctx, dy: Tensor, run: Callable[..., Sequence[Tensor]]):
    z, scale, mean, weight, weight_index = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[i] for i in (3, 0, 1, 2)]
    grads = iter(run(dy, z, scale, mean, weight, weight_index, ctx.pack, wanted))
    dweight, dz, dscale, dmean = (next(grads) if want else None for want in wanted)
    return dz, dscale, dmean, dweight, None, None


class _Gradients(torch.autograd.Function):
    """The backward pass as a function of its own, for the transforms of torch.func."""

    @staticmethod
    def forward(dy, z, scale, mean, weight, weight_index, pack, wanted) -> tuple[Tensor, ...]:
        pack = pack() if callable(pack) else pack
        given = dy.resolve_neg(), z, scale, mean, weight, weight_index
        return tuple(_backward(*given, pack.tensors, pack.sizes, wanted, pack.backend))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("spectral_reweight is once differentiable: its gradients have none of their own")

    jvp: Any = backward

    @staticmethod
    def vmap(info, in_dims, *arguments):
        *operands, pack, wanted = arguments
        return transforms.gradients(
            _Gradients.apply, info.batch_size, in_dims[: len(operands)], operands, pack, wanted
        )


def _once_backward(ctx, dy: Tensor):
    """The gradients; where somebody may differentiate them again, with an error in place of their gradients.

    PyTorch's own `once_differentiable` says so only where `dy` has gradients too; else they would be zero.
    """
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return _gradients_of(ctx, dy, _Gradients.apply)
    return _gradients_of(ctx, dy, _Gradients.forward)


class _Plainly(torch.autograd.Function):
    """The same without forward mode and transforms:
    with `setup_context` PyTorch binds a signature at every call."""

    @staticmethod
    def forward(ctx, z, scale, mean, weight, weight_index, pack: PackedUnits) -> Tensor:
        ctx.pack = pack
        ctx.save_for_backward(z, scale, mean, weight, weight_index)
        return _Reweight.forward(z, scale, mean, weight, weight_index, pack)

    backward: Any = staticmethod(_once_backward)


@torch.library.custom_op("residual_kernels::spectral_reweight", mutates_args=())
def _spectral_reweight(
    z: Tensor,
    scale: Tensor | None,
    mean: Tensor | None,
    weight: Tensor,
    weight_index: Tensor | None,
    tensors: list[Tensor],
    sizes: list[int],
    dim: int,
    backend: str,
) -> Tensor:
    refuse_tangents(z, scale, mean, weight)
    shape = check_pack(tensors, sizes, backend)
    check_call(z, scale, mean, weight, weight_index, tensors[0], shape)
    if dim != shape[3]:
        raise ValueError(f"the call states D = {dim}, but the constants are packed for D = {shape[3]}")
    check_index_values(weight_index, len(weight))
    return _forward(z, scale, mean, weight, weight_index, tensors, sizes, dim, backend)


@_spectral_reweight.register_fake
def _(z, scale, mean, weight, weight_index, tensors, sizes, dim, backend):
    return z.new_empty(_result_shape(z, weight, weight_index, dim))


# A custom op cannot return "no tensor", so the set of wanted gradients decides how many tensors come back.
@torch.library.custom_op("residual_kernels::spectral_reweight_backward", mutates_args=())
def _spectral_reweight_backward(
    dy: Tensor,
    z: Tensor,
    scale: Tensor | None,
    mean: Tensor | None,
    weight: Tensor,
    weight_index: Tensor | None,
    tensors: list[Tensor],
    sizes: list[int],
    wanted: list[bool],
    backend: str,
) -> list[Tensor]:
    refuse_tangents(dy, z, scale, mean, weight)
    shape = check_pack(tensors, sizes, backend)
    check_call(z, scale, mean, weight, weight_index, tensors[0], shape)
    check_upstream(dy, _result_shape(z, weight, weight_index, shape[3]), z)
    check_index_values(weight_index, len(weight))
    return _backward(dy, z, scale, mean, weight, weight_index, tensors, sizes, wanted, backend)


@_spectral_reweight_backward.register_fake
def _(dy, z, scale, mean, weight, weight_index, tensors, sizes, wanted, backend):
    return _empty_gradients(z, weight, wanted)


def _setup_context(ctx, inputs, output) -> None:
    z, scale, mean, weight, weight_index, tensors, sizes, _, backend = inputs
    ctx.save_for_backward(z, scale, mean, weight, weight_index, *tensors)
    ctx.sizes, ctx.backend = sizes, backend


def _op_backward(ctx, dy: Tensor):
    z, scale, mean, weight, weight_index, *tensors = ctx.saved_tensors
    need = ctx.needs_input_grad
    wanted = [need[3], need[0], need[1], need[2]]
    grads = iter(
        _spectral_reweight_backward(
            dy, z, scale, mean, weight, weight_index, tensors, ctx.sizes, wanted, ctx.backend
        )
    )
    dweight, dz, dscale, dmean = (next(grads) if want else None for want in wanted)
    return dz, dscale, dmean, dweight, None, [None] * len(tensors), None, None, None


_spectral_reweight.register_autograd(_op_backward, setup_context=_setup_context)


# For compiled graphs of the unpacked function: packing reads unit_offsets, which cannot be part of a graph.
@torch.library.custom_op("residual_kernels::spectral_reweight_unpacked", mutates_args=())
def _unpacked(
    z: Tensor,
    scale: Tensor | None,
    mean: Tensor | None,
    weight: Tensor,
    weight_index: Tensor | None,
    constants: list[Tensor],
    backend: str,
) -> Tensor:
    refuse_tangents(z, scale, mean, weight)
    pack = remembered_pack(constants, z.dtype, backend)
    check_call(z, scale, mean, weight, weight_index, pack.tensors[0], pack.shape)
    check_index_values(weight_index, len(weight))
    return _forward(z, scale, mean, weight, weight_index, pack.tensors, pack.sizes, pack.dim, pack.backend)


@_unpacked.register_fake
def _(z, scale, mean, weight, weight_index, constants, backend):
    return z.new_empty(_result_shape(z, weight, weight_index, constants[4].shape[1]))


@torch.library.custom_op("residual_kernels::spectral_reweight_unpacked_backward", mutates_args=())
def _unpacked_backward(
    dy: Tensor,
    z: Tensor,
    scale: Tensor | None,
    mean: Tensor | None,
    weight: Tensor,
    weight_index: Tensor | None,
    constants: list[Tensor],
    wanted: list[bool],
    backend: str,
) -> list[Tensor]:
    refuse_tangents(dy, z, scale, mean, weight)
    pack = remembered_pack(constants, z.dtype, backend)
    check_call(z, scale, mean, weight, weight_index, pack.tensors[0], pack.shape)
    check_upstream(dy, _result_shape(z, weight, weight_index, pack.dim), z)
    check_index_values(weight_index, len(weight))
    return _backward(dy, z, scale, mean, weight, weight_index, pack.tensors, pack.sizes, wanted, pack.backend)


@_unpacked_backward.register_fake
def _(dy, z, scale, mean, weight, weight_index, constants, wanted, backend):
    return _empty_gradients(z, weight, wanted)


def _unpacked_setup_context(ctx, inputs, output) -> None:
    z, scale, mean, weight, weight_index, constants, backend = inputs
    ctx.save_for_backward(z, scale, mean, weight, weight_index, *constants)
    ctx.backend = backend


def _unpacked_op_backward(ctx, dy: Tensor):
    z, scale, mean, weight, weight_index, *constants = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[i] for i in (3, 0, 1, 2)]
    grads = iter(_unpacked_backward(dy, z, scale, mean, weight, weight_index, constants, wanted, ctx.backend))
    dweight, dz, dscale, dmean = (next(grads) if want else None for want in wanted)
    return dz, dscale, dmean, dweight, None, [None] * len(constants), None


_unpacked.register_autograd(_unpacked_op_backward, setup_context=_unpacked_setup_context)


def _traced(z: Tensor) -> bool:
    """Whether something other than plain execution looks at this call: a compiler, a mode,
    a tensor subclass."""
    refuse_compiled_tangents("spectral_reweight")
    return (
        torch.compiler.is_compiling()
        or type(z) not in (Tensor, torch.nn.Parameter)
        or z.is_meta
        or is_in_torch_dispatch_mode()
    )


def spectral_reweight_packed(
    z: Tensor,
    scale: Tensor | None,
    mean: Tensor | None,
    weight: Tensor,
    pack: PackedUnits,
    weight_index: Tensor | None = None,
) -> Tensor:
    """:func:`spectral_reweight` with constants that :func:`pack_units` packed beforehand.

    Args:
        z: [N, R, C], any strides, in the dtype of the packed proj and basis. Under autocast, in the autocast
            dtype.
        scale, mean: [N], or None for 1 and 0.
        weight: [J] or [T, J].
        pack: the packed constants.
        weight_index: [N] int64 in [0, T), or None.

    Returns:
        [N, D] in z's dtype; [T, N, D] for weight [T, J] without weight_index.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, with the values seen.

    Under autocast, weight, scale, mean and offsets keep their dtypes. Gradients as in
    :func:`spectral_reweight`.
    """
    z = _autocast(z)
    if z.dtype != pack.dtype:
        raise ValueError(
            f"z has dtype {z.dtype} but the packed constants have {pack.dtype}; cast one to the other"
        )
    operands = _operands(z, scale, mean, weight, weight_index, pack.shape, pack.device)
    if _traced(z):
        y = torch.ops.residual_kernels.spectral_reweight(
            *operands, list(pack.tensors), list(pack.sizes), pack.dim, pack.backend
        )
    elif _transformed(operands):
        y = _Reweight.apply(*_plain(operands), pack)
    elif torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands):
        y = _Plainly.apply(*_plain(operands), pack)
    else:
        z, scale, mean, rows, index = _plain(operands)
        y = _Reweight.forward(z, scale, mean, rows, index, pack)
    return y if weight.ndim == 2 else y.squeeze(0)


def _transformed(operands: tuple[Tensor | None, ...]) -> bool:
    """Whether a transform of torch.func is active, or an operand carries a forward-mode tangent."""
    if torch._C._are_functorch_transforms_active():
        return True
    return has_tangent(*operands)


def _autocast(z: Tensor) -> Tensor:
    if torch.is_autocast_enabled(z.device.type) and z.dtype != torch.float64:
        return z.to(torch.get_autocast_dtype(z.device.type))
    return z


def _operands(
    z: Tensor,
    scale: Tensor | None,
    mean: Tensor | None,
    weight: Tensor,
    weight_index: Tensor | None,
    shape: tuple[int, int, int, int],
    device: torch.device,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """z, scale, mean, weight [T, J] and weight_index as the operators take them;
    ValueError for what does not fit."""
    units, coordinates, components, _ = shape
    if z.layout is not torch.strided or z.is_nested:
        raise ValueError(f"z must be a dense tensor [N, R, C]; got layout {z.layout}, nested: {z.is_nested}")
    if z.ndim != 3 or z.shape[1:] != (units, coordinates):
        raise ValueError(f"z must be [N, R, C] = [N, {units}, {coordinates}]; got {tuple(z.shape)}")
    if weight.ndim not in (1, 2) or weight.shape[-1] != components:
        raise ValueError(f"weight must be [J] or [T, J] with J = {components}; got {tuple(weight.shape)}")
    rows = z.shape[0]
    least = wide(z.dtype)
    for name, tensor in (("scale", scale), ("mean", mean)):
        if tensor is not None and tensor.shape != (rows,):
            raise ValueError(f"{name} must be [N] = ({rows},) like z; got {tuple(tensor.shape)}")
    named = (("scale", scale), ("mean", mean), ("weight", weight), ("weight_index", weight_index))
    for name, tensor in named:
        if tensor is not None and tensor.device != z.device:
            raise ValueError(f"{name} is on {tensor.device} but z is on {z.device}; move one of them")
        if tensor is not None and (tensor.is_complex() or tensor.layout is not torch.strided):
            raise ValueError(
                f"{name} must be a dense real tensor; got {tensor.dtype}, layout {tensor.layout}"
            )
    if device != z.device:
        raise ValueError(f"the packed constants are on {device} but z is on {z.device}; move one of them")
    if weight_index is not None:
        if weight.ndim != 2:
            raise ValueError(
                f"weight_index chooses among weights [T, J]; got one weight {tuple(weight.shape)}"
            )
        if weight_index.shape != (rows,) or weight_index.dtype != torch.int64:
            raise ValueError(
                f"weight_index must be int64 [N] = ({rows},); got {weight_index.dtype} "
                f"{tuple(weight_index.shape)}"
            )
    scale = None if scale is None else scale.to(least)
    mean = None if mean is None else mean.to(least)
    tasks = weight.to(least) if weight.ndim == 2 else weight.to(least).unsqueeze(0)
    return z, scale, mean, tasks, weight_index


def _plain(operands: tuple[Tensor | None, ...]) -> Any:
    """Tensors whose memory holds their values: a negative view holds them with the other sign."""
    return tuple([x.resolve_neg() if x is not None and x.is_neg() else x for x in operands])


def spectral_reweight(
    z: Tensor,
    scale: Tensor | None,
    mean: Tensor | None,
    proj: Tensor,
    bias: Tensor,
    slope: Tensor,
    offset: Tensor,
    weight: Tensor,
    basis: Tensor,
    unit_offsets: Tensor,
    *,
    weight_index: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Projects units onto their principal components, reweights them and sums them up in the output space.

    Args:
        z: [N, R, C] coordinates of R units for N rows, any strides; float64, float32, bfloat16 or float16.
        scale, mean: [N], or None for 1 and 0 (the stream form).
        proj: [J, C]. The constants `proj` to `basis` must not require grad.
        bias, slope, offset: [J].
        weight: [J], or [T, J] for T tasks on the same coefficients.
        basis: [J, D].
        unit_offsets: [R+1] int64; unit r owns the run of components unit_offsets[r] to unit_offsets[r+1].
        weight_index: [N] int64 in [0, T): row n uses weight[weight_index[n]]. Checked on the CPU only.
        backend: ``auto``, ``triton``, ``cpp`` or ``torch``.

    Returns:
        [N, D] in z's dtype; [T, N, D] for weight [T, J] without weight_index. Products accumulate in float32
        or better.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, with the values seen.
        RuntimeError: the backend asked for is missing.

    Gradients: of weight always; of z, scale and mean when they require it. dweight, dscale and dmean are at
    least float32. Once differentiable. Deterministic: the same inputs on the same machine give the same bits.

    The pack of the same constants is remembered. It is made again when one of them is another tensor or was
    changed in place. Writes through `.data` or NumPy are not seen; a module packs once and calls
    :func:`spectral_reweight_packed`.

    Source: the method is that of Basile et al., TMLR 2025 (arXiv 2411.00246); the low-rank form is this
    library's.
    """
    z = _autocast(z)
    constants = (proj, bias, slope, offset, basis, unit_offsets)
    transformed = torch._C._are_functorch_transforms_active()
    if not _traced(z) and not transformed:
        pack = remembered_pack(constants, z.dtype, backend)
        return spectral_reweight_packed(z, scale, mean, weight, pack, weight_index)
    check_constants(*constants)
    shape = (unit_offsets.numel() - 1, proj.shape[1], *basis.shape)
    operands = _operands(z, scale, mean, weight, weight_index, shape, proj.device)
    if transformed:  # packed here, the constants would be wrapped tensors of the transform
        pack_later = functools.partial(remembered_pack, constants, z.dtype, backend)
        y = _Reweight.apply(*_plain(operands), pack_later)
    else:
        chosen = backends.resolve(backend, z.device, z.dtype)
        y = torch.ops.residual_kernels.spectral_reweight_unpacked(*operands, list(constants), chosen)
    return y if weight.ndim == 2 else y.squeeze(0)
