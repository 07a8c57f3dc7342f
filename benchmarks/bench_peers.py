"""ResiDual and its peers on the same work: accuracy from 4, 16 and all labelled images a class,
learned numbers, time.

    python -m benchmarks.bench_peers --photos cifar10.zip --out benchmarks/results/<device>/peers

Protocol. The bundled model; digits it never saw (scikit-learn's, in thirds), and with --photos CIFAR-10's
photographs (100, 60 and 240 a class, all from the zip's test half: the model was trained on its train half).
Every method sees the same labelled images, without augmentation, and the same whole validation part. Its grid
(benchmarks/peers: six configurations where there is anything to choose) is tried with seed 0; the best by
validation accuracy, then loss, is fitted with every seed, which chooses the labelled images and what is drawn
at random. The test part is read once per seed, at the end. The class vectors are the text's for everyone but
the linear probe.

seconds: one fit with the chosen configuration on one thread (mean over seeds); methods on cached units or
outputs need the encoding once in addition, which is told. memory: growth of the resident peak of a fresh
process during its first fit (Linux).

Every row is written as it is found, to <out>.rows.jsonl; the same command goes on after the last one, and
takes the file away when all are there.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch.nn import functional as F

from benchmarks.cpu_clock import cpu_name
from benchmarks.peers import METHODS, PeerTask, Split, digits, few, photographs
from residual_kernels.files import write_json

SHOTS: tuple[int | None, ...] = (4, 16, None)
SEEDS = (0, 1, 2)
_tasks: dict[str, PeerTask] = {}  # of this process


def load_tasks(photos: Path | None) -> None:
    """Loads and encodes the tasks, on one thread; and imports what fits import, which is no fit's memory."""
    import peft  # noqa: F401
    import schedulefree  # noqa: F401
    import sklearn.linear_model  # noqa: F401

    torch.set_num_threads(1)
    tasks = [digits()] + ([] if photos is None else [photographs(photos)])
    _tasks.update({task.name: task for task in tasks})


class PeakMemory:
    """Growth of this process's resident peak while the block runs, in MiB;
    None where the system does not tell."""

    def __enter__(self) -> "PeakMemory":
        self.mib: float | None = None
        self._start = self._reset()
        return self

    def __exit__(self, *exception) -> None:
        if self._start is not None:
            self.mib = max(0.0, (self._status("VmHWM") - self._start) / 1024)

    def _reset(self) -> int | None:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now
        except OSError:
            return None
        return self._status("VmRSS")

    @staticmethod
    def _status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field))


@torch.no_grad()
def score(logits: torch.Tensor, split: Split) -> tuple[float, float]:
    """Accuracy and negative cross-entropy: what is compared, in this order."""
    return (
        float((logits.argmax(1) == split.labels).double().mean()),
        -float(F.cross_entropy(logits, split.labels)),
    )


def cell(task_name: str, shots: int | None, name: str, seeds: Iterable[int] = SEEDS) -> dict:
    """One row of the result: a method on a task with so many labelled images a class."""
    task, method = _tasks[task_name], METHODS[name]
    tried: list[tuple[tuple[float, float], dict]] = []
    memory = None
    for settings in method.grid:
        train = few(task.train, shots, seed=0)
        with PeakMemory() as peak:
            fitted = method.fit(task, train, settings, 0)
        memory = peak.mib if not tried else memory
        tried.append((score(fitted.logits(task.val), task.val), settings))
    (validation, _), chosen = max(tried, key=lambda entry: entry[0])
    accuracies, seconds, parameters = [], [], 0
    for seed in seeds:
        train = few(task.train, shots, seed)
        start = time.perf_counter()
        fitted = method.fit(task, train, chosen, seed)
        seconds.append(time.perf_counter() - start)
        parameters = fitted.parameters
        accuracies.append(score(fitted.logits(task.test), task.test)[0])
    return {
        "task": task_name,
        "shots": shots,
        "method": name,
        "accuracies": accuracies,
        "accuracy": statistics.mean(accuracies),
        "std": statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
        "parameters": parameters,
        "seconds": statistics.mean(seconds),
        "memory_mib": memory,
        "settings": chosen,
        "validation_accuracy": validation,
        "tried": [{"settings": settings, "validation_accuracy": found[0]} for found, settings in tried],
    }


def _cell(arguments: tuple) -> dict:
    return cell(*arguments)


def _key(row: dict) -> tuple:
    return row["task"], row["shots"], row["method"]


def found_rows(kept: Path, conditions: dict) -> list[dict]:
    """The rows of a run that was cut short, under the same conditions (the file's first line);
    none without a file."""
    head = json.dumps({"conditions": conditions}) + "\n"
    lines = kept.read_text().splitlines(keepends=True) if kept.is_file() else [head]
    if lines[0] != head:
        raise SystemExit(
            f"{kept} holds rows found under other conditions ({lines[0].strip()[:200]} ...); remove it to "
            "start anew"
        )
    whole = [line for line in lines if line.endswith("\n")]  # a killed run may have cut its last one
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text("".join(whole))
    return [json.loads(line) for line in whole[1:]]


