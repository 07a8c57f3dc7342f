"""How are T smooth convex functions minimised side by side?

L-BFGS, each with its own steps, one evaluation for all.

Every evaluation serves all tasks that are still going: one that accepts its step turns to a new direction,
one that does not halves its step. The host waits for the device once an evaluation, to learn who is done.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MEMORY = 12  # pairs of steps and gradient changes that are remembered
SUFFICIENT = 1e-4  # Armijo: share of the promised decrease that a step must bring
HALVINGS = 30
EXACT = 1e-7  # of a value in float32: what rounding may add to it


@dataclass(frozen=True)
class Pairs:
    """Steps and the changes of gradient along them, [T, m, P] each, oldest first.

    Zeros where there is none.
    """

    steps: Tensor
    changes: Tensor

    def pick(self, index: Tensor | int) -> "Pairs":
        return Pairs(self.steps[index], self.changes[index])


@dataclass(frozen=True)
class Minimum:
    """Where a minimisation ended: theta [T, P], values [T] float64, gradients [T, P], gaps [T], evaluations
    [T]; and the pairs that tell of the curvature there."""

    theta: Tensor
    value: Tensor
    grad: Tensor
    gap: Tensor
    evaluations: Tensor
    pairs: Pairs


def minimise(
    evaluate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    gap: Callable[[Tensor, Tensor, Tensor], Tensor],
    start: Tensor,
    curvature: Tensor,
    tolerance: Tensor,
    *,
    longest: Callable[[Tensor, Tensor], Tensor] | None = None,
    limit: int = 300,
    rounding: float = EXACT,
    pairs: Pairs | None = None,
) -> Minimum:
    """Minimises T functions from `start` [T, P] until the gap of each is at most its tolerance.

    Args:
        evaluate: (theta [t, P], tasks [t]) -> values [t] float64 and gradients [t, P] of those tasks.
        gap: (theta, gradients, tasks) -> upper bounds [t] on what is left to gain.
        curvature: [T, P] above zero, a diagonal like the Hessian's.
        tolerance: [T].
        longest: (theta [t, P], direction [t, P]) -> [t], the step that would leave the domain; none goes
            beyond half.
        limit: most evaluations a task may take.
        rounding: share of a value by which rounding may raise it.
        pairs: of a minimum nearby, to start with its curvature.

    A task that is done drops out of the evaluations, and its numbers do not depend on its neighbours but by
    rounding.
    """
    theta = start.clone()
    active = torch.arange(len(theta), device=theta.device)
    value, grad = evaluate(theta, active)
    left = gap(theta, grad, active)
    used = torch.ones(len(theta), dtype=torch.int64, device=theta.device)
    inverse = _Inverse(1 / curvature, pairs)
    done = Minimum(theta, value, grad, left, used, Pairs(*inverse.all()))
    going = left > tolerance
    x, fx, gx, count, halved = theta, value, grad, used, torch.zeros_like(used)
    direction, slope, step = _ahead(inverse, x, gx, longest)
    while True:
        alive = going.tolist()
        if not all(alive):
            ended, keep = (
                torch.tensor([i for i, on in enumerate(alive) if on == kept], dtype=torch.int64).to(
                    theta.device
                )
                for kept in (False, True)
            )
            places = active[ended]
            done.theta[places], done.value[places], done.grad[places] = x[ended], fx[ended], gx[ended]
            done.gap[places], done.evaluations[places] = left[ended], count[ended]
            done.pairs.steps[places], done.pairs.changes[places] = (one[ended] for one in inverse.all())
            active, tolerance = active[keep], tolerance[keep]
            if not any(alive):
                return done
            x, fx, gx, count, halved = x[keep], fx[keep], gx[keep], count[keep], halved[keep]
            inverse.pick(keep)
            direction, slope, step = direction[keep], slope[keep], step[keep]
        trial = torch.addcmul(x, step[:, None], direction)
        found, found_grad = evaluate(trial, active)
        count = count + 1
        good = found <= fx + SUFFICIENT * step.double() * slope + rounding * fx.abs()
        taken = good[:, None]
        inverse.add(torch.where(taken, trial - x, 0), torch.where(taken, found_grad - gx, 0))
        x, gx = torch.where(taken, trial, x), torch.where(taken, found_grad, gx)
        fx = torch.where(good, found, fx)
        left = gap(x, gx, active)
        halved = torch.where(good, 0, halved + 1)
        ahead, new_slope, new_step = _ahead(inverse, x, gx, longest)
        direction = torch.where(taken, ahead, direction)
        slope, step = torch.where(good, new_slope, slope), torch.where(good, new_step, step / 2)
        going = (left > tolerance) & (halved < HALVINGS) & (count < limit)


def _ahead(inverse: "_Inverse", x: Tensor, grad: Tensor, longest) -> tuple[Tensor, Tensor, Tensor]:
    """Direction [t, P], the slope [t] along it in float64, and the step [t] to try first."""
    direction = inverse.direction(grad)
    slope = (direction.double() * grad.double()).sum(1)
    step = torch.ones_like(x[:, 0])
    if longest is not None:
        step = torch.minimum(step, longest(x, direction) / 2)
    return direction, slope, step


class _Inverse:
    """The inverse Hessian of L-BFGS in its compact form (Byrd, Nocedal, Schnabel 1994),
    for all tasks at once.

    Pairs stand in a ring; a pair that is no use (a step not taken, no curvature seen) is zero and counts for
    nothing.
    """

    def __init__(self, inverse: Tensor, pairs: Pairs | None):
        self.inverse = inverse
        shape = (len(inverse), MEMORY, inverse.shape[1])
        self.steps, self.changes = inverse.new_zeros(shape), inverse.new_zeros(shape)
        self.scale = inverse.new_ones(len(inverse))
        self.newest = MEMORY - 1
        self.some = False
        if pairs is not None:
            for number in range(pairs.steps.shape[1]):
                self.add(pairs.steps[:, number], pairs.changes[:, number])

    def _order(self) -> list[int]:
        return [(self.newest + 1 + place) % MEMORY for place in range(MEMORY)]

    def all(self) -> tuple[Tensor, Tensor]:
        """Steps and changes, oldest first."""
        order = self._order()
        return self.steps[:, order], self.changes[:, order]

    def pick(self, keep: Tensor) -> None:
        self.inverse, self.scale = self.inverse[keep], self.scale[keep]
        self.steps, self.changes = self.steps[keep], self.changes[keep]

    def add(self, step: Tensor, change: Tensor) -> None:
        product = (step * change).sum(1)
        usable = product > 1e-12 * step.norm(dim=1) * change.norm(dim=1)
        self.newest = (self.newest + 1) % MEMORY
        self.steps[:, self.newest] = torch.where(usable[:, None], step, 0)
        self.changes[:, self.newest] = torch.where(usable[:, None], change, 0)
        length = (change * self.inverse * change).sum(1)
        self.scale = torch.where(usable, product / length, self.scale)
        self.some = True

    def direction(self, grad: Tensor) -> Tensor:
        first = self.inverse * self.scale[:, None]
        found = first * grad
        if not self.some:
            return -found
        order = self._order()
        s, y = self.steps, self.changes
        scaled = y * first[:, None]
        products = torch.bmm(s, y.mT).double()[:, order][:, :, order]
        among = torch.bmm(scaled, y.mT).double()[:, order][:, :, order]
        a = torch.bmm(s, grad[:, :, None]).double()[:, order]
        b = torch.bmm(y, found[:, :, None]).double()[:, order]
        own = products.diagonal(dim1=1, dim2=2)
        upper = products.triu() + torch.diag_embed((own == 0).double())
        u = torch.linalg.solve_triangular(upper, a, upper=True)
        v = own[..., None] * u + among @ u - b
        v = torch.linalg.solve_triangular(upper.mT, v, upper=False)
        u, v = u.to(grad.dtype), v.to(grad.dtype)
        back = [order.index(place) for place in range(MEMORY)]
        found = found + torch.bmm(v[:, back].mT, s)[:, 0] - torch.bmm(u[:, back].mT, scaled)[:, 0]
        return -found
