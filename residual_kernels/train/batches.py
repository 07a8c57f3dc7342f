"""How do rows reach a step? From memory where they fit, gathered ahead from a source where not.

What of an embedding does not depend on the weights (an adapter's `features`) is computed once where the
features of all rows fit in memory, and once a batch otherwise: the same :class:`Batch` either way, in an
order that the caller fixes.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from residual_kernels.adapters.tower_adapter import TowerAdapter
from residual_kernels.units.cache import UnitCache
from residual_kernels.units.source import ROWS, UnitBatch, UnitSource, unit_source

CPU_MEMORY = 2 * 2**30  # bytes of features kept in memory at most
GPU_SHARE = 0.5  # of a device's memory, likewise
BLOCK_BYTES = 32 * 2**20  # of reweighted features that the tasks of one product may take


class Places(NamedTuple):
    """Positions of a batch in its indexed source: [S, n] of this process's share,
    [S, m] of all processes' rows."""

    rows: Tensor
    everyone: Tensor


@dataclass
class Batch:
    """features [n, ...] that all tasks share, or [S, n, ...] with rows of its own for each of S orders.

    `places` is None of a source that is not indexed. `labels` [n] are the source's own, where a single order
    has them.
    """

    features: dict[str, Tensor]
    places: Places | None = None
    labels: Tensor | None = None

    @property
    def truth(self) -> Tensor:
        """`labels` of a source that was asked for them."""
        assert self.labels is not None
        return self.labels


def room(device: torch.device, memory: int | None) -> int:
    """Bytes of features that may be kept: `memory`, or 2 GiB on a CPU and half of the device's memory on a
    GPU."""
    if memory is not None:
        if memory < 0:
            raise ValueError(f"memory must be a number of bytes, 0 or more; got {memory}")
        return memory
    if device.type == "cuda":
        return int(GPU_SHARE * torch.cuda.get_device_properties(device).total_memory)
    return CPU_MEMORY


def widest(device: torch.device) -> torch.dtype:
    """What losses are added up in: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def source_of(adapter: TowerAdapter, data: "UnitCache | Tensor | Iterable", **options) -> UnitSource:
    """The units of some data that an adapter reads; options as in :func:`unit_source`.

    Raises ValueError as it does.
    """
    if not isinstance(adapter, TowerAdapter):
        raise ValueError(
            f"expected a ResiDual or another adapter of this library; got {type(adapter).__name__}"
        )
    adapter.still()
    return unit_source(
        data, adapter.tower, adapter.adapted, also=adapter.kinds, device=adapter.device, **options
    )


def runs(count: int, size: int) -> list[slice]:
    """Slices of at most `size` that cover `count` rows in order."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def whole(count: int) -> slice:
    """All of `count` rows: for a process that works alone."""
    return slice(0, count)


