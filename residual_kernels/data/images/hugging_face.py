"""Images of Hugging Face's data sets: ``hf:tanganke/dtd@test``, or the folder of one that its library
saved."""

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from residual_kernels import extras
from residual_kernels.data.downloads import without_network
from residual_kernels.data.images.account import Account
from residual_kernels.data.images.dataset import Images
from residual_kernels.data.images.decode import MARK, UnreadableImage
from residual_kernels.data.images.listing import class_order
from residual_kernels.data.user_text import some, user_path

# Columns of these names need no feature ClassLabel.
_LABELS = (
    "label",
    "labels",
    "class",
    "category",
    "target",
)


class HuggingFaceImages(Images):
    """A data set of the Hugging Face hub, or a local folder that `datasets` reads: ``hf:tanganke/dtd@test``.

    Images stand in a column of type Image, or of bytes; labels in one of type ClassLabel, or of strings or
    integers. Which, is found where only one can be meant: the one Image (else the one of bytes), the one
    ClassLabel (else the one called label, labels, class, category or target).

    Args:
        name, part: of the data set; `part` is train, test ...
        preprocess: PIL image -> tensor [3, H, W].
        labelled: whether labels are wanted; None for labels where there is a column for them.
        root: where downloads are kept; download: whether the hub may be asked.
        exif, identity: see :class:`Images`.
        image_column, label_column: the columns, where more than one would do.
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
        image_column: str | None = None,
        label_column: str | None = None,
    ):
        self.source = f"hf:{name}" + ("" if part is None else f"@{part}")
        self.preprocess, self.exif, self.identity = preprocess, exif, identity
        data = _load(name, part, root, download)
        self._image = self._image_column(data, image_column)
        unsure: list[str] = []  # columns of which none is taken for the labels
        if labelled is None:
            labelled = label_column is not None or self._only_label(data) is not None
            unsure = [] if labelled else self._may_be_labels(data)
        self._label = self._label_column(data, label_column) if labelled else None
        self.names = [f"{index:07d}" for index in range(len(data))]
        if not self.names:
            raise ValueError(f"{self.source} holds no images")
        self.account = Account(self.source, found=len(self.names))
        if unsure:
            self.account.notes.append(
                f"read without labels, for several columns may hold them: {some(unsure)}; say which with "
                "--label-column"
            )
        self.class_names, self.labels = None, torch.full((len(self.names),), -1)
        if self._label is not None:
            self.class_names, self.labels = self._classes(data)
            self._count_classes()
        data = data.select_columns([self._image])
        if _is_image(data.features[self._image]):
            import datasets

            data = data.cast_column(self._image, datasets.Image(decode=False))  # bytes: decoding is ours
        self._data = data

    def _image_column(self, data: Any, asked: str | None) -> str:
        if asked is not None:
            feature = self._asked(data, asked)
            if not (_is_image(feature) or _is_bytes(feature)):
                raise ValueError(
                    f"{self.source}: column {asked} holds {feature}, not images or bytes of images"
                )
            return asked
        images = [name for name, feature in data.features.items() if _is_image(feature)]
        if not images:
            images = [name for name, feature in data.features.items() if _is_bytes(feature)]
        return self._only(images, data, "images (feature Image)", "--image-column")

    def _only_label(self, data: Any) -> str | None:
        """The one column that must hold the labels."""
        found = self._may_be_labels(data)
        return found[0] if len(found) == 1 else None

    def _may_be_labels(self, data: Any) -> list[str]:
        """The columns that may hold the labels: those of classes, else those that are called so."""
        classes = [name for name, feature in data.features.items() if type(feature).__name__ == "ClassLabel"]
        called = [name for name in _LABELS if name in data.features and _is_plain(data.features[name])]
        return classes or called

    def _label_column(self, data: Any, asked: str | None) -> str:
        if asked is not None:
            feature = self._asked(data, asked)
            if not (type(feature).__name__ == "ClassLabel" or _is_plain(feature)):
                raise ValueError(
                    f"{self.source}: column {asked} holds {feature}, not one label an image (a class, a "
                    "string or an integer)"
                )
            return asked
        found = self._only_label(data)
        if found is not None:
            return found
        return self._only(self._may_be_labels(data), data, "labels (feature ClassLabel)", "--label-column")

    def _asked(self, data: Any, column: str) -> Any:
        if column not in data.features:
            raise ValueError(f"{self.source} has no column {column}; it has {some(list(data.features))}")
        return data.features[column]

    def _only(self, columns: list[str], data: Any, what: str, option: str) -> str:
        if len(columns) == 1:
            return columns[0]
        found = f"has several: {some(columns)}" if columns else "has none"
        raise ValueError(
            f"{self.source} must have exactly one column of {what}; it {found}; say which with {option} "
            f"({some(list(data.features))})"
        )

    def _classes(self, data: Any) -> tuple[tuple[str, ...], torch.Tensor]:
        """Class names, and labels int64 [N]."""
        values = data.with_format(None)[self._label][:]
        own = getattr(data.features[self._label], "names", None)
        bare = [row for row, value in enumerate(values) if value is None or (own is not None and value < 0)]
        if bare:
            raise ValueError(
                f"{self.source}: {len(bare)} images have no label in column {self._label}, the first of "
                f"them image {bare[0]}; choose a part with labels, or use it without labels"
            )
        if own is not None:
            return tuple(own), torch.tensor(values)
        names = class_order(map(str, values))
        number = {name: index for index, name in enumerate(names)}
        return names, torch.tensor([number[str(value)] for value in values])

    def where(self, index: int) -> str:
        return f"{self.source}, image {index}"

    def _open(self, index: int) -> bytes:
        found = self._data[index][self._image]
        if isinstance(found, dict):
            path, found = found.get("path"), found.get("bytes")
            if found is None and path:
                return Path(path).read_bytes()
        if not found:
            raise UnreadableImage(f"{self.where(index)}{MARK}it is empty")
        return bytes(found)

    def _states(self) -> Iterator[object]:
        """The library's own fingerprint: it changes with the data's files and with every step applied to
        them."""
        return iter([self._data._fingerprint] * len(self))


def _is_image(feature: Any) -> bool:
    return type(feature).__name__ == "Image"


def _is_bytes(feature: Any) -> bool:
    if isinstance(feature, dict):
        return "bytes" in feature and _is_bytes(feature["bytes"])
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def _is_plain(feature: Any) -> bool:
    """Whether a column holds strings or whole numbers."""
    dtype = str(getattr(feature, "dtype", ""))
    return type(feature).__name__ == "Value" and (
        dtype in ("string", "large_string", "bool") or dtype.startswith(("int", "uint"))
    )


def _load(name: str, part: str | None, root: Path | None, download: bool):
    datasets = extras.need("datasets", "data", "reading hf: data sets")
    kept = user_path(name)
    asking = contextlib.nullcontext() if download else _offline(datasets)
    try:
        with asking:
            data = _read(datasets, kept, name, root, download)
    except (OSError, ValueError, RuntimeError) as error:
        on_hub = re.fullmatch(r"([\w.-]+/)?[\w.-]+", name) and not kept.exists()
        missing = "; fetch it with --download" if on_hub and not download else ""
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"hf:{name} cannot be read here ({reason}){missing}") from error
    if isinstance(data, datasets.DatasetDict):
        if part not in data:
            raise ValueError(f"say which part of hf:{name}: {some([f'hf:{name}@{found}' for found in data])}")
        return data[part]
    if part is not None:
        raise ValueError(f"hf:{name} comes in one part; leave @{part} out")
    return data


@contextlib.contextmanager
def _offline(datasets: Any) -> Iterator[None]:
    """The library asks no hub, and so does not wait for one."""
    before, datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE, True
    try:
        with without_network():
            yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _read(datasets: Any, kept: Path, name: str, root: Path | None, download: bool) -> Any:
    if (kept / "dataset_dict.json").is_file() or (kept / "state.json").is_file():
        return datasets.load_from_disk(str(kept))
    return datasets.load_dataset(
        str(kept) if kept.exists() else name,
        cache_dir=None if root is None else str(user_path(root)),
        download_config=datasets.DownloadConfig(local_files_only=not download),
        **({"trust_remote_code": False} if int(datasets.__version__.split(".")[0]) < 4 else {}),
    )
