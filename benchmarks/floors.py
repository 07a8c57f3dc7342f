"""Issue floors of the Triton kernels: what the compiled code of a call costs before any clock is asked.

No GPU.

    python -m benchmarks.floors                       every shape and N, printed
    python -m benchmarks.floors --json FILE           the same rows as JSON
    python -m benchmarks.floors --write               into benchmarks/results/compile/floors.{json,md}

A launch cannot be faster than its warp instructions divided by what the chip's schedulers issue: one
instruction per scheduler and clock. That time is its *issue floor*. It is counted from the disassembled
kernel, with the trip count of every loop, so it is exact for straight code and too high where a branch is not
taken. The *estimate* of a launch is the largest of issue floor, bytes over bandwidth (each tensor once),
16-byte tile accesses over the bandwidth of the second-level cache, and operations over the matrix rate;
launches are added. Neither is a measured time.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from pathlib import Path

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.compile_targets import RecordedLaunch, fit_step_of, recorded
from benchmarks.counts import BANDWIDTH, RATE, STREAM, cheapest, moments, reweight, stream
from benchmarks.machine_code import code_of, trips
from residual_kernels.experiments.shapes import SHAPES, Shape
from residual_kernels.ops.triton import backend as triton_backend
from residual_kernels.ops.triton import fold, two_pass
from residual_kernels.ops.triton.kernel_layout import constants_of
from residual_kernels.ops.triton.routes import CACHE_BANDWIDTH, LAUNCH, VENDOR_RATE

RESULTS = Path(__file__).parent / "results" / "compile"
ROWS = (64, 256, 1024, 8192)
# Warp instructions a second of a whole chip: multiprocessors x schedulers x nominal boost clock.
ISSUE_RATE = {
    "sm_80": 108 * 4 * 1.41e9,
    "sm_90": 132 * 4 * 1.755e9,
    "sm_100": 148 * 4 * 1.85e9,
    "gfx942": 304 * 4 * 2.1e9,
}


# --- compiled code ------------------------------------------------------------------------------------------


# --- how often a loop runs ----------------------------------------------------------------------------------


# --- calls --------------------------------------------------------------------------------------------------

VIEWS = {
    "empty",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "lift_fresh",
    "_unsafe_view",
    "alias",
    "empty_like",
}
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm"}


class _Vendor(TorchDispatchMode):
    """Records torch's own launches: name, bytes, operations."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, float, float]] = []

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """left @ right in float32, from inputs of any type."""
        out = left.new_empty(left.shape[0], right.shape[1], dtype=torch.float32)
        self.calls.append(("mm", _bytes([left, right, out]), 2.0 * left.numel() * right.shape[1]))
        return out

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and name not in VIEWS:
            read = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor)]
            made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
            moved = _bytes([*read, *made])
            flop = 0.0
            if name in PRODUCTS:
                left, right = read[-2:] if (kwargs or {}).get("out") is None else read[-3:-1]
                flop = 2.0 * left.numel() * right.shape[-1]
            self.calls.append((name, moved, flop))
        return out


def _bytes(tensors: list[Tensor]) -> float:
    """Bytes of distinct tensors; of an expanded or sliced one, its elements."""
    distinct = {id(x): x for x in tensors}
    return float(sum(x.numel() * x.element_size() for x in distinct.values()))


@dataclass
class Cost:
    """What a call costs on paper."""

    launches: int = 0
    bytes: float = 0.0
    flop: float = 0.0
    floor: float = 0.0  # seconds
    estimate: float = 0.0
    kernels: list[dict] = field(default_factory=list)


