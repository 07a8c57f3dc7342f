"""What does the tower make of a loader?

Its images, checked, batch by batch, in pieces that end where shards end.

A piece is the same whether the pass begins at the first image or resumes, and whoever makes it: the tower
sees the same batches, and its results are the same to the bit.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any, NoReturn, cast

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

from residual_kernels.towers import Terms, Tower
from residual_kernels.units.checks import check_finite, check_range, checked_labels, parts_of

# What becomes of a loader's labels; kept: where it has them.
IGNORED, NEEDED, KEPT = (
    "ignored",
    "needed",
    "kept",
)
ALL, FIRST, NONE = "all", "first", "none"  # what a pass needs of a shard's images
Piece = tuple[int, Any, Any]  # number of the first image, images, labels or None
Need = Callable[[int], str]  # of a shard, by its index


class UnitBatch:
    """The units of some images.

    Attributes:
        rows: [n] int64 on the CPU, the positions of the images in their source.
        labels: [n] int64 on the CPU, or None.
        images: [n, 3, H, W] on the tower's device, or None where the tower ran before (a cache).
        given: the same images where the loader left them.
        terms: :class:`Terms` on the source's device. Of images they are computed when first asked for,
            without gradients.
    """

    def __init__(
        self,
        rows: Tensor,
        labels: Tensor | None,
        images: Tensor | None,
        terms: Callable[[], Terms],
        given: Tensor | None = None,
    ):
        self.rows, self.labels, self.images = rows, labels, images
        self.given = images if given is None else given
        self._make = terms
        self._terms: Terms | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def truth(self) -> Tensor:
        """`labels` of a source that was asked for them."""
        assert self.labels is not None
        return self.labels

    @property
    def pixels(self) -> Tensor:
        """`images` of a loader."""
        assert self.images is not None
        return self.images

    @property
    def first_image(self) -> str:
        """:func:`image_digest` of a loader's images."""
        assert self.given is not None
        return image_digest(self.given)

    @property
    def terms(self) -> Terms:
        if self._terms is None:
            self._terms = self._make()
        return self._terms


class LoadedUnits:
    """A loader of images, or of (images, labels): a :class:`UnitSource` whose tower runs at every reading.

    Args:
        reader: :class:`Stream` or :class:`Indexed`.
        labels: IGNORED (not even looked at), NEEDED, or KEPT (every batch has them, or none).
        class_names, classes: what the labels are checked against, where given.
    """

    indexed = False
    count: int | None = None
    ids: Tensor | None = None
    labels: Tensor | None = None  # they come with the batches

    def __init__(
        self,
        reader: "Stream | Indexed",
        view: Tower,
        kinds: tuple[str, ...],
        labels: str = IGNORED,
        *,
        class_names: Sequence[str] | None = None,
        classes: int | None = None,
    ):
        self.reader, self.view, self.kinds = reader, view, kinds
        self.policy, self.classes = labels, classes
        self.class_names = None if class_names is None else tuple(class_names)
        self.labelled: bool | None = None  # whether the batches have labels, once that is known
        self.repeatable = not isinstance(reader.loader, Iterator)
        self.device = next(view.module.parameters()).device

    def batches(
        self, size: int | None = None, *, shared: bool = False, ahead: bool = False
    ) -> Iterator[UnitBatch]:
        return self.pieces(None, lambda _: ALL)

    def pieces(self, size: int | None, need: Need) -> Iterator[UnitBatch]:
        """What is needed, in pieces that end where a shard of `size` images ends."""
        for first, images, labels in self.reader.pieces(size, need, self._checked):
            yield self._batch(first, images, labels)

    def sample(self) -> tuple[UnitBatch, int] | None:
        """(the first image, how many images a batch holds), or None where there are no images."""
        found = self.reader.first()
        if found is None:
            return None
        batch, size = found
        images, labels = self._checked(batch)
        return self._batch(0, images[:1], None if labels is None else labels[:1]), size

    def along(self, rows: Iterable, *, ahead: bool = False) -> NoReturn:
        raise ValueError("a loader is read in its own order; encode it to read rows by number")

    def subset(self, rows: Tensor) -> NoReturn:
        raise ValueError("a loader is read whole; encode it to choose rows by number")

    def fingerprint(self, labels: Tensor | None) -> NoReturn:
        raise ValueError("the images of a loader are not known before it is read; encode it first")

    def first(self, size: int | None = None) -> None:
        return None  # a loader may not be read twice

    def _checked(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """(images, labels) of what the loader yields."""
        images, labels = parts_of(batch)
        if not isinstance(images, Tensor) or (images.ndim != 4 and images.numel()):
            self.view.check_images(images)  # says what was expected
        if not len(images) or self.policy == IGNORED:
            return images, None
        if self.policy == NEEDED and labels is None:
            raise ValueError("this needs labels; the loader gives only images")
        if self.labelled is None:
            self.labelled = labels is not None
        if self.labelled != (labels is not None):
            raise ValueError("some batches have labels and some have none; give labels for all or for none")
        if labels is None:
            return images, None
        labels = checked_labels(labels, len(images), self.class_names)
        if self.classes is not None:
            check_range(labels, self.classes)
        return images, labels

    def _batch(self, first: int, images: Tensor, labels: Tensor | None) -> UnitBatch:
        rows = torch.arange(first, first + len(images))
        self.view.check_images(images)
        check_finite(images, first)  # where the loader left them: on the CPU this waits for no device
        here = self.view.here(images)

        @torch.no_grad()
        def terms() -> Terms:
            return self.view.terms(here, self.kinds)

        return UnitBatch(rows, labels, here, terms, images)


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
        """What is needed, in pieces that end where a shard of `size` images ends;
        `checked` opens every batch."""
        row = 0
        for batch in self._batches():
            images, labels = checked(batch)
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
        self.loader = loader
        # These loaders cut batches of one size from a counted data set.
        self.size = cast(int, loader.batch_size)
        whole = len(cast(Sized, loader.dataset))
        self.count = whole // self.size * self.size if loader.drop_last else whole

    def first(self) -> tuple[Any, int] | None:
        if not self.count:
            return None
        return self.loader.collate_fn([self.loader.dataset[0]]), self.size

    def pieces(
        self, size: int | None, need: Need, checked: Callable[[Any], tuple[Tensor, Any]]
    ) -> Iterator[Piece]:
        cuts = _Cuts(self.count, self.size, max(1, self.count) if size is None else size, need)
        of = self.loader
        batches = DataLoader(
            of.dataset,
            batch_sampler=_Numbers(cuts),
            num_workers=of.num_workers,
            collate_fn=of.collate_fn,
            pin_memory=of.pin_memory,
            timeout=of.timeout,
            worker_init_fn=of.worker_init_fn,
            multiprocessing_context=of.multiprocessing_context,
            prefetch_factor=of.prefetch_factor,
        )
        for cut, batch in zip(cuts, batches, strict=True):
            images, labels = checked(batch)
            yield cut.start, images, labels


def resumable(loader: Iterable) -> Stream | Indexed:
    """How a pass that can be interrupted reads this loader.

    A ValueError when its order cannot be relied on.
    """
    if not isinstance(loader, DataLoader):
        return Stream(loader)
    sampler = loader.sampler
    if isinstance(sampler, RandomSampler | SubsetRandomSampler | WeightedRandomSampler):
        raise ValueError(
            "the loader shuffles, so an interrupted pass could not resume; encode with shuffle=False (fit "
            "shuffles by itself)"
        )
    if isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
        raise ValueError(
            "the loader's DistributedSampler gives this process a part of the data, and encode would "
            "divide that part again; give every process the whole data in the same order"
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
