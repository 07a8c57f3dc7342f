"""This library's variants on cached units, by `fit` with schedule-free AdamW from weights of one.

The paper stops after 5 epochs without a better validation accuracy, of at most 30; of 40 images an epoch has
one or two steps, so here it is 20 of at most 100, as many as CLIP-Adapter gets.
"""

from typing import Any

import torch

import residual_kernels as rk
from benchmarks.peers.tasks import BATCH, Fitted, PeerTask, Split
from residual_kernels.adapters.methods import build


def _fit(name: str, task: PeerTask, train: Split, settings: dict[str, Any], seed: int) -> Fitted:
    more = {key: value for key, value in settings.items() if key != "rate"}
    adapter = build(name, task.tower, task.bases, init="ones", seed=seed, **more)
    rate = adapter.default_lr * settings["rate"]
    result = rk.fit(
        adapter,
        task.head,
        train.units,
        task.val.units,
        lr=rate,
        epochs=100,
        patience=20,
        batch_size=32,
        seed=seed,
    )

    @torch.no_grad()
    def logits(split: Split) -> torch.Tensor:
        runs = (slice(start, start + BATCH) for start in range(0, len(split.labels), BATCH))
        return torch.cat([task.head(adapter.from_units(split.units.terms(rows))) for rows in runs])

    return Fitted(logits, result.parameters)


def fine(task: PeerTask, train: Split, settings: dict[str, Any], seed: int) -> Fitted:
    return _fit("fine", task, train, settings, seed)


def full(task: PeerTask, train: Split, settings: dict[str, Any], seed: int) -> Fitted:
    return _fit("full", task, train, settings, seed)


def coarse(task: PeerTask, train: Split, settings: dict[str, Any], seed: int) -> Fitted:
    return _fit("coarse", task, train, settings, seed)


def output(task: PeerTask, train: Split, settings: dict[str, Any], seed: int) -> Fitted:
    return _fit("output", task, train, settings, seed)


def linear(task: PeerTask, train: Split, settings: dict[str, Any], seed: int) -> Fitted:
    return _fit("linear", task, train, settings, seed)
