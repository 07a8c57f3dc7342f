"""Where do images come from? What a `--data` names: a data set that a DataLoader reads, with its class names."""

import os
from collections.abc import Callable

from residual_kernels.images.base import Images
from residual_kernels.images.files import ImageFiles

__all__ = ["ImageFiles", "Images", "open_images"]


def open_images(source: str | os.PathLike, preprocess: Callable, *, labelled: bool = True) -> Images:
    """The data set that `source` names: a folder of images, or a zip of one (``photos.zip/train`` works too)."""
    return ImageFiles(source, preprocess, labelled=labelled)