@contextmanager
def costed(target: str, chunks: int = 0) -> Iterator[Cost]:
    """The cost of the calls made inside, on meta tensors."""
    cost = Cost()
    with recorded(target) as launches, _Vendor() as vendor:
        products = fold.product_float32, two_pass.product_float32
        # torch has no meta kernel of every version for a product with an output type of its own: recorded by
        # hand
        fold.product_float32 = two_pass.product_float32 = vendor.product
        try:
            yield cost
        finally:
            fold.product_float32, two_pass.product_float32 = products
    for launch in launches:
        _add_launch(cost, launch, target, chunks)
    for name, moved, flop in vendor.calls:
        seconds = max(moved / BANDWIDTH, flop / VENDOR_RATE["half"])
        cost.kernels.append({"kernel": f"torch {name}", "MB": moved / 1e6, "estimate_us": 1e6 * seconds})
        cost.launches += 1
        cost.bytes += moved
        cost.flop += flop
        cost.estimate += LAUNCH + seconds


def _add_launch(cost: Cost, launch: RecordedLaunch, target: str, chunks: int) -> None:
    code = code_of(launch, target)
    count = trips(launch, chunks)
    lanes = launch.warps
    floor = code.total("instructions", count) * lanes / ISSUE_RATE[target]
    flop = code.total("operations", count) * lanes
    moved = _bytes([x for x in launch.values.values() if isinstance(x, Tensor)])
    cached = code.total("tile_bytes", count) * lanes
    seconds = max(floor, moved / BANDWIDTH, cached / CACHE_BANDWIDTH, flop / RATE)
    depth = len(code.instructions) - 1
    cost.kernels.append(
        {
            "kernel": launch.label,
            "programs": launch.programs,
            "warps": launch.warps,
            "stages": launch.stages,
            "instructions": sum(code.instructions),
            "per_step": code.instructions[depth] if depth else None,
            "per_product": sum(code.instructions) / sum(code.products) if sum(code.products) else None,
            "barriers_per_step": code.barriers[depth] if depth else None,
            "barriers": sum(code.barriers),
            "narrow_accesses": sum(code.narrow),
            "occupancy": round(code.occupancy, 3),
            "MB": moved / 1e6,
            "cache_MB": cached / 1e6,
            "GFLOP": flop / 1e9,
            "floor_us": 1e6 * floor,
            "estimate_us": 1e6 * seconds,
        }
    )
    cost.launches += 1
    cost.bytes += moved
    cost.flop += flop
    cost.floor += floor
    cost.estimate += LAUNCH + seconds


def _meta(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*size, dtype=dtype, device="meta")


def pooled(shape: Shape, kind: str, rows: int, mode: str, target: str) -> Cost:
    """Forward (`fwd`), forward and dweight (`step`), or with dz too,
    of a bf16 call with the planned routes."""
    z = _meta(rows, shape.units, shape.coordinates, dtype=torch.bfloat16)
    plain = shape in STREAM
    scale, mean = (None, None) if plain else (_meta(rows), _meta(rows))
    tensors, sizes = constants(shape, kind)
    components = sum(shape.components(kind))
    weight = _meta(1, components)
    with costed(target, constants_of(tensors, sizes).chunk_count) as cost:
        y = triton_backend.spectral_reweight_forward(z, scale, mean, weight, None, tensors, sizes)
        if mode != "fwd":
            wanted = [True, mode == "step with dz", False, False]
            triton_backend.spectral_reweight_backward(
                torch.empty_like(y), z, scale, mean, weight, None, tensors, sizes, wanted
            )
    return cost


@lru_cache(maxsize=64)
def constants(shape: Shape, kind: str) -> tuple[list[Tensor], list[int]]:
    kept = shape.components(kind)
    total = sum(kept)
    offsets = torch.tensor([0, *kept]).cumsum(0)
    proj = _meta(total, shape.coordinates, dtype=torch.bfloat16)
    basis = _meta(total, shape.dim, dtype=torch.bfloat16)
    return triton_backend.pack(proj, _meta(total), _meta(total), _meta(total), basis, offsets)


