"""Twelve small tasks, few labels, everybody's recipe: accuracy, numbers, seconds,
and who falls below the model.

    python -m benchmarks.suite.run --photographs cifar10.zip --out benchmarks/results/<device>/suite

Protocol. The bundled model; 1, 4, 16 and all labelled images a class; five seeds, which choose the images and
what is drawn at random; with all labels one. Nobody sees test labels, nobody has validation images, nobody
augments: what has to be chosen is chosen by folds of the labelled images, or is the paper's fixed value
(`peers.py` says which). Bases come from drawings (and, where the task shows photographs, photographs of the
half that is not tested), never from a task. Class vectors are the text's, or means of the labelled images
where there is no text. Methods that train the tower cost a thousand times the others' time; they run at 16
labels with one seed.

Without --photographs the tasks that show photographs are left out. --model runs the suite on another model.

Every fit is a line of <out>.rows.jsonl, written whole or not at all; the same command resumes after the last
one. seconds: processor time of one thread.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.cpu_clock import cpu_name
from benchmarks.peers.tasks import Fitted
from benchmarks.suite import ours, peers, tasks, through_tower
from benchmarks.suite.rates import RATES
from residual_kernels.files import write_json

SHOTS: tuple[int | None, ...] = (1, 4, 16, None)
SEEDS = (0, 1, 2, 3, 4)
SEEDS_OF_ALL = 1  # with all labels the images are the same, and only folds and random draws would differ
CONTEST = "contest"  # one fit of `ours.contest` gives several rows


@dataclass(frozen=True)
class Contender:
    """`fit(task, train, head, seed)`, where it is from, and at which counts and seeds it is run."""

    fit: Callable[..., Any]
    source: str = field(repr=False)
    shots: tuple[int | None, ...] = SHOTS
    seeds: tuple[int, ...] = SEEDS

    def runs(self) -> list[tuple[int | None, int]]:
        """(count, seed) of every fit."""
        return [(n, seed) for n in self.shots for seed in self.seeds[: SEEDS_OF_ALL if n is None else None]]


METHODS = {
    "base": Contender(peers.base, "the untouched model"),
    CONTEST: Contender(ours.contest, "this library"),
    "LP++": Contender(peers.lp_plus_plus, "Huang et al. 2024, arXiv 2404.02285"),
    "Tip-Adapter": Contender(peers.tip_adapter, "Zhang et al. 2022, arXiv 2207.09519"),
    "Tip-Adapter-F": Contender(peers.tip_adapter_f, "Zhang et al. 2022, arXiv 2207.09519"),
    "GDA": Contender(peers.gda, "Wang et al. 2024, arXiv 2402.04087"),
    "ProKeR": Contender(peers.proker, "Bendou et al. 2025, arXiv 2501.11175"),
    "CLIP-Adapter": Contender(peers.clip_adapter, "Gao et al. 2021, arXiv 2110.04544", seeds=(0, 1, 2)),
    "fine (paper)": Contender(ours.paper("fine"), "Basile et al. 2025, arXiv 2411.00246", seeds=(0, 1, 2)),
    "full (paper)": Contender(ours.paper("full"), "Basile et al. 2025, arXiv 2411.00246", seeds=(0, 1, 2)),
    "LoRA": Contender(
        through_tower.lora, "Zanella and Ben Ayed 2024, arXiv 2405.18541", shots=(16,), seeds=(0,)
    ),
    "CLIP-SVD": Contender(
        through_tower.clip_svd, "Koleilat et al. 2025, arXiv 2509.03740", shots=(16,), seeds=(0,)
    ),
    "fine-tuning": Contender(through_tower.fine_tuning, "all of the image tower", shots=(16,), seeds=(0,)),
}


def _row(task, shots, seed, name: str, fitted: Fitted, base: torch.Tensor, more: dict) -> dict:
    """What is recorded of one fit; `base` is which test images the untouched model labels right."""
    right = fitted.logits(task.test).argmax(1) == task.test.labels
    return {
        "task": task.name,
        "shots": shots,
        "seed": seed,
        "method": name,
        "test": len(right),
        "right": int(right.sum()),
        "base_right": int(base.sum()),
        "won": int((right & ~base).sum()),
        "lost": int((base & ~right).sum()),
        "parameters": fitted.parameters,
        **more,
    }


def fitted_rows(task: tasks.SuiteTask, shots: int | None, seed: int, name: str) -> list[dict]:
    """The row, or the rows, of one method on one task with one choice of labelled images."""
    train = tasks.few(task.train, shots, seed)
    head = task.head(train)
    base = head(task.test.units.output).argmax(1) == task.test.labels
    start = time.process_time()
    found = METHODS[name].fit(task, train, head, seed)
    seconds = time.process_time() - start
    if name != CONTEST:
        more = {"seconds": seconds} | ({"rate": RATES[name]} if name in RATES else {})
        return [_row(task, shots, seed, name, found, base, more)]
    return [_row(task, shots, seed, row, fitted, base, more) for row, (fitted, more) in found.items()]


class Record:
    """The lines found so far, under the same conditions (the first line);
    a line is written whole or not at all."""

    def __init__(self, path: Path, conditions: dict):
        self.path = path
        head = json.dumps({"conditions": conditions}) + "\n"
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else [head]
        if lines[0] != head:
            raise SystemExit(f"{path} holds rows found under other conditions; remove it to start anew")
        whole = [line for line in lines if line.endswith("\n")]  # a killed run may have cut its last one
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(whole))
        self.groups = [json.loads(line) for line in whole[1:]]
        self.done = {tuple(group["key"]) for group in self.groups}

    def add(self, key: tuple, rows: list[dict]) -> None:
        group = {"key": list(key), "rows": rows}
        self.groups.append(group)
        self.done.add(key)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(descriptor, (json.dumps(group) + "\n").encode())
        finally:
            os.close(descriptor)

    def rows(self) -> list[dict]:
        return [row for group in self.groups for row in group["rows"]]


def run(
    record: Record,
    archive: Path | None,
    methods: list[str],
    chosen: list[str],
    budget: float = float("inf"),
    say: Callable[[str], None] = print,
) -> bool:
    """Fits what is not recorded yet, cheap methods first; whether all is there.

    `budget`: seconds of processor time.
    """
    start = time.process_time()
    dear = [name for name in methods if METHODS[name].shots != SHOTS]
    for part in ([name for name in methods if name not in dear], dear):
        for task_name in chosen:
            keys = [(task_name, *which, name) for name in part for which in METHODS[name].runs()]
            left = [key for key in keys if key not in record.done]
            for key in left:
                if time.process_time() - start > budget:
                    return False
                _, shots, seed, name = key
                rows = fitted_rows(tasks.task(task_name, archive), shots, seed, name)
                record.add(key, rows)
                for row in rows[:1]:
                    say(
                        f"[{time.process_time() - start:6.0f} s] {task_name:14s} {shots or 'all'!s:>3s} "
                        f"{seed} {row['method']:20s} {row['right'] / row['test']:.3f} (base "
                        f"{row['base_right'] / row['test']:.3f}) {row['seconds']:.2f} s"
                    )
    return True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="path of the results, without ending")
    parser.add_argument(
        "--photographs", type=Path, help="ImageFolder in a zip: train/<class>/*, test/<class>/*"
    )
    parser.add_argument(
        "--model",
        type=Path,
        help="folder written by examples/bundled_clip/train.py, instead of the bundled model",
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--tasks", nargs="+", choices=tasks.RECIPES, metavar="TASK")
    parser.add_argument(
        "--budget", type=float, default=float("inf"), help="stop after SECONDS of processor time"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    can = tasks.names(arguments.photographs)
    chosen = [name for name in arguments.tasks or can if name in can]
    left_out = [name for name in tasks.RECIPES if name not in can]
    if left_out:
        print(f"without --photographs these tasks are left out: {', '.join(left_out)}")
    conditions = {"cpu": cpu_name(), "torch": torch.__version__}
    if arguments.model is not None:
        tasks.choose_model(arguments.model)
        conditions["model"] = arguments.model.name
    record = Record(arguments.out.with_suffix(".rows.jsonl"), conditions)
    whole = run(
        record,
        arguments.photographs,
        arguments.methods,
        chosen,
        arguments.budget,
        say=lambda text: print(text, flush=True),
    )
    from benchmarks.suite.table import about

    result = about(conditions, record.rows(), chosen)
    write_json(arguments.out.with_suffix(".json"), result)
    print("done" if whole else "stopped at the budget; the same command resumes")


if __name__ == "__main__":
    main()
