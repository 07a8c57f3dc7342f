"""Images of a folder, or of a zip of one."""

import io
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import torch
from PIL import Image

from residual_kernels.data.images.base import Images, read_picture
from residual_kernels.data.models import nearest

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


class ImageFiles(Images):
    """Images of a folder or of a zip.

    With `labelled`, the layout is ImageFolder's: one folder per class, `class/**/image`. Otherwise all images below the
    path are taken. A path may go on inside a zip: ``photos.zip/train``.

    Attributes:
        names: of the images, relative to the path, in sorted order.
        labels: int64 [N].
        class_names: names of the class folders, or None.
    """

    def __init__(self, path: str | os.PathLike, preprocess: Callable, *, labelled: bool = True):
        self.path, self.preprocess = Path(path), preprocess
        self.archive, self.prefix = _split_archive(self.path)
        self.names = self._list()
        if not self.names:
            raise ValueError(f"{self.path} holds no images ({', '.join(IMAGE_ENDINGS[:4])} ...)")
        self.class_names: tuple[str, ...] | None = None
        self.labels = torch.full((len(self.names),), -1)
        if labelled:
            self._label()
        self._open: tuple[int, zipfile.ZipFile] | None = (
            None  # by process: a zip handle must not cross a fork
        )

    def _list(self) -> list[str]:
        if self.archive is None:
            inside = (
                Path(root) / file for root, _, files in os.walk(self.path, followlinks=True) for file in files
            )
            found = (file.relative_to(self.path).as_posix() for file in inside)
        else:
            try:
                with zipfile.ZipFile(self.archive) as file:
                    inside = [name for name in file.namelist() if not name.endswith("/")]
            except zipfile.BadZipFile as error:
                raise ValueError(f"{self.archive} is not a readable zip: {error}") from error
            found = (name[len(self.prefix) :] for name in inside if name.startswith(self.prefix))
        hidden = (".", "__MACOSX")
        return sorted(
            name
            for name in found
            if name.lower().endswith(IMAGE_ENDINGS)
            and not any(p.startswith(hidden) for p in PurePosixPath(name).parts)
        )

    def _label(self) -> None:
        parts = [PurePosixPath(name).parts for name in self.names]
        loose = [name for name, part in zip(self.names, parts, strict=True) if len(part) == 1]
        if loose:
            raise ValueError(
                f"{self.path} must hold one folder per class, but {loose[0]} lies outside of any"
            )
        if all(len(part) > 2 for part in parts):
            inner = ", ".join(sorted({part[0] for part in parts})[:4])
            raise ValueError(
                f"the folders of {self.path} ({inner}) hold folders, not images; name one of them, "
                f"such as {self.path / parts[0][0]}"
            )
        self.class_names = tuple(sorted({part[0] for part in parts}))
        empty = [name for name in self._folders() if name not in self.class_names]
        if empty:
            raise ValueError(f"class without images in {self.path}: {', '.join(empty)}")
        index = {name: label for label, name in enumerate(self.class_names)}
        self.labels = torch.tensor([index[part[0]] for part in parts])

    def _folders(self) -> list[str]:
        if self.archive is not None:
            with zipfile.ZipFile(self.archive) as file:
                inside = [n[len(self.prefix) :] for n in file.namelist() if n.startswith(self.prefix)]
            return sorted(
                {name.split("/")[0] for name in inside if "/" in name and not name.startswith("__MACOSX")}
            )
        return sorted(p.name for p in self.path.iterdir() if p.is_dir() and not p.name.startswith("."))

    def _bytes(self, name: str) -> bytes:
        if self.archive is None:
            return (self.path / name).read_bytes()
        if self._open is None or self._open[0] != os.getpid():
            self._open = (os.getpid(), zipfile.ZipFile(self.archive))
        return self._open[1].read(self.prefix + name)

    def _described(self) -> Iterator[str]:
        """Names, labels and sizes; in a zip also its own checksums of the files."""
        if self.archive is None:
            seen = (f"{(self.path / name).stat().st_size}" for name in self.names)
        else:
            with zipfile.ZipFile(self.archive) as file:
                entries = [file.getinfo(self.prefix + name) for name in self.names]
            seen = (f"{entry.file_size} {entry.CRC}" for entry in entries)
        for name, label, what in zip(self.names, self.labels.tolist(), seen, strict=True):
            yield f"{name}\0{label}\0{what}"

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": None}

    def picture(self, index: int) -> tuple[Image.Image, int]:
        name = self.names[index]
        with read_picture(str(self.path / name)), Image.open(io.BytesIO(self._bytes(name))) as image:
            return image.convert("RGB"), int(self.labels[index])


def _split_archive(path: Path) -> tuple[Path | None, str]:
    """(zip file, folder inside it with a trailing slash or "") of a path that may go on inside a zip."""
    if path.is_dir():
        return None, ""
    for parent in (path, *path.parents):
        if parent.is_file():
            inside = path.relative_to(parent).as_posix()
            if not zipfile.is_zipfile(parent):
                raise ValueError(f"{parent} is neither a folder nor a zip of one")
            return parent, "" if inside == "." else f"{inside}/"
    siblings = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
    hint = f"; {nearest(path.name, siblings)}" if siblings else ""
    raise FileNotFoundError(f"there is no folder or zip at {path}{hint}")
