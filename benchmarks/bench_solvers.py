"""The convex solver beside AdamW on the same forms: accuracy and seconds at 4, 16 and all labels per class.

    python -m benchmarks.bench_solvers --photos cifar10.zip --out benchmarks/results/<device>/solvers

Protocol of bench_peers: the bundled model, digits and photographs, three seeds that choose the labelled
images, test images read once. AdamW tries the six settings of bench_peers with seed 0 and keeps the best on
the validation part, where it also stops early. The convex solver chooses its strength on the same validation
part, or on five folds of the labelled images alone. seconds: processor time of one thread with everything
that is chosen on the way, mean of seeds.

Every row is written as it is found, to <out>.rows.jsonl; the same command resumes.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import residual_kernels as rk
from benchmarks import bench_peers
from benchmarks.cpu_clock import cpu_name
from benchmarks.peers import METHODS, PeerTask, Split, few
from benchmarks.peers.tasks import BATCH
from benchmarks.suite.run import Record
from residual_kernels.files import write_json, write_text

SHOTS: tuple[int | None, ...] = (4, 16, None)
SEEDS = (0, 1, 2)


@torch.no_grad()
def _accuracy(adapter, head, split: Split) -> float:
    runs = (slice(start, start + BATCH) for start in range(0, len(split.labels), BATCH))
    logits = torch.cat([head(adapter.from_units(split.units.terms(rows))) for rows in runs])
    return float((logits.argmax(1) == split.labels).double().mean())


def _convex(form: str, validation: bool) -> Callable:
    def fit(task: PeerTask, train: Split, seed: int) -> tuple[float, float]:
        start = time.process_time()
        adapter = rk.build(form, task.tower, task.bases, init="ones")
        rk.fit(
            adapter,
            task.head,
            train.units,
            task.val.units if validation else None,
            solver="convex",
            seed=seed,
        )
        seconds = time.process_time() - start
        accuracy = _accuracy(adapter, task.head, task.test)
        adapter.detach()
        return accuracy, seconds

    return fit


def _auto(task: PeerTask, train: Split, seed: int) -> tuple[float, float]:
    start = time.process_time()
    found = rk.tune(task.tower, task.bases, task.head, train.units, seed=seed)
    seconds = time.process_time() - start
    accuracy = _accuracy(found.adapter, found.head, task.test)
    found.adapter.detach()
    return accuracy, seconds


def _adamw(form: str) -> Callable:
    """With the best of bench_peers' settings on the validation part, tried once with seed 0."""
    chosen: dict[tuple, tuple[dict, float]] = {}
    method = METHODS[f"ResiDual {form}"]

    def fit(task: PeerTask, train: Split, seed: int) -> tuple[float, float]:
        key = task.name, len(train.labels)
        if key not in chosen:
            start = time.process_time()
            tried = []
            for settings in method.grid:
                fitted = method.fit(task, train, settings, 0)
                tried.append((bench_peers.score(fitted.logits(task.val), task.val), settings))
            best = max(tried, key=lambda one: one[0])[1]
            chosen[key] = best, time.process_time() - start
        settings, tuning = chosen[key]
        start = time.process_time()
        fitted = method.fit(task, train, settings, seed)
        seconds = time.process_time() - start
        return bench_peers.score(fitted.logits(task.test), task.test)[0], tuning + seconds

    return fit


FITS: dict[tuple[str, str], Callable] = {  # (form and solver, what chooses)
    ("fine, AdamW", "validation"): _adamw("fine"),
    ("full, AdamW", "validation"): _adamw("full"),
    ("fine, convex", "validation"): _convex("fine", True),
    ("full, convex", "validation"): _convex("full", True),
    ("anchored, convex", "validation"): _convex("anchored", True),
    ("fine, convex", "folds"): _convex("fine", False),
    ("full, convex", "folds"): _convex("full", False),
    ("anchored, convex", "folds"): _convex("anchored", False),
    ("auto", "folds"): _auto,
}


