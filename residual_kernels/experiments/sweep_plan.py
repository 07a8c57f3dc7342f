"""What does a sweep run? The plan in a YAML file: towers, data sets, methods, and how images are read."""

import math
import os
import reprlib
import typing
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import Any

from residual_kernels import extras
from residual_kernels.adapters.methods import METHODS as BY_NAME
from residual_kernels.data.user_text import decoded, some
from residual_kernels.schema import NESTING, read_bytes, typed
from residual_kernels.units.cache.shards import STORED

METHODS = tuple(BY_NAME)
ORIENTATIONS, UNREADABLE = ("exif", "stored"), ("fail", "skip")


@dataclass(frozen=True)
class TowerSpec:
    """A model by name, as on the command line."""

    model: str
    pretrained: str | None = None

    @property
    def label(self) -> str:
        return self.model if self.pretrained is None else f"{self.model} ({self.pretrained})"


@dataclass(frozen=True)
class DataSpec:
    """A data set by its parts; without `val`, a fifth of the training images is held out.

    The columns are those of a Hugging Face data set, where more than one would do.
    """

    name: str
    train: str
    test: str
    val: str | None = None
    class_names: str | None = None
    templates: str | None = None
    image_column: str | None = None
    label_column: str | None = None

    @property
    def columns(self) -> dict[str, str]:
        """The columns that are given."""
        both = {"image_column": self.image_column, "label_column": self.label_column}
        return {name: column for name, column in both.items() if column is not None}

    @property
    def sources(self) -> tuple[str, ...]:
        """What its images are read from."""
        return tuple(source for source in (self.train, self.val, self.test) if source is not None)


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep runs.

    `bases` names images for the bases of every tower; without, each data set's training images.

    `rates` are learning rates tried for a method, in units of its default; the best on validation is kept.
    `orientation` (exif, stored) and `unreadable` (fail, skip) mean what they mean as options of the commands.
    """

    towers: tuple[TowerSpec, ...]
    data: tuple[DataSpec, ...]
    methods: tuple[str, ...]
    bases: str | None = None
    seeds: int = 1
    rates: tuple[float, ...] = (1.0,)
    epochs: int = 30
    energy: float = 0.90
    shots: int | None = None
    batch_size: int = 64
    dtype: str = "float32"
    orientation: str = "exif"
    unreadable: str = "fail"

    @classmethod
    def read(cls, path: str | os.PathLike) -> "SweepPlan":
        """The plan in a YAML file; a ValueError names what is wrong with it and what is allowed."""
        yaml = extras.need("yaml", "sweep", "reading a plan")
        try:
            text = decoded(read_bytes(Path(path), LONGEST_PLAN), str(path))
            _check_size(yaml, text, path)
            _check_keys(yaml, text, path)
            found = yaml.safe_load(text)
        except (yaml.YAMLError, RecursionError) as error:
            raise ValueError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from error
        if not isinstance(found, dict):
            raise ValueError(
                f"{path} must hold the keys towers, data and methods; docs/COMMANDS.md shows one"
            )
        _only_known(found, cls, str(path))
        towers = tuple(_made(TowerSpec, row, f"{path}: a tower") for row in _list(found, "towers", path))
        data = tuple(_made(DataSpec, row, f"{path}: a data set") for row in _list(found, "data", path))
        names = [spec.name for spec in data]
        if len(set(names)) < len(names):
            shown = [name if len(name) < SHOWN_NAME else f"{name[:SHOWN_NAME]}..." for name in names]
            raise ValueError(f"{path}: data sets must have different names; got {some(shown)}")
        methods = tuple(_list(found, "methods", path))
        unknown = [str(method) for method in methods if method not in METHODS]
        if unknown:
            raise ValueError(
                f"{path}: unknown method {reprlib.repr(unknown[0])}; choose from {', '.join(METHODS)}"
            )
        rest = {key: value for key, value in found.items() if key not in ("towers", "data", "methods")}
        for where, rows in (("", [rest]), ("a data set: ", found["data"])):
            empty = [key for row in rows for key, value in row.items() if value == ""]
            if empty:
                raise ValueError(
                    f"{path}: {where}{empty[0]} is empty; write a value after it, or leave it out"
                )
        return cls(towers, data, methods, **rest)._checked(path)

    def _checked(self, path: str | os.PathLike) -> "SweepPlan":
        for name in ("seeds", "epochs", "batch_size", "shots"):
            value = getattr(self, name)
            if not (type(value) is int and 0 < value < 2**31) and not (name == "shots" and value is None):
                raise ValueError(f"{path}: {name} must be a whole number above 0; got {reprlib.repr(value)}")
        rates = self.rates if isinstance(self.rates, list | tuple) else ()
        if not rates or not all(type(rate) in (int, float) and 0 < rate < math.inf for rate in rates):
            raise ValueError(f"{path}: rates must be numbers above 0; got {reprlib.repr(self.rates)}")
        if not (type(self.energy) in (int, float) and 0 < self.energy <= 1):
            raise ValueError(f"{path}: energy must lie in (0, 1]; got {reprlib.repr(self.energy)}")
        if not isinstance(self.bases, str | None):
            raise ValueError(f"{path}: bases must name images; got {reprlib.repr(self.bases)}")
        if self.dtype not in STORED:
            raise ValueError(
                f"{path}: dtype must be one of {', '.join(STORED)}; got {reprlib.repr(self.dtype)}"
            )
        for name, allowed in (("orientation", ORIENTATIONS), ("unreadable", UNREADABLE)):
            if getattr(self, name) not in allowed:
                value = reprlib.repr(getattr(self, name))
                raise ValueError(f"{path}: {name} must be {' or '.join(allowed)}; got {value}")
        return replace(self, rates=tuple(rates))

    def files(self) -> list[str]:
        """What the plan names to be read: images, and files of class names and templates."""
        named = [
            self.bases,
            *(one for data in self.data for one in (*data.sources, data.class_names, data.templates)),
        ]
        return [one for one in named if one is not None]


LONGEST_PLAN = 2**17  # bytes
SHOWN_NAME = 60  # characters in a message
MOST_ALIASES = 32  # a few more could stand for more than fits into memory


def _check_size(yaml: Any, text: str, path: str | os.PathLike) -> None:
    """Raises ValueError for what would take hours or all memory to read: aliases of aliases,
    lists in lists."""
    aliases = depth = 0
    for event in yaml.parse(text):
        aliases += isinstance(event, yaml.AliasEvent)
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if aliases > MOST_ALIASES:
            raise ValueError(f"{path} refers more than {MOST_ALIASES} times to parts of itself (*name)")
        if depth > NESTING:
            raise ValueError(f"{path} has more than {NESTING} lists and mappings in one another")


def _check_keys(yaml: Any, text: str, path: str | os.PathLike) -> None:
    """Raises ValueError for a key that a mapping has twice, of which YAML would take the last."""
    nodes, seen = [yaml.compose(text, Loader=yaml.SafeLoader)], set()
    while nodes:
        node = nodes.pop()
        if node is None or id(node) in seen:  # an alias is the node that it refers to
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        if isinstance(node, yaml.MappingNode):
            lines: dict[tuple[str, str], int] = {}
            for key, value in node.value:
                nodes += [key, value]
                if not isinstance(key, yaml.ScalarNode):
                    continue
                name, line = (key.tag, key.value), key.start_mark.line + 1
                if name in lines:
                    raise ValueError(
                        f"{path} has the key {reprlib.repr(key.value)} twice, in lines {lines[name]} and "
                        f"{line}; leave one out"
                    )
                lines[name] = line


def _list(found: dict, key: str, path: str | os.PathLike) -> list:
    value = found.get(key)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{path} must hold a list of {key}; got {reprlib.repr(value)}")
    return value


def _only_known(found: dict, made: Any, where: str) -> None:
    known = made.__dataclass_fields__
    unknown = [str(key) for key in found if key not in known]
    if unknown:
        raise ValueError(
            f"{where} has an unknown key {reprlib.repr(unknown[0])}; known are {', '.join(known)}"
        )


def _made(made: Any, row: Any, where: str) -> Any:
    if not isinstance(row, dict):
        raise ValueError(f"{where} must be a mapping; got {reprlib.repr(row)}")
    _only_known(row, made, where)
    needed = [name for name, one in made.__dataclass_fields__.items() if one.default is MISSING]
    lacking = [name for name in needed if name not in row]
    if lacking:
        raise ValueError(f"{where} lacks a key: {', '.join(map(repr, lacking))}")
    forms = typing.get_type_hints(made)
    return made(**{name: typed(value, forms[name], where, name) for name, value in row.items()})
