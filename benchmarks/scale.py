"""docs/SCALE.md's tables: what an image costs to encode, store and fit,
and what 1.3 million and 400 million cost.

    python -m benchmarks.scale            prints them
    python -m benchmarks.scale --write    puts them into docs/SCALE.md, between its markers

Operations of a tower are counted by torch on the meta device, bytes and operations of the rest on paper.
Rates of this machine are read from results/amd-epyc (bench_scale, bench_ops); rates of a GPU are assumptions,
printed with the tables.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "amd-epyc"
PAGE = ROOT / "docs" / "SCALE.md"
TOWERS = {"B/16": "ViT-B-16", "L/14": "ViT-L-14", "H/14": "ViT-H-14", "bigG/14": "ViT-bigG-14"}
# Components a head at energy 0.90, as in shapes.py.
KEPT = {
    "B/16": 40,
    "L/14": 30,
    "H/14": 30,
    "bigG/14": 30,
}
SIZES = {"1.3 M": 1_300_000, "400 M": 400_000_000}
SMALL = 4 * 2 + 8 * 2  # s, m, label and id of an image, in bytes
EPOCHS = 30

# Assumptions, none of them measured: an H100's nominal bf16 rate and the share of it that a ViT reaches while
# encoding, and what one GPU's share of a parallel file system gives.
NOMINAL, REACHED = 989e12, 0.40
STORAGE = 2e9


@dataclass(frozen=True)
class ImageCost:
    """What one image costs with the heads of one tower."""

    name: str
    encode: float  # FLOP of the tower
    heads: int  # bytes of a bfloat16 cache for `fine`
    full: int  # the same with the MLPs, for `full`
    components: int  # J at energy 0.90
    fit: float  # FLOP of forward and dweight, as bench_ops counts them

    @classmethod
    def of(cls, name: str) -> "ImageCost":
        import open_clip

        from residual_kernels import towers

        with torch.device("meta"):
            tower = open_clip.create_model(TOWERS[name], device="meta").visual.eval()
            images = torch.empty(1, 3, *tower.image_size)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                tower(images)
        view = towers.view(tower)
        layers, heads, width, dim = view.layout.layers, view.layout.heads, view.head_width, view.dim
        head_numbers = layers * heads * width
        components = layers * heads * KEPT[name]
        return cls(
            name=name,
            encode=counter.get_total_flops(),
            heads=2 * head_numbers + 4 * dim + SMALL,
            full=2 * (head_numbers + layers * view.width) + 4 * dim + SMALL,
            components=components,
            fit=2.0 * components * (width + 2 * dim),
        )


def per_image(costs: list[ImageCost]) -> list[str]:
    lines = [
        "| tower | encode, GFLOP | cache for `fine`, kB | for `full`, kB | J at 0.90 | fit, MFLOP | "
        "encode / fit |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for cost in costs:
        lines.append(
            f"| {cost.name} | {cost.encode / 1e9:.1f} | {cost.heads / 1e3:.1f} | {cost.full / 1e3:.1f} | "
            f"{cost.components:,} | {cost.fit / 1e6:.1f} | {cost.encode / cost.fit:,.0f} x |"
        )
    return lines


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second: FLOP of encoding and of fitting, and bytes of a cache read."""

    encode: float
    fit: float
    read: float


def measured() -> Rates:
    """This machine's rates, from the committed results of bench_scale and bench_ops."""
    scale = json.loads((RESULTS / "scale.json").read_text())
    tower = next(tower for tower in scale["encoding"] if tower["model"] == TOWERS["B/16"])
    images = tower["rows"]["encode, heads, bfloat16"]["images_per_second"]
    wanted = {
        "operator": "spectral_reweight",
        "shape": "B/16",
        "components": "ragged",
        "N": 256,
        "mode": "step",
        "dtype": "float32",
        "provider": "cpp",
    }
    rows = json.loads((RESULTS / "ops.json").read_text())["rows"]
    fit = next(row for row in rows if all(row[key] == value for key, value in wanted.items()))
    read = scale["reading"]["rows"]["read shuffled, cold"]["gigabytes_per_second"]
    return Rates(encode=images * ImageCost.of("B/16").encode, fit=fit["gflops"] * 1e9, read=read * 1e9)


GPU = Rates(encode=NOMINAL * REACHED, fit=NOMINAL * REACHED, read=STORAGE)


def time_text(seconds: float) -> str:
    for limit, unit, length in (
        (120, "s", 1),
        (7200, "min", 60),
        (172800, "h", 3600),
        (730 * 86400, "days", 86400),
    ):
        if seconds < limit:
            value = seconds / length
            return f"{value:.1f} {unit}" if value < 10 else f"{value:,.0f} {unit}"
    return f"{seconds / 31557600:,.0f} years"


def whole(costs: list[ImageCost], cpu: Rates) -> list[str]:
    lines = [
        "| images | tower | cache | encode: 2 cores | 1 GPU | 64 GPUs | fit, an epoch: 2 cores | 1 GPU | "
        "64 GPUs |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for label, images in SIZES.items():
        for cost in costs:
            size = images * cost.heads
            cells = [f"{size / 1e9:,.0f} GB" if size < 1e12 else f"{size / 1e12:,.1f} TB"]
            machines = ((cpu, 1), (GPU, 1), (GPU, 64))
            cells += [time_text(images * cost.encode / rates.encode / count) for rates, count in machines]
            # An epoch reads the cache once; reading goes on beside the products, so the slower of the two
            # counts.
            cells += [
                time_text(max(images * cost.fit / rates.fit, size / rates.read) / count)
                for rates, count in machines
            ]
            lines.append(f"| {label} | {cost.name} | {' | '.join(cells)} |")
    return lines


def tables() -> dict[str, list[str]]:
    costs = [ImageCost.of(name) for name in TOWERS]
    cpu = measured()
    rates = [
        f"* 2 cores (measured): encoding {cpu.encode / 1e9:.0f} GFLOP/s, the fit's operator "
        f"{cpu.fit / 1e9:.0f} GFLOP/s, a cache in shuffled order from the disk {cpu.read / 1e9:.2f} GB/s.",
        f"* 1 GPU (assumed, not measured): {REACHED:.0%} of {NOMINAL / 1e12:.0f} TFLOP/s of bf16 products, "
        f"{STORAGE / 1e9:.0f} GB/s from storage. 64 GPUs: 64 times as much, with no loss to communication.",
    ]
    return {"per image": per_image(costs), "rates": rates, "whole": whole(costs, cpu)}


def put_in(text: str, name: str, lines: list[str]) -> str:
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, _, rest = text.partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{PAGE} has no place for {name}: {start} ... {end}")
    return before + start + "\n" + "\n".join(lines) + "\n" + end + after


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="put the tables into docs/SCALE.md")
    arguments = parser.parse_args()
    made = tables()
    if arguments.write:
        text = PAGE.read_text()
        for name, lines in made.items():
            text = put_in(text, name, lines)
        PAGE.write_text(text)
    print("\n\n".join("\n".join(lines) for lines in made.values()))


if __name__ == "__main__":
    main()
