"""How are weights fitted?

By a convex problem where logits are linear in them, by schedule-free AdamW elsewhere.

`config.py` is what a fit may be told, `batches.py` how rows reach it, `labels.py` what a row is labelled and
how much it counts, `evaluation.py` how good the outcome is, `results.py` what is reported. AdamW: `plan.py`
is what is about to be done, `fitting.py` the loop, `progress.py` where a task stands, `steps.py` one step,
`fused.py` the steps of an epoch on a GPU, `checkpoints.py` how a fit resumes. The convex fit: see
`convex.py`. `logs.py` is where records of a fit go.
"""

import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from residual_kernels.adapters.tower_adapter import TowerAdapter
from residual_kernels.train import logs
from residual_kernels.train.config import ConvexConfig, FitConfig
from residual_kernels.train.contest import Candidate
from residual_kernels.train.convex import chosen_solver, fit_convex
from residual_kernels.train.evaluation import (
    Comparison,
    Evaluation,
    Prediction,
    compare,
    evaluate,
    predict,
)
from residual_kernels.train.fitting import Loop
from residual_kernels.train.folds import FOLDS
from residual_kernels.train.path import FREEDOMS
from residual_kernels.train.plan import FitPlan
from residual_kernels.train.problem import is_linear
from residual_kernels.train.results import Certificate, Epoch, FitResult, ManyFits, Strength, Task
from residual_kernels.train.tuning import FEW, TuneResult, tune
from residual_kernels.units.cache import UnitCache
from residual_kernels.zeroshot import ZeroShotHead

__all__ = [
    "FEW",
    "Candidate",
    "Certificate",
    "Comparison",
    "Epoch",
    "Evaluation",
    "FitResult",
    "ManyFits",
    "Prediction",
    "Strength",
    "Task",
    "TuneResult",
    "compare",
    "evaluate",
    "fit",
    "fit_many",
    "predict",
    "tune",
]

logger = logging.getLogger(__name__)


