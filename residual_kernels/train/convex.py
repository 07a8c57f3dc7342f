"""How are weights fitted without a learning rate?

One convex problem, its strength chosen by validation or by folds.

`logistic.py` is the problem, `lbfgs.py` the minimiser, `path.py` the search for the strength, `choice.py` who
is judged better, `problem.py` what adapters and sources are to it. Here the solution becomes weights and a
report.
"""

import contextlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from residual_kernels import distributed
from residual_kernels.adapters.residual import ResiDual
from residual_kernels.adapters.tower_adapter import TowerAdapter
from residual_kernels.files import digest
from residual_kernels.train import checkpoints
from residual_kernels.train.batches import AdapterRows, room, source_of, whole
from residual_kernels.train.choice import standard_error
from residual_kernels.train.config import SOLVERS, ConvexConfig
from residual_kernels.train.evaluation import Heads, measure
from residual_kernels.train.path import Found
from residual_kernels.train.plan import check_unmerged
from residual_kernels.train.problem import ConvexProblem, Form, Labels, is_linear, labels_of
from residual_kernels.train.results import Certificate, Epoch, FitResult, ManyFits, Strength, Task
from residual_kernels.units.cache import UnitCache
from residual_kernels.units.source import UnitSource, cache_of
from residual_kernels.zeroshot import ZeroShotHead


def chosen_solver(solver: str, adapter: TowerAdapter, of_adamw: list[str], of_convex: list[str]) -> str:
    """Which solver fits: the one asked for, or the one that suits.

    Raises ValueError for options that it lacks.

    `of_adamw` and `of_convex` name the options given that one solver alone has.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}; got {solver!r}")
    if solver == "auto":
        anchored = is_linear(adapter) and adapter.rest.name == "all"
        solver = "convex" if anchored and not of_adamw else "adamw"
    if solver == "convex" and not is_linear(adapter):
        raise ValueError(
            'solver="convex" fits a ResiDual at the output, whose logits are linear in its weight; '
            f'{type(adapter).__name__} here is none: use solver="adamw"'
        )
    foreign, other = (of_adamw, "adamw") if solver == "convex" else (of_convex, "convex")
    if foreign:
        raise ValueError(
            f'{" and ".join(foreign)} belongs to solver="{other}", but this fit is by solver="{solver}"; '
            "leave it out"
        )
    return solver


def fit_convex(
    adapter: ResiDual,
    heads: Sequence[ZeroShotHead],
    train: UnitCache | Iterable,
    val: UnitCache | Iterable | None,
    config: ConvexConfig,
    seeds: Sequence[int],
    labels: Sequence[Tensor] | None = None,
    val_labels: Sequence[Tensor] | None = None,
) -> ManyFits:
    """A fit for each label set and seed, side by side where they share a head.

    The adapter is left as it is.
    """
    start = time.perf_counter()
    if not heads or not seeds or (labels is not None and not labels):
        raise ValueError("seeds, labels and heads must not be empty")
    check_unmerged(adapter)
    names = heads[0].class_names if len(heads) == 1 else None
    source = indexed(adapter, train, labels is None, names)
    judges = None if val is None else indexed(adapter, val, labels is None, names)
    sizes = [len(head.class_names) for head in heads]
    own = labels_of(source, labels, sizes, "labels")
    sets = len(own.numbers)
    if len(heads) not in (1, sets):
        raise ValueError(f"there are {sets} label sets, so give one head or {sets}; got {len(heads)}")
    there = None
    if judges is not None:
        there = labels_of(judges, None if labels is None else val_labels, sizes, "val_labels")
    with distributed.apart() if config.alone else contextlib.nullcontext():
        rows, outside = opened(adapter, source, judges, config)
        _agree(adapter, source, own, heads, config)
        form, tasks, results, weights = Form(adapter), [], [], []
        for number in range(len(heads)):
            some = slice(number, number + 1) if len(heads) > 1 else slice(0, sets)
            problem = ConvexProblem.of(
                config,
                own.of(some),
                heads[number].class_names,
                seeds,
                None if there is None else there.of(some),
            )
            path = problem.path(form, heads[number], rows, outside)
            for place, (group, one) in enumerate(zip(problem.groups, path.run(), strict=True)):
                weight = torch.ones_like(form.ones[0])
                if one.solution is not None:
                    weight = 1 + path.objective.delta(one.solution.theta[None])[0]
                weights.append(weight)
                tasks.append(Task(None, seeds[place % len(seeds)], some.start + group.which))
                results.append(_result(one, weight))
        stacked = torch.stack(weights)
        if outside is not None and there is not None:
            _measured(results, adapter, heads, outside, tasks, stacked, there)
    seconds = time.perf_counter() - start
    results = [replace(one, seconds=seconds) for one in results]
    return ManyFits(tasks, results, [stacked], isinstance(config.class_weight, str))


def indexed(
    adapter: TowerAdapter,
    data: UnitCache | Iterable,
    labelled: bool,
    class_names: Sequence[str] | None = None,
) -> UnitSource:
    """The units of some data; a loader runs through the tower once. `class_names` are the head's."""
    source = source_of(adapter, data, labelled=labelled, class_names=class_names)
    if not source.indexed:
        cache = cache_of(data, adapter.tower, adapter.adapted)
        source = source_of(adapter, cache, labelled=labelled, class_names=class_names)
    if not source.count:
        raise ValueError("the data gave no images")
    return source


