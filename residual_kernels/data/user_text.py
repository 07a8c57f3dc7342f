"""Lines of a text file that a user wrote, whatever editor it came from."""

import codecs
import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from residual_kernels.schema import read_bytes

LONGEST = 2**26  # bytes of a text
LONGEST_LINE = 1000  # characters of a name or phrase; text towers read 77 tokens
SHOWN = 5  # names in a message

_MARKS = (  # longest first: UTF-32's mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def user_path(text: str | os.PathLike) -> Path:
    """A path with ``~`` and environment variables expanded; one that exists as it is written is taken so."""
    if not os.fspath(text):  # Path would make it the working folder
        raise ValueError("an empty path names nothing; write `.` for the working folder")
    check_path(os.fspath(text))
    path = Path(text)
    if "~" not in str(path) and "$" not in str(path):
        return path
    if path.exists():
        return path
    expanded = os.path.expanduser(os.path.expandvars(path))
    unknown = re.search(r"^~[^/]*|\$\{?\w+\}?", expanded)
    if unknown is not None:  # a typing error, not the name of a folder to make
        raise ValueError(f"{path} names {unknown[0]}, which is not set here; write the path out")
    return Path(expanded)


def check_path(text: str) -> None:
    """Raises ValueError for text that no file can be called."""
    try:
        held = os.fsencode(text)
    except UnicodeEncodeError as error:
        raise ValueError(f"{text!a} holds signs that no file name has") from error
    if b"\0" in held:
        raise ValueError(f"{text!a} holds a zero byte, which no file name has")


def some(names: Sequence[str]) -> str:
    """Names in a message: the first five, and how many more there are."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def normal(name: str) -> str:
    """A class's name in the one Unicode form that names are compared in.

    Systems write é as one sign or as two.
    """
    return unicodedata.normalize("NFC", name)


def decoded(data: bytes, name: str) -> str:
    """Text in UTF-8, or in UTF-16 or UTF-32 with a byte order mark; ValueError for other bytes."""
    encoding = next((found for mark, found in _MARKS if data.startswith(mark)), "utf-8")
    if encoding == "utf-8" and data[:64].count(0) * 4 >= len(data[:64]) > 0:
        # a mark is missing; a text holds no zeros, so they are bytes of signs that take two or four
        wide = "utf-32" if data[:2] == b"\0\0" or data[1:4] == b"\0\0\0" else "utf-16"
        encoding = f"{wide}-be" if data[:1] == b"\0" else f"{wide}-le"
    if encoding.startswith("utf-8") and b"\0" in data:
        line = data[: data.index(0)].count(b"\n") + 1
        raise ValueError(f"{name} is not UTF-8 text: it holds a zero byte in line {line}; save it as UTF-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{name} is not UTF-8 text: byte {data[error.start]:#04x} in line {line}; save it as UTF-8"
        ) from error


def read_text(source: str | os.PathLike, what: str) -> str:
    """The text of a file, whatever its encoding.

    Raises FileNotFoundError when there is no such file, ValueError when it is a folder, a device or no text.
    """
    path = user_path(source)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a text file of {what}, one per line")
    if not path.exists():
        raise FileNotFoundError(f"there is no file of {what} at {path}")
    return decoded(read_bytes(path, LONGEST), str(path))


def read_lines(source: str | os.PathLike, what: str) -> list[str]:
    """The lines of a file that are not blank, without spaces around them.

    Raises FileNotFoundError when there is no such file, ValueError when it holds no lines or no text.
    """
    text = read_text(source, what).replace("\r\n", "\n").replace("\r", "\n")
    path = user_path(source)
    lines = [line.strip(" \f\v") for line in text.split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"{path} is empty; it should hold one of the {what} per line")
    check_lengths(lines, str(path))
    return lines


def check_lengths(lines: Sequence[str], where: str) -> None:
    """Raises ValueError for a line longer than a name or phrase: a tokenizer would take hours over it."""
    for number, line in enumerate(lines, 1):
        if len(line) > LONGEST_LINE:
            raise ValueError(
                f"{where}: number {number} has {len(line):,} characters ({line[:20]}...); the most is "
                f"{LONGEST_LINE:,}"
            )
