"""Where do units come from?

A cache, a loader of images, or images: one :class:`UnitSource`, and nobody asks which.

:func:`unit_source` makes it. A source yields :class:`UnitBatch` objects, whose terms are on one device and
checked.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor, nn

from residual_kernels import distributed, towers
from residual_kernels.files import digest
from residual_kernels.towers import Terms
from residual_kernels.units.cache import UnitCache, encode
from residual_kernels.units.checks import check_names, check_range, names_of
from residual_kernels.units.loader import IGNORED, NEEDED, LoadedUnits, Stream, UnitBatch

if TYPE_CHECKING:
    from typing_extensions import TypeIs

ROWS = 512  # of a cache at a time, where nothing else bounds a batch
IMAGES = 64  # of a tensor of images that go through the tower at a time
SAMPLE = 64  # rows whose terms a fingerprint reads
AHEAD = 2  # batches read while one is computed with
Rows = Tensor | slice  # numbers of rows, or a run of them


class UnitSource(Protocol):
    """Units of a data set, in order or, where `indexed`, along given rows.

    Attributes:
        indexed: whether rows can be read by number; :meth:`along` and :meth:`subset` raise ValueError
            otherwise.
        repeatable: whether the data can be read more than once.
        count: images; None where only a reading tells (a loader).
        labels: [N] int64 on the CPU; None where there are none, or where they come with the batches alone (a
            loader).
        ids: [N] int64, the positions of the images in the data they came from; None for a loader.
        class_names: names of the labels, or None.
        device: where the terms are.
    """

    indexed: bool
    repeatable: bool
    labels: Tensor | None
    class_names: tuple[str, ...] | None
    device: torch.device

    @property
    def count(self) -> int | None: ...

    @property
    def ids(self) -> Tensor | None: ...

    def batches(
        self, size: int | None = None, *, shared: bool = False, ahead: bool = False
    ) -> Iterator[UnitBatch]:
        """All units in order, `size` images at a time (ROWS by default);
        a loader's batches keep their own sizes.

        `shared`: the processes of a group share the batches of a source that all of them read; a loader is a
        process's own, and is read whole. `ahead`: a thread reads the next batches while one is computed with.
        """
        ...

    def along(self, rows: Iterable[Rows], *, ahead: bool = False) -> Iterator[UnitBatch]:
        """One batch for each entry of `rows`."""
        ...

    def first(self, size: int = ROWS) -> Terms | None:
        """Terms of the first `size` images, the same in all processes; None of a loader,
        or where there are none."""
        ...

    def subset(self, rows: Tensor) -> "UnitSource":
        """Some of the rows; errors go on naming them by their numbers here."""
        ...

    def fingerprint(self, labels: Tensor | None) -> str:
        """Checksum of what tells this data, with the labels [L, N] that are used, from other data.

        Raises ValueError of a loader, which is not read for it.
        """
        ...


class CachedUnits:
    """A :class:`UnitCache` as a :class:`UnitSource`. `names` [N] are what errors call its rows."""

    indexed = repeatable = True

    def __init__(self, cache: UnitCache, kinds: tuple[str, ...], device: torch.device, names: Tensor):
        self.cache, self.kinds, self.device, self.names = cache, kinds, device, names
        self.count, self.labels, self.ids = len(cache), cache.labels, cache.ids
        self.class_names = cache.class_names

    def _terms(self, rows: Rows) -> Terms:
        return self.cache.checked_terms(rows, self.device, self.kinds, self.names)

    def _batch(self, rows: Rows, terms: Callable[[], Terms]) -> UnitBatch:
        numbers = torch.arange(self.count)[rows] if isinstance(rows, slice) else rows
        return UnitBatch(numbers, None if self.labels is None else self.labels[rows], None, terms)

    def batches(
        self, size: int | None = None, *, shared: bool = False, ahead: bool = False
    ) -> Iterator[UnitBatch]:
        size = ROWS if size is None else size
        runs = [slice(start, min(start + size, self.count)) for start in range(0, self.count, size)]
        return self.along(runs[distributed.share(len(runs))] if shared else runs, ahead=ahead)

    def along(self, rows: Iterable[Rows], *, ahead: bool = False) -> Iterator[UnitBatch]:
        if not ahead:
            for some in rows:
                yield self._batch(some, functools.partial(self._terms, some))
            return
        with ThreadPoolExecutor(1) as reader:
            waiting: list[UnitBatch] = []
            for some in rows:
                waiting.append(self._batch(some, reader.submit(self._terms, some).result))
                if len(waiting) > AHEAD:
                    yield waiting.pop(0)
            yield from waiting

    def first(self, size: int = ROWS) -> Terms | None:
        return self._terms(slice(0, size)) if self.count else None

    def subset(self, rows: Tensor) -> "CachedUnits":
        return CachedUnits(self.cache.subset(rows), self.kinds, self.device, self.names[rows])

    def fingerprint(self, labels: Tensor | None) -> str:
        some = self.cache.terms(torch.linspace(0, self.count - 1, min(self.count, SAMPLE)).long())
        tensors = {"ids": self.ids, "output": some.output, "scale": some.scale, **some.z}
        if labels is not None:
            tensors["labels"] = labels
        return digest(tensors, {"tower": self.cache.checksum, "kinds": list(self.cache.kinds)})


def is_cache(data: object) -> "TypeIs[UnitCache]":
    """Whether some data are a cache, not images; commands ask in order to say what they were given."""
    return isinstance(data, UnitCache)


def unit_source(
    data: "UnitCache | Tensor | Iterable",
    tower: nn.Module,
    kinds: Iterable[str] = (),
    *,
    also: Iterable[str] = (),
    labelled: bool = False,
    classes: int | None = None,
    class_names: Sequence[str] | None = None,
    device: torch.device | None = None,
    check: bool = True,
) -> UnitSource:
    """The units of some data: the one place that knows what data may be.

    Args:
        data: a :class:`UnitCache` of this tower; a loader of images [n, 3, H, W], of (images, labels, ...) or
            of transformers' mappings; or images [N, 3, H, W].
        tower: a supported image tower, or an adapter around one.
        kinds: kinds of units that are needed.
        also: more kinds, which are read where a cache holds them and computed from images.
        labelled: labels are needed.
        classes: labels must lie in [0, classes).
        class_names: names of the labels, as a head has them: the data's own names, where it has some, must be
            these.
        device: where terms of a cache are to be; the tower's by default. Images always go to the tower.
        check: compare the first image with the tower's own forward, as :func:`residual_kernels.decompose`
            does.

    Raises:
        ValueError: a cache of another tower, or without the kinds or labels that are needed, or with labels
            out of range, or classes of other names or in another order. A loader raises when a batch is read.
    """
    view = towers.view_inside(tower, check)
    if labelled and class_names is not None:
        names, sure = (data.class_names, True) if is_cache(data) else names_of(data)
        check_names(class_names, names, sure=sure)
        classes = len(class_names)
    kinds = tuple(kinds)
    more = tuple(kind for kind in also if kind not in kinds)
    if not is_cache(data):
        loader = data.split(IMAGES) if isinstance(data, Tensor) else data
        return LoadedUnits(
            Stream(loader), view, (*kinds, *more), NEEDED if labelled else IGNORED, classes=classes
        )
    data.check(view.module, kinds)
    if labelled:
        labels = data.truth
        if classes is not None:
            check_range(labels, classes)
    kinds += tuple(kind for kind in more if kind in data.kinds)
    device = next(view.module.parameters()).device if device is None else device
    return CachedUnits(data, kinds, device, torch.arange(len(data)))


def cache_of(data: "UnitCache | Tensor | Iterable", tower: nn.Module, kinds: Iterable[str] = ()) -> UnitCache:
    """`data` itself where it is a cache (of this tower, with these kinds); images are encoded in memory."""
    unit_source(data, tower, kinds)  # checks them
    if is_cache(data):
        return data
    loader = data.split(IMAGES) if isinstance(data, Tensor) else data
    return encode(tower, loader, kinds=kinds)


def cached_source(
    data: "UnitCache | Tensor | Iterable", tower: nn.Module, kinds: Iterable[str] = (), **options
) -> CachedUnits:
    """:func:`unit_source`, but always indexed: images are encoded in memory first,
    in one pass of the tower."""
    kinds = tuple(kinds)
    return cast(CachedUnits, unit_source(cache_of(data, tower, kinds), tower, kinds, **options))  # of a cache


def rows_within(row_bytes: int, memory: int, most: int = ROWS) -> int:
    """How many rows of `row_bytes` each fit into `memory` bytes: one at least, `most` at most."""
    return max(1, min(most, memory // max(1, row_bytes)))