def blocks(tasks: int, row_bytes: int, rows: int) -> list[slice]:
    """Tasks in groups, so that no product makes reweighted features of more than BLOCK_BYTES."""
    most = max(1, BLOCK_BYTES // max(1, row_bytes * rows))
    return [slice(start, min(start + most, tasks)) for start in range(0, tasks, most)]


def bytes_of_a_row(features: dict[str, Tensor], rows: int) -> int:
    """Of features [n, ...] or [T, n, ...], with n * T = `rows`."""
    return sum(value.nbytes for value in features.values()) // max(1, rows)


class AdapterRows:
    """A source as an adapter reads it; all features stay on the device when they take at most `memory` bytes.

    `part` says which of every batch's rows are this process's, :func:`distributed.share` or :func:`whole`. A
    source that is not indexed keeps its own order and batches.

    `joined` [N, J, and zeros up to a multiple of 8] holds the coefficients of all kinds side by side, where
    they are kept on a CUDA device and the adapter is a sum over components; `resident` has views of it.
    """

    def __init__(
        self, adapter: TowerAdapter, source: UnitSource, memory: int = 0, part: Callable[[int], slice] = whole
    ):
        self.adapter, self.source, self.part = adapter, source, part
        self.device = adapter.device
        self.count = source.count or 0
        self.labels = None if source.labels is None else source.labels.to(self.device)
        self.resident: dict[str, Tensor] | None = None
        self.joined: Tensor | None = None
        self.row_bytes = 0
        if self.count:
            one = self.features(next(source.along([slice(0, 1)])))
            self.row_bytes = sum(value.nbytes for value in one.values())
        if source.indexed and self.bytes <= memory:
            self._keep()

    @property
    def bytes(self) -> int:
        """What all features take."""
        return self.row_bytes * self.count

    @torch.no_grad()
    def features(self, batch: UnitBatch) -> dict[str, Tensor]:
        """What of the embeddings does not depend on the weights, a row per image of a source's batch."""
        if batch.images is not None:  # an adapter inside the tower reads nothing else
            return self.adapter.features_of_images(batch.images)
        return self.adapter.features(batch.terms)

    def _keep(self) -> None:
        kept: dict[str, Tensor] = {}
        for batch in self.source.batches():
            found = self.features(batch)
            if not kept:
                kept = self._beside(found)
            for name, value in found.items():
                if name not in kept:
                    kept[name] = value.new_empty(self.count, *value.shape[1:])
                kept[name][batch.rows[0] : batch.rows[-1] + 1] = value
        self.resident = kept

    def _beside(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """Room for the coefficients of all kinds side by side on a CUDA device, by the kinds' names."""
        form = self.adapter.spectral_form()
        if form is None or self.device.type != "cuda":
            return {}
        widths = [found[name].shape[1] for name in form.coefficients]
        total = sum(widths)
        self.joined = found[form.coefficients[0]].new_zeros(self.count, -(-total // 8) * 8)
        return dict(zip(form.coefficients, self.joined[:, :total].split(widths, 1), strict=True))

    def gathered(self, rows: Tensor) -> dict[str, Tensor]:
        """Features of rows [S, n] from those that are kept: [n, ...] for one order,
        [S, n, ...] for several."""
        assert self.resident is not None
        index = rows.flatten()
        shape = rows.shape if len(rows) > 1 else rows.shape[1:]
        return {
            name: value.index_select(0, index).view(*shape, *value.shape[1:])
            for name, value in self.resident.items()
        }

    def shuffled(self, orders: Tensor | None, size: int, *, places_only: bool = False) -> Iterator[Batch]:
        """Batches of `size` along orders [S, m], each process its share of every batch.

        A loader has its own order.

        With `places_only` the features stay away, for a caller that gathers them from those that are kept.
        """
        if orders is None or not self.source.indexed:
            yield from self.in_order(size)
            return
        there = orders.to(self.device, non_blocking=True)  # an epoch's order travels once
        everyone = there.split(size, 1)
        if self.resident is not None:
            for all_rows in everyone:
                rows = all_rows[:, self.part(all_rows.shape[1])].contiguous()
                yield Batch({} if places_only else self.gathered(rows), Places(rows, all_rows))
            return
        mine = [rows[:, self.part(rows.shape[1])].contiguous() for rows in orders.split(size, 1)]
        read = self.source.along((rows.flatten() for rows in mine), ahead=True)
        for rows, all_rows, batch in zip(mine, everyone, read, strict=True):
            shape = rows.shape if len(rows) > 1 else rows.shape[1:]
            found = self.features(batch)
            features = {name: value.view(*shape, *value.shape[1:]) for name, value in found.items()}
            own = all_rows[:, self.part(all_rows.shape[1])].contiguous()
            yield Batch(features, Places(own, all_rows))

    def in_order(self, size: int = ROWS) -> Iterator[Batch]:
        """Batches of this process's share of all rows, in order."""
        if not self.source.indexed:
            for batch in self.source.batches():
                labels = None if batch.labels is None else batch.labels.to(self.device)
                yield Batch(self.features(batch), labels=labels)
            return
        mine = self.part(self.count)
        cuts = [
            slice(mine.start + cut.start, mine.start + cut.stop) for cut in runs(mine.stop - mine.start, size)
        ]
        if self.resident is not None:
            found = ({name: value[cut] for name, value in self.resident.items()} for cut in cuts)
        else:
            found = (self.features(batch) for batch in self.source.along(cuts, ahead=True))
        for cut, features in zip(cuts, found, strict=True):
            rows = torch.arange(cut.start, cut.stop, device=self.device)[None]
            yield Batch(features, Places(rows, rows), None if self.labels is None else self.labels[cut])