def run(
    photos: Path | None,
    methods: list[str],
    shots: list,
    seeds: list,
    workers: int,
    kept: Path,
    say: Callable = print,
) -> dict:
    """All rows.

    Every cell in a fresh process of one thread, `workers` of them at a time; each appended to `kept`.
    """
    names = ["digits"] + ([] if photos is None else ["photographs"])
    conditions = {"cpu": cpu_name(), "torch": torch.__version__, "workers": workers, "seeds": list(seeds)}
    grids = {name: METHODS[name].grid for name in METHODS}
    rows = found_rows(kept, {**conditions, "grids": grids})
    found = set(map(_key, rows))
    # what takes longest goes first
    cells = [(task, count, name) for name in methods[::-1] for count in shots for task in names]
    left = [each for each in cells if each not in found]
    start = time.perf_counter()

    def record(row: dict) -> None:
        rows.append(row)
        with kept.open("a") as file:
            file.write(json.dumps(row) + "\n")
        say(
            f"[{time.perf_counter() - start:6.1f} s] {row['task']:12s} {row['shots'] or 'all'!s:>3s} "
            f"{row['method']:16s} {row['accuracy']:.3f} +- {row['std']:.3f}  {row['settings']}"
        )

    load_tasks(photos)
    with multiprocessing.get_context("fork").Pool(workers, maxtasksperchild=1) as pool:
        for row in pool.imap_unordered(_cell, [(*each, seeds) for each in left]):
            record(row)
    order = [(task, count, name) for task in names for count in shots for name in methods]
    rows = sorted((row for row in rows if _key(row) in order), key=lambda row: order.index(_key(row)))
    return {
        **conditions,
        "tasks": {
            name: {
                "train": len(task.train.labels),
                "val": len(task.val.labels),
                "test": len(task.test.labels),
                "encoding_seconds": task.encoding_seconds,
            }
            for name, task in _tasks.items()
        },
        "methods": {name: METHODS[name].source for name in methods},
        "rows": rows,
    }


def table(result: dict) -> str:
    """The same numbers as Markdown: a table for every task, the best accuracy of a column in bold."""
    lines = [
        f"{result['cpu']}, one thread a fit, {result['workers']} at a time, torch {result['torch']}. "
        f"Accuracy on the test part, mean ± standard deviation over {len(result['seeds'])} seeds. "
        "Protocol: the head of bench_peers.py."
    ]
    for task, about in result["tasks"].items():
        rows = [row for row in result["rows"] if row["task"] == task]
        shots = list(dict.fromkeys(row["shots"] for row in rows))
        heads = [f"{count} labels per class" if count else "all labels" for count in shots]
        lines += [
            "",
            f"**{task}**: {about['train']} labelled images in all, {about['val']} for validation, "
            f"{about['test']} for the test. Encoding train and validation took "
            f"{about['encoding_seconds']:.1f} s.",
            "",
            "| method | " + " | ".join(heads) + " | learned numbers | seconds | memory, MiB |",
            "|---" * (len(shots) + 4) + "|",
        ]
        best = {count: max(row["accuracy"] for row in rows if row["shots"] == count) for count in shots}
        for name in result["methods"]:
            own = {row["shots"]: row for row in rows if row["method"] == name}
            cells = []
            for count in shots:
                row = own[count]
                text = f"{row['accuracy']:.3f} ± {row['std']:.3f}"
                cells.append(f"**{text}**" if row["accuracy"] == best[count] else text)
            last = own[shots[-1]]
            memory = "–" if last["memory_mib"] is None else f"{last['memory_mib']:.0f}"
            lines.append(
                f"| {name} | {' | '.join(cells)} | {last['parameters']:,} | {last['seconds']:.2f} | "
                f"{memory} |"
            )
    sources = "; ".join(f"{name}: {source}" for name, source in result["methods"].items())
    lines += [
        "",
        "Learned numbers, seconds and memory are those of the last accuracy column.",
        "",
        f"Sources. {sources}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="path of the results, without ending")
    parser.add_argument("--photos", type=Path, help="ImageFolder in a zip: train/<class>/*, test/<class>/*")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--shots", nargs="+", type=int, default=[4, 16, 0], help="a class; 0 for all")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--workers", type=int, default=2, help="processes at a time, of one thread each")
    arguments = parser.parse_args()
    kept = arguments.out.with_suffix(".rows.jsonl")
    result = run(
        arguments.photos,
        arguments.methods,
        [count or None for count in arguments.shots],
        arguments.seeds,
        arguments.workers,
        kept,
        say=lambda text: print(text, flush=True),
    )
    write_json(arguments.out.with_suffix(".json"), result)
    kept.unlink()
    text = table(json.loads(arguments.out.with_suffix(".json").read_text()))
    arguments.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
