"""How do rows reach a step? From memory where they fit, gathered ahead from the cache where not, or through the tower.

What of an embedding does not depend on the weights (an adapter's `features`) is computed once for a cache that fits in
memory, and once a batch otherwise. Sources yield the same :class:`Batch` either way, in an order that the caller fixes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from residual_kernels.adapters.residual import TowerAdapter
from residual_kernels.towers import Terms
from residual_kernels.units.cache import UnitCache
from residual_kernels.units.decomposition import check_finite_units, checked_batches, checked_labels

CHUNK = 512  # rows of a cache taken at a time where their order is free
AHEAD = 2  # batches gathered while one is computed
CPU_MEMORY = 2 * 2**30  # bytes of features kept in memory at most
GPU_SHARE = 0.5  # of a device's memory, likewise


@dataclass
class Batch:
    """features [n, ...] that all tasks share, or [S, n, ...] with rows of its own for each of S orders.

    `rows` [S, n] are positions in the data, of this process's share; `everyone` [S, m] those of all processes. A loader
    knows no positions and brings `labels` [n] instead.
    """

    features: dict[str, Tensor]
    rows: Tensor | None = None
    everyone: Tensor | None = None
    labels: Tensor | None = None


def room(device: torch.device, memory: int | None) -> int:
    """Bytes of features that may be kept: `memory`, or 2 GiB on a CPU and half of the device's memory on a GPU."""
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


def runs(count: int, size: int) -> list[slice]:
    """Slices of at most `size` that cover `count` rows in order."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def whole(count: int) -> slice:
    """All of `count` rows: for a process that works alone."""
    return slice(0, count)


class CachedRows:
    """A UnitCache as an adapter reads it; all features stay on the device when they take at most `memory` bytes.

    `part` says which of every batch's rows are this process's, :func:`distributed.share` or :func:`whole`; `names` what
    errors call the rows.
    """

    def __init__(
        self,
        adapter: TowerAdapter,
        cache: UnitCache,
        memory: int,
        part: Callable[[int], slice] = whole,
        names: Sequence[int] | None = None,
    ):
        self.part, self.names = part, range(len(cache)) if names is None else names
        cache.check(adapter.tower, getattr(adapter, "adapted", ()))
        self.adapter, self.cache, self.count = adapter, cache, len(cache)
        self.device = adapter.trainable()[0].device
        self.resident: dict[str, Tensor] | None = None
        self.row_bytes = 0
        if self.count:
            one = self._features(self.cache.terms(slice(0, 1), self.device), range(1))
            self.row_bytes = sum(value.nbytes for value in one.values())
        if self.bytes <= memory:
            self._keep()

    @property
    def bytes(self) -> int:
        """What all features take."""
        return self.row_bytes * self.count

    @torch.no_grad()
    def _features(self, terms: Terms, rows: Sequence[int]) -> dict[str, Tensor]:
        found = self.adapter.features(terms)
        check_finite_units(found.values(), [self.names[row] for row in rows])
        return found

    def _keep(self) -> None:
        kept: dict[str, Tensor] = {}
        for part in runs(self.count, CHUNK):
            found = self._features(self.cache.terms(part, self.device), range(part.start, part.stop))
            for name, value in found.items():
                if name not in kept:
                    kept[name] = value.new_empty(self.count, *value.shape[1:])
                kept[name][part] = value
        self.resident = kept

    def gathered(self, rows: Tensor) -> dict[str, Tensor]:
        """Features of rows [S, n] from those that are kept: [n, ...] for one order, [S, n, ...] for several."""
        index = rows.flatten()
        shape = rows.shape if len(rows) > 1 else rows.shape[1:]
        return {
            name: value.index_select(0, index).view(*shape, *value.shape[1:])
            for name, value in self.resident.items()
        }

    def shuffled(self, orders: Tensor, size: int, *, places_only: bool = False) -> Iterator[Batch]:
        """Batches of `size` along orders [S, m]; each process gets its share of every batch.

        With `places_only` the features stay away, for a caller that gathers them from those that are kept.
        """
        everyone = [rows.to(self.device) for rows in orders.split(size, 1)]
        mine = [rows[:, self.part(rows.shape[1])].contiguous() for rows in orders.split(size, 1)]
        if self.resident is not None:
            for rows, all_rows in zip(mine, everyone, strict=True):
                rows = rows.to(self.device)
                yield Batch({} if places_only else self.gathered(rows), rows, all_rows)
            return
        for (rows, terms), all_rows in zip(self._ahead(mine), everyone, strict=True):
            flat = rows.flatten()
            shape = rows.shape if len(rows) > 1 else rows.shape[1:]
            found = self._features(terms, flat.tolist())
            features = {name: value.view(*shape, *value.shape[1:]) for name, value in found.items()}
            yield Batch(features, rows.to(self.device), all_rows)

    def in_order(self, size: int) -> Iterator[Batch]:
        """Batches of this process's share of all rows, in order."""
        mine = self.part(self.count)
        parts = [
            slice(mine.start + part.start, mine.start + part.stop)
            for part in runs(mine.stop - mine.start, size)
        ]
        places = [torch.arange(part.start, part.stop)[None] for part in parts]
        if self.resident is not None:
            for part, rows in zip(parts, places, strict=True):
                yield Batch(
                    {name: value[part] for name, value in self.resident.items()}, rows.to(self.device)
                )
            return
        for (part, terms), rows in zip(self._ahead(parts), places, strict=True):
            features = self._features(terms, range(part.start, part.stop))
            yield Batch(features, rows.to(self.device))

    def _ahead(self, parts: Iterable[Tensor | slice]) -> Iterator[tuple[Tensor | slice, Terms]]:
        """(rows, terms) in the given order, read by another thread while the last ones are computed with."""

        def read(rows: Tensor | slice) -> Terms:
            return self.cache.terms(rows if isinstance(rows, slice) else rows.flatten(), self.device)

        with ThreadPoolExecutor(1) as reader:
            waiting = []
            for rows in parts:
                waiting.append((rows, reader.submit(read, rows)))
                if len(waiting) > AHEAD:
                    first, future = waiting.pop(0)
                    yield first, future.result()
            for rows, future in waiting:
                yield rows, future.result()


class LoadedRows:
    """A loader of (images, labels): the tower runs for every batch. Shuffling and batch size are the loader's own."""

    resident = None

    def __init__(self, adapter: TowerAdapter, loader: Iterable, *, labelled: bool, classes: int):
        self.adapter, self.loader, self.labelled, self.classes = adapter, loader, labelled, classes
        self.device = adapter.trainable()[0].device

    def in_order(self, size: int) -> Iterator[Batch]:
        for images, labels in checked_batches(self.adapter._view, self.loader):
            if self.labelled:
                if labels is None:
                    raise ValueError("this needs labels; the loader gives only images")
                labels = checked_labels(labels, len(images))
                check_range(labels, self.classes)
                labels = labels.to(self.device)
            yield Batch(self.adapter.features_of_images(images), labels=labels if self.labelled else None)

    def shuffled(self, orders: Tensor | None, size: int, *, places_only: bool = False) -> Iterator[Batch]:
        return self.in_order(size)


def check_range(labels: Tensor, classes: int) -> None:
    """Raises ValueError unless labels lie in [0, classes)."""
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"labels run from {int(labels.min())} to {int(labels.max())}, but the head has {classes} classes"
        )
