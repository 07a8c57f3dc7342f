"""What do adapters of units have in common?

One weight vector that runs through the units of some kinds, and a rest.

:class:`WeightedUnits` is the base of all of them. :class:`UnitAdapter` makes the embedding anew at the output
of the tower, from the reweighted units and what becomes of the others.
"""

import abc
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from residual_kernels import towers
from residual_kernels.adapters.fold import Fold, MergedUnits
from residual_kernels.adapters.tower_adapter import AroundTower, TowerAdapter
from residual_kernels.adapters.unit_sum import Rest, reweighted_sum, tower_itself
from residual_kernels.bases.spectral_bases import SpectralBases
from residual_kernels.ops import backends
from residual_kernels.ops.packing import wide
from residual_kernels.towers import Terms

RESTS = ("zero", "sum", "mean", "all")


def initial_weight(size: int, init: str | Tensor, seed: int, like: Tensor) -> nn.Parameter:
    """Ones, N(1, 1) drawn from a generator with `seed`, or a copy of a tensor [size]; at least float32."""
    dtype = wide(like.dtype)
    if isinstance(init, Tensor):
        if init.shape != (size,):
            raise ValueError(
                f"init must have shape ({size},), one number per kept component; got {tuple(init.shape)}"
            )
        value = init.detach().clone()
    elif init == "ones":
        value = torch.ones(size)
    elif init == "normal":
        value = 1 + torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    else:
        raise ValueError(f'init must be "ones", "normal" or a tensor; got {init!r}')
    return nn.Parameter(value.to(device=like.device, dtype=dtype))


def kept_start(init: str | Tensor) -> str | Tensor:
    """`init` as an adapter remembers it: a tensor is copied, so that later weights can be told from it."""
    return init.detach().cpu().clone() if isinstance(init, Tensor) else init


class WeightedUnits(TowerAdapter):
    """An adapter that learns one weight vector for the units of some kinds.

    `units` maps each adapted kind to the module that holds its constants; components run through them in
    layout order, `_sizes[k]` of the k-th kind. `spread` makes the components' weights [..., J] of the learned
    ones [..., P]: the identity, unless components share a number.
    """

    weight: nn.Parameter
    units: Mapping[str, Any]

    def _assemble(
        self,
        rest: str,
        bases: SpectralBases | None,
        units: dict[str, nn.Module],
        sizes: list[int],
        init: str | Tensor,
        seed: int,
        spread: "Spread | None" = None,
    ) -> None:
        like = next(self.tower.parameters())
        self.bases = None if bases is None else replace(bases, moments=None)
        self.adapted = tuple(units)
        self.rest = Rest(rest, self.adapted, self._view, wide(like.dtype))
        self.rest.set_mean(bases, like)
        self.units = cast(Mapping[str, Any], nn.ModuleDict(units))  # modules, read as a dictionary
        self._sizes = sizes
        self.spread = nn.Identity() if spread is None else spread.to(like.device)
        self.weight = initial_weight(sum(sizes) if spread is None else spread.count, init, seed, like)
        self._start = kept_start(init), seed

    def _initial(self) -> list[Tensor]:
        return [initial_weight(len(self.weight), *self._start, self.weight)]

    def component_weight(self, weight: Tensor | None = None) -> Tensor:
        return self.spread(self.weight if weight is None else weight)

    def constants(self) -> dict[str, nn.Module]:
        return {"units": cast(nn.Module, self.units), "rest": self.rest, "spread": self.spread}

    def weight_of(self, unit) -> Tensor:
        """The weights of one adapted unit's components.

        Args:
            unit: layout index, layout row or (layer, head).

        Returns:
            [K_u].

        Raises:
            ValueError: the unit is of a kind that is not adapted.
        """
        row = self.layout[self.layout.index(unit)]
        if row.kind not in self.adapted:
            raise ValueError(
                f"unit {unit} is of kind {row.kind!r}, which is not adapted ({', '.join(self.adapted)} are)"
            )
        position = self.adapted.index(row.kind)
        offsets = self.units[row.kind].unit_offsets
        index = row.index - self.layout.span(row.kind).start
        start = sum(self._sizes[:position])
        return self.component_weight()[start + int(offsets[index]) : start + int(offsets[index + 1])]


class Spread(nn.Module):
    """Components that share learned numbers: component j has the weight of number `index[j]`."""

    index: Tensor

    def __init__(self, index: Tensor):
        super().__init__()
        self.count = int(index.max()) + 1
        self.register_buffer("index", index)

    def forward(self, weight: Tensor) -> Tensor:
        """[..., J] of weights [..., P]."""
        return weight.index_select(-1, self.index)


