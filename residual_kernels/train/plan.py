"""What is a fit about to do?

Its tasks, starting weights, rows, labels and orders, checked before the first step.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from residual_kernels import distributed
from residual_kernels.adapters.tower_adapter import TowerAdapter
from residual_kernels.files import digest
from residual_kernels.train import checkpoints
from residual_kernels.train.batches import AdapterRows, room, source_of, whole
from residual_kernels.train.config import FitConfig
from residual_kernels.train.evaluation import Heads
from residual_kernels.train.labels import label_table, shots_of, weights_of_classes
from residual_kernels.train.results import Task
from residual_kernels.units.cache import UnitCache
from residual_kernels.units.source import UnitSource
from residual_kernels.zeroshot import ZeroShotHead


class FitPlan:
    """One call of fit or fit_many; see there for the arguments.

    Attributes:
        tasks, starts: T fits, and their starting weights [T, ...] per parameter.
        rates: the learning rates of the tasks.
        heads: of the label sets.
        rows, val: training rows, and validation rows or None.
        labels, val_labels: [L, N] on the device, or None where a loader brings them.
        class_weight: [L, K], or None.
        orders, order_of: by name the rows that are shuffled together, and the name that each task follows.
        identity: what a checkpoint, and every process, must have the same; empty where nobody asks.
    """

    def __init__(
        self,
        adapter: TowerAdapter,
        heads: Sequence[ZeroShotHead],
        train: UnitCache | Iterable,
        val: UnitCache | Iterable | None,
        tasks: list[Task],
        config: FitConfig,
        *,
        starts: Sequence[Sequence[Tensor]] | None = None,
        labels: Sequence[Tensor] | None = None,
        val_labels: Sequence[Tensor] | None = None,
    ):
        self.adapter, self.tasks, self.config = adapter, tasks, config
        self.rates = [task.lr for task in tasks if task.lr is not None]
        self.parallel = distributed.world() > 1 and not config.alone
        check_unmerged(adapter)
        self.parameters = adapter.trainable()
        if not self.parameters:
            raise ValueError(f"a {type(adapter).__name__} learns nothing, so there is nothing to fit")
        self.device = adapter.device
        self.heads = Heads(heads, self.device)
        sets = 1 + max(task.labels for task in tasks)
        if len(heads) not in (1, sets):
            raise ValueError(f"there are {sets} label sets, so give one head or {sets}; got {len(heads)}")
        self.starts = self._stacked(starts)
        if config.shrink and any(name != "weight" for name in self._named()):
            raise ValueError("shrink pulls weights on components or heads to 1; this adapter has none")
        names = heads[0].class_names if len(heads) == 1 else None
        needed = {"labelled": labels is None, "classes": min(self.heads.sizes), "class_names": names}
        source, judges = opened_twice(adapter, train, val, **needed)
        self._check_cached((source, judges), labels)
        self.labels: Tensor | None = None
        self.class_weight: Tensor | None = None
        self.orders: dict[str, Tensor] = {}
        self.order_of = ["loader"] * len(tasks)
        by_class = config.class_weight
        if source.indexed:
            if not source.count:
                raise ValueError("the training data gave no images")
            table = label_table(source, labels, sets, self.heads.sizes, "labels")
            source, table = self._choose(source, source.count, table, heads)
            if config.shots is not None and isinstance(by_class, str):
                by_class = None  # shots are balanced already
            self.labels = table.to(self.device)
        elif by_class is not None:
            table = torch.cat([batch.truth for batch in source.batches()])[None]  # read; the tower rests
        if by_class is not None:
            weights = weights_of_classes(by_class, table, self.heads.sizes)
            self.class_weight = weights.to(self.starts[0])
        self.val_labels: Tensor | None = None
        if judges is not None and judges.indexed:
            given = val_labels if labels is not None else None
            self.val_labels = label_table(judges, given, sets, self.heads.sizes, "val_labels").to(self.device)
        budget = room(self.device, config.memory)
        part = distributed.share if self.parallel else whole
        self.rows = AdapterRows(adapter, source, budget, part)
        if self.rows.resident is not None:
            budget -= self.rows.bytes
        self.val = None if judges is None else AdapterRows(adapter, judges, budget, part)
        self.identity: dict[str, Any] = {}
        if config.checkpoint is not None or self.parallel:
            self.identity = self._identity(source, judges)
        if self.parallel:
            self._agree()

    def _check_cached(self, sources: Sequence[UnitSource | None], labels: Sequence[Tensor] | None) -> None:
        """Raises ValueError for what only rows with numbers can do."""
        if all(source.indexed for source in sources if source is not None):
            return
        for what, wanted in (
            ("a checkpoint", self.config.checkpoint is not None),
            ("shots", self.config.shots is not None),
            ("a label set of its own", labels is not None),
            ("a fit by several processes", self.parallel),
        ):
            if wanted:
                raise ValueError(f"{what} needs UnitCaches, but train or val is a loader; encode it first")

    def _named(self) -> list[str]:
        return [n for n, _ in self.adapter.named_parameters() if not n.startswith("tower.")]

    def _stacked(self, starts: Sequence[Sequence[Tensor]] | None) -> list[Tensor]:
        """Starting weights of all tasks, [T, ...] per parameter."""
        if starts is None:
            return [p.detach().expand(len(self.tasks), *p.shape).clone() for p in self.parameters]
        for start in starts:
            shapes = [tuple(value.shape) for value in start]
            wanted = [tuple(p.shape) for p in self.parameters]
            if shapes != wanted:
                raise ValueError(
                    f"starts must hold tensors of shapes {wanted}, as the adapter does; got {shapes}"
                )
        return [
            torch.stack([start[index].detach().to(p) for start in starts])
            for index, p in enumerate(self.parameters)
        ]

    def _choose(
        self, train: UnitSource, count: int, table: Tensor, heads: Sequence[ZeroShotHead]
    ) -> tuple[UnitSource, Tensor]:
        """The rows of all `count` that are fitted on, and their labels.

        `orders` then holds the rows that each seed shuffles (each seed and label set, where shots differ by
        it), and `order_of` which of them a task follows.
        """
        shots = self.config.shots
        several = shots is not None and len(table) > 1
        self.order_of = [f"{task.seed}.{task.labels}" if several else str(task.seed) for task in self.tasks]
        if shots is None:
            self.orders = {name: torch.arange(count) for name in self.order_of}
            return train, table
        for task, name in zip(self.tasks, self.order_of, strict=True):
            if name not in self.orders:
                classes = heads[task.labels if len(heads) > 1 else 0].class_names
                self.orders[name] = shots_of(table[task.labels], shots, task.seed, classes)
        if len({len(rows) for rows in self.orders.values()}) > 1:
            raise ValueError("shots of label sets with different numbers of classes cannot be fitted at once")
        used = torch.cat(list(self.orders.values())).unique()
        self.orders = {name: torch.searchsorted(used, rows) for name, rows in self.orders.items()}
        return train.subset(used), table[:, used]

    def _identity(self, train: UnitSource, val: UnitSource | None) -> dict[str, Any]:
        """What makes this fit itself: a checkpoint, and every process, must have the same."""
        config, given = self.config, self.config.class_weight
        if isinstance(given, Tensor):
            given = digest({"class_weight": given}, {})
        return {
            "train": train.fingerprint(self.labels),
            "val": None if val is None else val.fingerprint(self.val_labels),
            "head": checkpoints.of_heads(self.heads),
            "adapter": type(self.adapter).__name__,
            "constants or starting weights": checkpoints.of_adapter(self.adapter, self.starts),
            "lr": [task.lr for task in self.tasks],
            "seed": [task.seed for task in self.tasks],
            "label sets": [task.labels for task in self.tasks],
            "batch_size": config.batch_size,
            "patience": config.patience,
            "weight_decay": config.weight_decay,
            "shrink": config.shrink,
            "class_weight": given,
            "shots": config.shots,
            "in memory": [None if s is None else s.resident is not None for s in (self.rows, self.val)],
        }

    def _agree(self) -> None:
        seen = distributed.gather(self.identity)
        for rank, other in enumerate(seen):
            different = [name for name in self.identity if other[name] != seen[0][name]]
            if different:
                raise ValueError(
                    f"all processes of a fit must get the same input, but {', '.join(different)} of process "
                    f"{rank} differ from process 0's; alone=True fits in each process by itself"
                )


def check_unmerged(adapter: TowerAdapter) -> None:
    if adapter.merged:
        raise ValueError(
            "this adapter is merged into its tower, so its weight changes nothing; unmerge it first"
        )


def opened_twice(
    adapter: TowerAdapter, train: UnitCache | Iterable, val: UnitCache | Iterable | None, **needed
) -> tuple[UnitSource, UnitSource | None]:
    """The sources of training and validation images, which must be readable more than once."""

    def opened(name: str, data: UnitCache | Iterable) -> UnitSource:
        source = source_of(adapter, data, **needed)
        if not source.repeatable:
            raise ValueError(
                f"{name} can be read only once; give a loader or a list that every epoch can read again"
            )
        return source

    return opened("train", train), None if val is None else opened("val", val)
