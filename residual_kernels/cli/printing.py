"""How commands speak: results on stdout, progress and errors on stderr, numbers as JSON for machines."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from residual_kernels.files import write_json

out = Console(markup=False)  # what is printed may hold brackets: class names, paths
err = Console(stderr=True, markup=False)


@contextmanager
def bar(title: str, total: int | None, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr; yields what to call with the number of images done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=quiet) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done: progress.advance(task, done)


def write_numbers(path: Path | None, numbers: dict) -> None:
    if path is not None:
        write_json(path, numbers)
