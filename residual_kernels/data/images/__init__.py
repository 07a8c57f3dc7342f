"""Where do images come from? What a `--data` names: a data set that a DataLoader reads, with its class names."""

import os
from collections.abc import Callable
from pathlib import Path

from residual_kernels.data.images.base import Images
from residual_kernels.data.images.image_folder import ImageFiles
from residual_kernels.data.images.named import HuggingFaceImages, TorchvisionImages
from residual_kernels.data.images.unreadable import find_unreadable, without
from residual_kernels.data.images.webdataset import ShardImages, shard_files

__all__ = [
    "HuggingFaceImages",
    "ImageFiles",
    "Images",
    "ShardImages",
    "TorchvisionImages",
    "find_unreadable",
    "open_images",
    "without",
]
_BY_NAME = {"torchvision": TorchvisionImages, "hf": HuggingFaceImages}


def open_images(
    source: str | os.PathLike,
    preprocess: Callable,
    *,
    labelled: bool = True,
    root: Path | None = None,
    download: bool = False,
) -> Images:
    """The data set that `source` names.

    Args:
        source: an ImageFolder directory, or a zip of one (``photos.zip/train`` works too); WebDataset shards (a folder
            of .tar files, one, or a pattern ``photos-{000..012}.tar``); ``torchvision:GTSRB@test``;
            ``hf:tanganke/dtd@test`` or the folder of a data set that Hugging Face's library saved.
        preprocess: PIL image -> tensor [3, H, W].
        labelled: whether labels are wanted; without, any image below a folder is taken.
        root: where the named data sets are kept; download: whether they may be fetched when they are not there.

    Raises FileNotFoundError or ValueError when there is no such data set, and ImportError naming the extra to install.
    """
    scheme, _, rest = os.fspath(source).partition(":")
    if scheme in _BY_NAME and rest:
        name, _, part = rest.partition("@")
        return _BY_NAME[scheme](
            name, part or None, preprocess, labelled=labelled, root=root, download=download
        )
    shards = shard_files(source)
    if shards is not None:
        return ShardImages(shards, preprocess, labelled=labelled)
    return ImageFiles(source, preprocess, labelled=labelled)
