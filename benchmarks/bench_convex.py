"""What the convex fit costs, with its folds: by task, and by N, J, K and the number of fits side by side.

    python -m benchmarks.bench_convex --out benchmarks/results/<device>/convex [--photos cifar10.zip]

Digits and photographs are the bundled model's, all training labels, ten strengths, five folds. ViT-B-32 has
random weights and caches as in bench_fit; 10,000 images, 100 classes, energy 0.90, ten strengths, five folds,
beside 30 epochs of AdamW at one rate. A row's label is the number of the encoded image it was drawn from,
modulo the classes: it can be learned by heart. The table by size draws coefficients at random, which changes
the number of evaluations but not what one costs: it gives both.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import open_clip
import torch
from torch.nn import functional as F

import residual_kernels as rk
from benchmarks.bench_fit import BATCH, CLASSES, drawn
from benchmarks.cpu_clock import cpu_name
from residual_kernels.files import write_json
from residual_kernels.train.folds import folds_of
from residual_kernels.train.logistic import Objective, Readout, ResidentRows, Targets
from residual_kernels.train.path import FREEDOMS, FitGroup
from residual_kernels.train.path import Path as Strengths

SIZES = {"N": 1000, "J": 2000, "K": 10, "T": 5}
GRID = {"N": (250, 1000, 4000), "J": (500, 2000, 8000), "K": (10, 100), "T": (5, 10, 20)}


Made = TypeVar("Made")


def timed(call: Callable[[], Made], rounds: int) -> tuple[dict, Made]:
    """Median seconds of a call after one to warm up, of the clock and of the processor, and what it gave.

    With one thread the processor's seconds are those of a machine with nothing else to do.
    """
    result, clock, processor = call(), [], []
    for _ in range(rounds):
        start, used = time.perf_counter(), time.process_time()
        result = call()
        clock.append(time.perf_counter() - start)
        processor.append(time.process_time() - used)
    return {"seconds": statistics.median(clock), "cpu_seconds": statistics.median(processor)}, result


def of_task(task, rounds: int) -> dict:
    """Seconds of one fit with all training labels, and accuracy on the test part, before and after."""
    adapter = rk.build("anchored", task.tower, task.bases)
    base = rk.evaluate(rk.build("base", task.tower), task.head, task.test.units).accuracy
    seconds, result = timed(lambda: rk.fit(adapter, task.head, task.train.units), rounds)
    accuracy = rk.evaluate(adapter, task.head, task.test.units).accuracy
    adapter.detach()
    tuned, found = timed(lambda: rk.tune(task.tower, task.bases, task.head, task.train.units), 1)
    row = {
        "task": task.name,
        "labels": len(task.train.labels),
        "J": adapter.weight.numel(),
        **seconds,
        "evaluations": result.certificate.evaluations if result.certificate else 0,
        "base_accuracy": base,
        "accuracy": accuracy,
        "freedom": result.freedom,
        "tune_seconds": tuned["seconds"],
        "tune_cpu_seconds": tuned["cpu_seconds"],
        "tune_winner": found.winner,
        "tune_accuracy": rk.evaluate(found.adapter, found.head, task.test.units).accuracy,
    }
    found.adapter.detach()
    return row


def of_vit(rows: int, encoded: int, adamw: bool) -> dict:
    """10,000 cached ViT-B-32 images, 100 classes."""
    torch.manual_seed(0)
    tower = open_clip.create_model("ViT-B-32").eval().visual
    size = tower.image_size
    small = rk.encode(tower, (torch.randn(BATCH, 3, *size) for _ in range(encoded // BATCH)))
    bases = rk.fit_bases(tower, small).truncate(energy=0.90)
    head = rk.ZeroShotHead(
        F.normalize(torch.randn(tower.output_dim, CLASSES), dim=0), list(map(str, range(CLASSES))), 4.6
    )
    cache = drawn(small, rows, 1)
    same = torch.Generator().manual_seed(1)  # as `drawn` chose its rows
    cache.labels = torch.randint(len(small), (rows,), generator=same) % CLASSES
    adapter = rk.ResiDual(tower, bases, "all")
    start, used = time.perf_counter(), time.process_time()
    result = rk.fit(adapter, head, cache)
    found = {
        "images": rows,
        "J": adapter.weight.numel(),
        "K": CLASSES,
        "strengths": len(result.path) - 1,
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - used,
        "evaluations": result.certificate.evaluations if result.certificate else None,
        "freedom": result.freedom,
        "base_accuracy": result.base_accuracy,
        "accuracy": result.fold_accuracy,
    }
    if adamw:
        start = time.perf_counter()
        rk.fit(adapter, head, cache, solver="adamw", epochs=30)
        found["adamw_seconds"] = time.perf_counter() - start
    return found


def of_size(n: int, j: int, k: int, t: int, dim: int = 512) -> dict:
    """Seconds of one evaluation of t fits side by side, and of a whole path, on drawn coefficients."""
    g = torch.Generator().manual_seed(0)
    c, output = torch.randn(n, j, generator=g), torch.randn(n, dim, generator=g)
    basis = torch.randn(j, dim, generator=g) / dim**0.5
    vectors = F.normalize(torch.randn(dim, k, generator=g), dim=0)
    truth = torch.randn(j, generator=g) / j**0.5
    labels = ((output + c @ (truth[:, None] * basis)) @ vectors).argmax(1)
    splits = t // 5
    fold = torch.stack([folds_of(labels, 5, seed) for seed in range(splits)])
    objective = Objective(
        ResidentRows((c,), output), Readout(basis, vectors, 30.0), Targets(labels[None]), torch.ones(j)
    )
    path = Strengths(objective, [FitGroup(0, split) for split in range(splits)], fold, 5)
    tasks, _ = path._tasks([(group, held, 100.0) for group in range(splits) for held in range(5)])
    theta = torch.zeros(t, objective.shape.size)
    once, _ = timed(lambda: objective.evaluate(theta, tasks), 3)
    start = time.process_time()
    found = path.run()
    return {
        "N": n,
        "J": j,
        "K": k,
        "T": t,
        "evaluation_ms": 1e3 * once["cpu_seconds"],
        "gflop": 4e-9 * n * j * min(k, dim) * t,
        "path_seconds": time.process_time() - start,
        "evaluations": sum(one.evaluations for one in found),
        "strengths": len(found[0].candidates),
    }


def sizes() -> list[dict]:
    rows = [of_size(**{name.lower(): value for name, value in SIZES.items()})]
    for name, values in GRID.items():
        for value in values:
            if value != SIZES[name]:
                rows.append(of_size(**{key.lower(): size for key, size in (SIZES | {name: value}).items()}))
    return rows


def table(found: dict) -> str:
    lines = [
        f"{found['cpu']}, torch {found['torch']}, {len(FREEDOMS)} strengths, 5 folds; one thread where no "
        "other number is given.",
        "",
    ]
    lines += [
        "| task | labels | J | fit, s (CPU s) | evaluations | model | fit | tune, s (CPU s) | winner | "
        "accuracy |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|---:|",
    ]
    for one in found["tasks"]:
        lines.append(
            f"| {one['task']} | {one['labels']} | {one['J']:,} | {one['seconds']:.2f} "
            f"({one['cpu_seconds']:.2f}) | {one['evaluations']} | {one['base_accuracy']:.3f} | "
            f"{one['accuracy']:.3f} | {one['tune_seconds']:.2f} ({one['tune_cpu_seconds']:.2f}) | "
            f"{one['tune_winner']} | {one['tune_accuracy']:.3f} |"
        )
    vit = found.get("vit")
    if vit:
        lines += [
            "",
            f"{vit['images']:,} cached ViT-B-32 images, J = {vit['J']:,}, {vit['K']} classes: "
            f"{vit['seconds']:.1f} s on {vit['threads']} threads ({vit['cpu_seconds']:.1f} CPU s) with "
            f"{vit['strengths']} strengths and 5 folds, {vit['evaluations']} evaluations; accuracy of the "
            f"folds {vit['base_accuracy']:.3f} -> {vit['accuracy']:.3f}"
            + (
                f"; 30 epochs of AdamW at one rate {vit['adamw_seconds']:.1f} s."
                if "adamw_seconds" in vit
                else "."
            ),
        ]
    lines += [
        "",
        "| N | J | K | T | one evaluation, CPU ms | GFLOP | GFLOP/s | path, CPU s | evaluations | "
        "strengths |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in found["sizes"]:
        lines.append(
            f"| {one['N']:,} | {one['J']:,} | {one['K']} | {one['T']} | {one['evaluation_ms']:.1f} | "
            f"{one['gflop']:.2f} | {1e3 * one['gflop'] / one['evaluation_ms']:.0f} | "
            f"{one['path_seconds']:.2f} | {one['evaluations']} | {one['strengths']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="without suffix: .json and .md are written")
    parser.add_argument("--photos", type=Path, help="zip of CIFAR-10 as folders")
    parser.add_argument(
        "--parts", nargs="+", default=["tasks", "vit", "sizes"], choices=["tasks", "vit", "sizes"]
    )
    parser.add_argument("--threads", type=int, default=2, help="of the part vit; the others have one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--adamw", action="store_true", help="time 30 epochs of AdamW too")
    options = parser.parse_args()
    file = options.out.with_suffix(".json")
    found = json.loads(file.read_text()) if file.is_file() else {"tasks": [], "sizes": []}
    found |= {"cpu": cpu_name(), "torch": torch.__version__}
    torch.set_num_threads(1)
    if "tasks" in options.parts:
        from benchmarks.peers import tasks

        made = [tasks.digits()] + ([] if options.photos is None else [tasks.photographs(options.photos)])
        found["tasks"] = [of_task(one, options.rounds) for one in made]
    if "vit" in options.parts:
        torch.set_num_threads(options.threads)
        found["vit"] = of_vit(options.images, 512, options.adamw) | {"threads": options.threads}
        torch.set_num_threads(1)
    if "sizes" in options.parts:
        found["sizes"] = sizes()
    write_json(file, found)
    text = table(found)
    options.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