def fit(
    adapter: TowerAdapter,
    head: ZeroShotHead,
    train: UnitCache | Iterable,
    val: UnitCache | Iterable | None = None,
    *,
    solver: str = "auto",
    lr: float | None = None,
    epochs: int = 30,
    batch_size: int = 64,
    patience: int = 5,
    weight_decay: float = 0.0,
    shrink: float = 0.0,
    class_weight: str | Tensor | None = None,
    shots: int | None = None,
    seed: int = 0,
    labels: Tensor | None = None,
    val_labels: Tensor | None = None,
    label_smoothing: float = 0.0,
    folds: int = FOLDS,
    freedoms: Sequence[float] = FREEDOMS,
    checkpoint: str | os.PathLike | None = None,
    every: int = 1,
    step: str = "auto",
    memory: int | None = None,
    alone: bool = False,
    progress: Callable[[Epoch], None] | None = None,
    log: logs.Log = None,
) -> FitResult:
    """Fits an adapter's own weights by cross-entropy of head(y). The tower never trains here.

    solver="convex" holds |y| at the length it has at weight 1, which changes no label. The problem is then
    convex: it has one solution, whatever the adapter's weights were, and no learning rate. `val` chooses how
    strongly weights are held at 1; without it, folds of the training images do. If no strength is better than
    weights of 1 by one standard error, they stay at 1, which for an anchored adapter is the model itself.
    solver="adamw" is the paper's schedule-free AdamW, from the adapter's present weights.

    Args:
        adapter: any adapter of this library; "convex" takes a ResiDual at the output.
        head: the classifier, which stays as it is.
        train, val: UnitCaches (seconds) or loaders of (images, labels). AdamW runs the tower on a loader
            every epoch, the convex solver once. Without `val`, AdamW does not stop early and keeps the last
            epoch.
        solver: "convex", "adamw", or "auto": convex for an anchored ResiDual (rest="all") unless an option of
            AdamW alone is given, AdamW otherwise.
        lr: AdamW. The adapter's own default, the paper's: 0.8 for weights on components and heads, 1e-3 for
            `output` and `linear`.
        epochs, batch_size, patience: AdamW. At most this many epochs; stop after `patience` epochs without a
            better accuracy on val.
        weight_decay: AdamW. Decoupled, towards 0.
        shrink: AdamW. The same towards 1: every step subtracts lr * shrink * (weight - 1).
        class_weight: [K] above zero, or "balanced": every class has the same weight (an image counts N / (K
            n_k)), and the best epoch is the one with the best balanced accuracy.
        shots: fit on this many images of each class, chosen by `seed`.
        seed: random seed of the shuffling, the shots and the folds.
        labels, val_labels: in place of the caches' own, [N]. For the convex solver also [N, K], not below
            zero: shares of the classes, or ones at several labels of an image, which share it evenly.
        label_smoothing: convex. This share of every label goes to all classes alike.
        folds: convex, without `val`: into how many parts the training images are split.
        freedoms: convex. The strengths tried: about how many weights each leaves free.
        checkpoint: AdamW. A file for the state of the fit. A fit that finds it resumes, with the same result
            (the same bits, on a CPU). Needs caches.
        every: AdamW. The state is written every so many epochs.
        step: AdamW. "eager", "compiled" (torch.compile of features, head and loss), "graph" (one CUDA graph),
            "fused" (five Triton kernels do a step, optimizer included, and a graph holds several steps), or
            "auto": fused for a cache in a GPU's memory, a graph where "fused" cannot serve, eager elsewhere.
        memory: bytes for what is read of a cache besides the weights; by default 2 GiB on a CPU and half of a
            GPU's memory. Beyond that, another thread reads batches from the cache.
        alone: do not share the work in a process group.
        progress: called with every :class:`Epoch`.
        log: where the fit is logged: a callable that takes a dict, "tensorboard", "wandb", "mlflow", "csv"
            (`fit-log.csv` in the working folder; new lines are appended), or the path of a .csv file. AdamW
            logs each epoch as it ends. A convex fit logs, when it ends, the untouched model (epoch 0) and the
            fit (epoch 1). Keys are the fields of :class:`Epoch` and `fit` (0); a convex fit adds `freedom`,
            `loss`, `accuracy` and `error`, as in `FitResult.path`. In a process group only the first process
            logs, but a callable is called in each.

    Returns:
        A :class:`FitResult`. The adapter holds the weights of its best epoch (by accuracy on val, the earlier
        of equals; epoch 0 is the start).

    Raises:
        ValueError: no labels, labels out of range, a class with fewer images than `shots`, NaN in cached
            units (named by row), a cache of another tower or without the kinds needed, a loader that can be
            read only once, a checkpoint of another fit, an option that the solver does not have, or an
            unknown name in `log`.
        ImportError: the library that `log` names is missing.
        FloatingPointError: the loss is not finite.

    If anything is raised, the adapter has the weights that it started from. Deterministic for the same
    inputs, seed and number of threads. In a process group all processes call it with the same arguments; each
    takes its share of the work, and all end with the same weights.

    Source: schedule-free AdamW is that of Defazio et al., "The Road Less Scheduled", 2024, with the paper's
    settings.
    """
    fits = fit_many(
        adapter,
        head,
        train,
        val,
        solver=solver,
        lrs=None if lr is None else [lr],
        seeds=(seed,),
        labels=None if labels is None else [labels],
        val_labels=None if val_labels is None else [val_labels],
        epochs=epochs,
        batch_size=batch_size,
        patience=patience,
        weight_decay=weight_decay,
        shrink=shrink,
        class_weight=class_weight,
        shots=shots,
        label_smoothing=label_smoothing,
        folds=folds,
        freedoms=freedoms,
        checkpoint=checkpoint,
        every=every,
        step=step,
        memory=memory,
        alone=alone,
        progress=None if progress is None else lambda _, row: progress(row),
        log=log,
    )
    return fits.put(adapter, 0)


