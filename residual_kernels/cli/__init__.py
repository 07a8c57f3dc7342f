"""Make a CLIP-like model better at your own task.

`fit` does the whole job; the other commands are single steps.
"""

import functools
import importlib
import inspect
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from residual_kernels import __version__
from residual_kernels.cli import apart, printing
from residual_kernels.cli.given import GIVEN
from residual_kernels.data.user_text import user_path


class Entry(NamedTuple):
    """Where a command is defined, and its line in the list of commands."""

    module: str
    function: str
    help: str


COMMANDS = {
    "doctor": Entry("demo", "doctor", "Show versions, devices, backends and extras, and what is missing."),
    "demo": Entry("demo", "demo", "Run the whole method on real handwritten digits, offline."),
    "towers": Entry(
        "towers", "towers_command", "Describe an image tower, and check that its units sum to its output."
    ),
    "encode": Entry("encode", "encode_command", "Run the tower over images once and keep its units."),
    "bases": Entry("encode", "bases", "Fit the principal components of every unit on images."),
    "fit": Entry("fit", "fit_command", "Fit an adapter to labelled images."),
    "eval": Entry("use", "eval_command", "Measure accuracy on labelled images, with and without an adapter."),
    "predict": Entry("use", "predict", "Label new images, and write the labels to a CSV file."),
    "merge": Entry("merge", "merge_command", "Fold an adapter into a file that does not need this library."),
    "report": Entry("report", "report", "Write one HTML page about what an adapter learned."),
    "sweep": Entry("sweep", "sweep", "Fit every method on every data set with every tower."),
    "bench": Entry("bench", "bench", "Measure how fast the operator is on this machine."),
    "analyze": Entry(
        "analyze", "analyze_command", "Measure dimensions, similarity, scores and words of heads."
    ),
}


class _Loaded(MutableMapping):
    """Commands by name.

    A command's module is imported when it is first asked for, so that --help needs none.
    """

    def __init__(self):
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            entry = COMMANDS[name]
            module = importlib.import_module(f"residual_kernels.cli.{entry.module}")
            alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
            alone.command(name, cls=_Command)(_with_user_paths(getattr(module, entry.function)))
            self._made[name] = get_command(alone)
        return self._made[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._made[name] = command

    def __delitem__(self, name: str) -> None:
        raise TypeError("the commands are those of COMMANDS")

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class _Command(TyperCommand):
    """A command that takes no empty text (as a path it would mean the working folder) and notes what was
    given."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for before, one in zip(["", *args], args, strict=False):
            option = before if one == "" else one[:-1]
            if one == "" or re.fullmatch("--[a-z-]+=", one):
                raise ValueError(
                    f"{option if option.startswith('-') else 'an argument'} is empty; write a value after it"
                )
        rest = super().parse_args(ctx, args)
        sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
        GIVEN.set(
            frozenset(name for name, source in sources.items() if source and source.name == "COMMANDLINE")
        )
        return rest


def _with_user_paths(command: Callable) -> Callable:
    """A command whose paths are read as a shell reads them, and whose outputs each have a place of their own.

    ``~`` and variables are expanded.
    """
    signature = inspect.signature(command)

    @functools.wraps(command)
    def called(**values: Any) -> None:
        values = {name: _expanded(value) for name, value in values.items()}
        apart.check(*apart.options_of(signature, values))
        command(**values)

    vars(called)["__signature__"] = signature
    return called


def _expanded(value: Any) -> Any:
    if isinstance(value, list):
        return [_expanded(one) for one in value]
    return user_path(value) if isinstance(value, Path) else value


class _Group(TyperGroup):
    """The commands of the table above, loaded when they are called."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.commands = _Loaded()

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items()])


app = typer.Typer(
    cls=_Group,
    help=__doc__,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(asked: bool) -> None:
    if asked:
        print(f"residual-kernels {__version__}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    pass


program.__doc__ = __doc__


class _Stopped(BaseException):
    """SIGINT or SIGTERM has come."""


def _stop(number: int, main_process: int) -> None:
    if os.getpid() != main_process:  # a process that reads images
        os._exit(128 + number)
    for one in _SIGNALS:  # a second one ends the process at once
        signal.signal(one, signal.SIG_DFL)
    raise _Stopped(number)


# A process of several may wait for the others in a call that no handler interrupts: there SIGTERM ends it at
# once.
_SIGNALS = (signal.SIGINT,) if "WORLD_SIZE" in os.environ else (signal.SIGINT, signal.SIGTERM)


def _without_number(error: BaseException) -> str:
    """The text of an error; of one of the system what it is and of which file, without its number."""
    if isinstance(error, OSError) and error.strerror and str(error).startswith("[Errno"):
        return error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
    return str(error)


def main() -> None:
    """Entry point: bad input ends with exit code 2 and one clear line, a signal with 128 and its number."""
    process = os.getpid()
    for one in _SIGNALS:
        signal.signal(one, lambda number, frame: _stop(number, process))
    printing.prepare()
    try:
        app()
    except (ValueError, OSError, FloatingPointError, RuntimeError, ImportError) as error:
        text = _without_number(error)
        if (
            "Original Traceback" in text
        ):  # from a process that reads images: its last line says what went wrong
            text = text.strip().splitlines()[-1].partition(": ")[2]
        text = " ".join(text.split())
        printing.err.print(f"error: {text}", style="red", soft_wrap=True)
        sys.exit(2)
    except _Stopped as stopped:
        number = stopped.args[0]
        printing.err.print(
            f"stopped by {signal.Signals(number).name}; what was finished is kept", style="red"
        )
        sys.exit(128 + number)
    except SystemExit as end:
        if not end.code and printing.out.reader_gone:
            printing.err.print("error: the reader of the output has gone; the files are written", style="red")
            sys.exit(2)
        raise
