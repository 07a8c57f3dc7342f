"""What do adapters share that differ in their weights alone?

Their constants: of units, the output or the stream.
"""

import abc
import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from residual_kernels.adapters.tower_adapter import TowerAdapter
from residual_kernels.adapters.unit_sum import Rest, SpectralConstants, reweighted_sum
from residual_kernels.towers import Terms
from residual_kernels.towers.edit import Edit


class Group(nn.Module, abc.ABC):
    """The constants of one kind of adapter, as :class:`AdapterSet` applies them with the weights of any."""

    removed_mean: Tensor

    def __init__(self, adapter: TowerAdapter):
        super().__init__()
        self.label = _label(adapter)
        self.kinds, self.reads = adapter.kinds, adapter._reads()
        self.register_buffer("removed_mean", adapter.removed_mean.double(), persistent=False)
        tower = {id(adapter.tower): adapter.tower}  # which is not copied
        self.sizes = adapter._sizes
        for name, module in adapter.constants().items():
            self.add_module(name, copy.deepcopy(module, tower))

    def serves(self, adapter: TowerAdapter) -> bool:
        """Whether this adapter's constants are these, number for number."""
        if _label(adapter) != self.label:
            return False
        mine = self.state_dict()
        theirs = {
            f"{name}.{key}": value
            for name, module in adapter.constants().items()
            for key, value in module.state_dict().items()
        }
        return mine.keys() == theirs.keys() and all(
            mine[key].shape == value.shape and torch.equal(mine[key], value.to(mine[key]))
            for key, value in theirs.items()
        )

    @abc.abstractmethod
    def forward(self, terms: Terms, weight: Tensor, index: Tensor | None = None) -> Tensor:
        """y [N, D] with weight [J], or [T, J] and each row's own, `index` [N]."""


class UnitsGroup(Group):
    """Units reweighted before they are summed up."""

    units: Mapping[str, Any]
    rest: Rest
    spread: nn.Module

    def forward(self, terms: Terms, weight: Tensor, index: Tensor | None = None) -> Tensor:
        y, rest = self.change(terms, weight, index), self.rest(terms)
        return y if rest is None else y + rest

    def change(self, terms: Terms, weight: Tensor, index: Tensor | None = None) -> Tensor:
        """The part of y, [N, D], that is added to the tower's output where :meth:`leaves_the_tower` holds."""
        factors = self.rest.factors(self.spread(weight))
        return reweighted_sum(self.units, self.sizes, terms, factors, index)

    def leaves_the_tower(self, weight: Tensor) -> bool:
        """Whether y is the tower's own output with this weight."""
        return self.rest.leaves_the_tower(weight)


class OutputGroup(Group):
    """Components of the output embedding."""

    spectral: SpectralConstants

    def forward(self, terms: Terms, weight: Tensor, index: Tensor | None = None) -> Tensor:
        return self.spectral(terms.output[:, None, :], None, None, weight, index)


class StreamGroup(Group):
    """Heads reweighted inside the tower, whose output has the change already."""

    units: Mapping[str, Any]

    def forward(self, terms: Terms, weight: Tensor, index: Tensor | None = None) -> Tensor:
        return terms.output

    def edit(self, weight: Tensor, index: Tensor | None = None) -> Edit:
        """What is done in every block, with weights as in :meth:`forward`."""
        return self.units["head"].edit(weight, index)


def group_of(adapter: TowerAdapter) -> Group:
    """A group with the constants of this adapter."""
    if adapter.placement == "stream":
        return StreamGroup(adapter)
    return OutputGroup(adapter) if adapter.weights_on == "output" else UnitsGroup(adapter)


def _label(adapter: TowerAdapter) -> tuple:
    return type(adapter).__name__, adapter.options(), len(adapter.weight)
