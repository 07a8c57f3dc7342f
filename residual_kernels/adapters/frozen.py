"""Are the tower's weights still those that an adapter was made of? Asked before every run of the tower.

Output projections, LayerScale, the final norm and the projection are folded into an adapter's constants. Were
they to train (thawed, held by an older optimiser, loaded over, edited in place), the adapter would no longer
be what it says. Version counters notice that for a twentieth of a microsecond a parameter; only where one has
risen are values compared.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from residual_kernels.ops.tracing import constant_when_traced
from residual_kernels.towers import Tower
from residual_kernels.towers.checksum import on_cpu, plain_tensors
from residual_kernels.towers.watch import counter

_SAMPLE = 256  # values of a parameter that are kept
_RUN = 2**16  # values summed at a time
# What is called rounding: an average of equal weights (d a + (1 - d) a) is off by this much after a few
# steps.
_ROUNDINGS, _AT_MOST = 32, 0.01
_SHARDED = "_is_fsdp_managed_module"  # an attribute that both of torch's FSDPs set
_CASTS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Seen:
    """What is kept of a parameter: some of its values, the sum of all, and of their sizes."""

    sample: Tensor
    total: Tensor
    size: Tensor

    @classmethod
    def of(cls, values: Iterable[Tensor]) -> "list[_Seen]":
        """Of many parameters at once: what is kept of those on a device travels together."""
        return [cls(row[2:], row[0], row[1]) for row in on_cpu([_kept(value) for value in values])]

    def moved(self, now: "_Seen") -> float:
        """How far a parameter is from what was seen, relative to its size."""
        if now.sample.shape != self.sample.shape:
            return float("inf")
        casts = [self.sample.to(dtype).double() for dtype in _CASTS]
        if any(torch.equal(now.sample, cast) and not torch.equal(cast, self.sample) for cast in casts):
            return 0.0  # the same numbers after a cast, perhaps to and fro, of whoever holds the tower
        tiny = torch.finfo(torch.float32).tiny
        by_sample = (now.sample - self.sample).abs().max() / self.sample.abs().max().clamp_min(tiny)
        by_sum = torch.stack([now.total - self.total, now.size - self.size]).abs().max()
        moved = torch.maximum(by_sample, by_sum / self.size.clamp_min(tiny))
        return float(moved.nan_to_num(nan=float("inf")))


def _kept(value: Tensor) -> Tensor:
    """(sum, sum of sizes, some of the values) of a parameter, float64."""
    flat = value.detach().reshape(-1)
    step = max(1, len(flat) // _SAMPLE) | 1  # odd, so that it does not stay in one column
    sums = torch.zeros(2, dtype=torch.float64, device=flat.device)
    # In runs that stay in a core's cache: one sum of float64 over all would be ten times slower.
    for run in flat.split(_RUN if flat.device.type == "cpu" else len(flat)):
        wide = run.double()
        sums += torch.stack([wide.sum(), wide.abs().sum()])
    return torch.cat([sums, flat[::step].double()])


@dataclass(frozen=True)
class _Place:
    """Where a parameter is registered: its module's parameters, and where that module is registered."""

    parameters: dict[str, Any]
    leaf: str
    module: nn.Module
    siblings: dict[str, Any]
    name: str

    @classmethod
    def of(cls, tower: nn.Module, name: str) -> "_Place":
        at, _, leaf = name.rpartition(".")
        module = tower.get_submodule(at)
        above, _, own = at.rpartition(".")
        siblings = tower.get_submodule(above)._modules if at else {"": module}
        return cls(module._parameters, leaf, module, siblings, own)

    def replaced(self) -> bool:
        return self.siblings.get(self.name) is not self.module

    def mark(self, p: Tensor) -> tuple[int | None, int]:
        """What changes when `p` is written: its version counter, or its address (another ``.data``).

        FSDP2 gathers its parameters anew at every forward.
        """
        stays = type(p) is nn.Parameter and not hasattr(self.module, _SHARDED)
        return counter(p), p.data_ptr() if stays else 0

    def flattened(self) -> bool:
        """Whether FSDP1 holds the parameter, and has put a part of its one flat parameter here or nothing."""
        return hasattr(self.module, _SHARDED) and not isinstance(
            self.parameters.get(self.leaf, None), nn.Parameter
        )


