"""Images of torchvision's classification data sets, by name: ``torchvision:GTSRB@test``."""

import hashlib
import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from residual_kernels.data import prompts
from residual_kernels.data.downloads import why
from residual_kernels.data.images.account import Account
from residual_kernels.data.images.dataset import Images
from residual_kernels.data.images.decode import reading
from residual_kernels.data.models import nearest
from residual_kernels.data.user_text import user_path

DEFAULT_ROOT = Path("~/.cache/residual_kernels/datasets")
_TABLES = {
    "OxfordIIITPet": "pets",
    "Flowers102": "flowers",
    "ImageNet": "imagenet1k",
    "Caltech101": "caltech101",
}
_FOLDERS = ("ImageFolder", "DatasetFolder")
_LABELS = {  # what the labels of other data sets are: refused before anything is fetched
    "CelebA": "attributes of faces",
    "Cityscapes": "masks",
    "CocoCaptions": "captions",
    "CocoDetection": "boxes",
    "Flickr30k": "captions",
    "Flickr8k": "captions",
    "Kitti": "boxes",
    "SBDataset": "boundaries",
    "SBU": "captions",
    "VOCDetection": "boxes",
    "VOCSegmentation": "masks",
    "WIDERFace": "boxes of faces",
}
_NO_PICTURES = {  # what the items of others are in place of one image: refused even without labels
    "LFWPairs": "pairs of images",
    "PhotoTour": "patches",
    "MovingMNIST": "films",
    "Kinetics": "films",
    "HMDB51": "films",
    "UCF101": "films",
    "FlyingChairs": "pairs of images",
    "FlyingThings3D": "pairs of images",
    "HD1K": "pairs of images",
    "KittiFlow": "pairs of images",
    "Sintel": "pairs of images",
}
_GIVEN = frozenset({"root", "split", "train"})


class TorchvisionImages(Images):
    """A classification data set of torchvision: ``torchvision:GTSRB@test``.

    Class names are the data set's own, or clip_benchmark's where it has none (GTSRB, SVHN ...). The library
    decodes the images itself.
    """

    def __init__(
        self,
        name: str,
        part: str | None,
        preprocess: Callable,
        *,
        labelled: bool | None = True,
        root: Path | None = None,
        download: bool = False,
        exif: bool = True,
        identity: str = "auto",
    ):
        made = torchvision_class(name)
        if labelled:
            check_classes(made)
        self.source = f"torchvision:{made.__name__}" + ("" if part is None else f"@{part}")
        self.preprocess, self.exif, self.identity = preprocess, exif, identity
        root = user_path(root or DEFAULT_ROOT)
        options = part_option(made, part)
        if "download" in _parameters(made):
            options["download"] = download
            if download:
                root.mkdir(parents=True, exist_ok=True)
        elif download:
            raise ValueError(f"torchvision cannot download {made.__name__}; place it in {root} by hand")
        try:
            self._data = made(str(root), **options)
        except (RuntimeError, OSError) as error:
            if download:
                raise ValueError(f"{self.source} could not be fetched into {root}: {why(error)}") from error
            raise ValueError(
                f"{self.source} is not in {root}; fetch it with --download, or say where it is with "
                "--data-root"
            ) from error
        except (ValueError, ImportError) as error:
            raise ValueError(f"{self.source}: {error}") from error
        self.names = [f"{index:07d}" for index in range(len(self._data))]
        if not self.names:
            raise ValueError(f"{self.source} holds no images")
        self.account = Account(self.source, found=len(self.names))
        kind = self._check_items()
        labelled = kind is None if labelled is None else labelled
        if labelled and kind is not None:
            raise ValueError(
                f"{self.source} is not a classification data set: its labels are {kind}; use it without "
                "labels"
            )
        self.class_names = self._classes(made.__name__) if labelled else None
        self.labels = self._labels() if labelled else torch.full((len(self.names),), -1)
        self._count_classes()

    def _check_items(self) -> str | None:
        """What the labels are instead of class numbers, or None; a ValueError where there are no images."""
        try:
            found = self._data[0]
        except (ValueError, OSError, SyntaxError):  # one image that cannot be read says nothing of the others
            return None
        pair = isinstance(found, tuple) and len(found) == 2
        if not pair or not isinstance(found[0], Image.Image):
            raise ValueError(
                f"{self.source} is not a data set of single images with one label each, so it cannot be used"
            )
        whole = isinstance(found[1], int | np.integer) or (isinstance(found[1], Tensor) and not found[1].ndim)
        return None if whole else f"of type {type(found[1]).__name__}"

    def _labels(self) -> Tensor:
        """The labels without opening the images where the data set lists them,
        else -1 until an image is read."""
        for attribute in ("targets", "labels", "_labels"):
            found = getattr(self._data, attribute, None)
            if isinstance(found, Tensor | np.ndarray | list) and len(found) == len(self.names):
                numbers = np.asarray(found)
                if numbers.ndim == 1 and numbers.dtype.kind in "iu":
                    return torch.from_numpy(numbers.astype(np.int64))
        for attribute in ("samples", "_samples", "imgs"):
            found = getattr(self._data, attribute, None)
            if isinstance(found, list) and len(found) == len(self.names):
                if all(isinstance(row, tuple) and isinstance(row[-1], int) for row in found):
                    return torch.tensor([row[-1] for row in found])
        return torch.full((len(self.names),), -1)

    def _count_classes(self) -> None:
        if self.class_names is not None and len(self.labels) and int(self.labels.min()) >= 0:
            super()._count_classes()

    def _classes(self, name: str) -> tuple[str, ...]:
        own = getattr(self._data, "classes", None)
        if own:
            # ImageNet's classes are tuples of synonyms
            return tuple(", ".join(found) if isinstance(found, tuple) else str(found) for found in own)
        table = prompts.table_of_names(_TABLES.get(name, name.lower()))
        if table is None:
            raise ValueError(
                f"torchvision's {name} does not name its classes, and clip_benchmark has no table for it; "
                "use it without labels"
            )
        return table

    def where(self, index: int) -> str:
        return f"{self.source}, image {index}"

    def _open(self, index: int) -> Image.Image:
        return self._data[index][0]

    def picture(self, index: int) -> tuple[Image.Image, int]:
        image, label = super().picture(index)
        if self.class_names is not None and label < 0:
            with reading(self.where(index)):
                label = int(self._data[index][1])
        return image, label

    def _states(self) -> Iterator[object]:
        """One state for all: files that the data set names, by size and time of change,
        and arrays by their content."""
        total = hashlib.sha256()
        for name, value in sorted(vars(self._data).items()):
            for item in _parts(value):
                total.update(f"{name}\0{_state(item)}\n".encode("utf-8", "surrogateescape"))
        return iter([total.hexdigest()] * len(self))


