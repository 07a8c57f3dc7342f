"""What a fit costs on cached units, against the same steps with the tower in the loop.

    python -m benchmarks.bench_fit --out benchmarks/results/<device>/fit

ViT-B-32 with random weights, heads, energy 0.90, batches of 64, random labels. A few hundred images are
encoded and give the bases; the cache's rows are drawn from them with a little noise, as values do not change
the time. Variants take turns in every round; times of cached steps are those of whole calls of `fit`, divided
by their steps.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import open_clip
import schedulefree
import torch
from torch.nn import functional as F

import residual_kernels as rk
from benchmarks.cpu_clock import cpu_name, interleaved
from residual_kernels.files import write_json

BATCH, CLASSES = 64, 100


def drawn(cache: rk.UnitCache, rows: int, seed: int) -> rk.UnitCache:
    """A labelled cache of any size with the rows of a small one, each with 1 % of noise."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(cache), (rows,), generator=generator)
    labels = torch.randint(CLASSES, (rows,), generator=generator)
    z = cache.z["head"][chosen]
    z *= 1 + 0.01 * torch.randn(z.shape, generator=generator)
    return rk.UnitCache(
        {"head": z},
        cache.scale[chosen],
        cache.mean[chosen],
        cache.output[chosen],
        labels,
        torch.arange(rows),
        cache.checksum,
        list(map(str, range(CLASSES))),
    )


class Textbook:
    """The step as the paper's code takes it: every head's output in D dimensions, centred,
    onto its components, back.

    Heads have different numbers of components, so these are padded to the most, and one product reads all
    heads.
    """

    def __init__(self, bases: rk.SpectralBases, tower, head: rk.ZeroShotHead):
        rows = bases.layout.select("head")
        most = max(len(bases.components(row)) for row in rows)
        self.tower, self.head = tower, head
        self.mean = torch.stack([bases.mean(row) for row in rows]).float()  # [R, D]
        self.basis = torch.stack(
            [F.pad(bases.components(row), (0, 0, 0, most - len(bases.components(row)))) for row in rows]
        ).float()  # [R, K, D]
        self.weight = torch.ones(len(rows), most, requires_grad=True)
        self.optimizer = schedulefree.AdamWScheduleFree([self.weight], lr=0.8)
        self.optimizer.train()

    def units(self, images):
        with torch.no_grad():
            return rk.decompose(self.tower, images, kinds=("head",)).units(kind="head")  # [N, R, D]

    def step(self, units, labels) -> float:
        inner = torch.einsum("nrd,rkd->nrk", units - self.mean, self.basis)
        y = torch.einsum("nrk,rkd->nd", inner * self.weight, self.basis)
        loss = F.cross_entropy(self.head(y), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


def steps(
    rounds: int, encoded: int, epoch_rows: int
) -> tuple[dict, tuple[rk.ResiDual, rk.ZeroShotHead, rk.UnitCache]]:
    """Seconds of one step, with the tower in the loop and on cached units."""
    torch.manual_seed(0)
    tower = open_clip.create_model("ViT-B-32").eval().visual
    size = tower.image_size
    small = rk.encode(tower, (torch.randn(BATCH, 3, *size) for _ in range(encoded // BATCH)))
    bases = rk.fit_bases(tower, small).truncate(energy=0.90)
    vectors = F.normalize(torch.randn(tower.output_dim, CLASSES), dim=0)
    head = rk.ZeroShotHead(vectors, list(map(str, range(CLASSES))), 4.6)
    residual = rk.ResiDual(tower, bases)
    images, labels = torch.randn(BATCH, 3, *size), torch.randint(CLASSES, (BATCH,))
    train = drawn(small, epoch_rows, 1)
    textbook = Textbook(bases, tower, head)
    units = textbook.units(images)
    count = -(-epoch_rows // BATCH)

    def cached(**options):
        return lambda: rk.fit_many(residual, head, train, epochs=2, **options)

    variants = {
        "tower in the loop, textbook": lambda: textbook.step(textbook.units(images), labels),
        "tower in the loop, ResiDual": lambda: rk.fit(residual, head, [(images, labels)], epochs=1),
        "ready units, textbook": lambda: textbook.step(units, labels),
        "cached": cached(),
        "cached, compiled": cached(step="compiled"),
        "cached, read ahead": cached(memory=0),
        "cached, 3 learning rates": cached(lrs=(0.1, 0.3, 0.8)),
        "cached, 3 seeds": cached(seeds=(0, 1, 2)),
    }
    times = interleaved(variants, rounds)
    for name in variants:
        if name.startswith("cached"):
            times[name] = [seconds / (2 * count) for seconds in times[name]]
    base = statistics.median(times["tower in the loop, textbook"])
    rows = {
        name: {
            "seconds_a_step": statistics.median(seconds),
            "times_faster_than_textbook": base / statistics.median(seconds),
            "seconds": seconds,
        }
        for name, seconds in times.items()
    }
    result = {
        "model": "ViT-B-32",
        "batch": BATCH,
        "components": len(residual.weight),
        "bases_images": len(small),
        "classes": CLASSES,
        "epoch_rows": epoch_rows,
        "rows": rows,
    }
    return result, (residual, head, small)


def whole_fit(residual, head, small, images: int, epochs: int) -> dict:
    """All epochs of a cache of `images`, validated on a fifth as many after each, without early stopping."""
    train, val = drawn(small, images, 2), drawn(small, images // 5, 3)
    start = time.perf_counter()
    result = rk.fit(residual, head, train, val, epochs=epochs, patience=epochs)
    seconds = time.perf_counter() - start
    kept = images * len(residual.weight) * 4
    return {
        "images": images,
        "val_images": len(val),
        "epochs": epochs,
        "seconds": seconds,
        "seconds_before_training": result.history[0].seconds,
        "features_bytes": kept,
    }


def table(result: dict) -> str:
    """The same numbers as Markdown."""
    step, fit = result["steps"], result["fit"]
    lines = [
        f"CPU: {result['cpu']}, {result['threads']} threads, torch {result['torch']}",
        "",
        f"{step['model']}, heads, energy 0.90 ({step['components']:,} components from "
        f"{step['bases_images']} images), batches of {step['batch']}, {step['classes']} classes. Cached "
        f"steps: of {step['epoch_rows']:,} rows, two epochs a call, everything included.",
        "",
        "| step | milliseconds | times faster than the textbook with the tower in the loop |",
        "|---|---|---|",
    ]
    for name, row in step["rows"].items():
        lines.append(
            f"| {name} | {1e3 * row['seconds_a_step']:.2f} | {row['times_faster_than_textbook']:.1f} |"
        )
    lines += [
        "",
        f"{fit['epochs']} epochs of {fit['images']:,} cached images, validated on {fit['val_images']:,} "
        f"after each: {fit['seconds']:.1f} s, of which {fit['seconds_before_training']:.1f} s before the "
        f"first step; {fit['features_bytes'] / 2**20:,.0f} MiB of coefficients in memory.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="path of the results, without ending")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--encoded", type=int, default=320, help="images that go through the tower")
    parser.add_argument("--epoch-rows", type=int, default=3200, help="cached rows of the timed steps")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=30)
    arguments = parser.parse_args()
    measured, fitted = steps(arguments.rounds, arguments.encoded, arguments.epoch_rows)
    result = {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "steps": measured,
        "fit": whole_fit(*fitted, arguments.images, arguments.epochs),
    }
    write_json(arguments.out.with_suffix(".json"), result)
    text = table(json.loads(arguments.out.with_suffix(".json").read_text()))
    arguments.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
