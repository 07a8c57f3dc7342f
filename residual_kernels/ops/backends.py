"""Who computes an operator: ``triton`` (CUDA and ROCm devices),
``cpp`` (the compiled CPU extension) or ``torch``.

A backend is a module in ``residual_kernels.ops`` that has the functions of :class:`Backend`, the one place
where their arguments are explained; the type checker holds each module to them. ``auto`` takes the first
available one in the order below; a backend asked for by name is never replaced by another.
"""

import importlib
import importlib.util
import os
from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from residual_kernels.ops.tracing import constant_when_traced

ENVIRONMENT_VARIABLE = "RESIDUAL_KERNELS_BACKEND"
BACKENDS = ("triton", "cpp", "torch")  # the order in which `auto` looks
_MODULES = {
    "triton": "residual_kernels.ops.triton.backend",
    "cpp": "residual_kernels.ops.cpp_backend",
    "torch": "residual_kernels.ops.torch_backend",
}


class Backend(Protocol):
    """What a backend computes. Its callers have checked shapes, dtypes and devices.

    A pack, `tensors` and `sizes`, is laid out by the backend's own `pack` and opaque to everybody else. The
    letters are those of :func:`residual_kernels.ops.spectral_reweight`.
    """

    def pack(
        self, proj: Tensor, bias: Tensor, slope: Tensor, offset: Tensor, basis: Tensor, unit_offsets: Tensor
    ) -> tuple[list[Tensor], list[int]]:
        """The constants of all units as the kernels read them; proj and basis in the dtype of z."""
        ...

    def shape(self, tensors: Sequence[Tensor], sizes: Sequence[int]) -> tuple[int, int, int, int]:
        """(R, C, J, D) of a pack.

        A ValueError unless its tensors are what `pack` makes of such constants, so that no kernel reads
        outside of them.
        """
        ...

    def spectral_reweight_forward(
        self,
        z: Tensor,
        scale: Tensor | None,
        mean: Tensor | None,
        weight: Tensor,
        weight_index: Tensor | None,
        tensors: Sequence[Tensor],
        sizes: Sequence[int],
    ) -> Tensor:
        """y [T, N, D] for weight [T, J]; [N, D] with `weight_index` [N], each row's own weight."""
        ...

    def spectral_reweight_backward(
        self,
        dy: Tensor,
        z: Tensor,
        scale: Tensor | None,
        mean: Tensor | None,
        weight: Tensor,
        weight_index: Tensor | None,
        tensors: Sequence[Tensor],
        sizes: Sequence[int],
        wanted: list[bool],
    ) -> list[Tensor]:
        """Those of dweight, dz, dscale and dmean that are `wanted`, in this order."""
        ...

    def unit_moments(
        self, z: Tensor, scale: Tensor | None, mean: Tensor | None, shift: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(total [R, L], second moment [R, L, L]) of l = (scale z, scale, scale mean), about `shift`."""
        ...


class SummingBackend(Backend, Protocol):
    """A backend that also sums coefficients which are known already, c [N, J], faster than a product."""

    def spectral_sum_forward(
        self, c: Tensor, weight: Tensor, tensors: Sequence[Tensor], sizes: Sequence[int]
    ) -> Tensor:
        """y [T, N, D] of weight [T, J]."""
        ...

    def spectral_sum_backward(
        self, dy: Tensor, c: Tensor, weight: Tensor, tensors: Sequence[Tensor], sizes: Sequence[int]
    ) -> Tensor:
        """dweight [T, J]."""
        ...


def _cpp_missing(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"the compiled backend computes on CPU tensors only, not on {device.type}"
    try:
        importlib.import_module("residual_kernels._cpp")
    except ImportError as error:
        return (
            f"the compiled extension is not there ({error}); reinstall with a C++17 compiler (GCC or "
            "Clang) at hand"
        )
    return None


def missing(
    backend: str, device: torch.device, dtype: torch.dtype | None = None, *, by_name: bool = True
) -> str | None:
    """Why `backend` cannot compute on `device` (in `dtype`), in one clause; None when it can.

    Triton's interpreter counts only when it is asked for `by_name`: it proves kernels, it is no way to
    compute.
    """
    if backend == "torch":
        return None
    if backend == "cpp":
        return _cpp_missing(device)
    if backend == "triton":
        if dtype == torch.float64 and not by_name:  # asked for by name, the backend itself refuses it
            return "Triton kernels compute bfloat16, float16 and float32, not float64"
        return _missing_triton(device, by_name)
    raise ValueError(f"unknown backend {backend!r}; choose one of {', '.join(BACKENDS)} or auto")


def _missing_triton(device: torch.device, by_name: bool) -> str | None:
    if device.type not in ("cuda", "cpu"):
        return f"Triton kernels run on CUDA and ROCm devices, not on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type == "cpu" and not (by_name and os.environ.get("TRITON_INTERPRET")):
        return (
            "Triton computes on the CPU only in its interpreter: set TRITON_INTERPRET=1 and ask for "
            "triton by name"
        )
    interpreted = importlib.import_module(_MODULES["triton"]).INTERPRETED
    if device.type == "cpu" and not interpreted:
        return "TRITON_INTERPRET=1 was not set when the kernels were imported"
    if device.type == "cuda" and interpreted:
        return "TRITON_INTERPRET=1 has made the kernels programs for the CPU; start Python without it"
    return None


def available(device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> list[str]:
    """Names of the backends that can compute on `device` (in `dtype`), in the order `auto` tries them."""
    device = torch.device(device)
    return [backend for backend in BACKENDS if missing(backend, device, dtype, by_name=False) is None]


@constant_when_traced
def resolve(backend: str, device: torch.device, dtype: torch.dtype | None = None) -> str:
    """The backend that will compute on `device` (in `dtype`).

    `backend` is a name or ``auto``; ``auto`` gives way to the variable RESIDUAL_KERNELS_BACKEND, then to the
    first available of triton, cpp, torch. Raises ValueError for an unknown name, RuntimeError when the named
    one is missing.
    """
    if backend == "auto":
        backend = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    if backend == "auto":
        return available(device, dtype)[0]
    reason = missing(backend, device, dtype)
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} was asked for on {device}, but {reason}")
    return backend


def load(backend: str) -> Backend:
    """The module that implements `backend` (a resolved name)."""
    return cast(Backend, importlib.import_module(_MODULES[backend]))


def load_summing(backend: str) -> SummingBackend:
    """The same of a backend that has the sums: triton or cpp."""
    return cast(SummingBackend, load(backend))


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether products of bfloat16 matrices are made by instructions of their own,
    and so much faster than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if _cpp_missing(device) is not None:
        return False
    return importlib.import_module("residual_kernels._cpp").instruction_sets()["avx512bf16"] is None
