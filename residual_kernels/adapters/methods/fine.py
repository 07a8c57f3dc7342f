"""fine: heads on the components that hold 0.90 of their variance; everything else is dropped. The paper's."""

from torch import nn

from residual_kernels.adapters.methods.record import TRUNCATION, Method, truncated
from residual_kernels.adapters.residual import ResiDual
from residual_kernels.bases.spectral_bases import SpectralBases


def make(
    tower: nn.Module, bases: SpectralBases, *, init="normal", seed: int = 0, rest: str = "zero", **truncation
) -> ResiDual:
    return ResiDual(tower, truncated(bases.of("head"), **truncation), rest, init=init, seed=seed)


METHOD = Method(
    name="fine",
    summary="heads, on the components that hold 0.90 of their variance; the rest is dropped",
    adapter=ResiDual,
    make=make,
    start="normal",
    kinds=("head",),
    options=("rest", *TRUNCATION),
    rests=("zero", "sum", "mean", "all"),
)
