"""What the analyses cost: TwoNN against the textbook, and every table of a 12 x 12-head tower.

    python -m benchmarks.bench_analysis --out benchmarks/results/<device>/analysis

TwoNN: points of a head in its C+2 coordinates, float32, against nearest neighbours in the D outputs (as the
textbook has them) and in the same C+2 coordinates. `cdist` is torch.cdist with its default (distances from a
product: in float32 wrong near duplicates) or without ("exact"), the whole N x N matrix, and topk;
`scikit-learn` is NearestNeighbors(algorithm="brute"), float32. Variants take turns; ratios are of medians of
one run.

Whole analysis: ViT-B-32 with random weights (144 heads) on images of random coordinates as its heads give
them, ten classes, the bundled phrases as many random vectors. Report: the page and pictures of an adapter of
ViT-L-14 (384 heads) on such a cache.
"""

import argparse
import resource
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import open_clip
import torch

import residual_kernels as rk
from benchmarks.cpu_clock import cpu_name, interleaved
from residual_kernels import towers
from residual_kernels.analysis import TextDictionary, analyze, nearest_two
from residual_kernels.analysis.words import bundled_phrases
from residual_kernels.files import write_json
from residual_kernels.report import gather, write_report
from residual_kernels.report.facts import Source

D, SIZE = 512, 66