class UnitConstants(Protocol):
    """What a module of `units` offers to a :class:`UnitAdapter`."""

    @property
    def unit_offsets(self) -> Tensor: ...

    def __call__(self, z: Tensor, scale: Tensor, mean: Tensor, weight: Tensor) -> Tensor: ...

    def features(self, z: Tensor, scale: Tensor, mean: Tensor) -> dict[str, Tensor]: ...

    def from_features(self, features: dict[str, Tensor], weight: Tensor) -> Tensor: ...


class UnitAdapter(WeightedUnits):
    """An adapter that reweights the units of some kinds and decides what becomes of the rest.

    Modules of `units` have ``forward(z, scale, mean, weight)``. With rest="all" the tower's whole output is
    kept, and the units add what `weight - 1` makes of them.
    """

    units: Mapping[str, UnitConstants]

    def _assemble(self, rest: str, *arguments: Any, **options: Any) -> None:
        super()._assemble(rest, *arguments, **options)
        self.kinds = self.layout.kinds if rest == "sum" else self.adapted

    def options(self) -> dict[str, Any]:
        return {"rest": self.rest.name}

    @property
    def rest_name(self) -> str | None:  # type: ignore[override]  # nobody sets it
        return self.rest.name

    def _reads(self) -> tuple[str, ...]:
        return self.adapted

    def adapted_sum(self, terms: Terms) -> Tensor:
        """The reweighted units alone, without the rest. With rest="all": what they add to the output.

        Args:
            terms: a batch of N images.

        Returns:
            [N, D].
        """
        return reweighted_sum(self.units, self._sizes, terms, self.rest.factors(self.component_weight()))

    def _embed(self, terms: Terms) -> Tensor:
        y = self.adapted_sum(terms)
        rest = self.rest(terms)
        return y if rest is None else y + rest

    def features(self, terms: Terms) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for kind in self.adapted:
            one = self.units[kind].features(terms.z[kind], terms.scale, terms.mean)
            found |= {f"{kind}.{name}": value for name, value in one.items()}
        if self.rest.varies:
            rest = self.rest(terms)
            found["rest"] = rest.to(wide(rest.dtype))
        return found

    def from_features(self, features: dict[str, Tensor], weights: Sequence[Tensor]) -> Tensor:
        y: Tensor | float = 0.0
        factors = self.rest.factors(self.component_weight(weights[0]))
        for kind, weight in zip(self.adapted, factors.split(self._sizes, -1), strict=True):
            own = {
                name.removeprefix(f"{kind}."): value
                for name, value in features.items()
                if name.startswith(f"{kind}.")
            }
            y = y + self.units[kind].from_features(own, weight)
        assert isinstance(y, Tensor)  # some kind is adapted
        if self.rest.name == "zero":
            return y
        return y + (features["rest"] if self.rest.varies else self.rest.mean)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if self.rest.leaves_the_tower(self.weight):
            return tower_itself(self._view, images, self.collect, self.adapted_sum)
        return super().forward(images)

    def merge(self) -> nn.Module:
        self.still()
        fold = Fold(self.dim, self.weight.device)
        factors = self.rest.factors(self.component_weight().detach())
        others_stay = self.rest.name == "sum" and bool(self.rest.others)
        for kind, weight in zip(self.adapted, factors.split(self._sizes), strict=True):
            self._fold(fold, kind, weight)
            if others_stay:
                fold.subtract_units(self._view.maps(kind))
        if self.rest.name == "mean":
            fold.e += self.rest.mean
        return MergedUnits(self._view, self.adapted, fold, keep_output=others_stay or self.rest.name == "all")

    @abc.abstractmethod
    def _fold(self, fold: Fold, kind: str, weight: Tensor) -> None:
        """Adds the reweighted units of one kind to what is folded."""


def check_arguments(
    tower: nn.Module,
    bases: SpectralBases | None,
    rest: str = "zero",
    backend: str = "auto",
    placement: str = "output",
) -> None:
    """Everything about the arguments that can be wrong, before anything is touched."""
    if isinstance(tower, AroundTower):
        raise ValueError(
            f"this tower is wrapped in a {type(tower).__name__} already; use its .tower, or detach it first"
        )
    # Whether it is here is asked where it computes: modules move.
    if backend not in (
        "auto",
        *backends.BACKENDS,
    ):
        raise ValueError(f"unknown backend {backend!r}; choose one of {', '.join(backends.BACKENDS)} or auto")
    if rest not in RESTS:
        raise ValueError(f"rest must be one of {', '.join(RESTS)}; got {rest!r}")
    if rest == "mean" and bases is None:
        raise ValueError('rest="mean" needs bases: the mean is the fitted one, not the batch\'s')
    view = towers.view(tower)
    if bases is not None:
        if bases.placement != placement:
            raise ValueError(
                f"these bases were fitted with placement={bases.placement!r}, but {placement!r} is wanted "
                f"here; fit them with fit_bases(..., placement={placement!r})"
            )
        bases.check_tower(view)
