"""What may a JSON file hold?

One reader for all: bounded, typed, and every fault one ValueError that says where.

The form of a file is a type: dataclasses and TypedDicts of int, float, str, bool, None, list[...], tuple[...,
...], dict[str, ...], unions, Literal, :data:`Count` and :data:`Measured`. A float is finite.
"""

import contextlib
import dataclasses
import functools
import json
import sys
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, Union

NESTING = 32  # of lists and objects: ours have 6
SIZE = 2**30  # bytes of a file
Count = Annotated[int, "a whole number from 0 on"]
Measured = Annotated[float, "a number, infinite or NaN too"]
Plain = str | int | float | bool | None


def parse(data: bytes | str, where: str) -> Any:
    """The value of a JSON text; a ValueError begins with `where`."""
    try:
        value = json.loads(data, object_pairs_hook=_named_once)
    except RecursionError:
        raise ValueError(f"{where}: more than {NESTING} lists and objects in one another") from None
    except ValueError as error:  # also no UTF-8, a number of thousands of digits
        raise ValueError(f"{where}: {error}") from error
    _bounded(value, where, NESTING)
    return value


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; of two values with one name a reader would take the first, another the last."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"it names {name[:60]!r} twice")
        found[name] = value
    return found


def read(path: Path, where: str) -> Any:
    """The value of a JSON file."""
    return parse(read_bytes(path, SIZE), where)


def read_bytes(path: Path, limit: int) -> bytes:
    """The bytes of a regular file; a ValueError when it is a device or a pipe, or has more than `limit`."""
    if not path.is_file():
        if path.is_dir():
            raise FileNotFoundError(f"{path} is a folder, not a file")
        if path.exists():
            raise ValueError(f"{path} is a device or a pipe, not a file")
        raise FileNotFoundError(f"there is no file {path}")
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{path} has more than {limit:,} bytes")
    return data


def read_lines(path: Path, what: str) -> list[str]:
    """The lines of a UTF-8 text file, without blank ones."""
    try:
        text = read_bytes(path, SIZE >> 4).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a UTF-8 text file of {what}: {error}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _bounded(value: Any, where: str, depth: int) -> None:
    if depth < 0:
        raise ValueError(f"{where}: more than {NESTING} lists and objects in one another")
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for one in inner:
        if isinstance(one, dict | list):
            _bounded(one, where, depth - 1)


def typed(value: Any, form: Any, where: str, at: str = "") -> Any:
    """The value as its form says: tuples where it says tuple, dataclasses made.

    A ValueError names what is wrong.

    A dataclass or TypedDict may have more keys than its form, from a newer version: a dataclass drops them. A
    null where a dataclass has a float is NaN.
    """
    origin, inner = typing.get_origin(form), typing.get_args(form)
    if form is Any:
        return value
    if origin in (Union, types.UnionType):
        forms = [one for one in inner if value is None or one is not type(None)]
        if len(forms) == 1:  # its fault says more
            return typed(value, forms[0], where, at)
        for one in forms:
            with contextlib.suppress(ValueError):
                return typed(value, one, where, at)
        raise _fault(value, form, where, at)
    if origin is Literal and isinstance(value, Plain) and value in inner:
        return value
    if origin in (list, tuple) and isinstance(value, list):
        return origin(typed(one, inner[0], where, f"{at}[{place}]") for place, one in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: typed(one, inner[1], where, _inside(at, key)) for key, one in value.items()}
    if isinstance(form, type) and dataclasses.is_dataclass(form) and isinstance(value, dict):
        hints = _hints(form)
        return form(**{key: _field(value, key, hint, where, at) for key, hint in hints.items()})
    if typing.is_typeddict(form) and isinstance(value, dict):
        hints = _hints(form)
        needed = {key: hint for key, hint in hints.items() if key in form.__required_keys__ or key in value}
        return value | {key: _entry(value, key, hint, where, at) for key, hint in needed.items()}
    if form == Count and type(value) is int and 0 <= value < 2**63:
        return value
    if form == Measured and type(value) in (int, float):
        return value
    if form is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:  # false for NaN
        return value
    if form in (int, str, bool) and type(value) is form and not (form is int and abs(value) >= 2**63):
        return value
    if form in (None, type(None)) and value is None:
        return value
    raise _fault(value, form, where, at)


@functools.cache
def _hints(form: type) -> dict[str, Any]:
    return typing.get_type_hints(form, include_extras=True)


def _entry(value: dict, key: str, hint: Any, where: str, at: str) -> Any:
    if key not in value:
        raise ValueError(f"{where} lacks {_inside(at, key)}; make it again")
    return typed(value[key], hint, where, _inside(at, key))


def _field(value: dict, key: str, hint: Any, where: str, at: str) -> Any:
    return (
        float("nan") if hint is float and value.get(key, 0) is None else _entry(value, key, hint, where, at)
    )


def _inside(at: str, key: str) -> str:
    name = repr(key[:60])[1:-1]  # one line, and nothing in it steers a terminal
    return f"{at}.{name}" if at else name


def _fault(value: Any, form: Any, where: str, at: str) -> ValueError:
    names: dict[type, str] = {list: "list", dict: "mapping"}
    seen = repr(value) if isinstance(value, Plain) else f"a {names.get(type(value), type(value).__name__)}"
    return ValueError(f"{where}: {at or 'the whole'} must be {_said(form)}, not {seen[:60]}; make it again")


def _said(form: Any) -> str:
    """A form in words."""
    names = {
        int: "a whole number",
        float: "a finite number",
        str: "a text",
        bool: "true or false",
        type(None): "null",
    }
    origin, inner = typing.get_origin(form), typing.get_args(form)
    if form in (Count, Measured):
        return typing.get_args(form)[1]
    if origin in (Union, types.UnionType):
        return " or ".join(map(_said, inner))
    if origin is Literal:
        return " or ".join(map(repr, inner))
    return names.get(form, "a list" if origin in (list, tuple) else "a mapping")
