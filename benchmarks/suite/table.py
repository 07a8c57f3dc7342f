"""What the suite's rows come to: averages, ranks, and every cell that fell below the model.

    python -m benchmarks.suite.table benchmarks/results/<device>/suite.json     # writes the .md beside it

A cell is a task at a count. Its error is of the difference from the model on the same test images: what the
test sample leaves uncertain, and what the seeds do.
"""

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.suite import ours
from residual_kernels.files import write_text

BASE, AUTO = "base", ours.AUTO
ORDER = (
    BASE,
    AUTO,
    *ours.CANDIDATES.values(),
    "fine (paper)",
    "full (paper)",
    "LP++",
    "Tip-Adapter",
    "Tip-Adapter-F",
    "GDA",
    "ProKeR",
    "CLIP-Adapter",
    "LoRA",
    "CLIP-SVD",
    "fine-tuning",
)


@dataclass(frozen=True)
class Cell:
    """One method on one task at one count, over its seeds."""

    accuracy: float
    gain: float
    error: float
    seeds: int
    parameters: float
    seconds: float

    @property
    def below(self) -> bool:
        return self.gain < -self.error

    @classmethod
    def of(cls, rows: list[dict]) -> "Cell":
        gains = [(row["won"] - row["lost"]) / row["test"] for row in rows]
        sampling = statistics.fmean(
            (row["won"] + row["lost"] - (row["won"] - row["lost"]) ** 2 / row["test"]) / row["test"] ** 2
            for row in rows
        )
        seeds = statistics.variance(gains) / len(gains) if len(gains) > 1 else 0.0
        return cls(
            statistics.fmean(row["right"] / row["test"] for row in rows),
            statistics.fmean(gains),
            (sampling + seeds) ** 0.5,
            len(rows),
            statistics.fmean(row["parameters"] for row in rows),
            statistics.fmean(row["seconds"] for row in rows),
        )


def cells(rows: Iterable[dict]) -> dict[tuple[str, int | None, str], Cell]:
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault((row["task"], row["shots"], row["method"]), []).append(row)
    return {key: Cell.of(own) for key, own in found.items()}


def about(conditions: dict, rows: list[dict], tasks: list[str]) -> dict:
    """What is written: conditions, tasks and every row of the protocol,
    without what `tune` judged on the way."""
    from benchmarks.suite.run import METHODS
    from benchmarks.suite.tasks import RECIPES

    return {
        **conditions,
        "tasks": {
            name: {"classes": len(RECIPES[name].names), "about": RECIPES[name].about} for name in tasks
        },
        "sources": {name: method.source for name, method in METHODS.items()},
        "rows": [
            {key: value for key, value in row.items() if key != "table"}
            for row in rows
            if row["task"] in tasks
            and (row["method"] not in METHODS or (row["shots"], row["seed"]) in METHODS[row["method"]].runs())
        ],
    }


def ranks(found: dict, tasks: list[str], shots, methods: list[str]) -> dict[str, float]:
    """The mean place of each method among those that ran everywhere at this count; equals share a place."""
    total = dict.fromkeys(methods, 0.0)
    for task in tasks:
        values = {name: found[task, shots, name].accuracy for name in methods}
        for name in methods:
            better = sum(value > values[name] + 1e-12 for value in values.values())
            same = sum(abs(value - values[name]) <= 1e-12 for value in values.values())
            total[name] += better + (same + 1) / 2
    return {name: value / len(tasks) for name, value in total.items()}