def run(record: Record, tasks: dict[str, PeerTask], say: Callable = print) -> None:
    """All rows that are not recorded yet. All seeds of a row are found together, so that AdamW tunes once."""
    for task in tasks.values():
        for shots in SHOTS:
            for (method, judged_by), fit in FITS.items():
                key = (task.name, shots, method, judged_by)
                if key in record.done:
                    continue
                found = [fit(task, few(task.train, shots, seed), seed) for seed in SEEDS]
                accuracies, seconds = zip(*found, strict=True)
                row = {
                    "task": task.name,
                    "shots": shots,
                    "method": method,
                    "judged_by": judged_by,
                    "accuracies": list(accuracies),
                    "accuracy": statistics.mean(accuracies),
                    "std": statistics.stdev(accuracies),
                    "seconds": statistics.mean(seconds),
                }
                record.add(key, [row])
                say(
                    f"{task.name:12s} {shots or 'all'!s:>3s} {method:16s} {judged_by:10s} "
                    f"{row['accuracy']:.3f} {row['seconds']:.2f} s"
                )


def about(conditions: dict, rows: list[dict], tasks: dict[str, PeerTask]) -> dict:
    """What is written: conditions, the untouched model, and all rows in the order of the table."""
    base = {
        name: float((task.head(task.test.units.output).argmax(1) == task.test.labels).double().mean())
        for name, task in tasks.items()
    }
    order = [(task, shots, method, judged) for task in tasks for method, judged in FITS for shots in SHOTS]
    found = {(row["task"], row["shots"], row["method"], row["judged_by"]): row for row in rows}
    return {**conditions, "seeds": list(SEEDS), "base": base, "rows": [found[key] for key in order]}


def table(result: dict) -> str:
    """The same numbers as Markdown; the best accuracy of a column in bold."""
    cells = {(row["task"], row["shots"], row["method"], row["judged_by"]): row for row in result["rows"]}
    columns = [(task, shots) for task in result["base"] for shots in SHOTS]
    kinds = list(dict.fromkeys((method, judged) for *_, method, judged in cells))
    best = {column: max(cells[column + kind]["accuracy"] for kind in kinds) for column in columns}
    best = {column: max(value, result["base"][column[0]]) for column, value in best.items()}

    def text(column, value: float) -> str:
        return f"**{value:.3f}**" if value == best[column] else f"{value:.3f}"

    lines = [
        f"{result['cpu']}, one thread, torch {result['torch']}. Accuracy on the test part, mean over "
        f"{len(result['seeds'])} seeds; seconds with everything that is chosen on the way, all labels a "
        "class. Protocol: the head of bench_solvers.py.",
        "",
        "| form and solver | chosen by | "
        + " | ".join(f"{task}, {shots or 'all'} a class" for task, shots in columns)
        + " | "
        + " | ".join(f"seconds, {task}" for task in result["base"])
        + " |",
        "|---" * (2 + len(columns) + len(result["base"])) + "|",
        "| base | – | "
        + " | ".join(text(column, result["base"][column[0]]) for column in columns)
        + " | –" * len(result["base"])
        + " |",
    ]
    for method, judged in kinds:
        own = [text(column, cells[column + (method, judged)]["accuracy"]) for column in columns]
        seconds = [f"{cells[task, None, method, judged]['seconds']:.2f}" for task in result["base"]]
        lines.append(f"| {method} | {judged} | {' | '.join(own + seconds)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="without suffix: .json and .md are written")
    parser.add_argument("--photos", type=Path, help="zip of CIFAR-10 as folders")
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench_peers.load_tasks(options.photos)
    tasks = dict(bench_peers._tasks)
    conditions = {"cpu": cpu_name(), "torch": torch.__version__}
    record = Record(options.out.with_suffix(".rows.jsonl"), conditions)
    run(record, tasks, say=lambda text: print(text, flush=True))
    result = about(conditions, record.rows(), tasks)
    write_json(options.out.with_suffix(".json"), result)
    write_text(options.out.with_suffix(".md"), table(result))
    print(table(result))


if __name__ == "__main__":
    main()
