"""Budgets of the kernels: instructions of the compiled code that a change may not exceed. No GPU.

    python -m benchmarks.budget            compares with results/compile/budget.json; 1 when a kernel is worse
    python -m benchmarks.budget --write    takes what the kernels need now as the budget

Each case is a call at a real shape in bf16; its figure is the issue floor on sm_90 (benchmarks/floors.py),
for the call and for each kernel in it. Compilers differ: a budget holds for the Triton version it was written
with, and others are reported only.
"""

import argparse
import json
import sys
from pathlib import Path

import triton

from benchmarks import floors
from residual_kernels.experiments.shapes import SHAPES

FILE = Path(__file__).parent / "results" / "compile" / "budget.json"
SLACK = 1.03  # of a floor
STREAM = {shape.name: shape for shape in floors.STREAM}
CASES = (
    ("L/14", "ragged", 64, "step"),
    ("L/14", "ragged", 1024, "step"),
    ("L/14", "full", 1024, "fwd"),
    ("H/14", "ragged", 1024, "step"),
    ("stream L", "64", 65536, "step with dz"),
    ("L/14", "full", 8192, "step"),
    ("L/14", "-", 4096, "moments"),
    ("L/14", "ragged", 64, "sum"),
    ("L/14", "ragged", 64, "fit fp32"),
    ("L/14", "ragged", 64, "fit tf32"),
)


def measure() -> dict[str, dict]:
    """By case: launches, the floor in microseconds, and the floors of its kernels."""
    found = {}
    for name, kind, rows, mode in CASES:
        if mode == "sum":
            cost = floors.sum_cost(SHAPES[name], kind, rows, "sm_90")
        elif mode.startswith("fit"):
            switch = "highest" if mode.endswith("fp32") else "high"
            cost = floors.fit_cost(SHAPES[name], kind, rows, switch, "sm_90")
        elif mode == "moments":
            cost = floors.moments_cost(SHAPES[name], rows, "sm_90")
        else:
            cost = floors.pooled(SHAPES.get(name) or STREAM[name], kind, rows, mode, "sm_90")
        kernels = {
            word: round(value, 2) for word, value in floors.share_of(cost.kernels).items() if word != "torch"
        }
        found[f"{name} {kind} {rows} {mode}"] = {
            "launches": cost.launches,
            "floor_us": round(1e6 * cost.floor, 2),
            "kernels": kernels,
        }
    return found


def worse(found: dict[str, dict], budget: dict[str, dict]) -> list[str]:
    """What exceeds its budget, one sentence each."""
    said = []
    for case, allowed in budget.items():
        got = found.get(case)
        if got is None:
            said.append(f"{case}: not measured, but it has a budget")
            continue
        if got["launches"] > allowed["launches"]:
            said.append(f"{case}: {got['launches']} launches, {allowed['launches']} are allowed")
        if got["floor_us"] > SLACK * allowed["floor_us"]:
            said.append(f"{case}: a floor of {got['floor_us']} us, {allowed['floor_us']} are allowed")
        for kernel, most in allowed["kernels"].items():
            value = got["kernels"].get(kernel, 0.0)
            if value > SLACK * most:
                said.append(f"{case}: {kernel} has a floor of {value} us, {most} are allowed")
    return said


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help=f"replace {FILE.name}")
    options = parser.parse_args()
    found = measure()
    if options.write:
        record = {
            "note": "floors counted from compiled code, not times",
            "triton": triton.__version__,
            "cases": found,
        }
        FILE.write_text(json.dumps(record, indent=1) + "\n")
        return 0
    held = json.loads(FILE.read_text())
    said = worse(found, held["cases"])
    for line in said:
        print(line, file=sys.stderr)
    if said and held["triton"].split(".")[:2] != triton.__version__.split(".")[:2]:
        print(f"the budget is of triton {held['triton']}, this is {triton.__version__}: reported only")
        return 0
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