def by_task(result: dict, names: tuple[str, ...]) -> list[str]:
    """A line for each task: accuracies of the model and of some methods at each count of labels."""
    found = cells(result["rows"])
    counts = sorted({shots for _, shots, name in found if name == AUTO}, key=lambda n: (n is None, n))

    names = tuple(
        name for name in names if all((task, n, name) in found for task in result["tasks"] for n in counts)
    )

    def texts(task: str, name: str) -> str:
        values = [f"{found[task, n, name].accuracy:.3f}".lstrip("0") for n in counts]
        return values[0] if name == BASE and len(set(values)) == 1 else " ".join(values)

    heads = ["task", "the model", *(name.replace(" (the default)", "") for name in names)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return lines + [
        "| " + " | ".join([task, *(texts(task, name) for name in (BASE, *names))]) + " |"
        for task in result["tasks"]
    ]


def labels_per_class(count: int | None) -> str:
    """A count of labels as a heading; None is all of them."""
    return "all labels" if count is None else f"{count} label{'s' * (count > 1)} per class"


def by_methods(title: str, tasks: Sequence[str]) -> list[str]:
    """The head of a table with a row for each method and a column for each task."""
    return ["", f"**{title}**", "", "| method | " + " | ".join(tasks) + " |", "|---" * (len(tasks) + 1) + "|"]


def markdown(result: dict) -> str:
    tasks = list(result["tasks"])
    found = cells(result["rows"])
    counts = sorted({shots for _, shots, _ in found}, key=lambda n: (n is None, n))
    names = [name for name in ORDER if any(key[2] == name for key in found)]

    def whole(name: str, shots) -> bool:
        return all((task, shots, name) in found for task in tasks)

    lines = [
        f"{result['cpu']}, one thread, torch {result['torch']}. {len(tasks)} tasks, "
        f"{'the model ' + result['model'] if 'model' in result else 'the bundled model'}. "
        "Accuracy on test images, averaged over tasks; seconds are processor time of one fit with all its "
        "tuning, averaged over tasks, at the largest count run. Protocol: the head of "
        "`benchmarks/suite/run.py`." + result.get("note", ""),
        "",
        "| method | "
        + " | ".join(map(labels_per_class, counts))
        + " | mean rank at "
        + " / ".join(str(n or "all") for n in counts)
        + " | seeds | learned numbers | seconds | worst cell against base | cells below base by more "
        "than one error |",
        "|---" * (len(counts) + 7) + "|",
    ]
    best = {
        n: max(
            statistics.fmean(found[task, n, name].accuracy for task in tasks)
            for name in names
            if whole(name, n)
        )
        for n in counts
    }
    every_rank = {n: ranks(found, tasks, n, [name for name in names if whole(name, n)]) for n in counts}
    for name in names:
        own = {key: cell for key, cell in found.items() if key[2] == name and key[0] in tasks}
        texts, last = [], None
        for n in counts:
            if not whole(name, n):
                texts.append("–")
                continue
            mean = statistics.fmean(found[task, n, name].accuracy for task in tasks)
            texts.append(f"**{mean:.3f}**" if mean == best[n] else f"{mean:.3f}")
            last = n
        if last is None and texts.count("–") == len(counts):
            continue
        at = [found[task, last, name] for task in tasks]
        place = " / ".join(f"{every_rank[n][name]:.1f}" if name in every_rank[n] else "–" for n in counts)
        seeds = sorted({cell.seeds for cell in own.values()})
        numbers = sorted({round(cell.parameters) for cell in at})
        told = f"{numbers[0]:,}" if len(numbers) == 1 else f"{numbers[0]:,} – {numbers[-1]:,}"
        worst = min(own.items(), key=lambda one: one[1].gain)
        where = f"{worst[0][0]}, {worst[0][1] or 'all'}"
        fall = "–" if name == BASE else f"{100 * worst[1].gain:+.1f} points ({where})"
        below = "–" if name == BASE else f"{sum(cell.below for cell in own.values())} of {len(own)}"
        lines.append(
            f"| {name} | {' | '.join(texts)} | {place} | {', '.join(map(str, seeds))} | {told} | "
            f"{statistics.fmean(cell.seconds for cell in at):.2f} | {fall} | {below} |"
        )
    for n in counts:
        compared = [name for name in names if whole(name, n)]
        lines += by_methods(labels_per_class(n).capitalize(), tasks)
        top = {task: max(found[task, n, name].accuracy for name in compared) for task in tasks}
        for name in compared:
            row = []
            for task in tasks:
                cell = found[task, n, name]
                text = f"{cell.accuracy:.3f}" + (" ↓" if name != BASE and cell.below else "")
                row.append(f"**{text}**" if cell.accuracy == top[task] else text)
            lines.append(f"| {name} | {' | '.join(row)} |")
    lines += [
        "",
        f"**This library's methods by task**, at {', '.join(str(n or 'all') for n in counts)} "
        "labels per class",
        "",
        *by_task(result, (AUTO, *ours.CANDIDATES.values())),
        "",
        "↓ below the model by more than one error.",
        "",
        "Tasks: "
        + "; ".join(
            f"{name}: {one['about']}, {one['classes']} classes" for name, one in result["tasks"].items()
        )
        + ".",
        "",
        "Sources: "
        + "; ".join(f"{name}: {source}" for name, source in result["sources"].items() if name != "contest")
        + ".",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the table of a suite's results beside them.")
    parser.add_argument("results", type=Path)
    path = parser.parse_args().results
    text = markdown(json.loads(path.read_text()))
    write_text(path.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
