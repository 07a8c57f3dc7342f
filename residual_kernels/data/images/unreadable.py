"""Which images cannot be read? Found before the work begins, so that what is left out is counted and named."""

from collections.abc import Callable, Sequence

from PIL.Image import Image
from torch.utils.data import DataLoader, Dataset

from residual_kernels.data.images.base import Images


class _Check(Dataset):
    """Reads every image and gives why it cannot be read, or None."""

    def __init__(self, images: Images):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> str | None:
        try:
            self.images.picture(index)
        except ValueError as error:
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
        self.class_names = images.class_names
        self.preprocess = images.preprocess

    def _described(self) -> list[str]:
        return [self.images.fingerprint(), *self.names]

    def picture(self, index: int) -> tuple[Image, int]:
        return self.images.picture(self.rows[index])


def without(images: Images, rows: dict[int, str]) -> Images:
    """The data set without the images at these indices."""
    if not rows:
        return images
    return SelectedImages(images, [row for row in range(len(images)) if row not in rows])
