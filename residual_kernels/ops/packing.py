"""Constants of `spectral_reweight`, checked once and laid out for the backend that will read them."""

import os
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

from residual_kernels.forks import compute_alone_after_a_fork
from residual_kernels.ops import backends

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class PackedUnits:
    """What a backend reads besides z and weight. Made by :func:`pack_units`; treat as opaque.

    Attributes:
        backend: which reads it.
        dtype: of proj and basis.
        units, coordinates, components, dim: R, C, J and D of the operator.
        tensors, sizes: in the backend's own layout.
    """

    backend: str
    dtype: torch.dtype  # of proj and basis
    units: int  # R
    coordinates: int  # C
    components: int  # J
    dim: int  # D
    tensors: tuple[Tensor, ...]
    sizes: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(R, C, J, D)."""
        return self.units, self.coordinates, self.components, self.dim

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of weights, scales and offsets beside data of `dtype`: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def check_constants(
    proj: Tensor, bias: Tensor, slope: Tensor, offset: Tensor, basis: Tensor, unit_offsets: Tensor
) -> None:
    """ValueError for constants whose shapes, dtypes or devices do not fit together, or that require grad."""
    constants = {"proj": proj, "bias": bias, "slope": slope, "offset": offset, "basis": basis}
    if proj.ndim != 2 or basis.ndim != 2 or len(proj) != len(basis):
        raise ValueError(
            f"proj must be [J, C] and basis [J, D] with one J; got {tuple(proj.shape)} and "
            f"{tuple(basis.shape)}"
        )
    components = len(proj)
    for name in ("bias", "slope", "offset"):
        if constants[name].shape != (components,):
            raise ValueError(
                f"{name} must have shape [J] = ({components},) like proj; got {tuple(constants[name].shape)}"
            )
    for name, tensor in constants.items():
        if tensor.layout is not torch.strided or tensor.is_nested:
            raise ValueError(f"{name} must be a dense tensor; got layout {tensor.layout}")
        if tensor.dtype not in FLOATING:
            raise ValueError(f"{name} has dtype {tensor.dtype}; use float64, float32, bfloat16 or float16")
        if tensor.requires_grad:
            raise ValueError(
                f"{name} requires grad, but it is a constant of spectral_reweight; detach it (weight is "
                "what learns)"
            )
        if tensor.device != proj.device:
            raise ValueError(
                f"{name} is on {tensor.device} but proj is on {proj.device}; put all constants together"
            )
    if proj.dtype != basis.dtype:
        raise ValueError(f"proj ({proj.dtype}) and basis ({basis.dtype}) must have one dtype")
    if unit_offsets.ndim != 1 or unit_offsets.numel() < 2 or unit_offsets.dtype != torch.int64:
        raise ValueError(
            "unit_offsets must be an int64 tensor [R+1] with R >= 1; "
            f"got {unit_offsets.dtype} {tuple(unit_offsets.shape)}"
        )


def pack_units(
    proj: Tensor,
    bias: Tensor,
    slope: Tensor,
    offset: Tensor,
    basis: Tensor,
    unit_offsets: Tensor,
    *,
    backend: str = "auto",
) -> PackedUnits:
    """Checks the constants and lays them out for a backend, once per module instead of once per call.

    Args:
        proj: [J, C] rows that read coefficients from a unit's coordinates; one floating dtype with `basis`.
        bias, slope, offset: [J]; kept at float32 or better.
        basis: [J, D] rows that the coefficients are written along.
        unit_offsets: [R+1] int64, 0 = first, J = last, non-decreasing: unit r owns components
            offsets[r]..offsets[r+1].
        backend: a backend's name, or ``auto``.

    Returns:
        The pack, for :func:`spectral_reweight_packed` and :func:`spectral_sum`.

    Raises:
        ValueError: shapes, dtypes, devices or offsets that do not fit together, or constants that require
            grad.
        RuntimeError: the backend asked for is missing.
    """
    compute_alone_after_a_fork()
    check_constants(proj, bias, slope, offset, basis, unit_offsets)
    components = len(proj)
    if proj.device.type != "meta":
        bounds = unit_offsets.tolist()
        if (
            bounds[0] != 0
            or bounds[-1] != components
            or any(a > b for a, b in zip(bounds[:-1], bounds[1:], strict=True))
        ):
            raise ValueError(
                f"unit_offsets must rise from 0 to J = {components}; got {bounds[:4]} ... {bounds[-2:]}"
            )

    chosen = backends.resolve(backend, proj.device, proj.dtype)
    least = wide(proj.dtype)
    tensors, sizes = backends.load(chosen).pack(
        proj.detach(),
        bias.detach().to(least),
        slope.detach().to(least),
        offset.detach().to(least),
        basis.detach(),
        unit_offsets.to(proj.device),
    )
    return PackedUnits(
        backend=chosen,
        dtype=proj.dtype,
        units=unit_offsets.numel() - 1,
        coordinates=proj.shape[1],
        components=components,
        dim=basis.shape[1],
        tensors=tuple(tensors),
        sizes=tuple(sizes),
    )


REMEMBERED = 8  # packs of unpacked calls that are kept
_remembered: OrderedDict[tuple, tuple[tuple[weakref.ref, ...], tuple[int, ...], PackedUnits]] = OrderedDict()
_remembering = Lock()


def remembered_pack(constants: Sequence[Tensor], dtype: torch.dtype, backend: str) -> PackedUnits:
    """The pack of (proj, bias, slope, offset, basis, unit_offsets) in `dtype`, made once for the same
    tensors.

    "The same" means the same objects with the same version counters. Only weak references are held, and at
    most REMEMBERED packs. Tensors made under inference mode have no counter and are packed at every call.
    """
    proj, bias, slope, offset, basis, unit_offsets = constants
    if any(x.is_inference() or x.requires_grad or type(x) is not Tensor for x in constants):
        return pack_units(proj.to(dtype), bias, slope, offset, basis.to(dtype), unit_offsets, backend=backend)
    if backend == "auto":
        backend = os.environ.get(backends.ENVIRONMENT_VARIABLE, "auto")
    key = (*map(id, constants), dtype, backend)
    versions = tuple(x._version for x in constants)
    with _remembering:
        known = _remembered.get(key)
        if known is not None and known[1] == versions:
            if all(ref() is x for ref, x in zip(known[0], constants, strict=True)):
                _remembered.move_to_end(key)
                return known[2]
    pack = pack_units(proj.to(dtype), bias, slope, offset, basis.to(dtype), unit_offsets, backend=backend)

    def forget(_: weakref.ref, key: tuple = key) -> None:
        _remembered.pop(key, None)

    with _remembering:
        _remembered[key] = tuple(weakref.ref(x, forget) for x in constants), versions, pack
        while len(_remembered) > REMEMBERED:
            _remembered.popitem(last=False)
    return pack
