"""How strong a penalty keeps, or helps, classes that nobody labelled? Classes as folds.

Each fold holds out some classes altogether: components are fitted on the images and names of the others, and
judged on the held-out classes' images, read among the held-out names alone. Weights belong to components and
not to classes, so such a fit can be read there; class vectors that were moved, or a probe, cannot.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from residual_kernels.train.batches import AdapterRows
from residual_kernels.train.choice import Judge, Judged
from residual_kernels.train.logistic import Objective, Readout, ResidentRows, Targets
from residual_kernels.train.path import PATIENCE, ROUGH, FitGroup, Path
from residual_kernels.train.problem import FLOOR, Form, moments
from residual_kernels.zeroshot import ZeroShotHead

FEWEST = 4  # classes: two to fit and two to hold out
LOW = -1e4  # a logit that no temperature makes likely


def class_folds(classes: int, folds: int, seed: int) -> Tensor:
    """Fold numbers [K] of classes, as evenly as it goes, by a seed; every fold holds out at least two.

    Raises ValueError for fewer than four classes.
    """
    if classes < FEWEST:
        raise ValueError(
            f'folds="classes" holds classes out and needs at least {FEWEST}; there are {classes}'
        )
    count = max(2, min(folds, classes // 2))
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(seed))
    found = torch.empty(classes, dtype=torch.int64)
    found[order] = torch.arange(classes) % count
    return found


def judged_by_classes(
    form: Form,
    head: ZeroShotHead,
    rows: AdapterRows,
    labels: Tensor,
    fold: Tensor,
    freedoms: Sequence[float],
) -> tuple[Judged, list[tuple[float, Judged]]]:
    """The untouched model, and every strength, on images of classes that the fit had not seen.

    Args:
        form: the anchored adapter.
        head: the classifier of all classes.
        rows: the labelled images; their coefficients must be in memory.
        labels: [N] int64; -1 leaves an image out.
        fold: [K] fold numbers of the classes.
        freedoms: the strengths tried.

    Raises:
        ValueError: the coefficients do not fit into `memory`.
    """
    if rows.resident is None:
        raise ValueError('folds="classes" needs the coefficients in memory; give more of it with memory=')
    readout = form.readout(head)
    coefficients, output = form.rows(rows.resident)
    labels = labels.to(output.device)
    fold = fold.to(output.device)
    of_row = torch.where(labels >= 0, fold[labels.clamp_min(0)], -1)
    paths = [
        _path(coefficients, output, readout, labels, of_row, fold != k, k) for k in fold.unique().tolist()
    ]
    targets = Targets(labels.clamp_min(0)[None])
    weight = (labels >= 0).to(output.dtype)

    def judged(deltas: Sequence[Tensor | None]) -> Judged:
        judge = Judge(1, len(output), targets, readout.basis)
        logits = output.new_full((len(output), readout.classes), LOW)
        for k, delta in enumerate(deltas):
            held, names = of_row == k, (fold == k).nonzero().flatten()
            y = output[held]
            r = readout.scale / y.norm(dim=1, keepdim=True).clamp_min(torch.finfo(y.dtype).tiny)
            if delta is not None:
                start = 0
                for c in coefficients:
                    stop = start + c.shape[1]
                    y = y + c[held].to(y.dtype) @ (delta[start:stop, None] * readout.basis[start:stop])
                    start = stop
            block = logits[held]
            block[:, names] = r * (y @ readout.vectors[:, names])
            logits[held] = block
        judge.add(0, logits, weight, 0, slice(0, len(output)))
        return judge.judged(0)

    base = judged([None] * len(paths))
    thetas = [path.like.new_zeros(path.objective.shape.size) for path in paths]
    tried: list[tuple[float, Judged]] = []
    waiting = 0
    for freedom in sorted(freedoms):
        thetas = [
            path._fit([(0, -1, freedom)], theta[None], ROUGH).theta[0]
            for path, theta in zip(paths, thetas, strict=True)
        ]
        found = judged(
            [path.objective.delta(theta[None])[0] for path, theta in zip(paths, thetas, strict=True)]
        )
        waiting = 0 if all(found.loss < other.loss for _, other in tried) else waiting + 1
        tried.append((freedom, found))
        if waiting == PATIENCE:
            break
    return base, tried


def _path(
    coefficients: Sequence[Tensor],
    output: Tensor,
    readout: Readout,
    labels: Tensor,
    of_row: Tensor,
    seen: Tensor,
    held: int,
) -> Path:
    """The fit on all classes but those of one fold, under their names alone."""
    mine = (of_row >= 0) & (of_row != held)
    number = torch.cumsum(seen, 0) - 1
    few = Readout(readout.basis, readout.vectors[:, seen], readout.scale)
    rows = ResidentRows([c[mine] for c in coefficients], output[mine])
    variance, _ = moments(rows, few)
    variance = variance.clamp_min(max(FLOOR * float(variance.mean()), torch.finfo(output.dtype).tiny))
    objective = Objective(rows, few, Targets(number[labels[mine]][None]), variance.sqrt())
    fold = torch.zeros(1, len(rows), dtype=torch.int16, device=output.device)
    return Path(objective, [FitGroup(0, 0)], fold, 1)
