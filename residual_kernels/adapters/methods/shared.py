"""shared: anchored, with one number per component index that all heads of a layer share:
far fewer numbers to learn."""

import torch
from torch import nn

from residual_kernels.adapters.methods.record import TRUNCATION, Method
from residual_kernels.adapters.residual import ResiDual
from residual_kernels.adapters.unit_adapter import Spread
from residual_kernels.bases.spectral_bases import SpectralBases


class SharedResiDual(ResiDual):
    """:class:`ResiDual` where the k-th components of all heads of a layer have one weight:
    of length P, not J.

    MLPs, alone in their layers, keep a number for each component. Arguments as there, at the output only.
    """

    method = "shared"

    def _shared(self, bases: SpectralBases) -> Spread:
        index, total = [], 0
        for kind in bases.kinds:
            sizes = bases.parts[kind].offsets.diff().tolist()
            units = self.layout.select(kind)
            for layer in dict.fromkeys(unit.layer for unit in units):
                own = [size for size, unit in zip(sizes, units, strict=True) if unit.layer == layer]
                index += [total + torch.arange(size) for size in own]
                total += max(own)
        return Spread(torch.cat(index))


def make(
    tower: nn.Module, bases: SpectralBases, *, init="ones", seed: int = 0, rest: str = "all", **truncation
) -> SharedResiDual:
    kept = bases.of("head", "mlp")
    if truncation:
        kept = kept.truncate(**truncation)
    return SharedResiDual(tower, kept, rest, init=init, seed=seed)


METHOD = Method(
    name="shared",
    summary="as anchored, but the heads of a layer share one number per component index",
    adapter=SharedResiDual,
    make=make,
    start="ones",
    kinds=("head", "mlp"),
    options=("rest", *TRUNCATION),
    rests=("all", "zero", "sum", "mean"),
)
