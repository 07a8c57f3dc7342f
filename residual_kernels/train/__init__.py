"""How are weights fitted? Schedule-free AdamW on cross-entropy, the paper's protocol by default, many fits at once.

`fitting.py` is how a fit goes, `steps.py` what one step is, `batches.py` how rows reach it, `labels.py` what a row is
labelled and how much it counts, `evaluation.py` how good the outcome is, `results.py` what is reported and
`checkpoints.py` how a fit goes on after it was killed.
"""

import math
import os
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from residual_kernels.adapters.tower_adapter import TowerAdapter
from residual_kernels.train.evaluation import (
    Comparison,
    Evaluation,
    Prediction,
    compare,
    evaluate,
    predict,
)
from residual_kernels.train.fitting import Run
from residual_kernels.train.results import Epoch, FitResult, ManyFits, Task
from residual_kernels.units.cache import UnitCache
from residual_kernels.zeroshot import ZeroShotHead

__all__ = [
    "Comparison",
    "Epoch",
    "Evaluation",
    "FitResult",
    "ManyFits",
    "Prediction",
    "Task",
    "compare",
    "evaluate",
    "fit",
    "fit_many",
    "predict",
]


def fit(
    adapter: TowerAdapter,
    head: ZeroShotHead,
    train: UnitCache | Iterable,
    val: UnitCache | Iterable | None = None,
    *,
    lr: float | None = None,
    epochs: int = 30,
    batch_size: int = 64,
    patience: int = 5,
    weight_decay: float = 0.0,
    shrink: float = 0.0,
    class_weight: str | Tensor | None = None,
    shots: int | None = None,
    seed: int = 0,
    checkpoint: str | os.PathLike | None = None,
    every: int = 1,
    step: str = "auto",
    memory: int | None = None,
    alone: bool = False,
    progress: Callable[[Epoch], None] | None = None,
) -> FitResult:
    """Fits an adapter's own weights by cross-entropy of head(y) with schedule-free AdamW; the tower never trains here.

    Args:
        adapter: ResiDual, CoarseHeads, OutputSpectral or OutputLinear. Its weights are the starting point.
        head: the classifier, which stays as it is.
        train, val: UnitCaches (seconds) or loaders of (images, labels) (the tower runs every epoch). Without `val`
            there is no early stopping and the last epoch is kept.
        lr: the adapter's own default, the paper's: 0.8 for weights on components and heads, 1e-3 for `output` and
            `linear`.
        epochs, batch_size, patience: at most this many epochs; stop after `patience` without a better accuracy on val.
        weight_decay: decoupled (AdamW's), towards 0.
        shrink: the same towards 1, the tower's own output: every step takes lr * shrink * (weight - 1) off.
        class_weight: [K] above zero, or "balanced": every class counts alike, a row for N / (K n_k), and the best epoch
            is the one of best balanced accuracy.
        shots: fit on this many images of each class, chosen by `seed`.
        seed: of the shuffling and of the shots.
        checkpoint: a file; the state is written there every `every` epochs, and a fit that finds it goes on from there,
            to the same result, bit for bit on a CPU. Needs caches.
        step: "eager", "compiled" (torch.compile of features, head and loss), "graph" (one CUDA graph), or "auto": a
            graph for a cache in a GPU's memory, eager otherwise.
        memory: bytes that may hold what a step reads of a cache besides the weights; 2 GiB on a CPU, half of a GPU's
            memory by default. Beyond that, batches are read from the cache by another thread, ahead of the step.
        alone: do not share the work in a process group.
        progress: called with every :class:`Epoch`.

    Returns:
        A :class:`FitResult`; the adapter holds the weights of its best epoch (by accuracy on val, the earlier of
        equals; epoch 0 is the start).

    Raises:
        ValueError: no labels, labels out of range, a class with fewer images than `shots`, NaN in cached units (named
            by row), a cache of another tower or without the kinds needed, a loader that can be read only once, a
            checkpoint of another fit.
        FloatingPointError: the loss is not finite.

    Whatever is raised, the weights are those it started from. Deterministic for the same inputs, seed and number of
    threads. In a process group all processes call it with the same arguments; each takes its share of every batch, and
    all end with the same weights.
    """
    fits = Run(
        adapter, [head], train, val, [Task(_rate(adapter, lr), seed, 0)], starts=None, epochs=epochs,
        batch_size=batch_size, patience=patience, weight_decay=weight_decay, shrink=shrink,
        class_weight=class_weight, shots=shots, checkpoint=checkpoint, every=every, step=step, memory=memory,
        alone=alone, progress=None if progress is None else lambda _, row: progress(row),
    ).run()  # fmt: skip
    return fits.put(adapter, 0)


