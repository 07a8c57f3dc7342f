"""What the main job costs: a tower plain, decomposed and adapted; bases against the textbook.

    python -m benchmarks.main_job --out benchmarks/results/<device>/main_job

Random weights at true widths; variants take turns in every round, and ratios are of medians of one run.
"""

import argparse
import json
import statistics
from pathlib import Path

import open_clip
import torch

import residual_kernels as rk
from benchmarks.cpu_clock import cpu_name, interleaved
from residual_kernels.files import write_json


def towers(name: str, batch: int, rounds: int) -> dict:
    """Images per second of a tower plain, decomposed (heads and MLPs), and with a ResiDual attached."""
    torch.manual_seed(0)
    model = open_clip.create_model(name).eval()
    images = torch.randn(batch, 3, *model.visual.image_size)
    fitting = [torch.randn(batch, 3, *model.visual.image_size) for _ in range(4)]
    bases = rk.fit_bases(model.visual, fitting).truncate(energy=0.90)
    residual = rk.ResiDual(model.visual, bases)
    kept = rk.ResiDual(model.visual, bases, "sum")
    variants = {
        "plain": lambda: model.visual(images),
        "decomposed": lambda: rk.decompose(model.visual, images, kinds=("head", "mlp")),
        "attached, rest zero": lambda: residual(images),
        "attached, rest sum": lambda: kept(images),
    }
    with torch.no_grad():
        times = interleaved(variants, rounds)
    plain = statistics.median(times["plain"])
    rows = {
        variant: {
            "images_per_second": batch / statistics.median(seconds),
            "times_plain": plain / statistics.median(seconds),
            "seconds": seconds,
        }
        for variant, seconds in times.items()
    }
    return {"model": name, "batch": batch, "components": len(residual.weight), "rows": rows}


def bases(rows: int, rounds: int, textbook_heads: int = 8) -> dict:
    """PCA of the 144 heads of ViT-B-32 from given coordinates: moments of C+2 numbers against one SVD of N x D a head.

    The textbook projects a head to the D outputs, centres, and takes the singular vectors, as the paper's code does. It
    is timed on `textbook_heads` of the heads, one after the other, and compared by the head.
    """
    from residual_kernels import towers
    from residual_kernels.bases.moments import MomentSum
    from residual_kernels.bases.spectral_bases import principal

    torch.manual_seed(0)
    view = towers.view(open_clip.create_model("ViT-B-32").visual)
    maps = view.maps("head")
    heads, _, dim = maps.A.shape
    z = torch.randn(rows, heads, view.head_width)
    scale, mean = torch.rand(rows) + 0.5, torch.randn(rows) * 0.01
    lines = maps.rows().float()

    def moments():
        held = MomentSum(maps.rows(), maps.e / maps.share)
        for start in range(0, rows, 500):
            part = slice(start, start + 500)
            held.add(z[part], scale[part], mean[part])
        return principal(held.moments())

    def textbook():
        for head in range(textbook_heads):
            l = torch.cat([scale[:, None] * z[:, head], scale[:, None], (scale * mean)[:, None]], dim=1)
            units = l @ lines[head]
            torch.linalg.svd(units - units.mean(0), full_matrices=False)

    times = interleaved({"moments": moments, "textbook": textbook}, rounds)
    fast = statistics.median(times["moments"]) / heads
    slow = statistics.median(times["textbook"]) / textbook_heads
    return {
        "rows": rows, "heads": heads, "dim": dim, "textbook_heads": textbook_heads, "seconds": times,
        "moments_s_per_head": fast, "textbook_s_per_head": slow, "ratio": slow / fast,
    }  # fmt: skip


def table(result: dict) -> str:
    """The same numbers as Markdown."""
    lines = [f"CPU: {result['cpu']}, {result['threads']} threads, torch {result['torch']}", ""]
    for tower in result["towers"]:
        lines += [f"{tower['model']}, batch {tower['batch']}, {tower['components']:,} learned numbers", ""]
        lines += ["| variant | images/s | times plain |", "|---|---|---|"]
        for name, row in tower["rows"].items():
            lines.append(f"| {name} | {row['images_per_second']:.1f} | {row['times_plain']:.2f} |")
        lines.append("")
    pca = result["bases"]
    lines.append(
        f"Bases from {pca['rows']:,} images, D = {pca['dim']}, seconds a head: {pca['moments_s_per_head']:.4f} here "
        f"(all {pca['heads']} together), {pca['textbook_s_per_head']:.2f} by one SVD of N x D "
        f"({pca['textbook_heads']} heads): {pca['ratio']:.0f} times faster."
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="path of the results, without ending")
    parser.add_argument("--models", nargs="+", default=["ViT-B-32", "ViT-B-16"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--pca-rows", type=int, default=5000)
    arguments = parser.parse_args()
    result = {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "towers": [towers(name, arguments.batch, arguments.rounds) for name in arguments.models],
        "bases": bases(arguments.pca_rows, 3),
    }
    write_json(arguments.out.with_suffix(".json"), result)
    text = table(json.loads(arguments.out.with_suffix(".json").read_text()))
    arguments.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