def opened(
    adapter: TowerAdapter, train: UnitSource, val: UnitSource | None, config: ConvexConfig
) -> tuple[AdapterRows, AdapterRows | None]:
    """Training and validation rows; their features stay in memory where they fit."""
    part = distributed.share if distributed.world() > 1 else whole
    budget = room(adapter.device, config.memory)
    rows = AdapterRows(adapter, train, budget, part)
    if rows.resident is not None:
        budget -= rows.bytes
    return rows, None if val is None else AdapterRows(adapter, val, budget, part)


def strengths(found: Found) -> list[Strength]:
    """The untouched model and every strength that was tried."""
    return [Strength(0.0, found.base.loss, found.base.accuracy, 0.0)] + [
        Strength(freedom, one.loss, one.accuracy, standard_error(found.base, one))
        for freedom, one in found.candidates
    ]


def certificate(found: Found) -> Certificate | None:
    if found.solution is None:
        return None
    at = found.solution
    return Certificate(at.objective, at.gap, at.gradient, at.alpha, found.evaluations)


def _result(found: Found, weight: Tensor) -> FitResult:
    """What one group came to, as far as the folds tell."""
    chosen = None if found.chosen is None else found.candidates[found.chosen]
    return FitResult(
        best_epoch=int(chosen is not None),
        val_accuracy=None,
        parameters=weight.numel(),
        seconds=0.0,
        stopped_early=False,
        history=[Epoch(0, None, None, None, 0.0), Epoch(1, None, None, None, 0.0)],
        solver="convex",
        base_accuracy=found.base.accuracy,
        fold_accuracy=found.base.accuracy if chosen is None else chosen[1].accuracy,
        freedom=0.0 if chosen is None else chosen[0],
        path=strengths(found),
        certificate=certificate(found),
    )


def _measured(results, adapter, heads, outside: AdapterRows, tasks, weights: Tensor, labels: Labels) -> None:
    """Adds what validation images say of the model and of the fits."""
    every = Heads(heads, weights.device)
    which = torch.tensor([task.labels for task in tasks], device=weights.device)
    truth = labels.numbers.to(weights.device)
    fitted = measure(adapter, outside, every, which, [weights], truth)
    start = measure(adapter, outside, every, which, [torch.ones_like(weights)], truth)
    for place, (result, before, after) in enumerate(zip(results, start, fitted, strict=True)):
        history = [
            Epoch(number, None, loss, accuracy, 0.0, balanced)
            for number, (loss, accuracy, balanced) in enumerate((before, after))
        ]
        accuracy = history[result.best_epoch].val_accuracy
        results[place] = replace(result, history=history, val_accuracy=accuracy, fold_accuracy=None)


def _agree(adapter, train: UnitSource, labels: Labels, heads, config: ConvexConfig) -> None:
    """Raises ValueError unless all processes were given the same."""
    if distributed.world() == 1:
        return
    identity = {
        "rows": train.count,
        "labels": digest({"labels": labels.values}, {}),
        "heads": checkpoints.of_heads(Heads(heads, torch.device("cpu"))),
        "constants": checkpoints.of_adapter(adapter, []),
        "freedoms": list(config.freedoms),
        "folds": config.folds,
    }
    seen = distributed.gather(identity)
    for rank, other in enumerate(seen):
        different = [name for name in identity if other[name] != seen[0][name]]
        if different:
            raise ValueError(
                f"all processes of a fit must get the same input, but {', '.join(different)} of process "
                f"{rank} differ from process 0's; alone=True fits in each process by itself"
            )