def fit_many(
    adapter: TowerAdapter,
    heads: ZeroShotHead | Sequence[ZeroShotHead],
    train: UnitCache | Iterable,
    val: UnitCache | Iterable | None = None,
    *,
    lrs: Sequence[float] | None = None,
    seeds: Sequence[int] = (0,),
    labels: Sequence[Tensor] | None = None,
    val_labels: Sequence[Tensor] | None = None,
    starts: Sequence[Sequence[Tensor]] | None = None,
    epochs: int = 30,
    batch_size: int = 64,
    patience: int = 5,
    weight_decay: float = 0.0,
    shrink: float = 0.0,
    class_weight: str | Tensor | None = None,
    shots: int | None = None,
    checkpoint: str | os.PathLike | None = None,
    every: int = 1,
    step: str = "auto",
    memory: int | None = None,
    alone: bool = False,
    progress: Callable[[int, Epoch], None] | None = None,
) -> ManyFits:
    """:func:`fit` for all learning rates, seeds and label sets at once: each result is that of a fit of its own.

    T weights on the same features are one product a step, so that T small fits cost little more than one. A fit that
    stops early, or diverges, leaves the others alone.

    Args:
        adapter: its weights are the starting point of every fit; it is left as it is (see :meth:`ManyFits.put`).
        heads: one head, or one for each label set.
        lrs: learning rates; the adapter's default alone by default.
        seeds: of the shuffling and of the shots.
        labels, val_labels: label sets, each [N] for the rows of the cache; the caches' own labels by default.
        starts: for each seed the starting weights, in the order of `adapter.trainable()`.
        progress: called with the number of the fit and its :class:`Epoch`.

    Returns:
        :class:`ManyFits`; fits run over label sets, then seeds, then learning rates, the last fastest.

    Raises:
        As :func:`fit`; FloatingPointError only when every fit diverges.
    """
    heads = [heads] if isinstance(heads, ZeroShotHead) else list(heads)
    rates = [_rate(adapter, lr) for lr in ([None] if lrs is None else lrs)]
    sets = 1 if labels is None else len(labels)
    tasks = [Task(lr, seed, number) for number in range(sets) for seed in seeds for lr in rates]
    if not tasks or not heads:
        raise ValueError("lrs, seeds, labels and heads must not be empty")
    if starts is not None:
        if len(starts) != len(seeds):
            raise ValueError(f"starts must hold one entry for each of {len(seeds)} seeds; got {len(starts)}")
        starts = [start for _ in range(sets) for start in starts for _ in rates]
    return Run(
        adapter, heads, train, val, tasks, starts=starts, labels=labels, val_labels=val_labels, epochs=epochs,
        batch_size=batch_size, patience=patience, weight_decay=weight_decay, shrink=shrink,
        class_weight=class_weight, shots=shots, checkpoint=checkpoint, every=every, step=step, memory=memory,
        alone=alone, progress=progress,
    ).run()  # fmt: skip


def _rate(adapter: TowerAdapter, lr: float | None) -> float:
    if not isinstance(adapter, TowerAdapter):
        raise ValueError(
            f"expected a ResiDual or another adapter of this library; got {type(adapter).__name__}"
        )
    lr = adapter.default_lr if lr is None else float(lr)
    if not 0 < lr < math.inf:
        raise ValueError(f"a learning rate must be above 0; got {lr}")
    return lr
