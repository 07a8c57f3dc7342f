"""stream: heads reweighted where they enter the residual stream, so that later layers see it.

Weights of one are the tower."""

from torch import nn

from residual_kernels.adapters.methods.record import TRUNCATION, Method, truncated
from residual_kernels.adapters.stream import StreamResiDual
from residual_kernels.bases.spectral_bases import SpectralBases


def make(
    tower: nn.Module, bases: SpectralBases, *, init="ones", seed: int = 0, **truncation
) -> StreamResiDual:
    return StreamResiDual(tower, truncated(bases.of("head"), **truncation), init=init, seed=seed)


METHOD = Method(
    name="stream",
    summary="heads, inside the tower; every other unit stays",
    adapter=StreamResiDual,
    make=make,
    start="ones",
    kinds=("head",),
    options=TRUNCATION,
)
