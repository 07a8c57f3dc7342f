"""How commands speak: results on stdout, progress and errors on stderr, numbers as JSON for machines."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.status import Status
from rich.text import Text

from residual_kernels.visible import visible

PERIOD = 30.0  # seconds between two lines of progress where there is no terminal
STDOUT = "-"  # as the file of --json


class _Plain(Console):
    """A console that escapes what would steer the terminal, and goes on when its reader has gone.

    What is printed may hold brackets, and names that somebody else chose: of classes, of files.
    """

    reader_gone = False

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)

    def status(self, status: RenderableType, **options: Any) -> Status:
        return _Status(Text(visible(str(status))), console=self, **options)

    def on_broken_pipe(self) -> None:
        self.reader_gone = True
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), (sys.stderr if self.stderr else sys.stdout).fileno())


class _Status(Status):
    """A line that turns while work goes on; its text may hold brackets and names that somebody else chose."""

    def update(self, status: Any = None, **options: Any) -> None:
        super().update(Text(visible(status)) if isinstance(status, str) else status, **options)


out = _Plain(markup=False)
err = _Plain(stderr=True, markup=False)


def prepare() -> None:
    """Before a command: text that the terminal's encoding does not hold is escaped, never an error."""
    out.stderr = False
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def json_to_stdout() -> None:
    """Standard output is for the JSON alone; what is printed for people goes to standard error."""
    out.stderr = True


class _Lines:
    """Progress as a line of text now and then, for logs."""

    def __init__(self, title: str, total: int | None):
        self.title, self.total, self.done = title, total, 0
        self.last, self.at = 0, time.monotonic()

    def __call__(self, done: int) -> None:
        self.done += done
        now = time.monotonic()
        if now - self.at < PERIOD:
            return
        rate = (self.done - self.last) / (now - self.at)
        text = f"{self.title}: {self.done:,}"
        if self.total:
            text += f" of {self.total:,} ({self.done / self.total:.0%})"
        text += f", {rate:.1f} a second"
        if self.total and rate > 0:
            text += f", about {_duration(max(0, self.total - self.done) / rate)} left"
        err.print(text, soft_wrap=True)
        self.last, self.at = self.done, now


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextmanager
def bar(title: str, total: int | None, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """Progress on stderr; yields what to call with the number of images done.

    A bar on a terminal; elsewhere a line every 30 seconds.
    """
    if not err.is_terminal:
        yield (lambda done: None) if quiet else _Lines(title, total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=quiet) as progress:
        task = progress.add_task(escape(visible(title)), total=total)
        yield lambda done: progress.advance(task, done)


@contextmanager
def status(text: str) -> Iterator[Callable[[str], None]]:
    """What is being done, on stderr; yields what to call with a new text.

    Off a terminal at most every 30 seconds.
    """
    if err.is_terminal:
        with err.status(text) as shown:
            yield shown.update
        return
    at = time.monotonic()

    def say(text: str) -> None:
        nonlocal at
        if time.monotonic() - at >= PERIOD:
            err.print(text, soft_wrap=True)
            at = time.monotonic()

    yield say


def write_numbers(path: Path | None, numbers: dict) -> None:
    """Writes the numbers of a command as JSON to a file, or to standard output for ``-``."""
    if path is None:
        return
    from residual_kernels.files import json_bytes, write_json  # they bring torch, which --help does without

    if os.fspath(path) == STDOUT:
        sys.stdout.write(json_bytes(numbers).decode())
    else:
        write_json(path, numbers)
