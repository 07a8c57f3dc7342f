"""y[n] = sum_j weight[j] * c[n,j] * basis[j]

with c[n,j] = scale[n] * (z[n,r(j)] . proj[j] + bias[j] + mean[n] * slope[j]) - offset[j]:
the operator of ResiDual: coefficients of N rows on the J principal components of R units, reweighted and written back
to D dimensions. Source: Basile et al., "ResiDual Transformer Alignment with Spectral Decomposition", TMLR 2025; the
low-rank form is derived in README, "How it works".
"""

import torch
from torch import Tensor

from residual_kernels.ops import backends
from residual_kernels.ops.packing import PackedUnits, pack_units, wide


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
    # Values cannot be looked at while tracing, and on a device a look would wait for it: checked here, on the CPU.
    if weight_index is not None and weight_index.device.type == "cpu" and len(weight_index):
        low, high = int(weight_index.min()), int(weight_index.max())
        if low < 0 or high >= len(weight):
            raise ValueError(
                f"weight_index runs from {low} to {high}, but there are T = {len(weight)} weights"
            )
    return backends.load(backend).spectral_reweight_forward(
        z, scale, mean, weight, weight_index, tensors, sizes
    )


@_spectral_reweight.register_fake
def _(z, scale, mean, weight, weight_index, tensors, sizes, dim, backend):
    lead = (z.shape[0],) if weight_index is not None else (weight.shape[0], z.shape[0])
    return z.new_empty(*lead, dim)


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
    return backends.load(backend).spectral_reweight_backward(
        dy, z, scale, mean, weight, weight_index, tensors, sizes, wanted
    )


@_spectral_reweight_backward.register_fake
def _(dy, z, scale, mean, weight, weight_index, tensors, sizes, wanted, backend):
    least = wide(z.dtype)
    shapes = [weight.shape, z.shape, z.shape[:1], z.shape[:1]]
    dtypes = [least, z.dtype, least, least]
    return [
        z.new_empty(shape, dtype=dtype)
        for shape, dtype, want in zip(shapes, dtypes, wanted, strict=True)
        if want
    ]


def _setup_context(ctx, inputs, output) -> None:
    z, scale, mean, weight, weight_index, tensors, sizes, _, backend = inputs
    ctx.save_for_backward(z, scale, mean, weight, weight_index, *tensors)
    ctx.sizes, ctx.backend = sizes, backend


def _backward(ctx, dy: Tensor):
    z, scale, mean, weight, weight_index, *tensors = ctx.saved_tensors
    need = ctx.needs_input_grad
    wanted = [need[3], need[0], need[1], need[2]]
    grads = iter(
        _spectral_reweight_backward(
            dy, z, scale, mean, weight, weight_index, tensors, ctx.sizes, wanted, ctx.backend
        )
    )  # fmt: skip
    dweight, dz, dscale, dmean = (next(grads) if want else None for want in wanted)
    return dz, dscale, dmean, dweight, None, [None] * len(tensors), None, None, None


_spectral_reweight.register_autograd(_backward, setup_context=_setup_context)


def spectral_reweight_packed(
    z: Tensor,
    scale: Tensor | None,
    mean: Tensor | None,
    weight: Tensor,
    pack: PackedUnits,
    weight_index: Tensor | None = None,
) -> Tensor:
    """:func:`spectral_reweight` with the constants packed beforehand by :func:`pack_units`; see there.

    Under autocast z takes the autocast dtype, and weight, scale, mean and offsets keep theirs. `z` must otherwise have
    the dtype of the packed proj and basis.
    """
    if torch.is_autocast_enabled(z.device.type) and z.dtype != torch.float64:
        z = z.to(torch.get_autocast_dtype(z.device.type))
    if z.ndim != 3 or z.shape[1:] != (pack.units, pack.coordinates):
        raise ValueError(f"z must be [N, R, C] = [N, {pack.units}, {pack.coordinates}]; got {tuple(z.shape)}")
    if z.dtype != pack.dtype:
        raise ValueError(
            f"z has dtype {z.dtype} but the packed constants have {pack.dtype}; cast one to the other"
        )
    if weight.ndim not in (1, 2) or weight.shape[-1] != pack.components:
        raise ValueError(
            f"weight must be [J] or [T, J] with J = {pack.components}; got {tuple(weight.shape)}"
        )
    rows = z.shape[0]
    least = wide(z.dtype)
    for name, tensor in (("scale", scale), ("mean", mean)):
        if tensor is not None and tensor.shape != (rows,):
            raise ValueError(f"{name} must be [N] = ({rows},) like z; got {tuple(tensor.shape)}")
    for name, tensor in (
        ("scale", scale),
        ("mean", mean),
        ("weight", weight),
        ("weight_index", weight_index),
    ):
        if tensor is not None and tensor.device != z.device:
            raise ValueError(f"{name} is on {tensor.device} but z is on {z.device}; move one of them")
    if pack.device != z.device:
        raise ValueError(
            f"the packed constants are on {pack.device} but z is on {z.device}; move one of them"
        )
    if weight_index is not None:
        if weight.ndim != 2:
            raise ValueError(
                f"weight_index chooses among weights [T, J]; got one weight {tuple(weight.shape)}"
            )
        if weight_index.shape != (rows,) or weight_index.dtype != torch.int64:
            raise ValueError(
                f"weight_index must be int64 [N] = ({rows},); got {weight_index.dtype} {tuple(weight_index.shape)}"
            )
    scale = None if scale is None else scale.to(least)
    mean = None if mean is None else mean.to(least)
    tasks = weight.to(least) if weight.ndim == 2 else weight.to(least).unsqueeze(0)
    y = torch.ops.residual_kernels.spectral_reweight(
        z, scale, mean, tasks, weight_index, list(pack.tensors), list(pack.sizes), pack.dim, pack.backend
    )
    return y if weight.ndim == 2 else y.squeeze(0)


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
        proj: [J, C]; bias, slope, offset: [J]; basis: [J, D]: constants, which must not require grad.
        weight: [J], or [T, J] for T tasks on the same coefficients.
        unit_offsets: [R+1] int64; unit r owns the run of components unit_offsets[r] to unit_offsets[r+1].
        weight_index: [N] int64 in [0, T): row n uses weight[weight_index[n]]. Checked on the CPU only.
        backend: ``auto``, ``triton``, ``cpp`` or ``torch``.

    Returns:
        [N, D] in z's dtype; [T, N, D] for weight [T, J] without weight_index. Products accumulate in float32 or better.

    Gradients: weight always, z, scale and mean when they require it; dweight, dscale, dmean at least float32; once
    differentiable. Deterministic: the same inputs on the same machine give the same bits.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, with the values seen.
        RuntimeError: the backend asked for is missing.

    The constants are checked and laid out at every call; a module packs once and calls
    :func:`spectral_reweight_packed`.
    """
    if torch.is_autocast_enabled(z.device.type) and z.dtype != torch.float64:
        z = z.to(torch.get_autocast_dtype(z.device.type))
    pack = pack_units(proj.to(z.dtype), bias, slope, offset, basis.to(z.dtype), unit_offsets, backend=backend)
    return spectral_reweight_packed(z, scale, mean, weight, pack, weight_index)
