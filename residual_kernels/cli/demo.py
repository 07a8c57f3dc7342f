"""doctor and demo: what is here, and what it is for."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from residual_kernels.cli.apart import PICTURES
from residual_kernels.cli.options import Json
from residual_kernels.cli.outputs import folder_of
from residual_kernels.cli.printing import out, status, write_numbers


def doctor(json_file: Json = None) -> None:
    """Show versions, devices, backends and extras, and how to get what is missing."""
    from residual_kernels.cli.doctor import facts

    found = facts()
    write_numbers(json_file, found)
    table = Table("package", "version", title="Versions")
    for name, version in found["versions"].items():
        table.add_row(name, version)
    out.print(table)
    table = Table("device", "backend", "state", title="Backends (`auto` takes the first that is ready)")
    for device in found["devices"]:
        for name, state in device["backends"].items():
            table.add_row(f"{device['device']} ({device['detail']})", name, state)
    out.print(table)
    table = Table("extra", "what for", "state", title="Extras")
    for name, extra in found["extras"].items():
        table.add_row(name, extra["for"], extra["state"])
    out.print(table)


def demo(
    folder: Annotated[
        Path, typer.Option("--out", callback=folder_of(*PICTURES), help="folder for the pictures")
    ] = Path("demo"),
    json_file: Json = None,
) -> None:
    """Run the whole method offline: a small CLIP misreads handwritten digits, then learns to read them."""
    from residual_kernels.demo import story

    with status("starting") as say:
        result = story.run(folder, say=say)
    write_numbers(
        json_file,
        {"rows": result.rows, "seconds": result.seconds, "pictures": [str(p) for p in result.pictures]},
    )
    table = Table(
        "method",
        "accuracy",
        "parameters",
        "seconds",
        title=f"Handwritten digits, {result.test_images} test images",
    )
    for row in result.rows:
        table.add_row(
            row["method"], f"{row['accuracy']:.3f}", f"{row['parameters']:,}", f"{row['seconds']:.1f}"
        )
    out.print(table)
    out.print(result.summary)
    for path in result.pictures:
        out.print(f"  {path}")
