"""Bytes and operations of the operators, counted on paper, and the roof they imply for a machine.

python -m benchmarks.counts            the table of benchmarks/NOTES.md, for nominal ceilings
python -m benchmarks.counts --write    puts it there
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from residual_kernels.experiments.shapes import SHAPES, Shape
from residual_kernels.ops.triton import backend, routes
from residual_kernels.ops.triton.kernel_layout import padded_bounds

NOTES = Path(__file__).parent / "NOTES.md"
MARKS = ("<!-- counts -->", "<!-- /counts -->")
# Nominal: bytes/s of an H100's memory, bf16 operations/s of its tensor cores.
BANDWIDTH, RATE = (
    3.0e12,
    8.0e14,
)
STREAM = (  # the heads of one layer, for every token: K = C and D = the model's width
    Shape("stream B", 12, 64, 768, 64),
    Shape("stream L", 16, 64, 1024, 64),
    Shape("stream H", 16, 80, 1280, 80),
)


@dataclass(frozen=True)
class Count:
    """Bytes that must move (each input read once, each output written once) and operations of one exact
    route."""

    route: str
    bytes: float
    flop: float

    def roof(self, bandwidth: float, rate: float) -> float:
        """Seconds below which no implementation of this route can go on a machine with these two ceilings."""
        return max(self.bytes / bandwidth, self.flop / rate)


def reweight(shape: Shape, components: int, rows: int, mode: str, item: int) -> list[Count]:
    """The direct and the folded route of a forward pass (`fwd`) or of forward + dweight (`step`)."""
    width, dim = shape.units * shape.coordinates, shape.dim
    z, y = rows * width * item, rows * dim * item
    constants = components * (shape.coordinates + dim) * item + 12 * components
    weight = 4 * components
    passes = 1 if mode == "fwd" else 2  # backward reads z, the constants and dy, and writes dweight
    moved = passes * (z + constants + weight + y)
    direct = passes * 2.0 * rows * components * (shape.coordinates + dim)
    fold = 2.0 * components * shape.coordinates * dim
    folded = passes * (2.0 * rows * width * dim + fold)
    return [Count("direct", moved, direct), Count("folded", moved + passes * 2 * width * dim * item, folded)]


def moments(shape: Shape, rows: int, item: int) -> Count:
    """One pass over z; the symmetric half of the products."""
    size = shape.coordinates + 2
    return Count(
        "moments",
        rows * shape.units * shape.coordinates * item,
        float(rows) * shape.units * size * (size + 1),
    )


def cheapest(counts: list[Count], bandwidth: float, rate: float) -> Count:
    return min(counts, key=lambda count: count.roof(bandwidth, rate))


def stream(shape: Shape, rows: int, mode: str, item: int) -> Count:
    """Fold and one product forward; backward t = dy . basis and, from it, dweight and dz unit by unit."""
    width, dim = shape.units * shape.coordinates, shape.dim
    tokens, constants = float(rows) * width * item, width * (shape.coordinates + dim) * item
    product = 2.0 * rows * width * dim
    moved, flop = 2 * tokens + constants, product + 2.0 * width * shape.coordinates * dim
    if mode == "step with dz":  # reads z and dy, writes dz
        moved, flop = (
            moved + 3 * tokens + constants,
            flop + product + 2 * 2.0 * rows * width * shape.coordinates,
        )
    return Count("folded" if mode == "fwd" else "folded, t", moved, flop)


def line(cells: list[object], count: Count) -> str:
    bound = "bytes" if count.bytes / BANDWIDTH > count.flop / RATE else "products"
    figures = [
        f"{count.bytes / 1e6:.0f}",
        f"{count.flop / 1e9:.1f}",
        f"{1e6 * count.roof(BANDWIDTH, RATE):.1f}",
        bound,
    ]
    return "| " + " | ".join([*map(str, cells), *figures]) + " |"


def markdown() -> str:
    """What each case must move and compute, and the roof by the nominal ceilings. Nothing is measured."""
    lines = [
        "| shape | K | J | N | mode | cheaper route | planned route | MB | GFLOP | roof, us | bound by |",
        "|---|---|---:|---:|---|---|---|---:|---:|---:|---|",
    ]
    for shape in SHAPES.values():
        for kind in ("ragged", "full"):
            components = sum(shape.components(kind))
            for rows in (64, 256, 1024, 8192):
                planned = plan(shape, shape.components(kind), rows)
                for mode in ("fwd", "step"):
                    best = cheapest(reweight(shape, components, rows, mode, 2), BANDWIDTH, RATE)
                    routes = planned[0] if mode == "fwd" else ", ".join(planned)
                    lines.append(line([shape.name, kind, components, rows, mode, best.route, routes], best))
    for shape in STREAM:
        planned = plan(shape, [shape.coordinates] * shape.units, 65536, plain=True)
        for mode in ("fwd", "step with dz"):
            count = stream(shape, 65536, mode, 2)
            routes = planned[0] if mode == "fwd" else ", ".join(planned)
            cells = [shape.name, "C", shape.units * shape.coordinates, 65536, mode, count.route, routes]
            lines.append(line(cells, count))
    for item, dtype in ((2, "bf16"), (4, "tf32")):
        count = moments(SHAPES["L/14"], 4096, item)
        lines.append(
            line([f"L/14 unit_moments, {dtype}", "-", "-", 4096, "fwd", "moments", "one pass"], count)
        )
    return "\n".join(lines)


def plan(shape: Shape, components: list[int], rows: int, *, plain: bool = False) -> tuple[str, str]:
    """The routes the launcher plans for bf16, forward and backward."""
    block = routes.block_components(components, 2)
    runs = padded_bounds(components)
    problem = routes.Problem(
        rows=rows,
        tasks=1,
        indexed=False,
        units=shape.units,
        coordinates=shape.coordinates,
        components=sum(components),
        padded=runs[-1],
        dim=shape.dim,
        chunks=len(routes.cut_runs(runs, components, block)),
        block_k=block,
        longest=-(-max(components) // 8) * 8,
        kind="half",
        plain=plain,
    )
    return backend.plan_forward(problem).route, backend.plan_backward(problem).route


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help=f"replace the tables in {NOTES.name}")
    if not parser.parse_args().write:
        print(markdown())
        return
    text = NOTES.read_text()
    before, _, rest = text.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    NOTES.write_text(f"{before}{MARKS[0]}\n{markdown()}\n{MARKS[1]}{after}")


if __name__ == "__main__":
    main()
