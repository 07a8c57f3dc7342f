"""What may a fit be told? The options of both solvers, checked in one place."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields

from torch import Tensor

from residual_kernels.train.folds import FOLDS
from residual_kernels.train.path import FREEDOMS

SOLVERS = ("auto", "convex", "adamw")
STEPS = ("auto", "eager", "compiled", "graph", "fused")


def _check_shared(shots: int | None, memory: int | None) -> None:
    if shots is not None and shots < 1:
        raise ValueError(f"shots must be at least 1; got {shots}")
    if memory is not None and memory < 0:
        raise ValueError(f"memory must be a number of bytes, 0 or more; got {memory}")


@dataclass(frozen=True)
class FitConfig:
    """Options of a fit by AdamW; see :func:`residual_kernels.fit` for what each means."""

    epochs: int = 30
    batch_size: int = 64
    patience: int = 5
    weight_decay: float = 0.0
    shrink: float = 0.0
    class_weight: str | Tensor | None = None
    shots: int | None = None
    checkpoint: str | os.PathLike | None = None
    every: int = 1
    step: str = "auto"
    memory: int | None = None
    alone: bool = False

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size, self.patience, self.every) < 1:
            raise ValueError(
                "epochs, batch_size, patience and every must be at least 1; "
                f"got {self.epochs}, {self.batch_size}, {self.patience}, {self.every}"
            )
        if self.weight_decay < 0 or self.shrink < 0 or (self.weight_decay and self.shrink):
            raise ValueError(
                "weight_decay pulls weights to 0 and shrink pulls them to 1: give one of them, not below 0; "
                f"got {self.weight_decay} and {self.shrink}"
            )
        if self.step not in STEPS:
            raise ValueError(f"step must be one of {', '.join(STEPS)}; got {self.step!r}")
        _check_shared(self.shots, self.memory)

    def of_adamw(self, **more: object) -> list[str]:
        """Names of the options given that AdamW alone has;
        `more` are such options that are kept elsewhere."""
        shared = ("class_weight", "shots", "memory", "alone")
        own = [
            one.name
            for one in fields(self)
            if one.name not in shared and getattr(self, one.name) != one.default
        ]
        return [name for name, value in more.items() if value is not None] + own


@dataclass(frozen=True)
class ConvexConfig:
    """Options of a convex fit; see :func:`residual_kernels.fit` for what each means."""

    freedoms: Sequence[float] = FREEDOMS
    folds: int = FOLDS
    label_smoothing: float = 0.0
    class_weight: str | Tensor | None = None
    shots: int | None = None
    memory: int | None = None
    alone: bool = False

    def __post_init__(self) -> None:
        if not self.freedoms or not all(0 < one < math.inf for one in self.freedoms):
            raise ValueError(f"freedoms must be numbers above 0; got {self.freedoms!r}")
        if self.folds < 2:
            raise ValueError(f"folds must be at least 2; got {self.folds}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0 and below 1; got {self.label_smoothing}")
        _check_shared(self.shots, self.memory)

    def of_convex(self) -> list[str]:
        """Names of the options given that the convex solver alone has."""
        own = ("freedoms", "folds", "label_smoothing")
        return [
            one.name for one in fields(self) if one.name in own and getattr(self, one.name) != one.default
        ]
