"""What does a name on the command line mean? Models, image folders, class names and templates."""

import difflib
import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import torch
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import Dataset

from residual_kernels.bundled import load_bundled

BUNDLED = "bundled"
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def nearest(name: str, known: list[str]) -> str:
    """A clause that names the known names nearest to `name`."""
    if not known:
        return "none are known"
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return f"nearest are {', '.join(close)}" if close else f"known are {', '.join(known[:5])} ..."


def load_model(name: str, pretrained: str | None = None) -> tuple[nn.Module, Callable, Callable]:
    """(model, preprocess, tokenizer) of ``bundled`` or of an open_clip name, in eval mode.

    `pretrained` is an open_clip tag (downloaded by open_clip), a local checkpoint, or ``none`` for random weights.
    Raises ValueError with the nearest known names.
    """
    import open_clip

    if name == BUNDLED:
        if pretrained is not None:
            raise ValueError("the bundled model has its own weights; leave --pretrained out")
        return load_bundled()
    models = open_clip.list_models()
    if name not in models:
        raise ValueError(f"unknown model {name!r}; {nearest(name, [BUNDLED, *models])}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is None:
        raise ValueError(
            f"say which weights of {name}: --pretrained with a tag ({', '.join(tags[:4]) or 'there is none'}), "
            "a checkpoint file, or none for random weights"
        )
    if pretrained != "none" and pretrained not in tags and not Path(pretrained).is_file():
        raise ValueError(
            f"{name} has no weights {pretrained!r} and no such file exists; {nearest(pretrained, tags)}"
        )
    weights = None if pretrained == "none" else pretrained
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=weights)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{pretrained} does not hold weights of {name}: {reason}") from error
    return model.eval(), preprocess, open_clip.get_tokenizer(name)


class ImageFiles(Dataset):
    """Images of a folder or of a zip, read as (preprocessed image, label).

    With `labelled`, the layout is ImageFolder's: one folder per class, `class/**/image`. Otherwise all images below the
    path are taken and the label is -1. A path may go on inside a zip: ``photos.zip/train``.

    Attributes:
        names: of the images, relative to the path, in sorted order.
        labels: int64 [N].
        class_names: names of the class folders, or None.
    """

    def __init__(self, path: str | os.PathLike, preprocess: Callable, *, labelled: bool = True):
        self.path, self.preprocess = Path(path), preprocess
        self.archive, self.prefix = _split_archive(self.path)
        self.names = self._list()
        if not self.names:
            raise ValueError(f"{self.path} holds no images ({', '.join(IMAGE_ENDINGS[:4])} ...)")
        self.class_names: tuple[str, ...] | None = None
        self.labels = torch.full((len(self.names),), -1)
        if labelled:
            self._label()
        self._open: tuple[int, zipfile.ZipFile] | None = (
            None  # by process: a zip handle must not cross a fork
        )

    def _list(self) -> list[str]:
        if self.archive is None:
            inside = (
                Path(root) / file for root, _, files in os.walk(self.path, followlinks=True) for file in files
            )
            found = (file.relative_to(self.path).as_posix() for file in inside)
        else:
            try:
                with zipfile.ZipFile(self.archive) as file:
                    inside = [name for name in file.namelist() if not name.endswith("/")]
            except zipfile.BadZipFile as error:
                raise ValueError(f"{self.archive} is not a readable zip: {error}") from error
            found = (name[len(self.prefix) :] for name in inside if name.startswith(self.prefix))
        hidden = (".", "__MACOSX")
        return sorted(
            name
            for name in found
            if name.lower().endswith(IMAGE_ENDINGS)
            and not any(p.startswith(hidden) for p in PurePosixPath(name).parts)
        )

    def _label(self) -> None:
        parts = [PurePosixPath(name).parts for name in self.names]
        loose = [name for name, part in zip(self.names, parts, strict=True) if len(part) == 1]
        if loose:
            raise ValueError(
                f"{self.path} must hold one folder per class, but {loose[0]} lies outside of any"
            )
        if all(len(part) > 2 for part in parts):
            inner = ", ".join(sorted({part[0] for part in parts})[:4])
            raise ValueError(
                f"the folders of {self.path} ({inner}) hold folders, not images; name one of them, "
                f"such as {self.path / parts[0][0]}"
            )
        self.class_names = tuple(sorted({part[0] for part in parts}))
        empty = [name for name in self._folders() if name not in self.class_names]
        if empty:
            raise ValueError(f"class without images in {self.path}: {', '.join(empty)}")
        index = {name: label for label, name in enumerate(self.class_names)}
        self.labels = torch.tensor([index[part[0]] for part in parts])

    def _folders(self) -> list[str]:
        if self.archive is not None:
            with zipfile.ZipFile(self.archive) as file:
                inside = [n[len(self.prefix) :] for n in file.namelist() if n.startswith(self.prefix)]
            return sorted(
                {name.split("/")[0] for name in inside if "/" in name and not name.startswith("__MACOSX")}
            )
        return sorted(p.name for p in self.path.iterdir() if p.is_dir() and not p.name.startswith("."))

    def _bytes(self, name: str) -> bytes:
        if self.archive is None:
            return (self.path / name).read_bytes()
        if self._open is None or self._open[0] != os.getpid():
            self._open = (os.getpid(), zipfile.ZipFile(self.archive))
        return self._open[1].read(self.prefix + name)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": None}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        name = self.names[index]
        try:
            with Image.open(io.BytesIO(self._bytes(name))) as image:
                return self.preprocess(image.convert("RGB")), int(self.labels[index])
        except UnidentifiedImageError as error:
            raise ValueError(f"{self.path / name} is not a readable image: its format is unknown") from error
        except (Image.DecompressionBombError, OSError, zipfile.BadZipFile) as error:
            raise ValueError(f"{self.path / name} is not a readable image: {error}") from error


def _split_archive(path: Path) -> tuple[Path | None, str]:
    """(zip file, folder inside it with a trailing slash or "") of a path that may go on inside a zip."""
    if path.is_dir():
        return None, ""
    for parent in (path, *path.parents):
        if parent.is_file():
            inside = path.relative_to(parent).as_posix()
            if not zipfile.is_zipfile(parent):
                raise ValueError(f"{parent} is neither a folder nor a zip of one")
            return parent, "" if inside == "." else f"{inside}/"
    siblings = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
    hint = f"; {nearest(path.name, siblings)}" if siblings else ""
    raise FileNotFoundError(f"there is no folder or zip at {path}{hint}")


def class_names(source: str | None, folders: tuple[str, ...]) -> tuple[str, ...]:
    """Names for class folders: from a file with one name a line, in the folders' sorted order, or the folder names."""
    if source is None:
        return tuple(name.replace("_", " ") for name in folders)
    lines = _lines(source, "class names")
    if len(lines) != len(folders):
        raise ValueError(f"{source} has {len(lines)} class names, but there are {len(folders)} class folders")
    return tuple(lines)


def templates(source: str | None, default: tuple[str, ...]) -> tuple:
    """Prompt templates: a file with one a line, or open_clip's own by name (``openai``, ``simple``)."""
    import open_clip

    named = {
        "openai": open_clip.OPENAI_IMAGENET_TEMPLATES,
        "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES,
    }
    if source is None:
        return default
    return tuple(named[source]) if source in named else tuple(_lines(source, "templates"))


def _lines(source: str, what: str) -> list[str]:
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of {what} at {source}")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{source} is empty; it should hold one of the {what} a line")
    return lines
