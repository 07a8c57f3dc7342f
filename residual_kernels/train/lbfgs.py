"""How are T smooth convex functions minimised side by side? L-BFGS, each with its own steps, one evaluation for all."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MEMORY = 12  # pairs of steps and gradient changes that are remembered
SUFFICIENT = 1e-4  # Armijo: share of the promised decrease that a step must bring
HALVINGS = 30


@dataclass(frozen=True)
class Minimum:
    """Where a minimisation ended: theta [T, P], values [T] float64, gradients [T, P], gaps [T], evaluations [T]."""

    theta: Tensor
    value: Tensor
    grad: Tensor
    gap: Tensor
    evaluations: Tensor


def minimise(
    evaluate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    gap: Callable[[Tensor, Tensor, Tensor], Tensor],
    start: Tensor,
    curvature: Tensor,
    tolerance: Tensor,
    feasible: Callable[[Tensor], Tensor] | None = None,
    limit: int = 300,
) -> Minimum:
    """Minimises T functions from `start` [T, P] until the gap of each is at most its tolerance.

    Args:
        evaluate: (theta [t, P], tasks [t]) -> values [t] float64 and gradients [t, P] of those tasks.
        gap: (theta, gradients, tasks) -> upper bounds [t] on what is left to gain.
        curvature: [T, P] above zero, a diagonal like the Hessian's.
        tolerance: [T].
        feasible: theta [t, P] -> [t] bool; a step out of the domain is halved.
        limit: most evaluations a task may take.

    A task that is done drops out of the evaluations, and its numbers do not depend on its neighbours but by rounding.
    """
    theta = start.clone()
    tasks = torch.arange(len(theta), device=theta.device)
    value, grad = evaluate(theta, tasks)
    left = gap(theta, grad, tasks)
    used = torch.ones(len(theta), dtype=torch.int64, device=theta.device)
    active = (left > tolerance).nonzero().flatten()
    history = _History(curvature)
    while len(active):
        history.keep(active)
        own, slope_of = theta[active], grad[active]
        direction = history.direction(slope_of)
        slope = (direction.double() * slope_of.double()).sum(1)
        step = theta.new_ones(len(active))
        moving = torch.arange(len(active), device=theta.device)
        new_theta, new_value, new_grad = own.clone(), value[active].clone(), slope_of.clone()
        for _ in range(HALVINGS):
            trial = own[moving] + step[moving, None] * direction[moving]
            if feasible is not None:
                inside = feasible(trial)
                if not inside.all():
                    step[moving[~inside]] /= 2
                    continue
            found, found_grad = evaluate(trial, active[moving])
            used[active[moving]] += 1
            noise = 1e-7 * value[active[moving]].abs()  # what rounding may add
            good = found <= value[active[moving]] + SUFFICIENT * step[moving].double() * slope[moving] + noise
            chosen = moving[good]
            new_theta[chosen], new_value[chosen], new_grad[chosen] = (
                trial[good],
                found[good],
                found_grad[good],
            )
            moving = moving[~good]
            if not len(moving):
                break
            step[moving] /= 2
        history.add(new_theta - own, new_grad - slope_of)
        theta[active], value[active], grad[active] = new_theta, new_value, new_grad
        left[active] = gap(new_theta, new_grad, active)
        stuck = torch.zeros(len(active), dtype=torch.bool, device=theta.device)
        stuck[moving] = True
        going = (left[active] > tolerance[active]) & ~stuck & (used[active] < limit)
        history.compact(going)
        active = active[going]
    return Minimum(theta, value, grad, left, used)


class _History:
    """Pairs (step, gradient change) of the tasks that are still going, newest last."""

    def __init__(self, curvature: Tensor):
        self.inverse = 1 / curvature
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = []
        self._started = False

    def keep(self, active: Tensor) -> None:
        """Forgets, before the first step, tasks that are done already."""
        if not self._started:
            self.inverse, self._started = self.inverse[active], True

    def compact(self, going: Tensor) -> None:
        if not going.all():
            self.inverse = self.inverse[going]
            self.pairs = [(s[going], y[going], rho[going]) for s, y, rho in self.pairs]

    def add(self, s: Tensor, y: Tensor) -> None:
        product = (s * y).sum(1, keepdim=True)
        usable = product > 1e-12 * (s.norm(dim=1) * y.norm(dim=1))[:, None]
        self.pairs.append((s, y, torch.where(usable, 1 / product, 0.0)))
        del self.pairs[:-MEMORY]

    def direction(self, grad: Tensor) -> Tensor:
        q = -grad
        kept = []
        for s, y, rho in reversed(self.pairs):
            a = rho * (s * q).sum(1, keepdim=True)
            q = q - a * y
            kept.append(a)
        if self.pairs:
            s, y, rho = self.pairs[-1]
            scale = torch.where(rho > 0, 1 / (rho * (y * self.inverse * y).sum(1, keepdim=True)), 1.0)
            q = q * self.inverse * scale
        else:
            q = q * self.inverse
        for (s, y, rho), a in zip(self.pairs, reversed(kept), strict=True):
            q = q + s * (a - rho * (y * q).sum(1, keepdim=True))
        return q
