"""How does a fit by AdamW go? Epoch by epoch over T tasks: steps, validation, early stopping, checkpoints."""

import os
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from residual_kernels import distributed
from residual_kernels.train import checkpoints
from residual_kernels.train.batches import widest
from residual_kernels.train.evaluation import measure, tower_accuracy
from residual_kernels.train.fused import fused_fit
from residual_kernels.train.plan import FitPlan
from residual_kernels.train.progress import Progress
from residual_kernels.train.results import Epoch, FitResult, ManyFits
from residual_kernels.train.steps import Step, TaskWeights


class Loop:
    """Runs a plan. `progress` is called with the number of a task and its :class:`Epoch`."""

    def __init__(self, plan: FitPlan, progress: Callable[[int, Epoch], None] | None = None):
        self.start = time.perf_counter()
        self.plan, self.config, self.progress = plan, plan.config, progress
        self.by_balanced_accuracy = isinstance(self.config.class_weight, str)
        self.step = Step(
            plan.adapter,
            plan.heads,
            plan.rows,
            plan.labels,
            plan.class_weight,
            self.config.step,
            plan.parallel,
        )
        self.fused = fused_fit(plan)

    def run(self) -> ManyFits:
        plan, count = self.plan, len(self.plan.tasks)
        self.states = [Progress([start[task].clone() for start in plan.starts]) for task in range(count)]
        self.generators = {}
        for task, name in zip(plan.tasks, plan.order_of, strict=True):
            self.generators[name] = torch.Generator().manual_seed(task.seed)
        self.weights = TaskWeights(plan.starts, plan.rates, self.config.weight_decay, self.config.shrink)
        self.active = list(range(count))
        self.before, epoch = 0.0, 0  # seconds of earlier sessions; epochs done
        found = None
        if self.config.checkpoint is not None:
            found = checkpoints.load(self.config.checkpoint, plan.identity)
        if plan.parallel and len(set(distributed.gather(None if found is None else found[0]["epoch"]))) > 1:
            raise ValueError(
                f"the processes do not see the same checkpoint at {self.config.checkpoint}; put it where "
                "all can read it"
            )
        if found is not None:
            try:
                epoch = self._restore(*found)
            except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
                raise ValueError(
                    f"{self.config.checkpoint} is damaged: it does not hold what this fit keeps ({error}); "
                    "remove it to start again"
                ) from error
        else:
            self._record(0, None)
        self._set_step()
        while epoch < self.config.epochs and self.active:
            epoch += 1
            self._record(epoch, self._train(epoch))
            self._drop()
            last = epoch == self.config.epochs or not self.active
            if self.config.checkpoint is not None and (last or epoch % self.config.every == 0):
                self._save(self.config.checkpoint, epoch)
        if all(state.diverged for state in self.states):
            rates = ", ".join(str(lr) for lr in sorted(set(plan.rates)))
            raise FloatingPointError(
                f"the training loss became infinite or NaN in epoch {epoch}; lower lr (now {rates})"
            )
        return self._result()

    def _set_step(self) -> None:
        """Tells the step which tasks go on, and which order each of them follows."""
        if self.active:
            self.used = sorted({self.plan.order_of[task] for task in self.active})
            order = [self.used.index(self.plan.order_of[task]) for task in self.active]
            which = [self.plan.tasks[task].labels for task in self.active]
            self.which = torch.tensor(which, device=self.plan.device)
            order_of = torch.tensor(order, device=self.plan.device)
            if self.fused is None:
                self.step.tasks(self.weights, self.which, order_of)
            else:
                self.fused.tasks(self.weights, self.which, order_of)

    def _train(self, epoch: int) -> list[float]:
        """One epoch of all active tasks; their mean losses."""
        orders = None
        if self.plan.labels is not None:
            shuffled = []
            for name in self.used:
                order = self.plan.orders[name]
                shuffled.append(order[torch.randperm(len(order), generator=self.generators[name])])
            orders = torch.stack(shuffled)
        self.weights.optimizer.train()
        if self.fused is not None and orders is not None:
            losses = self.fused.epoch(orders)
            self.weights.optimizer.eval()
            return losses.tolist()
        total = torch.zeros(len(self.active), dtype=widest(self.plan.device), device=self.plan.device)
        count = 0
        for batch in self.plan.rows.shuffled(orders, self.config.batch_size, places_only=self.step.captures):
            rows = len(batch.truth) if batch.places is None else batch.places.everyone.shape[1]
            total += self.step(batch) * rows
            count += rows
        self.weights.optimizer.eval()
        if not count:
            raise ValueError("the training data gave no images")
        return (total / count).tolist()

    def _measure(self) -> list[tuple[float, float, float]] | None:
        """Loss, accuracy and balanced accuracy of every active task on val."""
        plan = self.plan
        if plan.val is None:
            return None
        which = torch.tensor([plan.tasks[task].labels for task in self.active], device=plan.device)
        return measure(plan.adapter, plan.val, plan.heads, which, self.weights.current(), plan.val_labels)

    def _record(self, epoch: int, losses: list[float] | None) -> None:
        """Writes an epoch of all active tasks down."""
        seen = self._measure()
        seconds = self.before + time.perf_counter() - self.start
        current = self.weights.current()
        for place, task in enumerate(self.active):
            state = self.states[task]
            row = state.record(
                epoch,
                None if losses is None else losses[place],
                None if seen is None else seen[place],
                seconds,
                [stack[place] for stack in current],
                self.config.patience,
                self.by_balanced_accuracy,
            )
            if row is not None and self.progress is not None:
                self.progress(task, row)

    def _drop(self) -> None:
        """Leaves the tasks behind that are done."""
        going = [place for place, task in enumerate(self.active) if not self.states[task].done]
        if len(going) < len(self.active):
            self.weights.keep(going)
            self.active = [self.active[place] for place in going]
            self._set_step()

    def _result(self) -> ManyFits:
        plan = self.plan
        bases: list[float | None] = [None] * len(plan.tasks)
        if plan.val is not None:
            of_set = tower_accuracy(plan.val, plan.heads, plan.val_labels)
            bases = [of_set[task.labels if len(of_set) > 1 else 0] for task in plan.tasks]
        results = []
        for state, base in zip(self.states, bases, strict=True):
            best = state.history[state.best_epoch]
            results.append(
                FitResult(
                    best_epoch=state.best_epoch,
                    val_accuracy=best.val_accuracy,
                    parameters=sum(p.numel() for p in plan.parameters),
                    seconds=state.history[-1].seconds,
                    stopped_early=state.stopped,
                    history=state.history,
                    diverged=state.diverged,
                    base_accuracy=base,
                )
            )
        tensors = [torch.stack(of_all) for of_all in zip(*(state.best for state in self.states), strict=True)]
        return ManyFits(plan.tasks, results, tensors, self.by_balanced_accuracy)

    def _save(self, path: str | os.PathLike, epoch: int) -> None:
        if distributed.rank() and self.plan.parallel:
            return
        tensors, groups = self.weights.state() if self.active else ({}, [])
        for index in range(len(self.plan.parameters)):
            tensors[f"{index}.best"] = torch.stack([state.best[index] for state in self.states])
        tensors |= {f"generator.{name}": g.get_state() for name, g in self.generators.items()}
        tasks = [
            {
                "best_epoch": task.best_epoch,
                "best_score": task.best_score,
                "stopped": task.stopped,
                "diverged": task.diverged,
                "history": [list(vars(row).values()) for row in task.history],
            }
            for task in self.states
        ]
        state = {
            "epoch": epoch,
            "active": self.active,
            "groups": groups,
            "tasks": tasks,
            "seconds": self.before + time.perf_counter() - self.start,
        }
        checkpoints.save(path, self.plan.identity, state, tensors)

    def _restore(self, state: checkpoints.State, tensors: dict[str, Tensor]) -> int:
        """Takes a checkpoint's state; returns the number of epochs that it had done."""
        for number, (task, kept) in enumerate(zip(self.states, state["tasks"], strict=True)):
            task.best = [
                tensors[f"{index}.best"][number].to(p) for index, p in enumerate(self.plan.parameters)
            ]
            task.best_epoch, task.best_score = kept["best_epoch"], kept["best_score"]
            task.stopped, task.diverged = kept["stopped"], kept["diverged"]
            task.history = [Epoch(*cast(list[Any], row)) for row in kept["history"]]
        for name, generator in self.generators.items():
            generator.set_state(tensors[f"generator.{name}"])
        self.active, self.before = state["active"], state["seconds"]
        self.weights.keep(self.active)
        if self.active:
            self.weights.restore(tensors, state["groups"])
        return state["epoch"]
