"""The command line: one program whose commands are the library's main steps, each usable on its own."""

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
from residual_kernels.cli import use as using
from residual_kernels.cli.printing import err

app = typer.Typer(
    help=__doc__,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(story.doctor)
app.command()(story.demo)
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


def main() -> None:
    """Entry point: bad input ends with exit code 2 and one clear line."""
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
