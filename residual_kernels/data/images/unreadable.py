"""Which images cannot be read?

Found before the work begins, so that what is left out is counted and named.
"""

import copy
import hashlib
from collections.abc import Callable, Sequence

from PIL.Image import Image
from torch.utils.data import DataLoader, Dataset

from residual_kernels.data.images.dataset import Images
from residual_kernels.data.images.decode import UnreadableImage
from residual_kernels.data.user_text import some


class _Check(Dataset):
    """Reads every image and gives why it cannot be read, or None."""

    def __init__(self, images: Images):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> str | None:
        try:
            self.images.picture(index)
        except UnreadableImage as error:
            return str(error)
        return None


def find_unreadable(
    images: Images, workers: int = 0, progress: Callable[[int], None] | None = None
) -> dict[int, str]:
    """Index -> reason for every image that cannot be read. Reads them all, in `workers` processes."""
    found = {}
    for index, reason in enumerate(DataLoader(_Check(images), batch_size=None, num_workers=workers)):
        if reason is not None:
            found[index] = reason
        if progress is not None:
            progress(1)
    return found


class SelectedImages(Images):
    """Some images of a data set, in their order."""

    def __init__(self, images: Images, rows: Sequence[int]):
        self.images, self.rows = images, list(rows)
        if not self.rows:
            raise ValueError("none of the images can be read")
        self.names = [images.names[row] for row in self.rows]
        self.labels = images.labels[self.rows]
        self.class_names, self.preprocess = images.class_names, images.preprocess
        self.exif, self.identity = images.exif, images.identity
        self.account = copy.deepcopy(images.account)
        self._count_classes()

    def where(self, index: int) -> str:
        return self.images.where(self.rows[index])

    def _open(self, index: int) -> bytes | Image:
        return self.images._open(self.rows[index])

    def fingerprint(self) -> str:
        chosen = hashlib.sha256(repr(self.names).encode("utf-8", "surrogateescape")).hexdigest()
        return f"{len(self)} of {self.images.fingerprint()}, chosen {chosen[:16]}"


def without(images: Images, rows: dict[int, str]) -> Images:
    """The data set without the images at these indices (index -> why), which its account then names."""
    if not rows:
        return images
    kept = SelectedImages(images, [row for row in range(len(images)) if row not in rows])
    kept.account.leave_out((images.names[row], reason) for row, reason in rows.items())
    before = {folder for folder, _, count in images.account.classes if count}
    bare = [folder for folder, _, count in kept.account.classes if not count and folder in before]
    if bare:
        kept.account.notes.append(f"no image is left of the classes {some(bare)}")
    return kept
