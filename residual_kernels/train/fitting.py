"""How does a fit go? Epoch by epoch over T tasks: steps, validation, early stopping, best weights, checkpoints."""

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from residual_kernels import distributed
from residual_kernels.adapters.tower_adapter import TowerAdapter
from residual_kernels.files import digest
from residual_kernels.train import checkpoints
from residual_kernels.train.batches import AdapterRows, room, source_of, whole, widest
from residual_kernels.train.evaluation import Heads, balanced
from residual_kernels.train.labels import label_table, shots_of, weights_of_classes
from residual_kernels.train.results import Epoch, FitResult, ManyFits, Task
from residual_kernels.train.steps import STEPS, Step, TaskWeights, blocks, bytes_of_a_row
from residual_kernels.units.cache import UnitCache
from residual_kernels.units.source import UnitSource
from residual_kernels.zeroshot import ZeroShotHead


@dataclass
class _State:
    """Where one task stands."""

    best: list[Tensor]
    best_epoch: int = 0
    best_score: float | None = None
    history: list[Epoch] = field(default_factory=list)
    stopped: bool = False
    diverged: bool = False

    @property
    def done(self) -> bool:
        return self.stopped or self.diverged


class Run:
    """One call of fit or fit_many; see there for the arguments."""

    def __init__(
        self,
        adapter: TowerAdapter,
        heads: Sequence[ZeroShotHead],
        train: UnitCache | Iterable,
        val: UnitCache | Iterable | None,
        tasks: list[Task],
        *,
        starts: Sequence[Sequence[Tensor]] | None,
        epochs: int,
        batch_size: int,
        patience: int,
        weight_decay: float,
        shrink: float,
        class_weight: str | Tensor | None,
        shots: int | None,
        checkpoint: str | os.PathLike | None,
        every: int,
        step: str,
        memory: int | None,
        alone: bool,
        progress: Callable[[int, Epoch], None] | None,
        labels: Sequence[Tensor] | None = None,
        val_labels: Sequence[Tensor] | None = None,
    ):
        self.start = time.perf_counter()
        self._check_numbers(epochs, batch_size, patience, every, weight_decay, shrink, shots, step)
        self.adapter, self.tasks, self.progress = adapter, tasks, progress
        self.epochs, self.batch_size, self.patience = epochs, batch_size, patience
        self.checkpoint, self.every = checkpoint, every
        self.weight_decay, self.shrink = weight_decay, shrink
        self.parallel = distributed.world() > 1 and not alone
        self.by_balanced_accuracy = isinstance(class_weight, str)
        if adapter.merged:
            raise ValueError(
                "this adapter is merged into its tower, so its weight changes nothing; unmerge it first"
            )
        self.parameters = adapter.trainable()
        if not self.parameters:
            raise ValueError(f"a {type(adapter).__name__} learns nothing, so there is nothing to fit")
        self.device = adapter.device
        self.heads = Heads(heads, self.device)
        sets = 1 + max(task.labels for task in tasks)
        if len(heads) not in (1, sets):
            raise ValueError(f"there are {sets} label sets, so give one head or {sets}; got {len(heads)}")
        self.starts = self._stacked(starts)
        if shrink and any(name != "weight" for name in self._named()):
            raise ValueError("shrink pulls weights on components or heads to 1; this adapter has none")

        needed = {"labelled": labels is None, "classes": min(self.heads.sizes)}
        sources = [None if data is None else source_of(adapter, data, **needed) for data in (train, val)]
        for name, source in zip(("train", "val"), sources, strict=True):
            if source is not None and not source.repeatable:
                raise ValueError(
                    f"{name} can be read only once; give a loader or a list that every epoch can read anew"
                )
        train, val = sources
        loaded = not all(source.indexed for source in sources if source is not None)
        for what, wanted in (
            ("a checkpoint", checkpoint is not None),
            ("shots", shots is not None),
            ("class_weight", class_weight is not None),
            ("a label set of its own", labels is not None),
            ("a fit by several processes", self.parallel),
        ):
            if loaded and wanted:
                raise ValueError(f"{what} needs UnitCaches, but train or val is a loader; encode it first")

        self.labels, self.orders = None, {"loader": None}
        self.order_of = ["loader"] * len(tasks)
        if train.indexed:
            if not train.count:
                raise ValueError("the training data gave no images")
            table = label_table(train, labels, sets, self.heads.sizes, "labels")
            train, table = self._choose(train, table, heads, shots)
            even = shots is not None and isinstance(class_weight, str)  # shots are balanced already
            weights = weights_of_classes(None if even else class_weight, table, self.heads.sizes)
            self.class_weight = None if weights is None else weights.to(self.starts[0])
            self.labels = table.to(self.device)
        else:
            self.class_weight = None
        self.val_labels = None
        if val is not None and val.indexed:
            given = val_labels if labels is not None else None
            self.val_labels = label_table(val, given, sets, self.heads.sizes, "val_labels").to(self.device)
        budget = room(self.device, memory)
        part = distributed.share if self.parallel else whole
        self.source = AdapterRows(adapter, train, budget, part)
        if self.source.resident is not None:
            budget -= self.source.bytes
        self.val = None if val is None else AdapterRows(adapter, val, budget, part)
        self.identity = None
        if checkpoint is not None or self.parallel:
            self.identity = self._identity(train, val, shots, class_weight)
        if self.parallel:
            self._agree()
        self.step = Step(
            adapter, self.heads, self.source, self.labels, self.class_weight, step, self.parallel
        )  # fmt: skip

    @staticmethod
    def _check_numbers(epochs, batch_size, patience, every, weight_decay, shrink, shots, step) -> None:
        if epochs < 1 or batch_size < 1 or patience < 1 or every < 1:
            raise ValueError(
                "epochs, batch_size, patience and every must be at least 1; "
                f"got {epochs}, {batch_size}, {patience}, {every}"
            )
        if weight_decay < 0 or shrink < 0 or (weight_decay and shrink):
            raise ValueError(
                "weight_decay pulls weights to 0 and shrink pulls them to 1: give one of them, not below 0; "
                f"got {weight_decay} and {shrink}"
            )
        if shots is not None and shots < 1:
            raise ValueError(f"shots must be at least 1; got {shots}")
        if step not in STEPS:
            raise ValueError(f"step must be one of {', '.join(STEPS)}; got {step!r}")

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
        self, train: UnitSource, table: Tensor, heads: Sequence[ZeroShotHead], shots: int | None
    ) -> tuple[UnitSource, Tensor]:
        """The rows that are fitted on, and their labels.

        `orders` then holds the rows that each seed shuffles (each seed and label set, where shots differ by it), and
        `order_of` which of them a task follows.
        """
        several = shots is not None and len(table) > 1
        self.order_of = [f"{task.seed}.{task.labels}" if several else str(task.seed) for task in self.tasks]
        if shots is None:
            self.orders = {name: torch.arange(train.count) for name in self.order_of}
            return train, table
        self.orders = {}
        for task, name in zip(self.tasks, self.order_of, strict=True):
            if name not in self.orders:
                classes = heads[task.labels if len(heads) > 1 else 0].class_names
                self.orders[name] = shots_of(table[task.labels], shots, task.seed, classes)
        if len({len(rows) for rows in self.orders.values()}) > 1:
            raise ValueError("shots of label sets with different numbers of classes cannot be fitted at once")
        used = torch.cat(list(self.orders.values())).unique()
        self.orders = {name: torch.searchsorted(used, rows) for name, rows in self.orders.items()}
        return train.subset(used), table[:, used]

    def _identity(self, train, val, shots, class_weight) -> dict[str, Any]:
        """What makes this fit itself: a checkpoint, and every process, must have the same."""
        given = (
            digest({"class_weight": class_weight}, {}) if isinstance(class_weight, Tensor) else class_weight
        )
        return {
            "train": checkpoints.of_cache(train.cache, self.labels),
            "val": None if val is None else checkpoints.of_cache(val.cache, self.val_labels),
            "head": checkpoints.of_heads(self.heads),
            "adapter": type(self.adapter).__name__,
            "constants or starting weights": checkpoints.of_adapter(self.adapter, self.starts),
            "lr": [task.lr for task in self.tasks],
            "seed": [task.seed for task in self.tasks],
            "label sets": [task.labels for task in self.tasks],
            "batch_size": self.batch_size,
            "patience": self.patience,
            "weight_decay": self.weight_decay,
            "shrink": self.shrink,
            "class_weight": given,
            "shots": shots,
            "in memory": [None if s is None else s.resident is not None for s in (self.source, self.val)],
        }

    def _agree(self) -> None:
        seen = distributed.gather(self.identity)
        for rank, other in enumerate(seen):
            different = [name for name in self.identity if other[name] != seen[0][name]]
            if different:
                raise ValueError(
                    f"the processes of a fit must be given the same, but {', '.join(different)} of process {rank} "
                    "differ from process 0's; alone=True fits in each process by itself"
                )

    def run(self) -> ManyFits:
        count = len(self.tasks)
        self.states = [_State([start[task].clone() for start in self.starts]) for task in range(count)]
        self.generators = {}
        for task, name in zip(self.tasks, self.order_of, strict=True):
            self.generators[name] = torch.Generator().manual_seed(task.seed)
        self.weights = TaskWeights(
            self.starts, [task.lr for task in self.tasks], self.weight_decay, self.shrink
        )  # fmt: skip
        self.active = list(range(count))
        self.before, epoch = 0.0, 0  # seconds of earlier sessions; epochs done
        found = None if self.checkpoint is None else checkpoints.load(self.checkpoint, self.identity)
        if self.parallel and len(set(distributed.gather(None if found is None else found[0]["epoch"]))) > 1:
            raise ValueError(
                f"the processes do not see the same checkpoint at {self.checkpoint}; put it where all can read it"
            )
        if found is not None:
            try:
                epoch = self._restore(*found)
            except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
                raise ValueError(
                    f"{self.checkpoint} is damaged: it does not hold what this fit keeps ({error}); remove it to "
                    "start anew"
                ) from error
        else:
            self._record(0, None)
        self._set_step()
        while epoch < self.epochs and self.active:
            epoch += 1
            self._record(epoch, self._train(epoch))
            self._drop()
            if self.checkpoint is not None and (
                epoch % self.every == 0 or epoch == self.epochs or not self.active
            ):
                self._save(epoch)
        if all(state.diverged for state in self.states):
            rates = ", ".join(str(lr) for lr in sorted({task.lr for task in self.tasks}))
            raise FloatingPointError(
                f"the training loss became infinite or NaN in epoch {epoch}; lower lr (now {rates})"
            )
        return self._result()

    def _set_step(self) -> None:
        """Tells the step which tasks go on, and which order each of them follows."""
        if self.active:
            self.used = sorted({self.order_of[task] for task in self.active})
            order = [self.used.index(self.order_of[task]) for task in self.active]
            which = [self.tasks[task].labels for task in self.active]
            self.which = torch.tensor(which, device=self.device)
            self.step.tasks(self.weights, self.which, torch.tensor(order, device=self.device))

    def _train(self, epoch: int) -> list[float]:
        """One epoch of all active tasks; their mean losses."""
        orders = None
        if self.labels is not None:
            shuffled = []
            for name in self.used:
                rows = self.orders[name]
                shuffled.append(rows[torch.randperm(len(rows), generator=self.generators[name])])
            orders = torch.stack(shuffled)
        self.weights.optimizer.train()
        total = torch.zeros(len(self.active), dtype=widest(self.device), device=self.device)
        count = 0
        for batch in self.source.shuffled(orders, self.batch_size, places_only=self.step.captures):
            rows = len(batch.labels) if batch.rows is None else batch.everyone.shape[1]
            total += self.step(batch) * rows
            count += rows
        self.weights.optimizer.eval()
        if not count:
            raise ValueError("the training data gave no images")
        return (total / count).tolist()

    @torch.no_grad()
    def _measure(self) -> list[tuple[float, float, float]]:
        """Loss, accuracy and balanced accuracy of every active task on val."""
        tasks, classes = len(self.active), self.heads.classes
        which = torch.tensor([self.tasks[task].labels for task in self.active], device=self.device)
        weights = self.weights.current()
        loss = torch.zeros(tasks, dtype=widest(self.device), device=self.device)
        counts = loss.new_zeros(2, tasks, classes)  # hits, images
        for batch in self.val.in_order():
            rows = len(next(iter(batch.features.values())))
            for part in blocks(tasks, bytes_of_a_row(batch.features, rows), rows):
                y = self.adapter.from_features(batch.features, [stack[part] for stack in weights])
                logits = self.heads.logits(y, which[part])
                if self.val_labels is None:
                    truth = batch.labels.expand(len(y), -1)
                else:
                    truth = self.val_labels[which[part, None], batch.rows]
                losses = F.cross_entropy(logits.flatten(0, 1), truth.flatten(), reduction="none")
                loss[part] += losses.view(truth.shape).to(loss).sum(1)
                place = truth + classes * torch.arange(len(y), device=self.device)[:, None]
                right = logits.argmax(-1) == truth
                for held, chosen in zip(counts, (place[right], place.flatten()), strict=True):
                    held[part] += torch.bincount(chosen, minlength=len(y) * classes).view(len(y), classes)
        if self.parallel:
            loss, counts = distributed.total(loss), distributed.total(counts)
        hits, images = counts
        if not images.sum():
            raise ValueError("there are no images to evaluate on")
        number = images.sum(1)
        found = torch.stack([loss / number, hits.sum(1) / number, balanced(hits, images)], 1)
        return [tuple(row) for row in found.tolist()]

    def _record(self, epoch: int, losses: list[float] | None) -> None:
        """Writes an epoch of all active tasks down, keeps their weights where they are better, and stops those that
        have waited too long."""
        seen = None if self.val is None else self._measure()
        seconds = self.before + time.perf_counter() - self.start
        current = self.weights.current()
        for place, task in enumerate(self.active):
            state = self.states[task]
            loss = None if losses is None else losses[place]
            if loss is not None and not -float("inf") < loss < float("inf"):
                state.diverged = True
                continue
            val_loss, accuracy, in_balance = (None, None, None) if seen is None else seen[place]
            row = Epoch(epoch, loss, val_loss, accuracy, seconds, in_balance)
            state.history.append(row)
            if self.progress is not None:
                self.progress(task, row)
            score = in_balance if self.by_balanced_accuracy else accuracy
            if epoch == 0:
                state.best_score = score
            elif seen is None or score > state.best_score:
                state.best, state.best_epoch, state.best_score = (
                    [stack[place].detach().clone() for stack in current],
                    epoch,
                    score,
                )
            elif epoch - state.best_epoch >= self.patience:
                state.stopped = True

    def _drop(self) -> None:
        """Leaves the tasks behind that are done."""
        going = [place for place, task in enumerate(self.active) if not self.states[task].done]
        if len(going) < len(self.active):
            self.weights.keep(going)
            self.active = [self.active[place] for place in going]
            self._set_step()

    def _result(self) -> ManyFits:
        results = []
        for state in self.states:
            best = state.history[state.best_epoch]
            results.append(
                FitResult(
                    best_epoch=state.best_epoch, val_accuracy=best.val_accuracy,
                    parameters=sum(p.numel() for p in self.parameters), seconds=state.history[-1].seconds,
                    stopped_early=state.stopped, history=state.history, diverged=state.diverged,
                )
            )  # fmt: skip
        tensors = [torch.stack(held) for held in zip(*(state.best for state in self.states), strict=True)]
        return ManyFits(self.tasks, results, tensors, self.by_balanced_accuracy)

    def _save(self, epoch: int) -> None:
        if distributed.rank() and self.parallel:
            return
        tensors, groups = self.weights.state() if self.active else ({}, [])
        for index in range(len(self.parameters)):
            tensors[f"{index}.best"] = torch.stack([state.best[index] for state in self.states])
        tensors |= {f"generator.{name}": g.get_state() for name, g in self.generators.items()}
        states = [
            {
                "best_epoch": state.best_epoch, "best_score": state.best_score, "stopped": state.stopped,
                "diverged": state.diverged, "history": [list(vars(row).values()) for row in state.history],
            }
            for state in self.states
        ]  # fmt: skip
        held = {
            "epoch": epoch, "active": self.active, "groups": groups, "tasks": states,
            "seconds": self.before + time.perf_counter() - self.start,
        }  # fmt: skip
        checkpoints.save(self.checkpoint, self.identity, held, tensors)

    def _restore(self, held: dict, tensors: dict[str, Tensor]) -> int:
        """Takes a checkpoint's state; returns the number of epochs that it had done."""
        for number, (state, kept) in enumerate(zip(self.states, held["tasks"], strict=True)):
            state.best = [tensors[f"{index}.best"][number].to(p) for index, p in enumerate(self.parameters)]
            state.best_epoch, state.best_score = kept["best_epoch"], kept["best_score"]
            state.stopped, state.diverged = kept["stopped"], kept["diverged"]
            state.history = [Epoch(*row) for row in kept["history"]]
        for name, generator in self.generators.items():
            generator.set_state(tensors[f"generator.{name}"])
        self.active, self.before = held["active"], held["seconds"]
        self.weights.keep(self.active)
        if self.active:
            self.weights.restore(tensors, held["groups"])
        return held["epoch"]