class FrozenTower:
    """Watches the weights of a tower that an adapter stands on; called before each run of the tower.

    Args:
        view: the tower.
        folded: whether the adapter has folded weights of the tower into its constants.
    """

    def __init__(self, view: Tower, folded: bool):
        self._view = view
        view.folded = {n: tuple(p.shape) for n, p in view.constant_parameters().items()} if folded else None
        self._folded = tuple(view.folded or ())
        self._places: list[_Place] | None = None
        self._ids: list[int] | None = None
        self._counts: list[tuple[nn.Module, str, int | None, Tensor]] = []
        self.compiled = False  # whether torch.compile has traced it: its code looks at nothing while it runs
        self.accept()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_places": None, "_ids": None}  # of this very tower

    def accept(self) -> None:
        """Takes the tower's weights as they are now for those that the constants are of."""
        numbers = self._numbers(self._view.module.named_parameters())
        seen = _Seen.of(p for _, p in numbers)
        self._seen = {name: found for (name, _), found in zip(numbers, seen, strict=True)}
        self._remember(self._current())
        self._pending = False
        self._counts = [self._count(module, name) for module, name, *_ in self._counts]

    def keep(self, adapter: nn.Module) -> None:
        """Remembers the whole numbers among an adapter's constants,
        such as where each unit's components begin.

        An average of whole state dicts (timm's ModelEmaV2) averages these too, and cuts 7 x 0.9 + 7 x 0.1
        down to 6. They are put back before a run.
        """
        tower = set(self._view.module.modules())
        self._counts = [
            self._count(module, name)
            for module in adapter.modules()
            if module not in tower
            for name, value in module._buffers.items()
            if value is not None and not value.is_floating_point()
        ]

    @staticmethod
    def _count(module: nn.Module, name: str) -> tuple[nn.Module, str, int | None, Tensor]:
        value = module.get_buffer(name)
        return module, name, counter(value), value if value.is_meta else value.detach().cpu().clone()

    def _put_back(self) -> None:
        for number, (module, name, _, kept) in enumerate(self._counts):
            value = module.get_buffer(name)
            if not kept.is_meta and not value.is_meta and not torch.equal(value.cpu(), kept):
                with torch.no_grad():
                    value.copy_(kept)
                getattr(module, "_repack", lambda: None)()
            self._counts[number] = self._count(module, name)

    def forget(self) -> None:
        """The same at the next call: the constants and the tower are being loaded together."""
        self._pending = True

    def _numbers(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> list[tuple[str, Tensor]]:
        return [
            (part, tensor)
            for name, p in parameters
            if not p.is_meta and not hasattr(p, "full_tensor") and p.numel()
            for part, tensor in plain_tensors(name, p)
        ]

    def _where(self) -> "list[_Place]":
        """Where each folded parameter is registered: it may be replaced there."""
        if self._places is None:
            self._places = [_Place.of(self._view.module, name) for name in self._folded]
        return self._places

    def _current(self) -> dict[str, nn.Parameter]:
        """The folded parameters as they are registered now; ValueError where one is gone."""
        self._places = None  # modules may have been replaced
        try:
            if any(place.flattened() for place in self._where()):
                raise ValueError(
                    "this adapter is inside FSDP1 (FullyShardedDataParallel), which flattens the tower's "
                    "weights and the adapter's into one; use fully_shard (FSDP2) or "
                    "DistributedDataParallel around it instead"
                )
            return {
                name: place.parameters[place.leaf]
                for name, place in zip(self._folded, self._where(), strict=True)
            }
        except (AttributeError, KeyError) as error:
            raise ValueError(
                "the tower's parts that are folded into this adapter's constants have been replaced since "
                f"it was made ({error}). Put them back, or detach, fit bases of this tower and make a new "
                "adapter"
            ) from error

    def __call__(self) -> None:
        """Raises ValueError where folded parameters have changed by more than rounding, or would train."""
        thawed = torch.is_grad_enabled()
        if self._pending:
            self.accept()
        for module, name, version, _ in self._counts:
            value = module._buffers[name]
            if value is None or counter(value) != version:
                self._put_back()
                break
        if self._ids is None or self._places is None:
            return self._look()
        for place, mark, known in zip(self._places, self._marks, self._ids, strict=True):
            p = place.parameters.get(place.leaf)
            if p is None or id(p) != known or place.replaced():
                return self._look()
            if place.mark(p) != mark or (thawed and p.requires_grad):
                return self._look()

    @constant_when_traced
    def would_train(self) -> str | None:
        """What is wrong if folded parameters would train; None if none would.

        Asked when torch.compile traces, which it does again when they are thawed, so it costs the compiled
        code nothing."""
        self.compiled = self.compiled or torch.compiler.is_compiling()
        training = [name for name, p in self._current().items() if p.requires_grad]
        if not training:
            return None
        return (
            f"{len(training)} parameters that are folded into this adapter's constants would train "
            f"({_some(training)}); set requires_grad_(False) on them, which freeze() does for the whole tower"
        )

    def compare(self) -> None:
        """The same whatever the counters say: all values are summed.

        Writes through ``.data`` raise no counter.
        """
        if self._pending:
            self.accept()
        self._put_back()
        self._look()

    def _look(self) -> None:
        current = self._current()
        if torch.is_grad_enabled() and (why := self.would_train()) is not None:
            raise ValueError(why)
        moved = self._moved(current)
        if moved:
            name, far = max(moved.items(), key=lambda item: item[1])
            raise ValueError(
                f"{len(moved)} parameters that are folded into this adapter's constants have changed since "
                f"it was made ({_some(list(moved))}; {name} by {far:.1e}, relative), so the constants no "
                "longer match the tower. Put the tower's weights back, or detach, fit bases of this tower "
                "and make a new adapter. A weight average (EMA) should leave frozen parameters out: "
                "averaging adds rounding to them"
            )
        self._remember(current)

    def _remember(self, current: dict[str, nn.Parameter]) -> None:
        self._marks = [place.mark(p) for place, p in zip(self._where(), current.values(), strict=True)]
        self._ids = list(map(id, current.values()))

    def _moved(self, parameters: dict[str, nn.Parameter]) -> dict[str, float]:
        """Of those that changed by more than rounding, how far."""
        found = {}
        numbers = [(name, p) for name, p in self._numbers(parameters.items()) if name in self._seen]
        for (name, p), now in zip(numbers, _Seen.of(p for _, p in numbers), strict=True):
            far = self._seen[name].moved(now)
            eps = torch.finfo(p.dtype).eps if p.is_floating_point() else 0.0  # integers of a quantised weight
            if far > min(_ROUNDINGS * eps, _AT_MOST):
                found[name] = far
        return found

    def rounded(self) -> bool:
        """Whether all of the tower's weights are still those it was frozen with, up to rounding."""
        return not self._moved(dict(self._view.module.named_parameters()))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
