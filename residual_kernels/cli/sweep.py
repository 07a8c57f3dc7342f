"""sweep: every method on every data set and tower of a plan, as one table."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markdown import Markdown

from residual_kernels.cli import apart
from residual_kernels.cli.image_options import reads_images
from residual_kernels.cli.options import Device, Json, OnUnreadable, Orientation
from residual_kernels.cli.outputs import folder_of
from residual_kernels.cli.printing import STDOUT, err, out, status, write_numbers

if TYPE_CHECKING:
    from residual_kernels.cli.inputs import Reader
    from residual_kernels.data.images import Images
    from residual_kernels.experiments.sweep_plan import SweepPlan


@reads_images
def sweep(
    plan: Annotated[
        Path, typer.Argument(help="YAML file with towers, data and methods; docs/COMMANDS.md shows one")
    ],
    reader: "Reader",
    out_folder: Annotated[
        Path | None,
        typer.Option(
            "--out",
            callback=folder_of(*apart.SWEEP_FILES),
            help="folder for caches, results and the table; a stopped sweep resumes there. No default; "
            "only --check and --plan work without it",
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="only look up every name in the plan, without a network")
    ] = False,
    costs: Annotated[
        bool, typer.Option("--plan", help="only estimate hours and bytes, on this machine and device")
    ] = False,
    encode_batch: Annotated[
        int | None,
        typer.Option(
            min=1, help="images that go through the tower together; the plan's batch_size by default"
        ),
    ] = None,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """Fit every method on every data set with every tower, and write the accuracies as one table.

    Options that say how images are read apply to all data sets, and override the plan.
    """
    from residual_kernels.cli.inputs import device_of
    from residual_kernels.data.images.account import Account
    from residual_kernels.data.user_text import user_path
    from residual_kernels.experiments.sweep import Sweep, SweepTable
    from residual_kernels.experiments.sweep_plan import SweepPlan

    if check or costs:
        from residual_kernels.cli.foresee import foresee

        foresee(plan, check, costs, device_of(device), json_file)
        return
    if out_folder is None:
        raise ValueError("say where results go: --out FOLDER (or --check or --plan, which start nothing)")
    chosen = _with_options(SweepPlan.read(plan), reader)
    outputs = [apart.Output("--out", out_folder, apart.SWEEP_FILES)]
    if json_file is not None and os.fspath(json_file) != STDOUT:
        outputs.append(apart.Output("--json", json_file))
    planned = f"the plan {plan}"
    apart.check(outputs, {planned: [user_path(name) for name in chosen.files()]}, images=(planned,))

    def opened(source: str, preprocess: Callable, labelled: bool, **columns: str) -> "Images":
        reader.image_column, reader.label_column = columns.get("image_column"), columns.get("label_column")
        return reader.images(Path(source), preprocess, labelled)

    with status("starting") as say:
        work = Sweep(
            chosen,
            out_folder,
            say=say,
            workers=reader.workers,
            device=device_of(device),
            opened=opened,
            encode_batch=encode_batch,
        )
        rows = work.run()
    table = SweepTable.of(rows)
    paths = table.write(out_folder)
    for note in work.notes:
        err.print(note, soft_wrap=True)
    accounts = list(work.accounts.values())
    unreadable = [name for one in accounts for name in one["left_out"]]
    write_numbers(json_file, {"rows": rows, "unreadable": unreadable, "reading": accounts})
    for one in accounts:
        out.print(Account.of(one).summary(), soft_wrap=True)
    out.print(Markdown(table.markdown()))
    for path in paths:
        out.print(f"  {path}")


def _with_options(plan: "SweepPlan", reader: "Reader") -> "SweepPlan":
    """The plan with the reading options that were given; the reader then does as the plan says."""
    given = {
        name: getattr(reader, name).value for name in ("orientation", "unreadable") if name in reader.asked
    }
    columns = {
        name: getattr(reader, name) for name in ("image_column", "label_column") if name in reader.asked
    }
    named = tuple(replace(one, **columns) if one.train.startswith("hf:") else one for one in plan.data)
    plan = replace(plan, data=named, **given)
    reader.orientation, reader.unreadable = Orientation(plan.orientation), OnUnreadable(plan.unreadable)
    return plan
