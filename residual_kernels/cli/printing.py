"""How commands speak: results on stdout, progress and errors on stderr, numbers as JSON for machines."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.status import Status
from rich.text import Text

from residual_kernels.files import write_json
from residual_kernels.visible import visible


class _Plain(Console):
    """A console that escapes what would steer the terminal, and goes on when its reader has gone.

    What is printed may hold brackets, and names that somebody else chose: of classes, of files.
    """

    reader_gone = False

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)

    def status(self, status: str, **options: Any) -> Status:
        return _Status(Text(visible(status)), console=self, **options)

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


@contextmanager
def bar(title: str, total: int | None, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr; yields what to call with the number of images done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=quiet) as progress:
        task = progress.add_task(escape(visible(title)), total=total)
        yield lambda done: progress.advance(task, done)


def write_numbers(path: Path | None, numbers: dict) -> None:
    if path is not None:
        write_json(path, numbers)
