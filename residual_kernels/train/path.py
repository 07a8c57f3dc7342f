"""How strong a penalty?

Fits from strong to weak for every fold side by side, judged on what each fold held out.

The strength of a penalty is told as `freedom` = trace / alpha, with the trace of the loss's Hessian at equal
probabilities: about how many numbers the penalty leaves free, whatever the data's scale. Freedom 0 is the
tower itself. Rows in memory: one strength after another, each from the last one's solution, until two have
brought nothing. Rows that are read from disk again at every evaluation: all strengths side by side, which
takes fewer readings.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from residual_kernels import distributed
from residual_kernels.train.choice import Judge, Judged, best_of
from residual_kernels.train.lbfgs import EXACT, Minimum, Pairs, minimise
from residual_kernels.train.logistic import Objective, Rows, RowSource, Targets, Tasks

log = logging.getLogger(__name__)

FREEDOMS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 3e4)
PATIENCE = 2  # strengths without a better loss before a path ends
ROUGH, FINE = 3e-3, 1e-5  # nats an image that a fold's fit, and the last one, may be from their optimum
ROUNDING = 1e-3  # of a value from bfloat16 coefficients: what rounding may add to it


@dataclass(frozen=True)
class FitGroup:
    """One thing to fit: its label set and its split of the rows.

    Where it is `idle` there is nothing to learn from: images of fewer than two classes, or none to judge by.
    The tower stays then."""

    which: int
    split: int
    idle: bool = False


@dataclass(frozen=True)
class Solution:
    """A fit on all rows: theta [P], the penalty's factor alpha, the objective there, `gap` (an upper bound on
    what is left to gain) and the gradient's norm."""

    theta: Tensor
    alpha: float
    objective: float
    gap: float
    gradient: float


@dataclass
class Found:
    """What the path of one group came to.

    `candidates` are freedoms with what was judged of them; `chosen` is a place in it, and `solution` the fit
    there. Both are None where the tower stays.
    """

    base: Judged
    candidates: list[tuple[float, Judged]] = field(default_factory=list)
    chosen: int | None = None
    solution: Solution | None = None
    evaluations: int = 0


@dataclass(frozen=True)
class Outside:
    """Validation rows, their targets, and how much each counts [L, n]."""

    rows: RowSource
    targets: Targets
    weight: Tensor


