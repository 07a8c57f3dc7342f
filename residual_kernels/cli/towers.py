"""`towers MODEL`: what is this model's image tower, how does it pool, and do its units sum to its output?"""

from typing import Annotated, Any

import typer
from rich.table import Table

from residual_kernels.cli.options import Device, Json, Pretrained
from residual_kernels.cli.printing import out, write_numbers

DTYPES = ("float32", "bfloat16", "float16", "float64")


def towers_command(
    model: Annotated[
        str,
        typer.Argument(
            help="an open_clip model name, `bundled`, hf:NAME, timm:NAME (random weights), or "
            "py:MODULE:FUNCTION (a function of yours that returns a model or a tower)"
        ),
    ],
    pretrained: Pretrained = None,
    dtype: Annotated[str, typer.Option(help=f"dtype to run the tower in: {', '.join(DTYPES)}")] = "float32",
    device: Device = None,
    json_file: Json = None,
) -> None:
    """Describe a model's image tower, and compare its output with the sum of its units on one image."""
    import torch

    from residual_kernels.cli.inputs import device_of
    from residual_kernels.cli.tower_facts import inspect, tower_named

    if dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    tower = tower_named(model, pretrained).to(device_of(device), getattr(torch, dtype)).eval()
    found = inspect(tower)
    write_numbers(json_file, found)
    table = Table("what", "found", title=model)
    for name, value in found.items():
        table.add_row(_EXPLAINED.get(name, name), _shown(name, value))
    out.print(table)
    if not found["output apart"] < float("inf"):
        broken = [name for name, p in tower.named_parameters() if not p.isfinite().all()]
        where = (
            f"{broken[0]} holds NaN or Inf"
            if broken
            else f"no weight does, so {dtype} may be too narrow for it"
        )
        raise ValueError(f"{model} gives NaN or Inf on an image of noise: {where}")
    if found["parts at"]:
        raise ValueError(
            f"the units of {model} do not sum to its output: {found['parts at']}. Undo that change, or merge "
            "it into the weights"
        )
    out.print(f"The units sum to the output: {found['units apart']:.1e} apart, relative.")


_EXPLAINED = {
    "C": "C, numbers of a head",
    "D": "D, numbers of an embedding",
    "output apart": "output apart, relative",
    "units apart": "sum of units apart, relative",
}


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "nowhere"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.2f}" if name.startswith("seconds") else f"{value:.1e}"
    return f"{value:,}" if isinstance(value, int) else str(value)