def fit_many(
    adapter: TowerAdapter,
    heads: ZeroShotHead | Sequence[ZeroShotHead],
    train: UnitCache | Iterable,
    val: UnitCache | Iterable | None = None,
    *,
    solver: str = "auto",
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
    label_smoothing: float = 0.0,
    folds: int = FOLDS,
    freedoms: Sequence[float] = FREEDOMS,
    checkpoint: str | os.PathLike | None = None,
    every: int = 1,
    step: str = "auto",
    memory: int | None = None,
    alone: bool = False,
    progress: Callable[[int, Epoch], None] | None = None,
    log: logs.Log = None,
) -> ManyFits:
    """:func:`fit` for all learning rates, seeds and label sets at once.

    Each result is that of a separate fit. T weights on the same features are one product a step, so T small
    fits cost little more than one. A fit that stops early, or diverges, leaves the others alone.

    Args:
        adapter: its weights are the starting point of every fit by AdamW; it is left as it is (see
            :meth:`ManyFits.put`).
        heads: one head, or one for each label set.
        train, val: as in :func:`fit`.
        lrs: learning rates of AdamW; the adapter's default alone by default.
        seeds: of the shuffling, the shots and the folds.
        labels, val_labels: label sets, each [N] for the rows of the cache; the caches' own labels by default.
        starts: of AdamW: for each seed the starting weights, in the order of `adapter.trainable()`.
        solver, epochs, batch_size, patience, weight_decay, shrink, class_weight, shots, label_smoothing: as
            in :func:`fit`.
        folds, freedoms, checkpoint, every, step, memory, alone: as in :func:`fit`.
        progress: called with the number of the fit and its :class:`Epoch`.
        log: as in :func:`fit`; `fit` in a record is the number of the fit.

    Returns:
        :class:`ManyFits`; fits run over label sets, then seeds, then learning rates, the last fastest.

    Raises:
        ValueError, ImportError: as :func:`fit`.
        FloatingPointError: every fit diverges.
    """
    heads = [heads] if isinstance(heads, ZeroShotHead) else list(heads)
    if not isinstance(adapter, TowerAdapter):
        raise ValueError(
            f"expected a ResiDual or another adapter of this library; got {type(adapter).__name__}"
        )
    logs.check(log)
    config = FitConfig(
        epochs,
        batch_size,
        patience,
        weight_decay,
        shrink,
        class_weight,
        shots,
        checkpoint,
        every,
        step,
        memory,
        alone,
    )
    convex = ConvexConfig(freedoms, folds, label_smoothing, class_weight, shots, memory, alone)
    solver = chosen_solver(solver, adapter, config.of_adamw(lr=lrs, starts=starts), convex.of_convex())
    if solver == "convex" and is_linear(adapter):
        fits = fit_convex(adapter, heads, train, val, convex, seeds, labels, val_labels)
        with logs.opened(log, alone) as write:
            _tell_convex(fits, progress, write)
        return _said(fits)
    rates = [_rate(adapter, lr) for lr in ([None] if lrs is None else lrs)]
    sets = 1 if labels is None else len(labels)
    tasks = [Task(lr, seed, number) for number in range(sets) for seed in seeds for lr in rates]
    if not tasks or not heads:
        raise ValueError("lrs, seeds, labels and heads must not be empty")
    if starts is not None:
        if len(starts) != len(seeds):
            raise ValueError(f"starts must hold one entry for each of {len(seeds)} seeds; got {len(starts)}")
        starts = [start for _ in range(sets) for start in starts for _ in rates]
    plan = FitPlan(
        adapter, heads, train, val, tasks, config, starts=starts, labels=labels, val_labels=val_labels
    )
    with logs.opened(log, alone) as write:

        def told(number: int, row: Epoch) -> None:
            logger.debug("fit %d: %s", number, row)
            if progress is not None:
                progress(number, row)
            if write is not None:
                write(logs.of_epoch(number, row))

        fits = Loop(plan, told).run()
    return _said(fits)


def _tell_convex(
    fits: ManyFits, progress: Callable[[int, Epoch], None] | None, write: logs.Write | None
) -> None:
    for number, result in enumerate(fits.results):
        if progress is not None:
            for row in result.history:
                progress(number, row)
        if write is not None:
            for record in logs.of_convex(number, result):
                write(record)


def _said(fits: ManyFits) -> ManyFits:
    for number, result in enumerate(fits.results):
        logger.info("fit %d of %d: %s", number + 1, len(fits.results), result)
    return fits


def _rate(adapter: TowerAdapter, lr: float | None) -> float:
    lr = adapter.default_lr if lr is None else float(lr)
    if not 0 < lr < math.inf:
        raise ValueError(f"a learning rate must be above 0; got {lr}")
    return lr
