"""Images of WebDataset shards: tar files whose members come in groups, ``000012.jpg`` with ``000012.cls``."""

import io
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from PIL import Image

from residual_kernels.data.images.base import Images, read_picture
from residual_kernels.data.images.image_folder import IMAGE_ENDINGS

CLASS_FILE = "classnames.txt"  # beside the shards or one folder up, as clip_benchmark lays them out
_LABEL = "cls"


def shard_files(source: str | os.PathLike) -> list[Path] | None:
    """The tar files that `source` names: one, a folder of them, or a pattern ``photos-{000..012}.tar``; else None."""
    text = os.fspath(source)
    if "{" in text or "::" in text:
        return [Path(found) for found in _webdataset().shardlists.expand_urls(text)]
    path = Path(text)
    if path.is_dir():
        return sorted(path.glob("*.tar")) or None
    return [path] if path.suffix == ".tar" else None


def _webdataset():
    try:
        import webdataset.shardlists
    except ImportError as error:
        raise ImportError(
            "shards are read by the library `webdataset`; install it with pip install 'residual-kernels[data]'"
        ) from error
    return webdataset


class ShardImages(Images):
    """Local shards, indexed once by their tar headers and then read in any order; samples keep the shards' order.

    A label is the integer in a sample's ``.cls``. Class names are the lines of classnames.txt beside the shards or one
    folder up, else the numbers. Shards that must be streamed are read by a webdataset pipeline of your own, which
    `encode` takes as it takes any loader.
    """

    def __init__(self, shards: Iterable[Path], preprocess: Callable, *, labelled: bool = True):
        self.preprocess = preprocess
        self.shards = [Path(shard) for shard in shards]
        self.names: list[str] = []
        self._images: list[tuple[int, int, int]] = []  # shard, offset, size
        self._labels: list[int] = []
        for number, shard in enumerate(self.shards):
            self._index(number, shard, labelled)
        if not self.names:
            raise ValueError(f"{self.shards[0]} and its fellows hold no images")
        self.class_names = self._classes() if labelled else None
        self._open: dict[
            tuple[int, int], io.BufferedReader
        ] = {}  # by process: a handle must not cross a fork

    def _index(self, number: int, shard: Path, labelled: bool) -> None:
        split = _webdataset().tariterators.base_plus_ext
        images: dict[str, tuple[int, int, int]] = {}
        labels: dict[str, int] = {}
        if not shard.is_file():
            raise FileNotFoundError(f"there is no shard {shard}")
        try:
            with tarfile.open(shard, "r:") as file:
                for member in file:
                    key, ending = split(member.name)
                    if not member.isfile() or key is None:
                        continue
                    if f".{ending.lower()}" in IMAGE_ENDINGS:
                        images[key] = (number, member.offset_data, member.size)
                    elif ending == _LABEL and labelled:
                        text = file.extractfile(member).read().decode("utf-8", "replace").strip()
                        if not text.isdecimal():
                            raise ValueError(
                                f"{shard}: {member.name} holds {text[:20]!r}; it must be a class number, counted from 0"
                            )
                        labels[key] = int(text)
        except tarfile.TarError as error:
            raise ValueError(f"{shard} is not a readable (uncompressed) tar file: {error}") from error
        lacking = [key for key in images if key not in labels] if labelled else []
        if lacking:
            raise ValueError(f"{shard}: sample {lacking[0]} has no label ({lacking[0]}.{_LABEL} is missing)")
        self.names += [f"{shard.name}/{key}" for key in images]
        self._images += images.values()
        self._labels += [labels.get(key, -1) for key in images]

    def _classes(self) -> tuple[str, ...]:
        highest = max(self._labels)
        for folder in (self.shards[0].parent, self.shards[0].parent.parent):
            file = folder / CLASS_FILE
            if file.is_file():
                names = tuple(
                    line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()
                )
                if highest >= len(names):
                    raise ValueError(f"{file} has {len(names)} names, but the shards hold class {highest}")
                return names
        return tuple(map(str, range(highest + 1)))

    def _described(self) -> Iterator[str]:
        for name, label, (_, _, size) in zip(self.names, self._labels, self._images, strict=True):
            yield f"{name}\0{label}\0{size}"

    def _bytes(self, shard: int, offset: int, size: int) -> bytes:
        handle = self._open.get((os.getpid(), shard))
        if handle is None:
            handle = self._open[os.getpid(), shard] = self.shards[shard].open("rb")
        handle.seek(offset)
        return handle.read(size)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}}

    def picture(self, index: int) -> tuple[Image.Image, int]:
        with (
            read_picture(self.names[index]),
            Image.open(io.BytesIO(self._bytes(*self._images[index]))) as image,
        ):
            return image.convert("RGB"), self._labels[index]
