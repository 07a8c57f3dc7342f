"""What sweep --check and --plan print: what is known of every name, hours and bytes."""

from pathlib import Path

import torch
from rich.table import Table

from residual_kernels.cli.printing import out, write_numbers
from residual_kernels.experiments.foresee import TOWER_SHARE, UNKNOWN, check, estimate, speed
from residual_kernels.experiments.sweep_plan import SweepPlan


def foresee(path: Path, names: bool, costs: bool, device: torch.device, json_file: Path | None) -> None:
    """Looks names up, estimates costs, or both. Raises ValueError where a name is unknown."""
    plan = SweepPlan.read(path)
    told: dict[str, list[dict]] = {}
    if names:
        told["names"] = _names(plan)
    if costs:
        told["costs"] = _costs(plan, device)
    write_numbers(json_file, told)
    wrong = [one for one in told.get("names", ()) if one["verdict"] == UNKNOWN]
    if wrong:
        raise ValueError(f"{path}: {len(wrong)} names are unknown, the first is {wrong[0]['name']}")


def _names(plan: SweepPlan) -> list[dict]:
    names = check(plan)
    table = Table("what", "name", "verdict", "why")
    for one in names:
        table.add_row(one.what, one.name, one.verdict, one.why)
    out.print(table)
    return [vars(one) for one in names]


def _costs(plan: SweepPlan, device: torch.device) -> list[dict]:
    """A row for each tower, and the sum."""
    rate = speed(device)
    costs = estimate(plan, rate)
    table = Table("tower", "data sets", "images", "hours", "GB of caches", "not estimated")
    for tower in dict.fromkeys(one.tower for one in costs):
        own = [one for one in costs if one.tower == tower]
        known = [one for one in own if one.hours is not None]
        table.add_row(
            tower,
            f"{len(known)} of {len(own)}",
            f"{sum(one.images or 0 for one in known):,}",
            f"{sum(one.hours or 0 for one in known):.1f}",
            f"{sum(one.bytes or 0 for one in known) / 1e9:.0f}",
            ", ".join(one.data for one in own if one.hours is None),
        )
    out.print(table)
    for why in dict.fromkeys(one.why for one in costs if one.why):
        out.print(f"not known here: {why}", soft_wrap=True)
    hours, size = sum(one.hours or 0 for one in costs), sum(one.bytes or 0 for one in costs)
    out.print(
        f"about {hours:,.1f} hours and {size / 1e9:,.0f} GB of caches, at {rate / 1e9:,.0f} GFLOP/s of "
        f"float32 products on {device}, of which a tower reaches about {TOWER_SHARE:.0%}; reading images "
        "is not counted",
        soft_wrap=True,
    )
    return [vars(one) for one in costs]
