"""What do the paper's names mean? Its variants, built by name with their own defaults."""

from enum import Enum

import torch
from torch import nn

from residual_kernels.adapters.residual import (
    CoarseHeads,
    OutputLinear,
    OutputSpectral,
    ResiDual,
    TowerAdapter,
)
from residual_kernels.bases.spectral_bases import SpectralBases

ENERGY = 0.90  # of the paper: explained variance kept per head


class Method(str, Enum):
    """The paper's variants; `anchored`: the tower's output and what the weights change of it; and `stream`: heads
    reweighted where they enter the residual stream."""

    fine = "fine"
    full = "full"
    coarse = "coarse"
    output = "output"
    linear = "linear"
    anchored = "anchored"
    stream = "stream"

    @property
    def runs_the_tower(self) -> bool:
        """Whether a fit needs the images: what the tower computes depends on the weights, so nothing can be cached."""
        return self is Method.stream

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of units the variant adapts: what a cache or bases must hold for it."""
        kinds = {
            "fine": ("head",),
            "coarse": ("head",),
            "full": ("head", "mlp"),
            "anchored": ("head", "mlp"),
            "stream": ("head",),
        }
        return kinds.get(self.value, ())

    @property
    def truncates(self) -> bool:
        """Whether the variant keeps as many components as it is told."""
        return self in (Method.fine, Method.anchored, Method.stream)

    @property
    def needs_bases(self) -> bool:
        return self not in (Method.coarse, Method.linear)


def check_options(method: Method, *, rest: str | None, **truncation: object) -> None:
    """Raises ValueError when an option is given that `method` would not read."""
    given = [name for name, value in truncation.items() if value is not None]
    if given and not method.truncates:
        raise ValueError(
            f"{' and '.join(given)} belongs to fine, anchored and stream; {method.value} keeps all components"
        )
    if method is Method.anchored and rest not in (None, "all"):
        raise ValueError(f'anchored keeps the whole output (rest="all"); leave rest={rest!r} out')
    if rest is not None and method is Method.stream:
        raise ValueError(f"rest={rest!r} is about other units, but stream leaves them all in the tower")
    if rest is not None and not method.kinds:
        raise ValueError(
            f"rest={rest!r} is about other units, but {method.value} adapts the output as a whole"
        )


def build(
    method: Method | str,
    tower: nn.Module,
    bases: SpectralBases | None = None,
    *,
    rest: str | None = None,
    energy: float | None = None,
    components: int | None = None,
    max_components: int | None = None,
    init: str | None = None,
    seed: int = 0,
) -> TowerAdapter:
    """An adapter of the paper's kind, or of ours, around `tower`.

    `rest` is the variant's own by default (zero; sum for full; all for anchored), and so is `init`: "normal" for the
    paper's, "ones" for anchored and stream, which then start as the tower itself. `energy` (0.90), `components` and
    `max_components` are fine's and stream's; anchored keeps all components unless it is given one of them. `bases` must
    hold the variant's kinds and may hold more; stream's are fitted with placement="stream", and where they were fitted
    over some tokens those are adapted; coarse needs bases for rest="mean" only, linear never. Raises ValueError for an
    option that the variant does not have.
    """
    method = Method(method)
    check_options(method, rest=rest, energy=energy, components=components, max_components=max_components)
    if method.needs_bases and bases is None:
        raise ValueError(f"{method.value} needs bases; fit them with fit_bases")
    if init is None:
        init = "ones" if method in (Method.anchored, Method.stream) else "normal"
    if method in (Method.fine, Method.stream):
        heads = bases.of("head")
        if components is not None:
            kept = heads.truncate(components=components, max_components=max_components)
        else:
            kept = heads.truncate(energy=ENERGY if energy is None else energy, max_components=max_components)
        placement = "stream" if method is Method.stream else "output"
        return ResiDual(tower, kept, rest or "zero", placement=placement, init=init, seed=seed)
    if method is Method.anchored:
        kept = bases.of("head", "mlp")
        if (energy, components, max_components) != (None, None, None):
            kept = kept.truncate(energy=energy, components=components, max_components=max_components)
        return ResiDual(tower, kept, "all", init=init, seed=seed)
    if method is Method.full:
        return ResiDual(tower, bases.of("head", "mlp"), rest or "sum", init=init, seed=seed)
    if method is Method.coarse:
        return CoarseHeads(tower, rest or "zero", bases=bases, init=init, seed=seed)
    if method is Method.output:
        return OutputSpectral(tower, bases, init=init, seed=seed)
    return OutputLinear(tower, seed=seed)


def identity(tower: nn.Module) -> TowerAdapter:
    """The tower's own output as an adapter, so that the base is measured by the same code."""
    adapter = OutputLinear(tower)
    with torch.no_grad():
        adapter.linear.weight.copy_(torch.eye(adapter.dim))
        adapter.linear.bias.zero_()
    return adapter
