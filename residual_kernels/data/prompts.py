"""What is a class called? Names of classes and the prompts they stand in."""

import functools
import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path

from residual_kernels.data.models import BUNDLED
from residual_kernels.data.user_text import check_lengths, normal, read_lines, some

DEFAULT_TEMPLATES = ("a photo of a {}.",)
BUNDLED_TEMPLATES = ("a {}",)  # what the bundled model's captions say of anything, drawn or photographed
TABLE = "clip_benchmark:"  # clip_benchmark:eurosat names that data set's classes and templates
_NAMES, _TEMPLATES = "en_classnames.json", "en_zeroshot_classification_templates.json"


def class_names(source: str | None, folders: tuple[str, ...]) -> tuple[str, ...]:
    """Names for class folders: the folder names, or those of `source`, in the folders' sorted order.

    `source` is a file with one name a line in the folders' order (number order where all are numbers), a file
    of lines ``folder<TAB>name`` in any order, or ``clip_benchmark:eurosat``.
    """
    if source is None:
        check_lengths(folders, "the classes")
        return tuple(name.replace("_", " ") for name in folders)
    if source.startswith(TABLE):
        names = _from_table(source, _NAMES)
    else:
        lines = read_lines(source, "class names")
        if any("\t" in line.strip() for line in lines):
            return _by_folder(source, lines, folders)
        names = tuple(line.strip() for line in lines)
    if len(names) != len(folders):
        raise ValueError(
            f"{source} has {len(names)} class names, but there are {len(folders)} class folders; lines of "
            "folder<TAB>name say which is which"
        )
    return names


def _by_folder(source: str, lines: list[str], folders: tuple[str, ...]) -> tuple[str, ...]:
    named: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        folder, _, name = (part.strip() for part in line.partition("\t"))
        if not (folder and name):
            raise ValueError(f"{source}: line {number} is {line.strip()!r}, where others are folder<TAB>name")
        if named.setdefault(normal(folder), name) != name:
            raise ValueError(f"{source} names the folder {folder} twice: {named[normal(folder)]} and {name}")
    lacking = [folder for folder in folders if normal(folder) not in named]
    if lacking:
        raise ValueError(
            f"{source} has no name for {some(lacking)} ({len(lacking)} of {len(folders)} classes)"
        )
    return tuple(named[normal(folder)] for folder in folders)


def are_numbers(names: Iterable[str]) -> bool:
    """Whether classes are called by numbers only, which say nothing to a text tower."""
    return all(name.isdecimal() for name in names)


def templates(source: str | None, model: str) -> tuple:
    """Prompt templates: a file with one a line, open_clip's own
    (``openai``, ``simple``) or ``clip_benchmark:dtd``.

    Without a source, what suits the model of that name.
    """
    import open_clip

    named = {
        "openai": open_clip.OPENAI_IMAGENET_TEMPLATES,
        "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES,
    }
    if source is None:
        return BUNDLED_TEMPLATES if model == BUNDLED else DEFAULT_TEMPLATES
    if source.startswith(TABLE):
        return tuple(text.replace("{c}", "{}") for text in _from_table(source, _TEMPLATES))
    return (
        tuple(named[source])
        if source in named
        else tuple(line.strip() for line in read_lines(source, "templates"))
    )


def for_head(source: str | None, model: str, prototypes: bool) -> tuple | None:
    """:func:`templates`, or None for class vectors of images, which no template changes."""
    if not prototypes:
        return templates(source, model)
    if source is not None:
        raise ValueError(
            "--templates is for class vectors of text, and --prototypes makes them of images; leave one out"
        )
    return None


def table_of_names(data_set: str) -> tuple[str, ...] | None:
    """clip_benchmark's class names of a data set; None when it, or the table, is not here."""
    tables = _table(_NAMES)
    found = None if tables is None else tables.get(data_set)
    return None if found is None else tuple(found)


def _from_table(source: str, file: str) -> tuple[str, ...]:
    tables = _table(file)
    if tables is None:
        raise ImportError(
            f"{source} is a table of the library clip_benchmark; install it with pip install "
            "'residual-kernels[data]'"
        )
    name = source.removeprefix(TABLE)
    if name not in tables:
        raise ValueError(f"clip_benchmark has no such table as {source}; it has {', '.join(sorted(tables))}")
    return tuple(tables[name])


@functools.cache
def _table(file: str) -> dict | None:
    # Read as data: importing clip_benchmark's modules would ask for every library it can use.
    spec = importlib.util.find_spec("clip_benchmark")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / "datasets" / file
    return json.loads(path.read_text(encoding="utf-8"))
