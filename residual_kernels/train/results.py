"""What does a fit report? Its epochs, its outcome, and the weights of many fits."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from residual_kernels.adapters.tower_adapter import TowerAdapter


@dataclass(frozen=True)
class Epoch:
    """One row of the history; epoch 0 is the state before training (its train_loss is None)."""

    epoch: int
    train_loss: float | None
    val_loss: float | None
    val_accuracy: float | None
    seconds: float
    val_balanced_accuracy: float | None = None


@dataclass
class FitResult:
    """What :func:`fit` did. `best_epoch` is the epoch whose weights the adapter now holds.

    `seconds` counts all sessions of a resumed fit; of fits at once it is the time until this one ended. `diverged`: the
    training loss became infinite or NaN (only in :func:`fit_many`; :func:`fit` raises).
    """

    best_epoch: int
    val_accuracy: float | None
    parameters: int
    seconds: float
    stopped_early: bool
    history: list[Epoch] = field(repr=False)
    diverged: bool = False


@dataclass(frozen=True)
class Task:
    """One of many fits: its learning rate, the seed of its order (and shots), and the number of its label set."""

    lr: float
    seed: int
    labels: int


@dataclass
class ManyFits:
    """What :func:`fit_many` did: a task and a result for each fit, and the best weights of all, [T, ...] per parameter
    in the order of `adapter.trainable()`."""

    tasks: list[Task]
    results: list[FitResult]
    tensors: list[Tensor] = field(repr=False)
    by_balanced_accuracy: bool = False

    @property
    def weight(self) -> Tensor:
        """[T, J], of an adapter with one trainable tensor."""
        if len(self.tensors) != 1:
            raise ValueError(f"this adapter has {len(self.tensors)} trainable tensors; see .tensors")
        return self.tensors[0]

    def best(self, labels: int = 0) -> int:
        """Number of the fit of this label set that was best on val: by accuracy (balanced accuracy when the classes
        were balanced), then by loss, then the first."""
        found = []
        for index, (task, result) in enumerate(zip(self.tasks, self.results, strict=True)):
            if task.labels == labels and not result.diverged:
                row = result.history[result.best_epoch]
                if row.val_accuracy is None:
                    raise ValueError(
                        "without val no fit is known to be best; give val, or choose by yourself"
                    )
                score = row.val_balanced_accuracy if self.by_balanced_accuracy else row.val_accuracy
                found.append((score, -row.val_loss, -index))
        if not found:
            raise ValueError(f"there is no fit of label set {labels}")
        return -max(found)[2]

    def put(self, adapter: TowerAdapter, index: int) -> FitResult:
        """Gives `adapter` the weights of one fit and returns its result."""
        with torch.no_grad():
            for parameter, values in zip(adapter.trainable(), self.tensors, strict=True):
                parameter.copy_(values[index])
        return self.results[index]
