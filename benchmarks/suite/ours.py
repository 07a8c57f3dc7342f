"""This library's methods: what `tune` chooses, the candidates it chose among,
and the paper's forms by its recipe."""

import time
from typing import Any

import torch

import residual_kernels as rk
from benchmarks.peers.tasks import BATCH, Fitted, Split
from benchmarks.suite.tasks import SuiteTask
from residual_kernels.train import contest as contests
from residual_kernels.train import tuning
from residual_kernels.train.config import ConvexConfig

AUTO = "auto (the default)"
# Of one contest: the candidate's name in `tune`, and the row's here.
CANDIDATES = {
    "anchored": "anchored",
    "anchored + class vectors": "anchored + class vectors",
    "probe": "linear probe from text",
}


def _logits(adapter, head):
    @torch.no_grad()
    def logits(split: Split) -> torch.Tensor:
        runs = (slice(start, start + BATCH) for start in range(0, len(split.labels), BATCH))
        return torch.cat([head(adapter.from_units(split.units.terms(rows))) for rows in runs])

    return logits


def contest(
    task: SuiteTask, train: Split, head: rk.ZeroShotHead, seed: int
) -> dict[str, tuple[Fitted, dict]]:
    """`rk.tune`, and every candidate that it judged on the way, each with its own seconds of processor time.

    A candidate that its folds find no better than the model by one standard error is the model, as in `tune`.
    """
    built: list = []
    start = time.process_time()
    base = rk.build("base", task.tower)
    played = contests.Contest(
        base, task.bases, head, train.units, None, ConvexConfig(), seed, None, None, built
    )
    opening = time.process_time() - start
    seconds, found = {}, {}
    for name in sorted(tuning.CANDIDATES[1:], key=lambda name: name == tuning.VECTORS):
        start = time.process_time()
        played.add(name)
        seconds[name] = opening + time.process_time() - start
    played.entries.sort(key=lambda one: tuning.CANDIDATES.index(one.name))
    winner, _ = played.winner()
    table = [
        [one.name, one.judged.accuracy, one.judged.loss, one.freedom, seconds.get(one.name, 0.0)]
        for one in played.entries
    ]

    def fitted(entry) -> Fitted:
        if not entry.freedom:
            return Fitted(lambda split: head(split.units.output), 0)
        adapter, own = played.made(entry)
        return Fitted(_frozen_logits(adapter, own), entry.numbers)

    for entry in played.entries:
        if entry.name in CANDIDATES:
            more: dict[str, Any] = {"seconds": seconds[entry.name], "freedom": entry.freedom}
            found[CANDIDATES[entry.name]] = fitted(entry), more
    whole = sum(seconds.values()) - opening * (len(seconds) - 1)
    found[AUTO] = fitted(winner), {"seconds": whole, "winner": winner.name, "table": table}
    for adapter in (*built, base):
        adapter.detach()
    return found


def _frozen_logits(adapter, head):
    """Logits with the weights that the adapter has now: another candidate may use the same adapter."""
    weight = adapter.weight.detach().clone() if hasattr(adapter, "weight") else None
    read = _logits(adapter, head)

    @torch.no_grad()
    def logits(split: Split) -> torch.Tensor:
        if weight is not None:
            adapter.weight.copy_(weight)
        return read(split)

    return logits


def paper(name: str):
    """The paper's form by its recipe: N(1, 1), schedule-free AdamW at 0.8, batch 64, 30 epochs; no early
    stopping, since nobody has validation images."""

    def fit(task: SuiteTask, train: Split, head: rk.ZeroShotHead, seed: int) -> Fitted:
        adapter = rk.build(name, task.tower, task.bases, seed=seed)
        result = rk.fit(adapter, head, train.units, solver="adamw", epochs=30, batch_size=64, seed=seed)
        logits = _logits(adapter, head)
        adapter.detach()
        return Fitted(logits, result.parameters)

    return fit
