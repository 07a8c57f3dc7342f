"""Classes that nobody labelled: fitted on half the classes, read on the other half by their names.

    python -m benchmarks.suite.unseen --photographs cifar10.zip --out benchmarks/results/<device>/unseen

Every second class is labelled, 16 images each. Test images of these classes are read among their names
(base), those of the others among theirs (novel), as the few-shot literature does it, with the harmonic mean
of both. The tasks are the suite's that have a text and at least four classes; with fewer than four labelled
ones, classes cannot be folds, and images are. A linear probe, Tip-Adapter and their like know the labelled
classes alone and cannot stand in this table; where `auto` moves class vectors, those of novel classes stay
the text's.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import residual_kernels as rk
from benchmarks.cpu_clock import cpu_name
from benchmarks.suite import tasks, through_tower
from benchmarks.suite.ours import AUTO
from benchmarks.suite.run import Record
from residual_kernels.files import write_json, write_text

SHOTS, SEEDS = 16, (0, 1, 2)
NAMED = tuple(
    name for name, one in tasks.RECIPES.items() if one.templates is not None and len(one.names) >= 4
)


def _tuned(**options):
    """What `tune` gives, as the outputs of test images and the head of the labelled classes."""

    def fit(seen, train, seed: int):
        if options.get("folds") == "classes" and len(seen.names) < 4:
            return _tuned(candidates=("anchored",))(seen, train, seed)
        found = rk.tune(seen.tower, seen.bases, seen.text_head, train.units, seed=seed, **options)

        @torch.no_grad()
        def outputs(split):
            runs = (slice(start, start + 256) for start in range(0, len(split.labels), 256))
            return torch.cat([found.adapter.from_units(split.units.terms(rows)) for rows in runs])

        return outputs, found.head, found.winner, found.adapter.detach

    return fit


def _through_tower(name: str):
    def fit(seen, train, seed: int):
        made = getattr(through_tower, name)(seen, train, seen.text_head, seed)
        return made.outputs, seen.text_head, name, lambda: None

    return fit


METHODS: dict[str, tuple[Callable | None, tuple[int, ...]]] = {
    "base": (None, SEEDS),
    AUTO: (_tuned(), SEEDS),
    "anchored, images as folds": (_tuned(candidates=("anchored",)), SEEDS),
    "anchored, classes as folds": (_tuned(folds="classes"), SEEDS),
    "LoRA": (_through_tower("lora"), (0,)),
    "CLIP-SVD": (_through_tower("clip_svd"), (0,)),
    "fine-tuning": (_through_tower("fine_tuning"), (0,)),
}


def _row(task: tasks.SuiteTask, name: str, seed: int) -> dict:
    """Right answers on labelled and on novel classes, with those of the untouched model."""
    count = len(task.names)
    seen, novel = (task.of_classes(range(start, count, 2)) for start in (0, 1))
    train = tasks.few(seen.train, SHOTS, seed)
    fit = METHODS[name][0]
    start = time.process_time()
    row = {"task": task.name, "method": name, "seed": seed}
    if fit is not None:
        outputs, head, winner, done = fit(seen, train, seed)
        row |= {"seconds": time.process_time() - start, "winner": winner}
    for part, half in (("base", seen), ("novel", novel)):
        truth = half.test.labels
        words = half.head(half.train)
        before = words(half.test.units.output).argmax(1) == truth
        if fit is None:
            after = before
        else:
            own = head if part == "base" else words
            after = own(outputs(half.test)).argmax(1) == truth
        row[part] = {
            "test": len(truth),
            "right": int(after.sum()),
            "base_right": int(before.sum()),
            "won": int((after & ~before).sum()),
            "lost": int((before & ~after).sum()),
        }
    if fit is not None:
        done()
    return row


def run(
    record: Record, archive: Path | None, chosen: list[str], methods: list[str], budget: float, say
) -> bool:
    start = time.process_time()
    for name in methods:
        for task_name in chosen:
            for seed in METHODS[name][1]:
                key = (task_name, seed, name)
                if key in record.done:
                    continue
                if time.process_time() - start > budget:
                    return False
                row = _row(tasks.task(task_name, archive), name, seed)
                record.add(key, [row])
                say(
                    f"{task_name:14s} {seed} {name:28s} "
                    + "  ".join(
                        f"{part} {row[part]['right'] / row[part]['test']:.3f} "
                        f"({row[part]['base_right'] / row[part]['test']:.3f})"
                        for part in ("base", "novel")
                    )
                )
    return True


def markdown(result: dict) -> str:
    """A table of averages, and one of novel classes by task."""
    from benchmarks.suite.table import Cell, by_methods

    names, chosen = list(result["methods"]), result["tasks"]
    cells = {
        (task, name, part): Cell.of(
            [
                {**row[part], "parameters": 0, "seconds": row.get("seconds", 0.0)}
                for row in result["rows"]
                if row["task"] == task and row["method"] == name
            ]
        )
        for task in chosen
        for name in names
        for part in ("base", "novel")
    }
    lines = [
        f"{result['cpu']}, one thread, torch {result['torch']}. {len(chosen)} tasks, {SHOTS} labels for "
        "each of half the classes. Protocol: the head of `benchmarks/suite/unseen.py`.",
        "",
        "| method | labelled classes | novel classes | harmonic mean | novel below the model by more than "
        "one error | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for name in names:
        base, novel = (
            statistics.fmean(cells[task, name, part].accuracy for task in chosen)
            for part in ("base", "novel")
        )
        below = [task for task in chosen if cells[task, name, "novel"].below]
        fall = (
            "–"
            if name == "base"
            else f"{len(below)} of {len(chosen)}" + (f" ({', '.join(below)})" if below else "")
        )
        harmonic = 2 * base * novel / (base + novel)
        seeds = cells[chosen[0], name, "base"].seeds
        lines.append(f"| {name} | {base:.3f} | {novel:.3f} | {harmonic:.3f} | {fall} | {seeds} |")
    for part in ("base", "novel"):
        title = "Labelled" if part == "base" else "Novel"
        lines += by_methods(f"{title} classes", chosen)
        for name in names:
            own = [cells[task, name, part] for task in chosen]
            row = [f"{one.accuracy:.3f}" + (" ↓" if name != "base" and one.below else "") for one in own]
            lines.append(f"| {name} | {' | '.join(row)} |")
    return "\n".join([*lines, "", "↓ below the model by more than one error."]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="path of the results, without ending")
    parser.add_argument("--photographs", type=Path)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument(
        "--budget", type=float, default=float("inf"), help="stop after SECONDS of processor time"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [name for name in NAMED if name in tasks.names(arguments.photographs)]
    conditions = {"cpu": cpu_name(), "torch": torch.__version__}
    record = Record(arguments.out.with_suffix(".rows.jsonl"), conditions)
    whole = run(
        record,
        arguments.photographs,
        chosen,
        arguments.methods,
        arguments.budget,
        say=lambda text: print(text, flush=True),
    )
    if not whole:
        print("stopped at the budget; the same command resumes")
        return
    result = {**conditions, "tasks": chosen, "methods": arguments.methods, "rows": record.rows()}
    write_json(arguments.out.with_suffix(".json"), result)
    text = markdown(json.loads(arguments.out.with_suffix(".json").read_text()))
    write_text(arguments.out.with_suffix(".md"), text)
    print(text)
    print("done")


if __name__ == "__main__":
    main()
