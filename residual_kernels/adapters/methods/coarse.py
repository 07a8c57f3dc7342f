"""coarse: one number per head, without a basis; everything else is dropped. The paper's baseline."""

from torch import nn

from residual_kernels.adapters.coarse import CoarseHeads
from residual_kernels.adapters.methods.record import Method
from residual_kernels.bases.spectral_bases import SpectralBases


def make(
    tower: nn.Module, bases: SpectralBases | None, *, init="normal", seed: int = 0, rest: str = "zero"
) -> CoarseHeads:
    return CoarseHeads(tower, rest, bases=bases, init=init, seed=seed)


METHOD = Method(
    name="coarse",
    summary="heads, one number each; the rest is dropped",
    adapter=CoarseHeads,
    make=make,
    start="normal",
    kinds=("head",),
    options=("rest",),
    rests=("zero", "sum", "mean", "all"),
    needs_bases=False,  # but for rest="mean"
)
