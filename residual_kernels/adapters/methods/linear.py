"""linear: a linear layer on the tower's output. The paper's baseline."""

from torch import nn

from residual_kernels.adapters.methods.record import Method
from residual_kernels.adapters.output import OutputLinear
from residual_kernels.bases.spectral_bases import SpectralBases


def make(tower: nn.Module, bases: SpectralBases | None = None, *, seed: int = 0) -> OutputLinear:
    return OutputLinear(tower, seed=seed)


METHOD = Method(
    name="linear",
    summary="a linear layer on the output",
    adapter=OutputLinear,
    make=make,
    start=None,  # torch's own, by the seed
    needs_bases=False,
)
