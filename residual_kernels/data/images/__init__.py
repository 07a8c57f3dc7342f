"""Where do images come from? What a `--data` names: a data set that a DataLoader reads, with its class names.

Four sources enumerate images and open them: `image_folder.py` (a folder, or a zip, whose members `archive.py`
names), `webdataset.py` (shards, indexed by `tar.py`), `torchvision_sets.py` and `hugging_face.py` (by name).
What is the same for all is written once: `decode.py` (bytes to RGB, and what makes an image unreadable),
`listing.py` (which files are images, what class each is), `account.py` (what became of everything found),
`base.py` (identity, labels).
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from residual_kernels.data.images.account import Account
from residual_kernels.data.images.dataset import IDENTITIES, Images
from residual_kernels.data.images.decode import UnreadableImage
from residual_kernels.data.images.image_folder import ImageFiles
from residual_kernels.data.images.named import HuggingFaceImages, TorchvisionImages
from residual_kernels.data.images.unreadable import find_unreadable, without
from residual_kernels.data.images.webdataset import ShardImages, shard_files
from residual_kernels.data.user_text import user_path

__all__ = [
    "IDENTITIES",
    "Account",
    "HuggingFaceImages",
    "ImageFiles",
    "Images",
    "ShardImages",
    "TorchvisionImages",
    "UnreadableImage",
    "find_unreadable",
    "open_images",
    "without",
]
_EXAMPLES = {"torchvision": "torchvision:GTSRB@test", "hf": "hf:tanganke/dtd@test"}
_ADDRESS = re.compile("[A-Za-z][A-Za-z0-9+.-]+:/")  # one slash: a Path keeps no second; C:/ is a drive
_BY_NAME = {"torchvision": TorchvisionImages, "hf": HuggingFaceImages}


def open_images(
    source: str | os.PathLike,
    preprocess: Callable,
    *,
    labelled: bool | None = True,
    root: Path | None = None,
    download: bool = False,
    exif: bool = True,
    identity: str = "auto",
    image_column: str | None = None,
    label_column: str | None = None,
    skip: bool = False,
) -> Images:
    """The data set that `source` names.

    Args:
        source: an ImageFolder directory, or a zip of one (``photos.zip/train`` works too); WebDataset shards
            (a folder of .tar files, one, or a pattern ``photos-{000..012}.tar``); ``torchvision:GTSRB@test``;
            ``hf:tanganke/dtd@test`` or the folder of a data set that Hugging Face's library saved. ``~`` and
            environment variables are expanded.
        preprocess: PIL image -> tensor [3, H, W].
        labelled: whether labels are wanted; without, any image below a folder is taken. None takes labels
            where the source has them, and a flat folder without.
        root: where the named data sets are kept; download: whether they may be fetched when they are not
            there.
        exif: whether images are turned upright as their EXIF orientation says. They are by default, as every
            viewer shows them: a tower reads a photograph worse when it lies on its side. torchvision and
            open_clip leave them as stored; False does too. The value is part of :meth:`Images.fingerprint`.
        identity: what tells an image from another in the fingerprint: "auto", "stat" or "digest"; see
            :class:`Images`.
        image_column, label_column: of a Hugging Face data set, where more than one would do.
        skip: whether a container that is damaged (a shard cut short) is read up to there, and a folder that
            may not be listed is left out, instead of raising.

    Raises FileNotFoundError or ValueError when there is no such data set, and ImportError naming the extra to
    install.
    """
    if identity not in IDENTITIES:
        raise ValueError(f"identity must be one of {', '.join(IDENTITIES)}; got {identity!r}")
    shared: dict[str, Any] = {"labelled": labelled, "exif": exif, "identity": identity}
    scheme, _, rest = os.fspath(source).partition(":")
    named = {"image_column": image_column, "label_column": label_column}
    columns = {name: value for name, value in named.items() if value is not None}
    if columns and scheme != "hf":
        named_so = " and ".join(f"--{name.replace('_', '-')}" for name in columns)
        raise ValueError(f"{named_so} can only be said of a Hugging Face data set (hf:NAME), not of {source}")
    address = scheme not in _BY_NAME and _ADDRESS.match(os.fspath(source)) and not os.path.lexists(source)
    if address or rest.startswith("//"):
        raise ValueError(
            f"{scheme}://{rest.lstrip('/')} is an address in a network, and only local data are read; "
            "download it first"
        )
    if scheme in _BY_NAME and not rest:
        raise ValueError(
            f"{source} names no data set; write its name after the colon, such as {_EXAMPLES[scheme]}"
        )
    if scheme in _BY_NAME and rest:
        name, _, part = rest.partition("@")
        return _BY_NAME[scheme](
            name, part or None, preprocess, root=root, download=download, **shared, **columns
        )
    path = user_path(source)
    shards = shard_files(path)
    if shards is not None:
        return ShardImages(shards, preprocess, skip=skip, **shared)
    return ImageFiles(path, preprocess, skip=skip, **shared)
