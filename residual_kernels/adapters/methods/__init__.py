"""Which ways of adapting a tower are there, by name?

One file each, which ends in its record; `METHODS` is the table.

Where weights start. A class starts at ones whatever its form: `rk.ResiDual(tower, bases)` does. By name,
`rk.build("fine", tower, bases)` starts as the record says: the paper's methods at N(1, 1), ours (anchored,
shared, stream) at ones, which are the tower. `init=` overrides either.

How to add a method: a file here that ends in `METHOD = Method(...)` (with its adapter's class, where that is
new), a test, and its name in the table `adapters/method_names.py`. Commands, sweeps, files on disk and
reports then know it.
"""

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from residual_kernels.adapters.method_names import NAMES
from residual_kernels.adapters.methods.record import ENERGY, Method
from residual_kernels.adapters.tower_adapter import TowerAdapter
from residual_kernels.bases.spectral_bases import SpectralBases

__all__ = ["ENERGY", "METHODS", "Method", "build", "identity", "method_named"]

METHODS: Mapping[str, Method] = MappingProxyType(
    {name: importlib.import_module(f"{__name__}.{name}").METHOD for name in NAMES}
)


def method_named(name: str) -> Method:
    """The record of a method; a ValueError lists the names where there is none."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; choose from {', '.join(METHODS)}")
    return METHODS[name]


def build(
    method: str,
    tower: nn.Module,
    bases: SpectralBases | None = None,
    *,
    init: str | Tensor | None = None,
    seed: int = 0,
    **options: Any,
) -> TowerAdapter:
    """An adapter around `tower`, by the name of its method.

    Args:
        method: a name in :data:`METHODS`.
        tower: an image tower that :func:`residual_kernels.decompose` supports.
        bases: must hold the method's kinds and may hold more. Those of `stream` are fitted with
            placement="stream"; if they were fitted over some tokens, those tokens are adapted. Needed where
            the method's record says so, and for rest="mean".
        init: "ones", "normal" (N(1, 1) with `seed`) or a tensor; the record's `start` by default: "normal"
            for the paper's methods, "ones" for ours. `linear` and `base` do not read it.
        seed: random seed of init="normal", and of the linear layer.
        options: of the method. `rest`: what happens to other units; the method's own by default (the first of
            its `rests`). `energy`, `components`, `max_components`: how many components are kept of each unit,
            as in :meth:`SpectralBases.truncate`; `fine` and `stream` keep 0.90 of the variance by default,
            `anchored` and `shared` all. An option of None counts as left out.

    Returns:
        The adapter.

    Raises:
        ValueError: an unknown name, an option that the method does not have, or what the adapter's class
            refuses.
    """
    record = method_named(method)
    given = {name: value for name, value in options.items() if value is not None}
    record.check(**given)
    if record.needs_bases and bases is None:
        raise ValueError(f"{record.name} needs bases; fit them with fit_bases")
    if record.start is not None:
        given["init"] = record.start if init is None else init
    adapter = record.make(tower, bases, seed=seed, **given)
    adapter.method = record.name
    return adapter


def identity(tower: nn.Module) -> TowerAdapter:
    """The tower's own output as an adapter, so that the base is measured by the same code."""
    return build("base", tower)
