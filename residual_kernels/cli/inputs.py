"""What options become: a device, a model, images with an account of them, a loader, a cache."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from residual_kernels import distributed
from residual_kernels.cli.options import Identity, OnUnreadable, Orientation
from residual_kernels.cli.printing import bar, err, out
from residual_kernels.data import models as sources
from residual_kernels.data import prompts
from residual_kernels.data.images import Account, Images, find_unreadable, open_images, without
from residual_kernels.data.images.dataset import reading_of
from residual_kernels.data.images.decode import MARK
from residual_kernels.units.cache import MANIFEST, UnitCache, encode
from residual_kernels.units.cache.shards import read_manifest
from residual_kernels.units.source import is_cache

SHOWN = 10  # images or classes named on the screen; --json holds all


def device_of(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    if device.type == "meta":
        raise ValueError(
            "device 'meta' holds no numbers, so nothing can be computed on it; choose cpu or cuda"
        )
    return device


def prepare(model: str, pretrained: str | None, device: str | None):
    clip, preprocess, tokenizer = sources.load_model(model, pretrained)
    return clip.to(device_of(device)), preprocess, tokenizer


@dataclass
class Reader:
    """How a command reads images: what its options say of data sets, batches and processes,
    and what was found."""

    batch_size: int = 64
    workers: int = 0
    root: Path | None = None
    download: bool = False
    unreadable: OnUnreadable = OnUnreadable.fail
    orientation: Orientation = Orientation.exif
    identity: Identity = Identity.auto
    image_column: str | None = None
    label_column: str | None = None
    asked: frozenset[str] = frozenset()  # parameters of the command that the user wrote out
    accounts: list[Account] = field(default_factory=list)  # of every source that was read
    upright: dict[str, bool] = field(default_factory=dict)  # source -> whether EXIF orientation was applied

    @property
    def left_out(self) -> list[str]:
        """Names of images that could not be read."""
        return [name for account in self.accounts for name in account.left_out]

    def images(self, path: Path, preprocess: Callable, labelled: bool | None = True) -> Images:
        """The images that `path` names; without those that cannot be read, where that was asked for."""
        skip = self.unreadable is OnUnreadable.skip
        found = open_images(
            path,
            preprocess,
            labelled=labelled,
            root=self.root,
            download=self.download,
            skip=skip,
            exif=self.orientation is Orientation.exif,
            identity=self.identity.value,
            image_column=self.image_column,
            label_column=self.label_column,
        )
        first = distributed.rank() == 0
        # What no reading is needed for, such as links to nothing in a shard.
        lost = dict(found.account.left_out)
        if skip:
            with bar("looking for unreadable images", len(found), quiet=not first) as step:
                bad = find_unreadable(found, self.workers, step)
            if (bad or lost) and first:
                reasons = [f"{name}{MARK}{reason}" for name, reason in lost.items()]
                self._name(path, len(found) + len(lost), [*reasons, *bad.values()])
            found = without(found, bad)
        self.accounts.append(found.account)
        self._note_orientation(path, found.exif)
        if first:
            for line in found.account.warnings():
                err.print(line, soft_wrap=True)
        return found

    def _name(self, path: Path, count: int, reasons: list[str]) -> None:
        err.print(f"{len(reasons)} of {count} images of {path} cannot be read and are left out:")
        for reason in reasons[:SHOWN]:
            err.print(f"  {reason}", soft_wrap=True)
        if len(reasons) > SHOWN:
            err.print(f"  ... and {len(reasons) - SHOWN} more")

    def open(self, path: Path, preprocess: Callable, labelled: bool | None = True) -> UnitCache | Images:
        """The cache or the images that `path` names."""
        if (path / MANIFEST).is_file():
            self._check_cache(path)
            return UnitCache.load(path)
        return self.images(path, preprocess, labelled)

    def _check_cache(self, path: Path) -> None:
        """Raises ValueError where an option that was given says otherwise than how the images of a cache were
        read."""
        made = reading_of(read_manifest(path)["run"]["data"])
        for name in ("image_column", "label_column"):
            if name in self.asked:
                self._no_effect(f"--{name.replace('_', '-')}", path)
        if made is None:
            if "orientation" in self.asked:
                self._no_effect(f"--orientation {self.orientation.value}", path)
            return
        there = Orientation.exif if made.exif else Orientation.stored
        if "orientation" in self.asked and self.orientation is not there:
            raise ValueError(
                f"the cache at {path} was made with --orientation {there.value}, so --orientation "
                f"{self.orientation.value} cannot be applied to it; encode the images again, or leave the "
                "option out"
            )
        if "unreadable" in self.asked and self.unreadable is OnUnreadable.fail and made.left_out:
            raise ValueError(
                f"the cache at {path} was made with --unreadable skip, without {made.left_out} of "
                f"{made.found} images; encode the images again, or leave --unreadable fail out"
            )
        self._note_orientation(path, made.exif)

    def images_of(self, cache: Path, path: Path, preprocess: Callable) -> Images:
        """The images that a cache was made of, from where `path` says they are.

        Raises ValueError where they are others.
        """
        told = read_manifest(cache)["run"]["data"]
        made = reading_of(told)
        if made is not None:  # read as they were then
            self.orientation = Orientation.exif if made.exif else Orientation.stored
            self.unreadable = OnUnreadable.skip if made.left_out else OnUnreadable.fail
            self.identity = Identity(made.identity)
        found = self.images(path, preprocess)
        if made is not None and found.fingerprint() != told:
            copied = " (a copy has other times)" if made.identity == "stat" else ""
            raise ValueError(
                f"{path} does not hold the images that the cache at {cache} was made of: "
                f"{found.fingerprint()}, where the cache says {told}{copied}; name their folder, or leave "
                "--images out"
            )
        return found

    def _no_effect(self, option: str, path: Path) -> None:
        err.print(
            f"{option} changes nothing here: {path} is a cache, whose images were read when it was made",
            soft_wrap=True,
        )

    def _note_orientation(self, path: Path, exif: bool) -> None:
        """Says so where one source was read upright and another as stored."""
        other = next((source for source, upright in self.upright.items() if upright is not exif), None)
        self.upright[str(path)] = exif
        if other is not None and distributed.rank() == 0:
            words = ("as stored (--orientation stored)", "upright (--orientation exif)")
            err.print(
                f"{path} is read {words[exif]}, and {other} was read {words[not exif]}; photographs that "
                "carry an orientation differ between them",
                soft_wrap=True,
            )

    def only_images(self, source: UnitCache | Images, path: Path) -> Images:
        """`source` where it is images.

        A ValueError for a cache, which cannot tell what works inside the tower.
        """
        if is_cache(source):
            raise ValueError(
                f"{path} is a cache, and an adapter inside the tower needs the images; name their folder"
            )
        return source

    def share(self, source: UnitCache | Images) -> UnitCache | DataLoader:
        """What this process reads: a cache, whose rows are shared as they are read,
        or its own part of the images."""
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
            lacking = [kind for kind in kinds if kind not in source.kinds]
            if lacking:
                flags = " ".join(f"--kinds {kind}" for kind in (*source.kinds, *lacking))
                raise ValueError(
                    f"the cache holds units of kind {', '.join(source.kinds) or 'none'}, and "
                    f"{', '.join(lacking)} is needed; encode the images with {flags}"
                )
            source.check(tower, kinds)
            return source
        if distributed.world() > 1:
            raise ValueError(
                "several processes fit on a cache that they share: run `encode` first (torchrun shares "
                "that work too), and name its folder in place of the images"
            )
        with bar(title, len(source)) as step:
            return encode(
                tower, self.loader(source), None, kinds, class_names=source.class_names, progress=step
            )

    def class_names(self, source: str | None, folders: tuple[str, ...], text: bool) -> tuple[str, ...]:
        """The name of every class in the prompts, shown beside its folder where the user gave the names.

        Args:
            source: what --class-names says.
            folders: the class folders, or the class numbers of shards.
            text: whether a text tower will read the names.
        """
        names = prompts.class_names(source, folders)
        for account in self.accounts:
            account.pair(folders, names)
        if source is not None:
            pairs = [f"{folder} = {name}" for folder, name in zip(folders, names, strict=True)]
            more = f" ... ({len(pairs)} in all)" if len(pairs) > SHOWN else ""
            err.print(f"class names of {source}: {', '.join(pairs[:SHOWN])}{more}", soft_wrap=True)
        elif text and prompts.are_numbers(names):
            err.print(
                f"the classes are called {', '.join(names[:3])} ..., and that is what the text tower "
                "reads; where these numbers stand for names, give --class-names",
                soft_wrap=True,
            )
        return names

    def report(self) -> None:
        """Prints a line for every source."""
        for account in self.accounts:
            out.print(account.summary(), soft_wrap=True)

    def account(self) -> dict[str, Any]:
        """For JSON: names of images left out, and the account of every source."""
        return {"unreadable": self.left_out, "reading": [account.to_dict() for account in self.accounts]}
