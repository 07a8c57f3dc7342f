"""Can the outputs be written? Asked when the options are read, so that no work is done and then lost."""

import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from residual_kernels.cli import printing
from residual_kernels.data.user_text import user_path


def new_file(path: Path | None) -> Path | None:
    """The path of a file to write; ValueError or OSError when that cannot be done."""
    if path is None:
        return None
    path = user_path(path)
    mode = _mode(path)
    if mode is not None and stat.S_ISDIR(mode):
        raise IsADirectoryError(f"cannot write {path}: it is a folder; name a file")
    if mode is not None and not stat.S_ISREG(mode):
        raise ValueError(
            f"cannot write {path}: it is not a regular file; `--json -` writes to standard output"
        )
    _check_parent(path)
    return path


def new_folder(path: Path | None) -> Path | None:
    """The path of a folder to write into; OSError when that cannot be done."""
    if path is None:
        return None
    path = user_path(path)
    mode = _mode(path)
    if mode is not None and not stat.S_ISDIR(mode):
        raise FileExistsError(f"cannot write into {path}: it is a file; name a folder")
    _check_parent(path)
    return path


def folder_of(*own: str) -> Callable[[Path | None], Path | None]:
    """:func:`new_folder` for a folder in which the command itself writes files of these names (patterns)."""

    def probed(path: Path | None) -> Path | None:
        return new_folder(path)

    vars(probed)["own"] = own
    return probed


def json_file(path: Path | None) -> Path | None:
    """:func:`new_file`, or ``-`` for standard output."""
    if path is not None and os.fspath(path) == printing.STDOUT:
        printing.json_to_stdout()
        return path
    return new_file(path)


for _probe in (new_file, json_file):  # `apart` tells outputs from inputs by this mark; None: a file
    vars(_probe)["own"] = None


def _mode(path: Path) -> int | None:
    """What stands at a path; None where nothing does."""
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:  # a name too long, a folder that may not be searched
        raise type(error)(f"cannot write {path}: {error.strerror or error}") from error


def _check_parent(path: Path) -> None:
    """Whether the nearest folder that exists takes new entries."""
    above = path if path.is_dir() else path.parent
    while not above.exists():
        above = above.parent
    if not above.is_dir():
        raise NotADirectoryError(f"cannot write {path}: {above} is a file")
    if not os.access(above, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write {path}: {above} does not allow it")
    if path.is_file() and Path(os.path.abspath(path)).parts[1:2] in (("proc",), ("dev",)):
        return  # a link to what a process has open, as /dev/stdout is: it is written into
    try:  # /proc, /sys, a full disk and others allow it by their modes, and take no file
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        reason = f"no file can be made in {above} ({error.strerror or error})"
        raise type(error)(f"cannot write {path}: {reason}") from error
