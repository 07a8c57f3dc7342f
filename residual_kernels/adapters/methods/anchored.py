"""anchored: the tower's whole output, and what the weights of heads and MLPs change of it.

Ones are the tower.
"""

from torch import nn

from residual_kernels.adapters.methods.record import TRUNCATION, Method
from residual_kernels.adapters.residual import ResiDual
from residual_kernels.bases.spectral_bases import SpectralBases


def make(
    tower: nn.Module, bases: SpectralBases, *, init="ones", seed: int = 0, rest: str = "all", **truncation
) -> ResiDual:
    kept = bases.of("head", "mlp")
    if truncation:  # all components by default: none is dropped from the output, whatever is kept here
        kept = kept.truncate(**truncation)
    return ResiDual(tower, kept, rest, init=init, seed=seed)


METHOD = Method(
    name="anchored",
    summary="heads and MLPs, on all components, as a change of the tower's whole output",
    adapter=ResiDual,
    make=make,
    start="ones",
    kinds=("head", "mlp"),
    options=("rest", *TRUNCATION),
    rests=("all",),
)
