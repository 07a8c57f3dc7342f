"""Do two outputs of a command, or an output and an input, name one place?

Asked before work, for every command.
"""

import inspect
import os
import re
from collections.abc import Collection, Iterator, Mapping
from enum import Enum
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from residual_kernels.cli import printing

# Names that commands write into their folders: another output must not take one of them.
CACHE_FILES = ("manifest.json", "shard-*.safetensors")
ADAPTER_FILES = (
    "adapter.json",
    "weights.safetensors",
    "bases.safetensors",
    "head.safetensors",
    "base-head.safetensors",
    "classes.json",
)
ANALYSIS_FILES = ("analysis.json", "units.csv", "components.csv", "similarity-*.csv", "selection.csv")
SWEEP_FILES = ("table.csv", "table.md", "table.png", "cache/*", "results/*")
PICTURES = ("*.png", "*.svg", "*.csv")
_KEPT = {"manifest.json": CACHE_FILES, "adapter.json": ADAPTER_FILES}  # the file that tells what a folder is
_IMAGES = ("--data", "--val", "--images")  # options that name folders of images
_DATA = re.compile(r".*\.(tar|cls)|classnames\.txt", re.IGNORECASE)  # files of data sets that are no images


class Output(NamedTuple):
    """A place to write to: the option that names it, and for a folder the names of what is written there."""

    option: str
    path: Path
    own: tuple[str, ...] | None = None  # None for a file

    @property
    def is_file(self) -> bool:
        return self.own is None

    def __str__(self) -> str:
        return f"{self.option} {self.path}"


def check(outputs: list[Output], inputs: Mapping[str, object], images: Collection[str] = _IMAGES) -> None:
    """Raises ValueError where two outputs, or an output and an input, have one place, however it is spelled.

    Args:
        outputs: what will be written.
        inputs: option -> what is read: a path, text that may be one, or a list of either.
        images: the options among them whose folders are folders of images.
    """
    for number, one in enumerate(outputs):
        for other in outputs[:number]:
            _check_pair(other, one)
            _check_pair(one, other)
    for option, source in _each(inputs):
        for output in outputs:
            _check_input(output, option, source, option in images)


def _check_pair(one: Output, other: Output) -> None:
    if _key(one.path) == _key(other.path):
        raise ValueError(f"{one} and {other} name the same place; give two different paths")
    inside = _inside(other.path, one.path)
    if inside is None:
        return
    if one.own is None:
        raise ValueError(f"{other} lies below {one}, which will be a file; name another place")
    if other.is_file and any(fnmatch(inside, name) for name in one.own):
        raise ValueError(f"{other} is a file that {one} writes itself; name another")


def _check_input(output: Output, option: str, source: Path, images: bool) -> None:
    if _key(output.path) == _key(source):
        raise ValueError(f"{output} is what {option} reads; name another place")
    if not source.exists():
        if output.is_file and output.path.exists() and _names_shard(source, output.path):
            raise ValueError(f"{output} is a shard that {option} reads; name another file")
        return
    inside = _inside(output.path, source)
    if inside is not None and source.is_dir():
        if output.is_file and output.path.exists() and _is_read(source, inside):
            raise ValueError(f"{output} is a file that {option} {source} reads; name another")
        if not output.is_file and images and not any((source / mark).is_file() for mark in _KEPT):
            raise ValueError(
                f"{output} lies in {option} {source} and would be read as images of it; name a folder "
                "elsewhere"
            )
    within = _inside(source, output.path)
    if within is not None and any(fnmatch(within, name) for name in output.own or ()):
        raise ValueError(f"{output} would replace {source}, which {option} reads; name another folder")


def _each(inputs: Mapping[str, object]) -> Iterator[tuple[str, Path]]:
    """The paths among the inputs; of one that goes on inside a zip, the zip."""
    for option, value in inputs.items():
        for one in value if isinstance(value, list | tuple) else [value]:
            if not isinstance(one, str | Path) or isinstance(one, Enum) or not os.fspath(one):
                continue
            named = os.fspath(one).removeprefix("hf:")
            if not named:
                continue
            path = Path(named)
            try:
                yield option, next((part for part in (path, *path.parents) if part.is_file()), path)
            except (OSError, ValueError):  # text that is no path
                continue


def _key(path: Path) -> object:
    """What tells places apart: the file itself where there is one, else where the name leads."""
    try:
        found = os.stat(path)
    except OSError:
        return os.path.normcase(os.path.realpath(path))
    return found.st_dev, found.st_ino


def _inside(path: Path, folder: Path) -> str | None:
    """The name of `path` relative to a folder that it lies in, else None."""
    place, above = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    return place.relative_to(above).as_posix() if above in place.parents else None


def _names_shard(pattern: Path, file: Path) -> bool:
    """Whether a pattern such as a-{000..012}.tar may name a file."""
    if "{" not in pattern.name:
        return False
    form = re.sub(r"\\\{.*?\\\}", "[^/]*", re.escape(pattern.name))
    return bool(re.fullmatch(form, file.name)) and _key(pattern.parent) == _key(file.parent)


def _is_read(folder: Path, name: str) -> bool:
    """Whether a file in a folder of images, of shards,
    of a cache or of an adapter is one that is read there."""
    for mark, own in _KEPT.items():
        if (folder / mark).is_file():
            return any(fnmatch(name, one) for one in own)
    if _DATA.fullmatch(name):
        return True
    # It brings Pillow, which --help does without.
    from residual_kernels.data.images.decode import (
        image_endings,
    )

    return os.path.splitext(name)[1].lower() in image_endings()


# --- of a command's options ---------------------------------------------------------------------------------


def options_of(
    signature: inspect.Signature, values: Mapping[str, Any]
) -> tuple[list[Output], dict[str, object]]:
    """(outputs, inputs) of a command: an option that `outputs` probes is written,
    every other path is read."""
    outputs, inputs = [], {}
    for name, parameter in signature.parameters.items():
        value = values.get(name)
        if value is None:
            continue
        info = next(iter(getattr(parameter.annotation, "__metadata__", ())), None)
        probe: Any = getattr(info, "callback", None)
        option = _name(name, info)
        if hasattr(probe, "own"):
            if os.fspath(value) != printing.STDOUT:
                outputs.append(Output(option, value, probe.own))
        elif isinstance(value, Path | list) or name in ("model", "pretrained", "class_names", "templates"):
            inputs[option] = value
    return outputs, inputs


def _name(name: str, info: Any) -> str:
    """What the command line calls a parameter."""
    if type(info).__name__ == "ArgumentInfo":
        return name.upper()
    # As Annotated holds them.
    declared = (
        getattr(info, "default", None),
        *(getattr(info, "param_decls", None) or ()),
    )
    own = (one for one in declared if isinstance(one, str) and one.startswith("--"))
    return next(own, f"--{name.replace('_', '-')}")