def head_points(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Points [count, 66] with a falling spectrum and a mean, and the same in 512 outputs."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, SIZE + 1, dtype=torch.float32) ** -0.7
    points = torch.randn(count, SIZE, generator=generator) * scale + 0.3
    frame = torch.linalg.qr(torch.randn(D, SIZE, generator=generator)).Q
    return points, points @ frame.T


def cdist_two(points: torch.Tensor, mode: str) -> torch.Tensor:
    distances = torch.cdist(points, points, compute_mode=mode)
    distances.fill_diagonal_(float("inf"))
    return distances.topk(2, largest=False, sorted=True).values


def sklearn_two(points: torch.Tensor):
    from sklearn.neighbors import NearestNeighbors

    return (
        NearestNeighbors(n_neighbors=3, algorithm="brute").fit(points.numpy()).kneighbors(points.numpy())[0]
    )


def two_nn_times(count: int, rounds: int) -> dict:
    """Seconds of one head's nearest two neighbours."""
    short, wide = head_points(count)
    fast, exact = "use_mm_for_euclid_dist_if_necessary", "donot_use_mm_for_euclid_dist"
    variants = {
        "ours, C+2 coordinates, exact": lambda: nearest_two(short),
        "ours, D outputs, exact": lambda: nearest_two(wide),
        "cdist + topk, D outputs": lambda: cdist_two(wide, fast),
        "cdist + topk, D outputs, float64": lambda: cdist_two(wide.double(), fast),
        "cdist + topk, C+2 coordinates": lambda: cdist_two(short, fast),
        "cdist exact + topk, D outputs": lambda: cdist_two(wide, exact),
        "scikit-learn, D outputs": lambda: sklearn_two(wide),
        "scikit-learn, C+2 coordinates": lambda: sklearn_two(short),
    }
    times = interleaved(variants, rounds)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    ours = medians["ours, C+2 coordinates, exact"]
    rows = {
        name: {"seconds": seconds, "median": medians[name], "times_ours": medians[name] / ours}
        for name, seconds in times.items()
    }
    return {"points": count, "rows": rows}


def two_nn_large(count: int) -> dict:
    """One head of many points: seconds, and how far the peak of the process's memory rose beyond the
    points."""
    short, _ = head_points(count)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    first, second = nearest_two(short)
    seconds = time.perf_counter() - start
    peak = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert ((first > 0) & (second >= first)).all()
    return {"points": count, "seconds": seconds, "peak_bytes": peak, "textbook_bytes": 8 * count * count}


def random_cache(tower, count: int, classes: int) -> rk.UnitCache:
    """A cache as `encode` would leave it, from random head inputs with a falling spectrum."""
    view = towers.view(tower)
    generator = torch.Generator().manual_seed(0)
    heads = view.layout.layers * view.layout.heads
    labels = torch.randint(classes, (count,), generator=generator)
    centres = torch.randn(classes, heads, view.head_width, generator=generator)
    scale = torch.arange(1, view.head_width + 1, dtype=torch.float32) ** -0.7
    z = torch.randn(count, heads, view.head_width, generator=generator)
    z.add_(centres[labels], alpha=0.3).mul_(scale)
    s = 1 + 0.1 * torch.rand(count, generator=generator)
    m = 0.05 * torch.randn(count, generator=generator)
    maps = view.maps("head")
    rows = maps.rows().float()
    output = torch.zeros(count, view.dim)
    for start in range(0, count, 1024):
        part = slice(start, start + 1024)
        wide = s[part, None, None] * z[part]
        output[part] = wide.flatten(1) @ rows[:, :-2].flatten(0, 1)
        output[part] += s[part, None] * rows[:, -2].sum(0) + (s * m)[part, None] * rows[:, -1].sum(0)
    names = [f"class {k}" for k in range(classes)]
    return rk.UnitCache({"head": z}, s, m, output, labels, torch.arange(count), towers.checksum(tower), names)


def whole(count: int, classes: int, name: str = "ViT-B-32") -> dict:
    """Seconds of every step of `analyze` from a cache in memory."""
    torch.manual_seed(0)
    tower = open_clip.create_model(name).eval().visual
    cache = random_cache(tower, count, classes)
    head = rk.ZeroShotHead.from_prototypes(cache)
    phrases = bundled_phrases()
    vectors = torch.randn(len(phrases), towers.view(tower).dim, generator=torch.Generator().manual_seed(1))
    start = time.perf_counter()
    done = analyze(tower, cache, head, dictionary=TextDictionary(phrases, vectors))
    seconds = time.perf_counter() - start
    return {"model": name, "images": count, "classes": classes, "seconds": seconds, "steps": done.seconds}


def report_times(count: int, name: str = "ViT-L-14", classes: int = 10) -> dict:
    """Seconds of every step of a report of an adapter of `name`, random weights, with its pictures."""
    torch.manual_seed(0)
    tower = open_clip.create_model(name).eval().visual
    cache = random_cache(tower, count, classes)
    bases = rk.fit_bases(tower, cache).truncate(energy=0.90)
    adapter = rk.ResiDual(tower, bases, rest="all", init="normal")
    begun: list[tuple[str, float]] = []

    def say(step: str) -> None:
        begun.append((step, time.perf_counter()))

    facts = gather(
        adapter, rk.ZeroShotHead.from_prototypes(cache), cache, Source(name, "random", ""), say=say
    )
    with tempfile.TemporaryDirectory() as folder:
        say("writing the page and its pictures")
        write_report(facts, Path(folder) / "report.html", cache)
        say("end")
    steps = {name: later - start for (name, start), (_, later) in pairwise(begun)}
    return {"model": name, "images": count, "seconds": begun[-1][1] - begun[0][1], "steps": steps}


def markdown(results: dict) -> str:
    lines = [
        f"# Analyses on {results['device']}, {results['threads']} threads, torch {results['torch']}",
        "",
        f"Command: `{results['command']}`",
        "",
        f"## TwoNN, one head of {results['two_nn']['points']:,} points",
        "",
        "| nearest two neighbours | seconds | times ours |",
        "|---|---|---|",
    ]
    for name, row in results["two_nn"]["rows"].items():
        lines.append(f"| {name} | {row['median']:.3f} | {row['times_ours']:.1f} |")
    large = results["two_nn_large"]
    lines += [
        "",
        f"{large['points']:,} points: {large['seconds']:.1f} s and {large['peak_bytes'] / 1e6:.0f} MB "
        f"beside them; a float64 matrix of all distances would take {large['textbook_bytes'] / 1e9:.0f} GB.",
        "",
        f"## Every table: {results['whole']['model']}, {results['whole']['images']:,} images, "
        f"{results['whole']['classes']} classes: {results['whole']['seconds']:.1f} s",
        "",
        "| step | seconds |",
        "|---|---|",
    ]
    lines += [f"| {name} | {seconds:.2f} |" for name, seconds in results["whole"]["steps"].items()]
    report = results["report"]
    lines += [
        "",
        f"## A report: {report['model']}, {report['images']:,} images: {report['seconds']:.1f} s",
        "",
        "| step | seconds |",
        "|---|---|",
    ]
    lines += [f"| {name} | {seconds:.2f} |" for name, seconds in report["steps"].items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--points", type=int, default=5000)
    parser.add_argument("--large", type=int, default=50_000)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--report", type=int, default=1000, help="images of the report")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="path without ending; .json and .md are written")
    arguments = parser.parse_args()
    results = {
        "command": " ".join(["python -m benchmarks.bench_analysis", *sys.argv[1:]]),
        "device": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "two_nn_large": two_nn_large(arguments.large),  # first, so that the peak is its own
        "two_nn": two_nn_times(arguments.points, arguments.rounds),
        "whole": whole(arguments.images, arguments.classes),
        "report": report_times(arguments.report),
    }
    text = markdown(results)
    print(text)
    if arguments.out is not None:
        write_json(arguments.out.with_suffix(".json"), results)
        arguments.out.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
