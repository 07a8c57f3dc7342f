"""What every data set of images offers, wherever its images come from."""

import abc
import hashlib
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import Dataset

from residual_kernels.data.images.account import Account
from residual_kernels.data.images.decode import UnreadableImage, decode, reading, rgb

IDENTITIES = ("auto", "stat", "digest")
# Images of so many bytes together are told apart by their content: some seconds of reading.
DIGEST_BYTES = 4 * 2**30


class Images(Dataset, abc.ABC):
    """Images read as (preprocessed image, label), or as the image alone without labels,
    in an order that never changes.

    A source only enumerates its images and opens them (:meth:`_open`); what decoding, orientation, labels and
    identity mean is written here once.

    Attributes:
        names: of the images, in order.
        labels: int64 [N]; -1 without labels.
        class_names: names of the labels, or None where images are read without labels.
        preprocess: PIL image -> tensor [3, H, W].
        exif: whether images are turned as their EXIF orientation says.
        identity: what tells an image from another in :meth:`fingerprint`: "digest" (SHA-256 of its bytes;
            reads everything), "stat" (size and time of change, or the archive's own checksum), or "auto": the
            digest where all images together take less than 4 GiB and no archive holds checksums of its own,
            else "stat".
        account: what the source holds and what became of it.
    """

    names: list[str]
    labels: Tensor
    class_names: tuple[str, ...] | None
    preprocess: Callable[[Image], Tensor]
    exif: bool = True
    identity: str = "auto"
    account: Account

    def __len__(self) -> int:
        return len(self.names)

    def where(self, index: int) -> str:
        """What messages call an image."""
        return self.names[index]

    @abc.abstractmethod
    def _open(self, index: int) -> bytes | Image:
        """The bytes of an image; the image itself where a library has decoded it."""

    def picture(self, index: int) -> tuple[Image, int]:
        """The image itself, in RGB, and its label (-1 for none).

        Raises :class:`UnreadableImage`, a ValueError that names the image, when it cannot be read.
        """
        with reading(self.where(index)):
            found = self._open(index)
            made = decode(found, exif=self.exif) if isinstance(found, bytes) else rgb(found, exif=self.exif)
        return made, int(self.labels[index])

    def __getitem__(self, index: int) -> tuple[Tensor, int] | Tensor:
        image, label = self.picture(index)
        return self.preprocess(image) if self.class_names is None else (self.preprocess(image), label)

    def fingerprint(self) -> str:
        """A line that tells this data set from others, wherever it lies: a count,
        and a digest of what is known."""
        if self.identity not in IDENTITIES:
            raise ValueError(f"identity must be one of {', '.join(IDENTITIES)}; got {self.identity!r}")
        chosen = self.identity
        if chosen == "auto":
            size = self._total_bytes()
            chosen = "stat" if size is None or size > DIGEST_BYTES else "digest"
        total = hashlib.sha256()
        _add(total, getattr(self, "source", None), self.class_names)
        seen = self._states() if chosen == "stat" else map(self._digest, range(len(self)))
        for name, label, state in zip(self.names, self.labels.tolist(), seen, strict=True):
            _add(total, name, label, state)
        orientation = "EXIF orientation applied" if self.exif else "EXIF orientation ignored"
        return f"{len(self)} images ({total.hexdigest()[:32]}), {orientation}, identity by {chosen}"

    def _total_bytes(self) -> int | None:
        """How many bytes a digest would read; None where the states tell the content already."""
        return None

    def _states(self) -> Iterator[object]:
        """What is known of every image without opening it."""
        return iter([None] * len(self))

    def _digest(self, index: int) -> str:
        try:
            with reading(self.where(index)):
                found = self._open(index)
        except UnreadableImage as error:  # whoever reads it is told
            return f"unreadable: {error.__cause__!r}"
        if not isinstance(found, bytes):
            found = f"{found.mode} {found.size} ".encode() + found.tobytes()
        return hashlib.sha256(found).hexdigest()

    def _count_classes(self) -> None:
        """Enters the classes and their numbers of images into the account."""
        if self.class_names is not None:
            counts = torch.bincount(self.labels, minlength=len(self.class_names)).tolist()
            self.account.classes = [(name, None, n) for name, n in zip(self.class_names, counts, strict=True)]


class Reading(NamedTuple):
    """How a data set was read, as its fingerprint tells."""

    exif: bool
    left_out: int  # images that could not be read
    found: int
    identity: str  # "stat" or "digest"


def reading_of(fingerprint: str | None) -> Reading | None:
    """How the data set with this :meth:`Images.fingerprint` was read; None for a text of another kind."""
    form = (
        r"(?:(\d+) of )?(\d+) images \(\w+\), EXIF orientation (applied|ignored), "
        r"identity by (stat|digest)(?:, .*)?"
    )
    told = re.fullmatch(form, fingerprint or "")
    if told is None:
        return None
    found = int(told[2])
    return Reading(told[3] == "applied", found - int(told[1] or found), found, told[4])


def _add(total: "hashlib._Hash", *values: object) -> None:
    total.update("\0".join(map(str, values)).encode("utf-8", "surrogateescape") + b"\n")