def _parts(value: Any) -> Iterator[Any]:
    """Paths and arrays among an attribute's values, lists and tuples opened up."""
    if isinstance(value, str | Path | Tensor | np.ndarray):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _parts(item)


def _state(item: Any) -> object:
    if isinstance(item, Tensor | np.ndarray):
        return hashlib.sha256(np.ascontiguousarray(item).tobytes()).hexdigest()
    try:
        found = os.stat(item)
    except (OSError, ValueError):
        return None
    return None if os.path.isdir(item) else (found.st_size, found.st_mtime_ns)


def check_classes(made: Any) -> None:
    """Raises ValueError where the labels of a data set are no classes, before anything is fetched."""
    if made.__name__ in _LABELS:
        raise ValueError(
            f"torchvision:{made.__name__} is not a classification data set: its labels are "
            f"{_LABELS[made.__name__]}; use it without labels"
        )


def torchvision_class(name: str) -> Any:
    """torchvision's class of this name; a ValueError where there is none that holds single images."""
    import torchvision

    if name.lower() in (folder.lower() for folder in _FOLDERS):
        raise ValueError(f"torchvision's {name} reads a folder of images; name the folder itself")
    if name.lower() == "fakedata":
        raise ValueError("torchvision's FakeData draws noise whose classes have no names; it cannot be used")
    known = {
        found: made
        for found, made in vars(torchvision.datasets).items()
        if inspect.isclass(made)
        and found not in (*_FOLDERS, "VisionDataset")
        and issubclass(made, torchvision.datasets.VisionDataset)
        and "root" in inspect.signature(made.__init__).parameters
    }
    by_lower = {found.lower(): made for found, made in known.items()}
    if name.lower() not in by_lower:
        usable = sorted(one for one in known if one not in _NO_PICTURES and not one.endswith("Stereo"))
        raise ValueError(f"torchvision has no data set {name!r}; {nearest(name, usable)}")
    made = by_lower[name.lower()]
    items = "pairs of images" if made.__name__.endswith("Stereo") else _NO_PICTURES.get(made.__name__)
    if items is not None:
        raise ValueError(
            f"torchvision:{made.__name__} holds {items}, not single images, so it cannot be used"
        )
    needed = [
        parameter.name
        for parameter in inspect.signature(made).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and parameter.name not in _GIVEN
    ]
    if needed:
        raise ValueError(
            f"torchvision:{made.__name__} is not a classification data set that can be opened by name: it "
            f"also needs {', '.join(needed)}"
        )
    return made


def _parameters(made: Any) -> set[str]:
    """Names that a class takes, those that it hands on to the class below it too."""
    found: set[str] = set()
    for one in inspect.getmro(made):
        own = inspect.signature(vars(one).get("__init__", object.__init__)).parameters
        found |= set(own)
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in own.values()):
            break
    return found


def part_option(made: Any, part: str | None) -> dict[str, Any]:
    """How this class is asked for a part (train, test ...): `split`, `train`, or not at all."""
    parameters = inspect.signature(made.__init__).parameters
    asked = f"torchvision:{made.__name__}"
    if made.__name__ == "EMNIST":  # the only one with two kinds of parts, one of them hidden in **kwargs
        letters, _, side = (part or "").rpartition("-")
        if side not in ("train", "test"):
            raise ValueError(f"say which part of {asked}: {asked}@letters-train, {asked}@balanced-test ...")
        return {"split": letters, "train": side == "train"}
    if "split" in parameters or made.__name__ == "ImageNet":
        if part is None:
            raise ValueError(f"say which part of {asked}: {asked}@train, {asked}@test ...")
        return {"split": part}
    if "image_set" in parameters and part is not None:
        return {"image_set": part}
    if "train" in parameters:
        if part not in ("train", "test"):
            got = "" if part is None else f"; got {part!r}"
            raise ValueError(f"say which part of {asked}: {asked}@train or {asked}@test{got}")
        return {"train": part == "train"}
    if part is not None:
        raise ValueError(f"{asked} comes in one part; leave @{part} out")
    return {}
