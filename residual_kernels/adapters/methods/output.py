"""output: the tower's output as one unit, on all of its components. The paper's baseline."""

from torch import nn

from residual_kernels.adapters.methods.record import Method
from residual_kernels.adapters.output import OutputSpectral
from residual_kernels.bases.spectral_bases import SpectralBases


def make(tower: nn.Module, bases: SpectralBases, *, init="normal", seed: int = 0) -> OutputSpectral:
    return OutputSpectral(tower, bases, init=init, seed=seed)


METHOD = Method(
    name="output",
    summary="the output as one unit, on all components",
    adapter=OutputSpectral,
    make=make,
    start="normal",
)