class Path:
    """The search for G groups at once; `folds` numbers 0 ... folds-1 of `fold` [S, N],
    or validation rows outside."""

    def __init__(
        self,
        objective: Objective,
        groups: Sequence[FitGroup],
        fold: Tensor,
        folds: int,
        outside: Outside | None = None,
        *,
        freedoms: Sequence[float] = FREEDOMS,
        side_by_side: bool = False,
    ):
        self.objective, self.groups, self.fold, self.folds = objective, list(groups), fold, folds
        self.outside, self.freedoms, self.side_by_side = outside, sorted(freedoms), side_by_side
        self.held = [-1] if outside is not None else list(range(folds))
        self.like = objective.right
        self.trace = objective.trace()
        self.mass = self._mass()
        self.evaluations = [0] * len(self.groups)
        self.pairs: dict[tuple[int, int], tuple[Pairs, Tensor]] = {}  # of the last strength, and its alpha

    def _tasks(self, rows: Sequence[tuple[int, int, float]]) -> tuple[Tasks, Tensor]:
        """Tasks and their masses of (group, held, freedom)."""
        device, dtype = self.like.device, self.like.dtype
        mass = torch.tensor([self.mass[group, held] for group, held, _ in rows], dtype=dtype, device=device)
        freedom = torch.tensor([freedom for *_, freedom in rows], dtype=dtype, device=device)
        which = torch.tensor([self.groups[group].which for group, *_ in rows], device=device)
        split = torch.tensor([self.groups[group].split for group, *_ in rows], device=device)
        held = torch.tensor([held for _, held, _ in rows], dtype=torch.int16, device=device)
        return Tasks(which, split, held, mass * self.trace / freedom, self.fold), mass

    def _mass(self) -> dict[tuple[int, int], float]:
        """How many images, by their weights, each task fits."""
        keys = [(group, held) for group in range(len(self.groups)) for held in (-1, *self.held)]
        keys = list(dict.fromkeys(keys))
        self.mass = dict.fromkeys(keys, 1.0)
        tasks, _ = self._tasks([(*key, 1.0) for key in keys])
        sums = tasks.counted(self.objective.targets, slice(None)).double().sum(0)
        return dict(zip(keys, distributed.total(sums).tolist(), strict=True))

    def _fit(self, rows, start: Tensor, nats: float, limit: int = 300, rough: bool = False) -> Minimum:
        tasks, mass = self._tasks(rows)
        objective = self.objective
        found = minimise(
            lambda theta, index: objective.evaluate(theta, tasks.pick(index), rough=rough),
            lambda theta, grad, index: objective.gap(theta, grad, tasks.pick(index)),
            start,
            objective.curvature(tasks, mass),
            mass.double() * nats,
            longest=objective.longest,
            limit=limit,
            rounding=ROUNDING if rough and objective.is_narrow else EXACT,
            pairs=self._pairs(rows, tasks),
        )
        if not self.side_by_side:
            for place, (group, held, _) in enumerate(rows):
                self.pairs[group, held] = found.pairs.pick(place), tasks.alpha[place]
        for (group, *_), count in zip(rows, found.evaluations.tolist(), strict=True):
            self.evaluations[group] += count
        return found

    def _pairs(self, rows, tasks: Tasks) -> Pairs | None:
        """The curvature seen at the last strength: a change of alpha changes it by a multiple of the step."""
        keys = [(group, held) for group, held, _ in rows]
        if any(key not in self.pairs for key in keys):
            return None
        known = [self.pairs[key] for key in keys]
        steps = torch.stack([one.steps for one, _ in known])
        changes = torch.stack([one.changes for one, _ in known])
        more = tasks.alpha - torch.stack([alpha for _, alpha in known])
        self.objective.penalised(changes).add_(more[:, None, None] * self.objective.penalised(steps))
        return Pairs(steps, changes)

    def base(self, group: int = 0) -> Judged:
        """What the tower itself says of the images that judge."""
        return self._judged([(group, None)], {})[0]

    def run(self) -> list[Found]:
        zero = self.like.new_zeros(1, self.objective.shape.size)
        self.found = [Found(self.base(group)) for group in range(len(self.groups))]
        best: dict[int, Tensor] = {}
        waiting = [PATIENCE * group.idle for group in self.groups]
        last = {(group, held): zero[0] for group in range(len(self.groups)) for held in self.held}
        stages = [self.freedoms] if self.side_by_side else [[freedom] for freedom in self.freedoms]
        for stage in stages:
            active = [group for group in range(len(self.groups)) if waiting[group] < PATIENCE]
            if not active:
                break
            rows = [(group, held, freedom) for group in active for freedom in stage for held in self.held]
            start = torch.stack([last[group, held] for group, held, _ in rows])
            done = self._fit(rows, start, ROUGH, rough=True)
            thetas = dict(zip(rows, done.theta, strict=True))
            moved = {row[0] for row, count in zip(rows, done.evaluations.tolist(), strict=True) if count > 1}
            columns = [(group, freedom) for group in active for freedom in stage]
            for (group, freedom), judged in zip(columns, self._judged(columns, thetas), strict=True):
                found = self.found[group]
                better = all(judged.loss < other.loss for _, other in found.candidates)
                found.candidates.append((freedom, judged))
                if better:
                    waiting[group] = 0
                elif group in moved:  # so strong a penalty that nothing moves says nothing of weaker ones
                    waiting[group] += 1
                own = [thetas[group, held, freedom] for held in self.held]
                if better:
                    best[group] = torch.stack(own).mean(0)
                last.update({(group, held): one for held, one in zip(self.held, own, strict=True)})
        self._finish(best)
        return self.found

    def _finish(self, best: dict[int, Tensor]) -> None:
        """Fits all rows at what was chosen, to the last digits that count."""
        rows = []
        for group, found in enumerate(self.found):
            found.chosen = best_of(found.base, [judged for _, judged in found.candidates])
            if found.chosen is not None:
                rows.append((group, -1, found.candidates[found.chosen][0]))
        if rows:
            done = self._fit(rows, torch.stack([best[group] for group, *_ in rows]), FINE, 600)
            tasks, _ = self._tasks(rows)
            for place, (group, *_) in enumerate(rows):
                self.found[group].solution = Solution(
                    done.theta[place],
                    float(tasks.alpha[place]),
                    float(done.value[place]),
                    float(done.gap[place]),
                    float(done.grad[place].norm()),
                )
                nats = float(done.gap[place]) / self.mass[group, -1]
                if not nats <= FINE:
                    log.warning(
                        "the convex fit stopped up to %.2g nats an image from its optimum after %d "
                        "evaluations; a smaller freedom than %g, or logits of a smaller scale, would be "
                        "solved",
                        nats,
                        int(done.evaluations[place]),
                        rows[place][2],
                    )
        for found, count in zip(self.found, self.evaluations, strict=True):
            found.evaluations = count

    # --- judging --------------------------------------------------------------------------------------------

    def _judged(self, columns: Sequence[tuple[int, float | None]], thetas: dict) -> list[Judged]:
        """What each (group, freedom) says of images that it was not fitted to; freedom None is the tower."""
        outside = self.outside
        rows = self.objective.rows if outside is None else outside.rows
        targets = self.objective.targets if outside is None else outside.targets
        judge = Judge(len(columns), len(rows), targets, self.like)
        for block in rows.blocks():
            said = self._said(block, columns, thetas)
            for column, (number, _) in enumerate(columns):
                group = self.groups[number]
                if outside is None:
                    weight = (self.fold[group.split, block.place] >= 0).to(self.like.dtype)
                    if targets.weight is not None:
                        weight = weight * targets.weight[group.which, block.place]
                else:
                    weight = outside.weight[group.which, block.place]
                judge.add(column, said[column], weight, group.which, block.place)
        return [judge.judged(column) for column in range(len(columns))]

    def _said(self, block: Rows, columns: Sequence[tuple[int, float | None]], thetas: dict) -> list[Tensor]:
        """Logits [n, K] of a block by every column; each row is read by the fit that held it out."""
        base = self.objective.readout.base(block.output)[0]
        said = [base] * len(columns)
        splits: dict[int, list[int]] = {}  # columns that hold out the same rows
        for column, (number, freedom) in enumerate(columns):
            if freedom is not None:
                splits.setdefault(self.groups[number].split, []).append(column)
                said[column] = base.clone()
        for split, own in splits.items():
            for held in self.held:
                theta = torch.stack(
                    [thetas[number, held, freedom] for number, freedom in (columns[c] for c in own)]
                )
                where: Tensor | slice = slice(None)
                some = block
                if block.fold is None:
                    where = (self.fold[split, block.place] == held).nonzero().flatten()
                    some = block if held < 0 else block.pick(where)
                elif held not in (-1, block.fold):
                    continue
                every = self.objective.used(some, theta)
                for place, column in enumerate(own):
                    if held < 0:
                        said[column][:] = every[:, place]
                    else:
                        said[column][where] = every[:, place]
        return said