def sum_cost(shape: Shape, kind: str, rows: int, target: str) -> Cost:
    """Forward and dweight of spectral_sum with tf32 products: a step of a fit on cached coefficients."""
    kept = shape.components(kind)
    total = sum(kept)
    offsets = torch.tensor([0, *kept]).cumsum(0)
    vector, proj, basis = _meta(total), _meta(total, shape.coordinates), _meta(total, shape.dim)
    tensors, sizes = triton_backend.pack(proj, vector, vector, vector, basis, offsets)
    c, weight = _meta(rows, total), _meta(1, total)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with costed(target) as cost:
            y = triton_backend.spectral_sum_forward(c, weight, tensors, sizes)
            triton_backend.spectral_sum_backward(torch.empty_like(y), c, weight, tensors, sizes)
    finally:
        torch.set_float32_matmul_precision(before)
    return cost


def fit_cost(shape: Shape, kind: str, rows: int, precision: str, target: str, classes: int = 100) -> Cost:
    """A fused step of a fit on cached coefficients, optimizer included; `precision` is torch's switch."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with costed(target) as cost:
            fit_step_of(rows, sum(shape.components(kind)), shape.dim, classes)()
    finally:
        torch.set_float32_matmul_precision(before)
    return cost


def moments_cost(shape: Shape, rows: int, target: str) -> Cost:
    z = _meta(rows, shape.units, shape.coordinates, dtype=torch.bfloat16)
    shift = _meta(shape.units, shape.coordinates + 2, dtype=torch.float64)
    with costed(target) as cost:
        triton_backend.unit_moments(z, _meta(rows), _meta(rows), shift)
    return cost


def aim(roof: float, rows: int) -> float | None:
    """The aim of a pooled case on an H100, in seconds; none between 256 and 1,024 rows."""
    if rows <= 256:
        return roof / 0.7 + 8e-6
    return roof / 0.55 if rows >= 1024 else None


def rows_of(target: str, names: list[str]) -> list[dict]:
    """Every case of the table."""
    found = []

    def add(fields: dict, cost: Cost, roof: float, aimed: float | None) -> None:
        found.append(
            {
                **fields,
                "launches": cost.launches,
                "MB": cost.bytes / 1e6,
                "GFLOP": cost.flop / 1e9,
                "floor_us": 1e6 * cost.floor,
                "estimate_us": 1e6 * cost.estimate,
                "roof_us": 1e6 * roof,
                "aim_us": None if aimed is None else 1e6 * aimed,
                "kernels": cost.kernels,
            }
        )

    for name in names:
        for kind in ("ragged", "full"):
            shape = SHAPES[name]
            for rows in ROWS:
                for mode in ("fwd", "step"):
                    best = cheapest(
                        reweight(shape, sum(shape.components(kind)), rows, mode, 2), BANDWIDTH, RATE
                    )
                    roof = best.roof(BANDWIDTH, RATE)
                    fields = {
                        "operator": "spectral_reweight",
                        "shape": name,
                        "K": kind,
                        "N": rows,
                        "mode": mode,
                    }
                    add(fields, pooled(shape, kind, rows, mode, target), roof, aim(roof, rows))
    for shape in STREAM:
        for mode in ("fwd", "step with dz"):
            roof = stream(shape, 65536, mode, 2).roof(BANDWIDTH, RATE)
            fields = {"operator": "stream", "shape": shape.name, "K": "C", "N": 65536, "mode": mode}
            add(fields, pooled(shape, str(shape.coordinates), 65536, mode, target), roof, None)
    for name in names:
        for rows in (64, 256):
            shape = SHAPES[name]
            total = sum(shape.components("ragged"))
            moved = 2 * 4.0 * (rows * total + total * shape.dim + rows * shape.dim)
            roof = max(moved / BANDWIDTH, 4.0 * rows * total * shape.dim / VENDOR_RATE["tf32"])
            fields = {
                "operator": "spectral_sum, tf32",
                "shape": name,
                "K": "ragged",
                "N": rows,
                "mode": "step",
            }
            add(fields, sum_cost(shape, "ragged", rows, target), roof, None)
    for name, (kind, precision) in product(names, (("fp32", "highest"), ("tf32", "high"))):
        for rows in (64, 256):
            shape = SHAPES[name]
            total = sum(shape.components("ragged"))
            moved = 4.0 * (2 * rows * total + 2 * total * shape.dim + 6 * total + 200 * shape.dim)
            flop = 4.0 * rows * (total + 100) * shape.dim
            roof = max(moved / BANDWIDTH, flop / VENDOR_RATE[kind])
            fields = {
                "operator": f"fit step, {kind}",
                "shape": name,
                "K": "ragged",
                "N": rows,
                "mode": "step",
            }
            add(fields, fit_cost(shape, "ragged", rows, precision, target), roof, None)
    for name in names:
        roof = moments(SHAPES[name], 4096, 2).roof(BANDWIDTH, RATE)
        fields = {"operator": "unit_moments", "shape": name, "K": "-", "N": 4096, "mode": "fwd"}
        add(fields, moments_cost(SHAPES[name], 4096, target), roof, roof / 0.7)
    return found


def table(rows: list[dict]) -> str:
    lines = [
        "| operator | shape | K | N | mode | launches | MB | GFLOP | floor, us | estimate, us | roof, us "
        "| aim, us |",
        "|---|---|---|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        numbers = [r["MB"], r["GFLOP"], r["floor_us"], r["estimate_us"], r["roof_us"], r["aim_us"]]
        cells = [r["operator"], r["shape"], r["K"], r["N"], r["mode"], r["launches"]]
        shown = ["-" if value is None else f"{value:.1f}" for value in numbers]
        lines.append("| " + " | ".join([*map(str, cells), *shown]) + " |")
    return "\n".join(lines)


def kernel_table(rows: list[dict]) -> str:
    """Each compiled kernel once: what a step holds."""
    lines = [
        "| kernel | warps | instructions | per step | per product | barriers a step | 2- and 4-byte accesses "
        "| occupancy |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for kernel in {
        (k["kernel"], k["warps"], k["stages"]): k for r in rows for k in r["kernels"] if "warps" in k
    }.values():
        product, step = kernel["per_product"], kernel["per_step"]
        lines.append(
            f"| {kernel['kernel']} | {kernel['warps']} | {kernel['instructions']} | {step or '-'} "
            f"| {'-' if product is None else f'{product:.0f}'} "
            f"| {kernel['barriers_per_step'] if step else kernel['barriers']} | {kernel['narrow_accesses']} "
            f"| {kernel['occupancy']:.0%} |"
        )
    return "\n".join(lines)


def share_of(kernels: list[dict]) -> Counter:
    """Floors in microseconds by kernel name."""
    found: Counter = Counter()
    for kernel in kernels:
        found[kernel["kernel"].split()[0]] += kernel.get("floor_us", 0.0)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="sm_90", choices=list(ISSUE_RATE))
    parser.add_argument(
        "--shapes", default="B/16,L/14,H/14", help="names from experiments/shapes.py, with commas"
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--write", action="store_true", help=f"into {RESULTS}")
    options = parser.parse_args()
    rows = rows_of(options.target, options.shapes.split(","))
    record = {
        "note": "counted from compiled code: floors and estimates, nothing measured",
        "target": options.target,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "rows": rows,
    }
    text = f"{table(rows)}\n\n{kernel_table(rows)}\n"
    if options.json is not None:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    if options.write:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / "floors.json").write_text(json.dumps(record) + "\n")
        head = (
            "# Issue floors\n\n"
            f"bf16, {options.target}, triton {triton.__version__}. Floors and estimates are counted from "
            "compiled code (`python -m benchmarks.floors --write`); nothing here is a measured time.\n\n"
        )
        (RESULTS / "floors.md").write_text(head + text)
    print(text)


if __name__ == "__main__":
    main()
