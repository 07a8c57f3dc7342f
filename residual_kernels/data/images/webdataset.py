"""Images of WebDataset shards: tar files whose members come in groups, ``000012.jpg`` with ``000012.cls``."""

import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import torch

from residual_kernels.data.images.account import Account
from residual_kernels.data.images.dataset import Images
from residual_kernels.data.images.decode import MARK, MAX_BYTES, UnreadableImage
from residual_kernels.data.images.patterns import expand, is_pattern, shards_in
from residual_kernels.data.images.tar import Sample, samples
from residual_kernels.data.user_text import read_lines

CLASS_FILE = "classnames.txt"  # beside the shards or one folder up, as clip_benchmark lays them out
OPEN_FILES = 32  # shards open at once; systems allow a process some hundreds


class ShardImages(Images):
    """Local shards, indexed once by their tar headers and then read in any order.

    Samples keep the shards' order.

    A label is the integer in a sample's ``.cls``. Class names are the lines of classnames.txt beside the
    shards or one folder up, else the numbers. Shards that must be streamed are read by a webdataset pipeline
    of your own, which `encode` takes as it takes any loader.

    Args:
        shards: the tar files.
        preprocess: PIL image -> tensor [3, H, W].
        labelled: whether labels are wanted; None for labels where there are any.
        exif: whether images are turned as their EXIF orientation says.
        identity: see :class:`Images`.
        skip: whether a shard that is cut short is read up to there, and named in the account.

    Raises FileNotFoundError for a shard that is not there, ValueError for one that is no tar file or cut
    short, for images without a label, and where there are no images.
    """

    def __init__(
        self,
        shards: Iterable[Path],
        preprocess: Callable,
        *,
        labelled: bool | None = True,
        exif: bool = True,
        identity: str = "auto",
        skip: bool = False,
    ):
        self.preprocess, self.exif, self.identity = preprocess, exif, identity
        self.shards = [Path(shard) for shard in shards]
        self.account = Account(_source(self.shards))
        self.names: list[str] = []
        self._places: list[tuple[int, int, int]] = []  # shard, offset, size
        labels: list[int | None] = []
        read = [samples(shard, self.account, skip) for shard in self.shards]
        if labelled or (
            labelled is None and any(one.label is not None for found, _ in read for one in found)
        ):
            for shard, (found, damaged) in zip(self.shards, read, strict=True):
                if damaged:
                    self._leave_out_unlabelled(shard, found)
        for number, (shard, (found, _)) in enumerate(zip(self.shards, read, strict=True)):
            self.names += _unique(f"{shard.name}/{one.name}" for one in found)
            self._places += [(number, one.offset, one.size) for one in found]
            labels += [one.label for one in found]
            if labelled:
                _check_labels(shard, found)
        if not self.names:
            why = f": {self.account.notes[0]}" if self.account.notes else ""
            raise ValueError(f"the shards {self.account.source} hold no images{why}")
        if labelled is None:
            labelled = None not in labels
            if not labelled and any(label is not None for label in labels):
                lacking = self.names[labels.index(None)]
                raise ValueError(f"some images of {self.account.source} have labels and {lacking} has none")
        self.labels = torch.tensor([-1 if label is None or not labelled else label for label in labels])
        self.class_names = self._classes() if labelled else None
        self._count_classes()
        # by process: a handle must not cross a fork
        self._handles: OrderedDict[int, BinaryIO] = OrderedDict()
        self._process = os.getpid()

    def _leave_out_unlabelled(self, shard: Path, found: list[Sample]) -> None:
        """Takes the last images off whose labels stood behind the damage."""
        while found and found[-1].label is None:
            name = f"{shard.name}/{found.pop().name}"
            self.account.left_out[name] = "its label is lost: the shard is damaged before it"

    def _classes(self) -> tuple[str, ...]:
        highest = int(self.labels.max())
        for folder in (self.shards[0].parent, self.shards[0].parent.parent):
            file = folder / CLASS_FILE
            if file.is_file():
                names = tuple(line.strip() for line in read_lines(file, "class names"))
                if highest >= len(names):
                    raise ValueError(f"{file} has {len(names)} names, but the shards hold class {highest}")
                return names
        return tuple(map(str, range(highest + 1)))

    def _states(self) -> Iterator[object]:
        """Sizes, and when the shards were changed."""
        changed = [found.stat().st_mtime_ns for found in self.shards]
        for shard, _, size in self._places:
            yield size, changed[shard]

    def _total_bytes(self) -> int:
        return sum(size for _, _, size in self._places)

    def _open(self, index: int) -> bytes:
        shard, offset, size = self._places[index]
        if size > MAX_BYTES:
            raise UnreadableImage(f"{self.where(index)}{MARK}it takes {size:,} bytes")
        file = self._file(shard)
        file.seek(offset)
        data = file.read(size)
        if len(data) < size:
            raise UnreadableImage(f"{self.where(index)}{MARK}{self.shards[shard]} ends inside it")
        return data

    def _file(self, shard: int) -> BinaryIO:
        if self._process != os.getpid():
            self._handles, self._process = OrderedDict(), os.getpid()
        if shard not in self._handles:
            while len(self._handles) >= OPEN_FILES:
                self._handles.popitem(last=False)[1].close()
            self._handles[shard] = self.shards[shard].open("rb")
        self._handles.move_to_end(shard)
        return self._handles[shard]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_handles": OrderedDict()}


def shard_files(source: str | os.PathLike) -> list[Path] | None:
    """The tar files that `source` names: one, a folder of them,
    or a pattern ``photos-{000..012}.tar``; else None.

    What exists is what it is, whatever its name looks like: a folder ``run{1}`` is a folder.
    """
    path = Path(source)
    if path.is_dir():
        return shards_in(path)
    if path.exists() or not is_pattern(os.fspath(source)):
        return [path] if path.suffix.lower() == ".tar" else None
    return [Path(found) for found in expand(os.fspath(source))]


def _source(shards: list[Path]) -> str:
    return str(shards[0]) if len(shards) == 1 else f"{shards[0]} and {len(shards) - 1} more shards"


def _unique(names: Iterable[str]) -> Iterator[str]:
    """The names, with #2, #3 ... behind those that come again."""
    seen: Counter[str] = Counter()
    for name in names:
        seen[name] += 1
        yield name if seen[name] == 1 else f"{name}#{seen[name]}"


def _check_labels(shard: Path, found: list[Sample]) -> None:
    lacking = [one.name for one in found if one.label is None]
    if lacking:
        raise ValueError(f"{shard}: sample {lacking[0]} has no label ({lacking[0]}.cls is missing)")
