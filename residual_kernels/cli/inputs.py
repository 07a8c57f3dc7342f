"""What options become: a device, a model, a loader, a cache."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from residual_kernels import distributed
from residual_kernels.cli.options import OnUnreadable
from residual_kernels.cli.printing import bar, err
from residual_kernels.data import models as sources
from residual_kernels.data.images import Images, find_unreadable, open_images, without
from residual_kernels.units.cache import MANIFEST, UnitCache, encode


def device_of(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def prepare(model: str, pretrained: str | None, device: str | None):
    clip, preprocess, tokenizer = sources.load_model(model, pretrained)
    return clip.to(device_of(device)), preprocess, tokenizer


def is_cache(source: UnitCache | Images) -> bool:
    """Whether `--data` named a cache of `encode`."""
    return isinstance(source, UnitCache)


@dataclass
class Reader:
    """How a command reads images: what its options say of data sets, batches and processes."""

    batch_size: int
    workers: int
    root: Path | None
    download: bool
    unreadable: OnUnreadable
    left_out: list[str] = field(default_factory=list)  # names of images that could not be read

    def images(self, path: Path, preprocess: Callable, labelled: bool = True) -> Images:
        """The images that `path` names; without those that cannot be read, where that was asked for."""
        found = open_images(path, preprocess, labelled=labelled, root=self.root, download=self.download)
        if self.unreadable is OnUnreadable.fail:
            return found
        first = distributed.rank() == 0
        with bar("looking for unreadable images", len(found), quiet=not first) as step:
            bad = find_unreadable(found, self.workers, step)
        if bad and first:
            err.print(f"{len(bad)} of {len(found)} images of {path} cannot be read and are left out:")
            for reason in bad.values():
                err.print(f"  {reason}", soft_wrap=True)
        self.left_out += [found.names[row] for row in bad]
        return without(found, bad)

    def open(self, path: Path, preprocess: Callable, labelled: bool = True) -> UnitCache | Images:
        """The cache or the images that `path` names."""
        if (path / MANIFEST).is_file():
            return UnitCache.load(path)
        return self.images(path, preprocess, labelled)

    def only_images(self, source: UnitCache | Images, path: Path) -> Images:
        """`source` where it is images; a ValueError for a cache, which cannot tell what works inside the tower."""
        if is_cache(source):
            raise ValueError(
                f"{path} is a cache, and a cache cannot tell what changes inside the tower do; name the images "
                "themselves"
            )
        return source

    def share(self, source: UnitCache | Images) -> UnitCache | DataLoader:
        """What this process reads: a cache, whose rows are shared as they are read, or its own part of the images."""
        if is_cache(source):
            return source
        return self.loader(Subset(source, range(len(source))[distributed.share(len(source))]))

    def loader(self, images: Dataset) -> DataLoader:
        return DataLoader(images, batch_size=self.batch_size, num_workers=self.workers)

    def cached(
        self, tower: nn.Module, source: UnitCache | Images, kinds: Iterable[str], title: str
    ) -> UnitCache:
        """The cache of images: read before where `--data` named one, made now otherwise."""
        if is_cache(source):
            source.check(tower, kinds)
            return source
        if distributed.world() > 1:
            raise ValueError(
                "several processes fit on a cache that they share: run `encode` first (torchrun shares that work too), "
                "and name its folder in place of the images"
            )
        with bar(title, len(source)) as step:
            return encode(
                tower, self.loader(source), None, kinds, class_names=source.class_names, progress=step
            )  # fmt: skip
