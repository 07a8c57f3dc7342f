"""What if class vectors and components, fitted together, get in each other's way?

Class vectors first, then components.

The joint problem of `logistic.py` leaves out the product of the two changes, to stay convex. Far from home,
where the tower's own logits say nothing, that product can outweigh everything that was fitted. Here class
vectors are moved first, on the tower's own embeddings; then components are fitted under the moved vectors.
Both problems are convex, and what is fitted is what is used. Where the joint fit goes well it is the better
of the two, so this is the second try.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from residual_kernels.train.batches import AdapterRows
from residual_kernels.train.choice import Judge, Judged, best_of
from residual_kernels.train.logistic import Objective
from residual_kernels.train.path import FINE, PATIENCE, ROUGH, Path
from residual_kernels.train.problem import ConvexProblem, Form
from residual_kernels.zeroshot import ZeroShotHead


@dataclass(frozen=True)
class Stacked:
    """The better of all strengths: the moved head, and components `theta` [P] of `objective` under it."""

    freedom: float
    judged: Judged
    head: ZeroShotHead
    objective: Objective
    theta: Tensor


def stacked(
    problem: ConvexProblem,
    form: Form,
    head: ZeroShotHead,
    rows: AdapterRows,
    outside: AdapterRows | None,
    freedoms: Sequence[float],
) -> Stacked | None:
    """Class vectors, then components, at each strength, judged as `path.py` judges;
    None where the tower stays.

    Args:
        problem: of one label set and one seed.
        form: the anchored adapter with its components.
        head: the classifier whose vectors move.
        rows, outside: as in :meth:`ConvexProblem.path`.
        freedoms: the strengths tried, each for both steps.
    """
    first = problem.path(Form(form.adapter, with_components=False), head, rows, outside, class_vectors=True)
    if first.groups[0].idle:
        return None
    measured = problem.measured(form, head, rows)
    vectors = {held: first.like.new_zeros(first.objective.shape.size) for held in (*first.held, -1)}
    components: dict[int, Tensor] = {}
    base = first.base()
    tried: list[tuple[float, Judged]] = []
    waiting = 0
    for freedom in sorted(freedoms):
        start = torch.stack([vectors[held] for held in first.held])
        moved = first._fit([(0, held, freedom) for held in first.held], start, ROUGH).theta
        vectors.update(zip(first.held, moved, strict=True))
        fitted = []
        for held, theta in zip(first.held, moved, strict=True):
            own = _moved(head, first.objective, theta)
            second = problem.path(form, own, rows, outside, measured=measured)
            before = components.get(held, second.like.new_zeros(second.objective.shape.size))
            components[held] = second._fit([(0, held, freedom)], before[None], ROUGH, rough=True).theta[0]
            fitted.append((held, second, components[held]))
        judged = _judged(first, fitted)
        waiting = 0 if all(judged.loss < other.loss for _, other in tried) else waiting + 1
        tried.append((freedom, judged))
        if waiting == PATIENCE:
            break
    chosen = best_of(base, [judged for _, judged in tried])
    if chosen is None:
        return None
    freedom, judged = tried[chosen]
    theta = first._fit([(0, -1, freedom)], vectors[-1][None], FINE, 600).theta[0]
    final = _moved(head, first.objective, theta)
    second = problem.path(form, final, rows, outside, measured=measured)
    zero = second.like.new_zeros(1, second.objective.shape.size)
    return Stacked(
        freedom,
        judged,
        final,
        second.objective,
        second._fit([(0, -1, freedom)], zero, FINE, 600).theta[0],
    )


def _moved(head: ZeroShotHead, objective: Objective, theta: Tensor) -> ZeroShotHead:
    moved = objective.vectors(theta[None])
    if moved is None:
        return head
    vectors = head.class_vectors + moved[0].to(head.class_vectors)
    return ZeroShotHead(vectors, head.class_names, float(head.logit_scale))


def _judged(first: Path, fitted: Sequence[tuple[int, Path, Tensor]]) -> Judged:
    """What the fits say of the images that they held out, or of the validation images."""
    reader = fitted[0][1]  # its rows have components, which `first` leaves out
    outside = reader.outside
    rows = reader.objective.rows if outside is None else outside.rows
    targets = first.objective.targets if outside is None else outside.targets
    judge = Judge(1, len(rows), targets, first.like)
    group = first.groups[0]
    for block in rows.blocks():
        logits = first.like.new_zeros(len(block.output), first.objective.shape.classes)
        for held, path, theta in fitted:
            if outside is not None or block.fold == held:
                logits = path.objective.used(block, theta[None])[:, 0]
            elif block.fold is None:
                mine = (first.fold[group.split, block.place] == held).nonzero().flatten()
                logits[mine] = path.objective.used(block.pick(mine), theta[None])[:, 0]
        if outside is not None:
            weight = outside.weight[group.which, block.place]
        else:
            weight = (first.fold[group.split, block.place] >= 0).to(first.like.dtype)
            if targets.weight is not None:
                weight = weight * targets.weight[group.which, block.place]
        judge.add(0, logits, weight, group.which, block.place)
    return judge.judged(0)
