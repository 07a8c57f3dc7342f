"""What every Triton kernel takes from the chip, without a GPU: registers, spills, shared memory, occupancy.

    python -m benchmarks.resources                 a pairwise choice of configurations for every target
    python -m benchmarks.resources --every sm_90   every configuration the launchers can choose, one target
    python -m benchmarks.resources --write         both, into benchmarks/results/compile/resources.{json,md}

Registers and spills are ptxas' and LLVM's own figures; occupancy is counted from them, not measured.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import triton

from benchmarks.compile_targets import (
    SHARED_LIMIT,
    TARGETS,
    KernelCase,
    RecordedLaunch,
    Resources,
    all_cases,
    compile_launch,
    distinct_cases,
    edge_cases,
    launches_of,
    pairwise,
)

RESULTS = Path(__file__).parent / "results" / "compile"
# Bytes a thread on sm_90. The compiler of Triton 3.4 spills 24 in the folded backward (c64 d64 k32, tf32).
SPILL_LIMIT = 24 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 5) else 16


def launches(cases: list[KernelCase], target: str) -> list[RecordedLaunch]:
    """The distinct launches of these calls on a target, in order."""
    found = [launch for case in cases for launch in launches_of(case, target)]
    return list(dict.fromkeys(found))


def measure(cases: list[KernelCase], target: str, *, say: bool) -> list[Resources]:
    """Compiles every launch of these calls."""
    rows = []
    todo = launches(cases, target)
    for done, launch in enumerate(todo, 1):
        rows.append(compile_launch(launch, target))
        if say and sys.stderr.isatty():
            print(f"\r{target} {done}/{len(todo)}", end="", file=sys.stderr)
    if say and sys.stderr.isatty():
        print(file=sys.stderr)
    return rows


def complaints(row: Resources) -> list[str]:
    """What is wrong with a compiled kernel; spills count on sm_90 and are reported elsewhere."""
    found = []
    if row.shared > SHARED_LIMIT[row.target]:
        found.append(f"{row.shared} bytes of shared memory, {SHARED_LIMIT[row.target]} exist")
    if row.target == "sm_90" and row.spills > SPILL_LIMIT:
        found.append(f"spills {row.spills} bytes")
    wants_matrix_unit = row.kind in ("bf16", "fp16", "tf32")
    if wants_matrix_unit and row.instructions == ["fma"]:
        found.append("no tensor-core instruction")
    if row.kind == "fp32" and row.target != "gfx942" and row.instructions != ["fma"]:
        found.append(f"exact float32 uses {row.instructions}")
    if row.target == "gfx942" and wants_matrix_unit and "v_mfma" not in row.instructions:
        found.append("no mfma")
    if (
        row.target == "sm_90"
        and wants_matrix_unit
        and " n64" in row.kernel
        and "wgmma" not in row.instructions
    ):
        found.append("a tile of 64 rows without wgmma")
    return found


def table(rows: list[Resources]) -> str:
    """A Markdown table."""
    lines = [
        "| kernel | products | target | warps | stages | registers | spills | shared | instructions | "
        "occupancy |",
        "|---|---|---|---:|---:|---:|---:|---:|---|---:|",
    ]
    for r in rows:
        lines.append(
            f"| {r.kernel} | {r.kind} | {r.target} | {r.warps} | {r.stages} | {r.registers} | {r.spills} | "
            f"{r.shared} | {', '.join(r.instructions) or '-'} | {r.occupancy:.0%} |"
        )
    return "\n".join(lines)


def summary(rows: list[Resources]) -> str:
    """One line per target and kernel: how many configurations, worst spills, most shared memory,
    range of occupancy."""
    lines = [
        "| target | kernel | configurations | registers | spills | shared | occupancy | products by |",
        "|---|---|---:|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], list[Resources]] = {}
    for row in rows:
        groups.setdefault((row.target, row.kernel.split()[0]), []).append(row)
    for (target, kernel), group in groups.items():
        low, high = min(r.occupancy for r in group), max(r.occupancy for r in group)
        by = sorted({f"{r.kind}: {'+'.join(r.instructions)}" for r in group if r.instructions})
        lines.append(
            f"| {target} | {kernel} | {len(group)} | to {max(r.registers for r in group)} | to "
            f"{max(r.spills for r in group)} | to {max(r.shared for r in group)} | {low:.0%} to {high:.0%} "
            f"| {'; '.join(by) or '-'} |"
        )
    return "\n".join(lines)


def write(rows: list[Resources]) -> None:
    """All rows as JSON, and a page with one line per target and kernel."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    record = {
        "note": "compiled ahead of time, nothing measured",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "rows": [row.as_dict() for row in rows],
    }
    (RESULTS / "resources.json").write_text(json.dumps(record, indent=0) + "\n")
    text = [
        "# Resources of the Triton kernels",
        f"{len(rows)} configurations compiled ahead of time by triton {triton.__version__}, no GPU "
        "involved: nothing here is measured. sm_90 has every configuration the launchers can choose for "
        "head widths 64 to 112 (bf16 stands for fp16, one width for each way a width is split); the other "
        "targets have a pairwise choice. Registers are per thread, spills bytes per thread, shared memory "
        "bytes per program; occupancy is counted. Every configuration is in resources.json; `python -m "
        "benchmarks.resources --write` makes both files.",
        summary(rows),
    ]
    (RESULTS / "resources.md").write_text("\n\n".join(text) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--every", metavar="TARGET", choices=list(TARGETS), action="append", default=[])
    parser.add_argument(
        "--targets",
        default=",".join(TARGETS),
        help="targets of the pairwise choice, with commas; sm_80:1/2 is its second half",
    )
    parser.add_argument(
        "--edges", action="store_true", help="also sizes of one, several tasks, wide units, on sm_90"
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--write", action="store_true", help=f"everything, into {RESULTS}")
    options = parser.parse_args(arguments)
    every = options.every or (["sm_90"] if options.write else [])

    chosen = pairwise(all_cases())
    rows = []
    for word in options.targets.split(","):
        target, _, share = word.partition(":")
        if not target:
            continue
        first, parts = map(int, (share or "0/1").split("/"))
        if target not in every:
            rows += measure(chosen[first::parts], target, say=True)
    if options.edges:
        rows += measure(edge_cases(), "sm_90", say=True)
    for target in every:
        rows += measure(list(dict.fromkeys([*chosen, *distinct_cases()])), target, say=True)
    wrong = [(row, text) for row in rows for text in complaints(row)]

    if options.write:
        write(rows)
        print(summary(rows))
    else:
        print(table(rows))
    if options.json is not None:
        options.json.write_text(json.dumps([row.as_dict() | {"wrong": complaints(row)} for row in rows]))
    for row, text in wrong:
        print(f"{row.target} {row.kernel} {row.kind}: {text}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
