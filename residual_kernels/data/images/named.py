"""Images of data sets that a library knows by name: torchvision's and Hugging Face's."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from residual_kernels.data import prompts
from residual_kernels.data.images.base import Images, read_picture
from residual_kernels.data.models import nearest

DEFAULT_ROOT = Path("~/.cache/residual_kernels/datasets")


class TorchvisionImages(Images):
    """A classification data set of torchvision: ``torchvision:GTSRB@test``.

    Class names are the data set's own, or clip_benchmark's where it has none (GTSRB, SVHN ...).
    """

    def __init__(
        self,
        name: str,
        part: str | None,
        preprocess: Callable,
        *,
        labelled: bool = True,
        root: Path | None = None,
        download: bool = False,
    ):
        made = _torchvision_class(name)
        self.source = f"torchvision:{made.__name__}" + ("" if part is None else f"@{part}")
        self.preprocess, self.labelled = preprocess, labelled
        root = (root or DEFAULT_ROOT).expanduser()
        options = _part_option(made, part)
        if "download" in inspect.signature(made.__init__).parameters:
            options["download"] = download
            if download:
                root.mkdir(parents=True, exist_ok=True)
        elif download:
            raise ValueError(f"torchvision cannot download {made.__name__}; place it in {root} by hand")
        try:
            self._data = made(str(root), **options)
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"{self.source} is not in {root}; fetch it with --download, or say where it is with --data-root"
            ) from error
        except ValueError as error:
            raise ValueError(f"{self.source}: {error}") from error
        self.names = [f"{index:07d}" for index in range(len(self._data))]
        self.class_names = self._classes(made.__name__) if labelled else None

    def _classes(self, name: str) -> tuple[str, ...]:
        own = getattr(self._data, "classes", None)
        if own:
            return tuple(str(found) for found in own)
        table = prompts.table_of_names(_TABLES.get(name, name.lower()))
        if table is None:
            raise ValueError(
                f"torchvision's {name} does not name its classes, and clip_benchmark has no table for it; "
                "use it without labels"
            )
        return table

    def picture(self, index: int) -> tuple[Image.Image, int]:
        with read_picture(f"{self.source}, image {index}"):
            image, label = self._data[index]
        return image.convert("RGB"), int(label) if self.labelled else -1


_TABLES = {
    "OxfordIIITPet": "pets",
    "Flowers102": "flowers",
    "ImageNet": "imagenet1k",
    "Caltech101": "caltech101",
}


def _torchvision_class(name: str) -> type:
    import torchvision

    known = {
        found: made
        for found, made in vars(torchvision.datasets).items()
        if inspect.isclass(made)
        and issubclass(made, torchvision.datasets.VisionDataset)
        and "root" in inspect.signature(made.__init__).parameters
    }
    by_lower = {found.lower(): made for found, made in known.items()}
    if name.lower() not in by_lower:
        raise ValueError(f"torchvision has no data set {name!r}; {nearest(name, sorted(known))}")
    return by_lower[name.lower()]


def _part_option(made: type, part: str | None) -> dict[str, Any]:
    """How this class is asked for a part (train, test ...): `split`, `train`, or not at all."""
    parameters = inspect.signature(made.__init__).parameters
    asked = f"torchvision:{made.__name__}"
    if "split" in parameters or made.__name__ == "ImageNet":
        if part is None:
            raise ValueError(f"say which part of {asked}: {asked}@train, {asked}@test ...")
        return {"split": part}
    if "train" in parameters:
        if part not in ("train", "test"):
            raise ValueError(f"say which part of {asked}: {asked}@train or {asked}@test; got {part!r}")
        return {"train": part == "train"}
    if part is not None:
        raise ValueError(f"{asked} comes in one part; leave @{part} out")
    return {}


class HuggingFaceImages(Images):
    """A data set of the Hugging Face hub, or a local folder that `datasets` reads: ``hf:tanganke/dtd@test``.

    The image column is the one of type Image, the label the one of type ClassLabel.
    """

    def __init__(
        self,
        name: str,
        part: str | None,
        preprocess: Callable,
        *,
        labelled: bool = True,
        root: Path | None = None,
        download: bool = False,
    ):
        self.source = f"hf:{name}" + ("" if part is None else f"@{part}")
        self.preprocess = preprocess
        data = _load(name, part, root, download)
        columns = {
            kind: [c for c, f in data.features.items() if type(f).__name__ == kind] for kind in _COLUMNS
        }
        self._image = _only(columns["Image"], self.source, "images (feature Image)")
        self._label = (
            _only(columns["ClassLabel"], self.source, "labels (feature ClassLabel)") if labelled else None
        )
        wanted = [self._image] if self._label is None else [self._image, self._label]
        self._data = data.select_columns(wanted)
        self.names = [f"{index:07d}" for index in range(len(data))]
        self.class_names = None if self._label is None else tuple(data.features[self._label].names)

    def picture(self, index: int) -> tuple[Image.Image, int]:
        with read_picture(f"{self.source}, image {index}"):
            row = self._data[index]
            return row[self._image].convert("RGB"), -1 if self._label is None else int(row[self._label])


_COLUMNS = ("Image", "ClassLabel")


def _only(columns: list[str], source: str, what: str) -> str:
    if len(columns) != 1:
        found = f"has several: {', '.join(columns)}" if columns else "has none"
        raise ValueError(f"{source} must have exactly one column of {what}; it {found}")
    return columns[0]


def _load(name: str, part: str | None, root: Path | None, download: bool):
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "hf: data sets are read by the library `datasets`; install it with pip install 'residual-kernels[data]'"
        ) from error

    kept = Path(name).expanduser()
    try:
        if (kept / "dataset_dict.json").is_file() or (kept / "state.json").is_file():
            data = datasets.load_from_disk(str(kept))
        else:
            data = datasets.load_dataset(
                name,
                cache_dir=None if root is None else str(root.expanduser()),
                download_config=datasets.DownloadConfig(local_files_only=not download),
            )
    except (OSError, ValueError, RuntimeError) as error:
        missing = "" if download else "; fetch it with --download"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"hf:{name} cannot be read here ({reason}){missing}") from error
    if isinstance(data, datasets.DatasetDict):
        if part not in data:
            raise ValueError(
                f"say which part of hf:{name}: {', '.join(f'hf:{name}@{found}' for found in data)}"
            )
        return data[part]
    if part is not None:
        raise ValueError(f"hf:{name} comes in one part; leave @{part} out")
    return data
