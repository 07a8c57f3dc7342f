"""Images of a folder, or of a zip of one."""

import contextlib
import os
import stat
import zipfile
from collections.abc import Callable, Iterator

import torch

from residual_kernels.data.images.account import Account
from residual_kernels.data.images.archive import members, split_archive
from residual_kernels.data.images.dataset import Images
from residual_kernels.data.images.decode import MARK, MAX_BYTES, UnreadableImage
from residual_kernels.data.images.listing import by_folder, images_among, is_flat, is_system, walk
from residual_kernels.data.user_text import some, user_path

_HINTS = (  # endings -> what they tell
    ({".arrow", ".parquet"}, "; a data set of Hugging Face's library is named hf:{}"),
    (
        {".safetensors"},
        "; if it is a cache of `encode`, its images were read when it was made: name the images",
    ),
    (
        {".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"},
        "; unpack the archives, or name one zip or .tar itself",
    ),
)


class ImageFiles(Images):
    """Images of a folder or of a zip.

    With labels the layout is ImageFolder's: one folder per class, ``class/**/image``. Otherwise all images
    below the path are taken. A path may go on inside a zip: ``photos.zip/train``.

    Args:
        path: the folder, the zip, or a folder inside it.
        preprocess: PIL image -> tensor [3, H, W].
        labelled: whether labels are wanted; None for labels where images lie in folders of their own.
        exif: whether images are turned as their EXIF orientation says.
        identity: see :class:`Images`.
        skip: whether a folder that may not be listed is left out instead of raising.

    Attributes:
        names: of the images, relative to the path, in sorted order.
        labels: int64 [N].
        class_names: names of the class folders, in number order where all are numbers, or None.

    Raises FileNotFoundError or ValueError when there is no such data set.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        preprocess: Callable,
        *,
        labelled: bool | None = True,
        exif: bool = True,
        identity: str = "auto",
        skip: bool = False,
    ):
        self.path, self.preprocess, self.exif, self.identity = user_path(path), preprocess, exif, identity
        self.archive, self.prefix = split_archive(self.path)
        self.account = Account(str(self.path))
        entries, folders = self._list(skip)
        self.names, self._entries = list(entries), list(entries.values())
        if not self.names and self.archive is not None and self.prefix and not self.account.ignored:
            tops = {name.partition("/")[0] for name, _ in members(self.archive, "", Account(""))}
            raise FileNotFoundError(
                f"there is no folder {self.prefix.rstrip('/')} in {self.archive}; it holds "
                f"{some(sorted(tops))}"
            )
        if not self.names:
            there = ", ".join(f"{count} {ending}" for ending, count in self.account.ignored.most_common(4))
            hint = next((text for endings, text in _HINTS if endings & set(self.account.ignored)), "")
            raise ValueError(
                f"{self.path} holds no images (.jpg, .png ...); it holds "
                f"{there or 'nothing'}{hint.format(self.path)}"
            )
        self.class_names: tuple[str, ...] | None = None
        self.labels = torch.full((len(self.names),), -1)
        if labelled is None:
            labelled = not is_flat(self.names)
        if labelled:
            self.class_names, self.labels = by_folder(self.names, folders, self.path, self.account)
            self._count_classes()
        # by process: a zip handle must not cross a fork
        self._handle: tuple[int, zipfile.ZipFile] | None = None

    def _list(self, skip: bool) -> tuple[dict[str, zipfile.ZipInfo | None], set[str]]:
        """(name -> member of the zip, names of the folders directly below the path)."""
        found: list[tuple[str, bool, zipfile.ZipInfo | None]]
        if self.archive is None:
            found = [(name, folder, None) for name, folder in walk(self.path, self.account, skip)]
        else:
            inside = members(self.archive, self.prefix, self.account)
            found = [(name.rstrip("/"), name.endswith("/"), info) for name, info in inside]
        folders = {name for name, folder, _ in found if folder and "/" not in name}
        folders |= {name.partition("/")[0] for name, _, _ in found if "/" in name}
        entries = images_among(((name, info) for name, folder, info in found if not folder), self.account)
        return entries, {name for name in folders if not is_system(name)}

    def where(self, index: int) -> str:
        return str(self.path / self.names[index])

    def _open(self, index: int) -> bytes:
        member = self._entries[index]
        if member is None:
            return self._file(index)
        if stat.S_ISLNK(member.external_attr >> 16):  # others were followed
            raise UnreadableImage(f"{self.where(index)}{MARK}it is a link to nothing in the archive")
        if member.file_size > MAX_BYTES:
            raise UnreadableImage(f"{self.where(index)}{MARK}it would take {member.file_size:,} bytes")
        if self._handle is None or self._handle[0] != os.getpid():
            assert self.archive is not None  # members are of an archive
            self._handle = (os.getpid(), zipfile.ZipFile(self.archive))
        return self._handle[1].read(member)

    def _file(self, index: int) -> bytes:
        # Without O_NONBLOCK, opening a pipe would wait for a writer.
        handle = os.open(self.path / self.names[index], os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with open(handle, "rb") as file:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                raise UnreadableImage(f"{self.where(index)}{MARK}it is not a regular file")
            if found.st_size > MAX_BYTES:
                raise UnreadableImage(f"{self.where(index)}{MARK}it takes {found.st_size:,} bytes")
            return file.read()

    def _states(self) -> Iterator[object]:
        """Sizes and times of change; in a zip its own checksums of the files."""
        for name, member in zip(self.names, self._entries, strict=True):
            if member is not None:
                yield member.file_size, member.CRC
                continue
            try:
                found = os.stat(self.path / name)
            except OSError as error:  # a link to nothing, say; reading it names it
                yield f"error {error.errno}"
            else:
                yield found.st_size, found.st_mtime_ns

    def _total_bytes(self) -> int | None:
        if self.archive is not None:
            return None
        total = 0
        for name in self.names:
            with contextlib.suppress(OSError):
                total += os.stat(self.path / name).st_size
        return total

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_handle": None}
