"""The command line: one program whose commands are the library's main steps, each usable on its own."""

import os
import signal
import sys

import typer

from residual_kernels.cli import analyze as analyzing
from residual_kernels.cli import bench as benching
from residual_kernels.cli import demo as story
from residual_kernels.cli import encode as encoding
from residual_kernels.cli import fit as fitting
from residual_kernels.cli import merge as merging
from residual_kernels.cli import report as reporting
from residual_kernels.cli import sweep as sweeping
from residual_kernels.cli import towers as looking
from residual_kernels.cli import use as using
from residual_kernels.cli.printing import err, out

app = typer.Typer(
    help=__doc__,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(story.doctor)
app.command()(story.demo)
app.command("towers")(looking.towers_command)
app.command("encode")(encoding.encode_command)
app.command()(encoding.bases)
app.command("fit")(fitting.fit_command)
app.command("eval")(using.eval_command)
app.command()(using.predict)
app.command("merge")(merging.merge_command)
app.command()(reporting.report)
app.command()(sweeping.sweep)
app.command()(benching.bench)
app.command("analyze")(analyzing.analyze_command)


class _Stopped(BaseException):
    """SIGINT or SIGTERM has come."""


def _stop(number: int, main_process: int) -> None:
    if os.getpid() != main_process:  # a process that reads images
        os._exit(128 + number)
    for one in _SIGNALS:  # a second one ends the process at once
        signal.signal(one, signal.SIG_DFL)
    raise _Stopped(number)


# A process of several may wait for the others in a call that no handler interrupts: there SIGTERM ends it at once.
_SIGNALS = (signal.SIGINT,) if "WORLD_SIZE" in os.environ else (signal.SIGINT, signal.SIGTERM)


def main() -> None:
    """Entry point: bad input ends with exit code 2 and one clear line, a signal with 128 and its number."""
    process = os.getpid()
    for one in _SIGNALS:
        signal.signal(one, lambda number, frame: _stop(number, process))
    try:
        app()
    except (ValueError, OSError, FloatingPointError, RuntimeError, ImportError) as error:
        text = str(error)
        if (
            "Original Traceback" in text
        ):  # from a process that reads images: its last line says what went wrong
            text = text.strip().splitlines()[-1].partition(": ")[2]
        text = " ".join(text.split())
        err.print(f"error: {text}", style="red", soft_wrap=True)
        sys.exit(2)
    except _Stopped as stopped:
        number = stopped.args[0]
        err.print(f"stopped by {signal.Signals(number).name}; what was finished is kept", style="red")
        sys.exit(128 + number)
    except SystemExit as end:
        if not end.code and out.reader_gone:
            err.print("error: the reader of the output has gone; the files are written", style="red")
            sys.exit(2)
        raise
