"""Where does one task of a fit stand? Its history, its best weights, and whether it has waited too long."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from residual_kernels.train.results import Epoch


@dataclass
class Progress:
    """`best` weights are those of `best_epoch`; epoch 0 is the start."""

    best: list[Tensor]
    best_epoch: int = 0
    best_score: float | None = None
    history: list[Epoch] = field(default_factory=list)
    stopped: bool = False
    diverged: bool = False

    @property
    def done(self) -> bool:
        return self.stopped or self.diverged

    def record(
        self,
        epoch: int,
        loss: float | None,
        seen: tuple[float, float, float] | None,
        seconds: float,
        weights: Sequence[Tensor],
        patience: int,
        by_balanced_accuracy: bool,
    ) -> Epoch | None:
        """Writes an epoch down and keeps its weights where they are better; None where the task has diverged.

        `seen` are loss, accuracy and balanced accuracy on val. Without val the last epoch is the best.
        """
        if loss is not None and not math.isfinite(loss):
            self.diverged = True
            return None
        row = Epoch(epoch, loss, None, None, seconds)
        if seen is not None:
            row = Epoch(epoch, loss, seen[0], seen[1], seconds, seen[2])
        self.history.append(row)
        score = row.val_balanced_accuracy if by_balanced_accuracy else row.val_accuracy
        if epoch == 0:
            self.best_score = score
        elif score is None or self.best_score is None or score > self.best_score:
            self.best = [value.detach().clone() for value in weights]
            self.best_epoch, self.best_score = epoch, score
        elif epoch - self.best_epoch >= patience:
            self.stopped = True
        return row
