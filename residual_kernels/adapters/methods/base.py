"""base: the tower as it is, in the shape of an adapter. Nothing is learned."""

from torch import nn

from residual_kernels.adapters.methods.record import Method
from residual_kernels.adapters.output import OutputIdentity
from residual_kernels.bases.spectral_bases import SpectralBases


def make(tower: nn.Module, bases: SpectralBases | None = None, *, seed: int = 0) -> OutputIdentity:
    return OutputIdentity(tower)


METHOD = Method(
    name="base",
    summary="the tower as it is",
    adapter=OutputIdentity,
    make=make,
    start=None,
    needs_bases=False,
)
