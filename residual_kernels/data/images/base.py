"""What every data set of images offers, wherever its images come from."""

import abc
import contextlib
import hashlib
import zipfile
from collections.abc import Callable, Iterable, Iterator

from PIL import UnidentifiedImageError
from PIL.Image import DecompressionBombError, Image
from torch import Tensor
from torch.utils.data import Dataset


class Images(Dataset, abc.ABC):
    """Images read as (preprocessed image, label), or as the image alone without labels, in an order that never changes.

    Attributes:
        names: of the images, in order.
        class_names: names of the labels, or None where images are read without labels.
        preprocess: PIL image -> tensor [3, H, W].
    """

    names: list[str]
    class_names: tuple[str, ...] | None
    preprocess: Callable[[Image], Tensor]

    def __len__(self) -> int:
        return len(self.names)

    @abc.abstractmethod
    def picture(self, index: int) -> tuple[Image, int]:
        """The image itself, in RGB, and its label (-1 for none); a ValueError names an image that cannot be read."""

    def fingerprint(self) -> str:
        """A line that tells this data set from others, wherever it lies: a count, and a digest of what is known."""
        total = hashlib.sha256(repr((getattr(self, "source", None), self.class_names)).encode())
        for line in self._described():
            total.update(f"{line}\n".encode())
        return f"{len(self)} images ({total.hexdigest()[:32]})"

    def _described(self) -> Iterable[str]:
        """What is known of every image without opening it."""
        return self.names

    def __getitem__(self, index: int) -> tuple[Tensor, int] | Tensor:
        image, label = self.picture(index)
        return self.preprocess(image) if self.class_names is None else (self.preprocess(image), label)


@contextlib.contextmanager
def read_picture(name: str) -> Iterator[None]:
    """Whatever a decoder raises becomes a ValueError that names the image."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not a readable image: its format is unknown") from error
    except (DecompressionBombError, OSError, SyntaxError, zipfile.BadZipFile) as error:
        raise ValueError(f"{name} is not a readable image: {error}") from error
