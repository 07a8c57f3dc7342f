"""What does a fit report? Its epochs, its outcome, and the weights of many fits."""

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from residual_kernels import display
from residual_kernels.adapters.tower_adapter import TowerAdapter

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Epoch:
    """One row of the history.

    Attributes:
        epoch: counted from 1; 0 is the state before training.
        train_loss: mean cross-entropy over the epoch; None for epoch 0.
        val_loss, val_accuracy: on the validation images; None without any.
        seconds: since the fit began.
        val_balanced_accuracy: mean recall of the classes, on the validation images.
    """

    epoch: int
    train_loss: float | None
    val_loss: float | None
    val_accuracy: float | None
    seconds: float
    val_balanced_accuracy: float | None = None


@dataclass(frozen=True)
class Strength:
    """One strength of a convex fit's penalty, judged on images that it was not fitted to.

    `freedom`: about how many numbers the penalty leaves free; 0 is the model as it was. `loss` (nats, at its
    best temperature) and `accuracy` are means over these images; `error` is the standard error of its loss's
    difference from the untouched model's.
    """

    freedom: float
    loss: float
    accuracy: float
    error: float


@dataclass(frozen=True)
class Certificate:
    """How near its optimum a convex fit is: its objective is at most `gap` above the least one (both in nats,
    summed over images). `gradient` is the gradient's norm in whitened coordinates, `alpha` the penalty's
    factor there."""

    objective: float
    gap: float
    gradient: float
    alpha: float
    evaluations: int


@dataclass
class FitResult:
    """What :func:`fit` did.

    Attributes:
        best_epoch: the epoch whose weights the adapter now holds. A convex fit has no epochs: its history
            holds the model (0) and the fit (1), and best_epoch is 0 if the model stays.
        val_accuracy: of that epoch, on val; None without val.
        parameters: how many numbers were learned.
        seconds: of all sessions of a resumed fit. Of fits that run at once, the time until this one ended.
        stopped_early: whether patience ran out before the last epoch.
        history: one :class:`Epoch` per epoch.
        diverged: whether the training loss became infinite or NaN (only in :func:`fit_many`; :func:`fit`
            raises).
        solver: "adamw" or "convex".
        base_accuracy: of the untouched model, on val; without val, on the training images.
        fold_accuracy: convex, without val: of the fits, on the images that they held out.
        freedom: convex: the chosen strength, as the number of weights that it leaves about free.
        path: convex: every strength that was tried, the model first.
        certificate: convex: how near the optimum the fit is; None if the model stays.
    """

    best_epoch: int
    val_accuracy: float | None
    parameters: int
    seconds: float
    stopped_early: bool
    history: list[Epoch] = field(repr=False)
    diverged: bool = False
    solver: str = "adamw"
    base_accuracy: float | None = None
    fold_accuracy: float | None = None
    freedom: float | None = None
    path: list[Strength] = field(default_factory=list, repr=False)
    certificate: Certificate | None = None

    def table(self) -> display.Table:
        """One dict per epoch; of a convex fit one per strength that was tried, the untouched model first."""
        return display.Table(asdict(row) for row in (self.path if self.solver == "convex" else self.history))

    def to_pandas(self) -> "pandas.DataFrame":
        """:meth:`table` as a DataFrame. Raises ImportError where pandas is missing."""
        return self.table().to_pandas()

    def plot(self) -> "Figure":
        """Loss and accuracy by epoch, or by strength of a convex fit.

        Returns:
            A matplotlib Figure.

        Raises:
            ImportError: matplotlib is missing.
        """
        figures = display.drawing()
        return figures.strengths(self) if self.solver == "convex" else figures.epochs(self)

    def _repr_html_(self) -> str:
        facts = {
            "solver": self.solver,
            "accuracy of the untouched model": self.base_accuracy,
            "accuracy on val": self.val_accuracy,
            "accuracy on held-out folds": self.fold_accuracy,
            "best epoch": None if self.solver == "convex" else self.best_epoch,
            "weights left about free": self.freedom,
            "numbers": self.parameters,
            "seconds": self.seconds,
        }
        rows = self.table()
        note = "the training loss became infinite or NaN" if self.diverged else None
        return display.card(
            "FitResult", facts, rows.columns, [list(row.values()) for row in rows], notes=(note,)
        )


@dataclass(frozen=True)
class Task:
    """One of many fits: its learning rate (None of a convex fit), the seed of its order, shots or folds, and
    the number of its label set."""

    lr: float | None
    seed: int
    labels: int


@dataclass
class ManyFits:
    """What :func:`fit_many` did: a task and a result for each fit, and the best weights of all, [T, ...] per
    parameter in the order of `adapter.trainable()`."""

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

    def table(self) -> display.Table:
        """One dict per fit: its task, and what its result says in one number each."""
        names = (
            "best_epoch",
            "val_accuracy",
            "base_accuracy",
            "fold_accuracy",
            "freedom",
            "seconds",
            "diverged",
        )
        return display.Table(
            {**asdict(task), **{name: getattr(result, name) for name in names}}
            for task, result in zip(self.tasks, self.results, strict=True)
        )

    def best(self, labels: int = 0) -> int:
        """Number of the fit of this label set that was best on val: by accuracy (balanced accuracy when the
        classes were balanced), then by loss, then the first."""
        found = []
        for index, (task, result) in enumerate(zip(self.tasks, self.results, strict=True)):
            if task.labels == labels and not result.diverged:
                row = result.history[result.best_epoch]
                if row.val_accuracy is None or row.val_loss is None:
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
        adapter.fitted = True
        return self.results[index]
