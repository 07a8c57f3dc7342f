"""Which images go through the tower together? Batches of a loader, cut where shards end.

A cut is the same whether the pass begins at the first image or goes on after an interruption, and whoever makes it, so
that the tower sees the same batches and its results are the same to the bit.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)

from residual_kernels.units.checks import parts_of

ALL, FIRST, NONE = "all", "first", "none"  # what a pass needs of a shard's images
Piece = tuple[int, Any, Any]  # number of the first image, images, labels or None
Need = Callable[[int], str]  # of a shard, by its index


class Stream:
    """Any iterable of batches: read in order, and what is not needed is passed over."""

    def __init__(self, loader: Iterable):
        self.loader = loader
        self.count: int | None = None  # images, once all were read
        self._begun: tuple[Any, Iterator] | None = None

    def first(self) -> tuple[Any, int] | None:
        """(first batch that holds images, its size), or None; reading goes on from there."""
        batches = iter(self.loader)
        for batch in batches:
            images, _ = parts_of(batch)
            if not isinstance(images, Tensor) or len(images):
                self._begun = batch, batches
                return batch, len(images) if isinstance(images, Tensor) else 1
        return None

    def _batches(self) -> Iterator:
        if self._begun is None:
            yield from self.loader
            return
        batch, rest = self._begun
        self._begun = None
        yield batch
        yield from rest

    def pieces(
        self, size: int | None, need: Need, checked: Callable[[Any], tuple[Tensor, Any]]
    ) -> Iterator[Piece]:
        """What is needed, in pieces that end where a shard of `size` images ends; `checked` looks at every batch."""
        row = 0
        for batch in self._batches():
            images, labels = checked(parts_of(batch))
            at = 0
            while at < len(images):
                shard, inside = (0, row) if size is None else divmod(row, size)
                taken = len(images) - at if size is None else min(len(images) - at, size - inside)
                wanted = need(shard)
                if wanted == ALL or (wanted == FIRST and not inside):
                    part = slice(at, at + (taken if wanted == ALL else 1))
                    yield row, images[part], None if labels is None else labels[part]
                row, at = row + taken, at + taken
        self.count = row


class _Cuts:
    """The rows of every piece, made anew at each reading: there may be millions."""

    def __init__(self, count: int, batch: int, shard: int, need: Need):
        self.count, self.batch, self.shard, self.need = count, batch, shard, need

    def __iter__(self) -> Iterator[range]:
        for start in range(0, self.count, self.shard):
            wanted = self.need(start // self.shard)
            stop = min(start + self.shard, self.count)
            if wanted == FIRST:
                yield range(start, start + 1)
            while wanted == ALL and start < stop:
                end = min(stop, (start // self.batch + 1) * self.batch)  # where the loader's own batch ends
                yield range(start, end)
                start = end


class _Numbers:
    """A batch sampler over cuts."""

    def __init__(self, cuts: _Cuts):
        self.cuts = cuts

    def __iter__(self) -> Iterator[list[int]]:
        return map(list, self.cuts)


class Indexed:
    """A DataLoader that reads a data set by number and in order: what is not needed is not even opened."""

    def __init__(self, loader: DataLoader):
        self.loader, self.size = loader, loader.batch_size
        whole = len(loader.dataset)
        self.count = whole // self.size * self.size if loader.drop_last else whole

    def first(self) -> tuple[Any, int] | None:
        if not self.count:
            return None
        return self.loader.collate_fn([self.loader.dataset[0]]), self.size

    def pieces(self, size: int, need: Need, checked: Callable[[Any], tuple[Tensor, Any]]) -> Iterator[Piece]:
        cuts = _Cuts(self.count, self.size, size, need)
        of = self.loader
        batches = DataLoader(
            of.dataset, batch_sampler=_Numbers(cuts), num_workers=of.num_workers, collate_fn=of.collate_fn,
            pin_memory=of.pin_memory, timeout=of.timeout, worker_init_fn=of.worker_init_fn,
            multiprocessing_context=of.multiprocessing_context, prefetch_factor=of.prefetch_factor,
        )  # fmt: skip
        for cut, batch in zip(cuts, batches, strict=True):
            images, labels = checked(parts_of(batch))
            yield cut.start, images, labels


def source(loader: Iterable) -> Stream | Indexed:
    """How a pass that can be interrupted reads this loader; a ValueError when its order cannot be relied on."""
    if not isinstance(loader, DataLoader):
        return Stream(loader)
    sampler = loader.sampler
    if isinstance(sampler, RandomSampler | SubsetRandomSampler | WeightedRandomSampler):
        raise ValueError(
            "the loader shuffles, so a pass that is interrupted could not go on where it stopped; encode with "
            "shuffle=False (fit shuffles by itself)"
        )
    if isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
        raise ValueError(
            "the loader's DistributedSampler gives this process a part of the data, and encode would divide that part "
            "again; give every process the whole data in the same order"
        )
    by_number = type(sampler) is SequentialSampler and type(loader.batch_sampler) is BatchSampler
    if type(loader) is DataLoader and by_number and loader.collate_fn is default_collate:
        return Indexed(loader)
    return Stream(loader)


def preprocessing_of(loader: Any) -> str | None:
    """What a loader's data set says of its preprocessing: the text of its `preprocess` or `transform`."""
    found = getattr(loader, "dataset", None)
    while isinstance(found, Subset):
        found = found.dataset
    for name in ("preprocess", "transform"):
        if getattr(found, name, None) is not None:
            text = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(getattr(found, name)))
            return " ".join(text.split())
    return None


def data_of(loader: Any) -> str | None:
    """What a loader's data set says of its content: its `fingerprint()`, where it has one."""
    return _fingerprint(getattr(loader, "dataset", None))


def _fingerprint(dataset: Any) -> str | None:
    if isinstance(dataset, Subset):
        inner = _fingerprint(dataset.dataset)
        chosen = hashlib.sha256(str(list(map(int, dataset.indices))).encode()).hexdigest()
        return None if inner is None else f"{inner}, {len(dataset)} of them ({chosen[:16]})"
    own = getattr(dataset, "fingerprint", None)
    return own() if callable(own) else None


def image_digest(images: Tensor) -> str:
    """SHA-256 of the first of some images, as the tower gets it."""
    image = images[0].detach().cpu().contiguous()
    return hashlib.sha256(
        f"{image.dtype}{tuple(image.shape)}".encode() + image.reshape(-1).view(torch.uint8).numpy().tobytes()
    ).hexdigest()
