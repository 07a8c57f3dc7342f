"""Who computes an operator: ``triton`` (CUDA and ROCm devices), ``cpp`` (the compiled CPU extension) or ``torch``.

A backend is a module in ``residual_kernels.ops`` with the functions ``pack``, ``spectral_reweight_forward``,
``spectral_reweight_backward`` and ``unit_moments``. ``auto`` takes the first available one in the order below;
a backend asked for by name is never replaced by another.
"""

import importlib
import os
from types import ModuleType

import torch

ENVIRONMENT_VARIABLE = "RESIDUAL_KERNELS_BACKEND"
BACKENDS = ("triton", "cpp", "torch")  # the order in which `auto` looks
_MODULES = {
    "triton": "residual_kernels.ops.triton_backend",
    "cpp": "residual_kernels.ops.cpp_backend",
    "torch": "residual_kernels.ops.torch_backend",
}


def missing(backend: str, device: torch.device) -> str | None:
    """Why `backend` cannot compute on `device`, in one clause; None when it can."""
    if backend == "torch":
        return None
    if backend == "cpp":
        return "the compiled CPU backend is not part of this version"
    if backend == "triton":
        return "the Triton backend is not part of this version"
    raise ValueError(f"unknown backend {backend!r}; choose one of {', '.join(BACKENDS)} or auto")


def available(device: torch.device | str = "cpu") -> list[str]:
    """Names of the backends that can compute on `device`, in the order `auto` tries them."""
    device = torch.device(device)
    return [backend for backend in BACKENDS if missing(backend, device) is None]


def resolve(backend: str, device: torch.device) -> str:
    """The backend that will compute on `device`.

    `backend` is a name or ``auto``; ``auto`` gives way to the variable RESIDUAL_KERNELS_BACKEND, then to the first
    available of triton, cpp, torch. Raises ValueError for an unknown name, RuntimeError when the named one is missing.
    """
    if backend == "auto":
        backend = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    if backend == "auto":
        return available(device)[0]
    reason = missing(backend, device)
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} was asked for on {device}, but {reason}")
    return backend


def load(backend: str) -> ModuleType:
    """The module that implements `backend` (a resolved name)."""
    return importlib.import_module(_MODULES[backend])
