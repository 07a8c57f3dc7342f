"""What the main job costs: a tower plain, decomposed and adapted; bases against the textbook;
calls of little work.

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
from benchmarks.bench_ops import lowrank
from benchmarks.cpu_clock import cpu_name, interleaved
from residual_kernels import ops
from residual_kernels.experiments.shapes import SHAPES, Shape, problem
from residual_kernels.files import write_json
from residual_kernels.ops import cpp_backend


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
    """PCA of the 144 heads of ViT-B-32 from given coordinates:
    moments of C+2 numbers against one SVD of N x D a head.

    The textbook projects a head to the D outputs, centres, and takes the singular vectors, as the paper's
    code does. It is timed on `textbook_heads` of the heads, one after the other, and compared by the head.
    """
    from residual_kernels import towers
    from residual_kernels.bases.moments import MomentSum
    from residual_kernels.bases.principal import principal

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
        "rows": rows,
        "heads": heads,
        "dim": dim,
        "textbook_heads": textbook_heads,
        "seconds": times,
        "moments_s_per_head": fast,
        "textbook_s_per_head": slow,
        "ratio": slow / fast,
    }


def small_calls(rounds: int) -> dict:
    """What a call costs where there is little work: median seconds of each,
    and ratios to the plain way beside it.

    One image through ViT-B-32, attached and plain; the operator at N = 1; the functional form without a pack,
    from its second call on, forward and backward, beside the low-rank form in PyTorch; an adapter of ViT-L-14
    made and moved.
    """
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32").eval()
    image = torch.randn(1, 3, *model.visual.image_size)
    bases = rk.fit_bases(model.visual, [torch.randn(16, 3, *model.visual.image_size)]).truncate(energy=0.90)
    residual = rk.ResiDual(model.visual, bases, rest="all")
    with torch.no_grad():
        found = interleaved(
            {"image, plain": lambda: model.visual(image), "image, attached": lambda: residual(image)},
            3 * rounds,
        )
    for name, shape in SHAPES.items():
        for rows in (1, 64, 256):
            p = problem(shape, rows, shape.full())
            plain = lowrank(p)
            pack = ops.pack_units(p.proj, p.bias, p.slope, p.offset, p.basis, p.unit_offsets, backend="cpp")
            weight = p.weight.clone().requires_grad_()

            def functional(p=p, weight=weight):
                y = ops.spectral_reweight(
                    p.z,
                    p.scale,
                    p.mean,
                    p.proj,
                    p.bias,
                    p.slope,
                    p.offset,
                    weight,
                    p.basis,
                    p.unit_offsets,
                    backend="cpp",
                )
                return torch.autograd.grad(y, weight, p.dy)

            def step(p=p, weight=weight, plain=plain):
                return torch.autograd.grad(plain(p.z, weight), weight, p.dy)

            def packed(p=p, pack=pack):
                with torch.no_grad():
                    return ops.spectral_reweight_packed(p.z, p.scale, p.mean, p.weight, pack)

            variants = (
                {f"operator, {name}, N = {rows}": packed}
                if rows == 1
                else {
                    f"functional step, {name}, N = {rows}": functional,
                    f"low-rank step, {name}, N = {rows}": step,
                }
            )
            found |= interleaved(variants, rounds if rows > 1 else 20 * rounds)
    p = problem(Shape("tiny", 4, 16, 32), 1, [8] * 4)
    pack = ops.pack_units(p.proj, p.bias, p.slope, p.offset, p.basis, p.unit_offsets, backend="cpp")
    with torch.no_grad():
        call = {
            "operator, 4 units of 8, N = 1": lambda: ops.spectral_reweight_packed(
                p.z, p.scale, p.mean, p.weight, pack
            )
        }
        found |= interleaved(call, 100 * rounds)
    large = open_clip.create_model("ViT-L-14").eval()
    of_large = rk.fit_bases(large.visual, [torch.randn(2, 3, *large.visual.image_size)])
    adapter = rk.ResiDual(large.visual, of_large, rest="all")
    found |= interleaved(
        {
            "ResiDual of ViT-L-14": lambda: rk.ResiDual(large.visual, of_large, rest="all"),
            "its .to(float32)": lambda: adapter.to(torch.float32),
        },
        3,
    )
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    ratios = {"attached / plain, one image": medians["image, attached"] / medians["image, plain"]}
    for name in medians:
        if name.startswith("low-rank"):
            own = name.replace("low-rank", "functional")
            ratios[f"{name} / {own.split(',')[0]}"] = medians[name] / medians[own]
    return {"instruction_set": cpp_backend.instruction_set()[0], "median_s": medians, "ratios": ratios}


def table(result: dict) -> str:
    """The same numbers as Markdown."""
    lines = [f"CPU: {result['cpu']}, {result['threads']} threads, torch {result['torch']}", ""]
    for tower in result["towers"]:
        lines += [f"{tower['model']}, batch {tower['batch']}, {tower['components']:,} learned numbers", ""]
        lines += ["| variant | images/s | times plain |", "|---|---|---|"]
        for name, row in tower["rows"].items():
            lines.append(f"| {name} | {row['images_per_second']:.1f} | {row['times_plain']:.2f} |")
        lines.append("")
    lines += ["| call of little work | median |", "|---|---|"]
    for name, seconds in result["small"]["median_s"].items():
        lines.append(f"| {name} | {seconds * 1e3:.3f} ms |")
    lines += ["", "| ratio | |", "|---|---|"]
    lines += [f"| {name} | {ratio:.3f} |" for name, ratio in result["small"]["ratios"].items()] + [""]
    pca = result["bases"]
    lines.append(
        f"Bases from {pca['rows']:,} images, D = {pca['dim']}, seconds a head: "
        f"{pca['moments_s_per_head']:.4f} here (all {pca['heads']} together), "
        f"{pca['textbook_s_per_head']:.2f} by one SVD of N x D ({pca['textbook_heads']} heads): "
        f"{pca['ratio']:.0f} times faster."
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
        "small": small_calls(arguments.rounds),
    }
    write_json(arguments.out.with_suffix(".json"), result)
    text = table(json.loads(arguments.out.with_suffix(".json").read_text()))
    arguments.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
