"""full: heads and MLPs on all of their components; the embedding is kept. The paper's."""

from torch import nn

from residual_kernels.adapters.methods.record import Method
from residual_kernels.adapters.residual import ResiDual
from residual_kernels.bases.spectral_bases import SpectralBases


def make(
    tower: nn.Module, bases: SpectralBases, *, init="normal", seed: int = 0, rest: str = "sum"
) -> ResiDual:
    return ResiDual(tower, bases.of("head", "mlp"), rest, init=init, seed=seed)


METHOD = Method(
    name="full",
    summary="heads and MLPs, on all components; the rest is kept",
    adapter=ResiDual,
    make=make,
    start="normal",
    kinds=("head", "mlp"),
    options=("rest",),
    rests=("sum", "zero", "mean", "all"),
)
