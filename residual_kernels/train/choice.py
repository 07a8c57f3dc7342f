"""Which candidate is kept?

Judged on images that it was not fitted to, by one standard error in the tower's favour.

A candidate is judged by its log-loss at its best temperature: the accuracy of few images is coarse, and a
temperature moves no label. Two candidates are compared image by image, so that what all find hard cancels
out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from residual_kernels import distributed
from residual_kernels.train.logistic import Targets

# On the logits: 1/64 ... 2, and no opinion at all.
FACTORS = (
    0.0,
    *(2.0 ** (step / 2 - 6) for step in range(15)),
)


ELEMENTS = 2**22  # of logits at several temperatures, at a time


@dataclass(frozen=True)
class Judged:
    """Log-losses [n] (nats) and hits [n] on this process's images, and how much each image counts, [n].

    `loss` and `accuracy` are the means over all processes' images.
    """

    losses: Tensor
    hits: Tensor
    weight: Tensor
    loss: float
    accuracy: float

    @classmethod
    def of(cls, losses: Tensor, hits: Tensor, weight: Tensor) -> "Judged":
        """From losses [FACTORS, n]: the temperature of least mean loss is the one that counts."""
        wide = weight.double()
        sums = torch.cat([(losses.double() * wide).sum(1), (hits * wide).sum()[None], wide.sum()[None]])
        sums = distributed.total(sums)
        best = int(sums[:-2].argmin())
        return cls(losses[best], hits, weight, float(sums[best] / sums[-1]), float(sums[-2] / sums[-1]))


class Judge:
    """Collects what `columns` candidates say of `count` images, block by block."""

    def __init__(self, columns: int, count: int, targets: Targets, like: Tensor):
        self.targets = targets
        self.losses = like.new_zeros(columns, len(FACTORS), count)
        self.hits = torch.zeros(columns, count, dtype=torch.bool, device=like.device)
        self.weight = like.new_zeros(columns, count)

    def add(self, column: int, logits: Tensor, weight: Tensor, which: int, place: slice | Tensor) -> None:
        """Logits [n, K] of a candidate on the rows at `place`, which count as `weight` [n],
        under a label set."""
        most = max(1, ELEMENTS // max(1, logits.numel()))
        for start in range(0, len(FACTORS), most):
            factors = torch.tensor(FACTORS[start : start + most], dtype=logits.dtype).to(logits.device)
            log_p = (logits[:, None] * factors[:, None]).log_softmax(-1)  # [n, factors, K]
            number = torch.full((len(factors),), which, device=logits.device)
            found = self.targets.losses(log_p, number, place)
            self.losses[column][start : start + most, place] = found.T
        self.hits[column, place] = self.targets.hits(logits.argmax(-1), which, place)
        self.weight[column, place] = weight

    def judged(self, column: int) -> Judged:
        return Judged.of(self.losses[column], self.hits[column], self.weight[column])


def standard_error(a: Judged, b: Judged) -> float:
    """Of the difference of their mean losses, image by image."""
    weight = a.weight.double()
    difference = a.losses.double() - b.losses.double() - (a.loss - b.loss)
    found = distributed.total(torch.stack([(weight * difference).square().sum(), weight.sum()]))
    return float(found[0].sqrt() / found[1])


def accuracy_error(a: Judged, b: Judged) -> float:
    """Standard error of the difference of their accuracies, image by image."""
    weight = a.weight.double()
    difference = a.hits.double() - b.hits.double() - (a.accuracy - b.accuracy)
    found = distributed.total(torch.stack([(weight * difference).square().sum(), weight.sum()]))
    return float(found[0].sqrt() / found[1])


def best_of(base: Judged, candidates: Sequence[Judged]) -> int | None:
    """The candidate of least loss, or None where the tower stays: when it is better by less than one standard
    error, or labels fewer images right."""
    if not candidates:
        return None
    best = min(range(len(candidates)), key=lambda index: candidates[index].loss)
    found = candidates[best]
    if not base.loss - found.loss > standard_error(base, found) or found.accuracy < base.accuracy:
        return None
    return best
