"""What is one step of a fit? Losses and gradients of T tasks at once, and the optimizer on their weights.

y of every task comes from the features of a batch and that task's weights: one product for all of them. Tasks
do not touch each other, so each gets what it would get alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from residual_kernels import distributed
from residual_kernels.adapters.tower_adapter import TowerAdapter
from residual_kernels.train.batches import AdapterRows, Batch, Places, blocks, bytes_of_a_row
from residual_kernels.train.evaluation import Heads


class TaskWeights:
    """Weights of the tasks that are still fitted, a [T, ...] stack per parameter,
    and schedule-free AdamW on its rows.

    With `shrink` the stacks hold the distance from 1, so that the optimizer's decoupled decay pulls weights
    to 1.
    """

    def __init__(self, starts: Sequence[Tensor], lrs: Sequence[float], weight_decay: float, shrink: float):
        import schedulefree

        self.lrs = list(lrs)
        self.centre = 1.0 if shrink else 0.0
        self.stacks = [start.detach().clone() - self.centre for start in starts]
        self.rows = [[nn.Parameter(stack[task]) for stack in self.stacks] for task in range(len(self.lrs))]
        groups: dict[float, list[nn.Parameter]] = {lr: [] for lr in self.lrs}
        for lr, row in zip(self.lrs, self.rows, strict=True):
            groups[lr] += row
        self.optimizer = schedulefree.AdamWScheduleFree(
            [{"params": rows, "lr": lr} for lr, rows in groups.items()], weight_decay=shrink or weight_decay
        )

    def __len__(self) -> int:
        return len(self.rows)

    def current(self) -> list[Tensor]:
        """The weights as an adapter reads them."""
        return [stack + self.centre for stack in self.stacks] if self.centre else self.stacks

    def step(self, grads: Sequence[Tensor]) -> None:
        for task, row in enumerate(self.rows):
            for parameter, grad in zip(row, grads, strict=True):
                parameter.grad = grad[task]
        self.optimizer.step()

    def keep(self, tasks: Sequence[int]) -> None:
        """Goes on with these tasks only, by position."""
        kept = [self.rows[task] for task in tasks]
        still_fitted = {id(parameter) for row in kept for parameter in row}
        for group in self.optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) in still_fitted]
        for parameter in [p for p in self.optimizer.state if id(p) not in still_fitted]:
            del self.optimizer.state[parameter]
        index = torch.tensor(list(tasks), dtype=torch.int64, device=self.stacks[0].device)
        self.stacks = [stack.index_select(0, index) for stack in self.stacks]
        for task, row in enumerate(kept):
            for parameter, stack in zip(row, self.stacks, strict=True):
                parameter.data = stack[task]
        self.rows, self.lrs = kept, [self.lrs[task] for task in tasks]

    def moments(self) -> tuple[Tensor, Tensor]:
        """z and mean squares of gradients of the one parameter, [T, J] each, in the optimizer's memory."""
        stack, rows = self.stacks[0], [row[0] for row in self.rows]
        found = []
        for name, first in (("z", stack.clone()), ("exp_avg_sq", torch.zeros_like(stack))):
            for task, row in enumerate(rows):
                if name in self.optimizer.state[row]:
                    first[task] = self.optimizer.state[row][name]
                self.optimizer.state[row][name] = first[task]
            found.append(first)
        return found[0], found[1]

    def advance(self, steps: int) -> Tensor:
        """The numbers of the next steps [steps, T, 4], which count as done from here on.

        They are the weight of z in the average, lr, the bias correction, and the average's share of a step.
        """
        numbers = []
        for _ in range(steps):
            of_rate = {}
            for group in self.optimizer.param_groups:
                lr, k, (beta1, beta2) = group["lr"], group["k"], group["betas"]
                group["scheduled_lr"], group["lr_max"] = lr, max(lr, group["lr_max"])
                weight = (k + 1) ** group["r"] * group["lr_max"] ** group["weight_lr_power"]
                group["weight_sum"] += weight
                group["k"] = k + 1
                average = weight / group["weight_sum"]
                towards = lr * (beta1 * (1 - average) - 1)
                of_rate[lr] = (average, lr, 1 - beta2 ** (k + 1), towards)
            numbers.append([of_rate[lr] for lr in self.lrs])
        return torch.tensor(numbers, dtype=torch.float32)

    def state(self) -> tuple[dict[str, Tensor], list[dict]]:
        """Tensors [T, ...] by name, and the optimizer's numbers for every learning rate; between epochs."""
        tensors = {}
        for index, stack in enumerate(self.stacks):
            tensors[f"{index}.weights"] = stack
            for name in ("z", "exp_avg_sq"):
                of_tasks = [self.optimizer.state[row[index]][name] for row in self.rows]
                tensors[f"{index}.{name}"] = torch.stack(of_tasks)
        groups = [
            {key: group[key] for key in ("lr", "k", "weight_sum", "lr_max")}
            for group in self.optimizer.param_groups
        ]
        return tensors, groups

    def restore(self, tensors: dict[str, Tensor], groups: list[dict]) -> None:
        """The inverse of :meth:`state`, after :meth:`keep` has left the same tasks."""
        for index, stack in enumerate(self.stacks):
            stack.copy_(tensors[f"{index}.weights"])
            for task, row in enumerate(self.rows):
                self.optimizer.state[row[index]] = {
                    name: tensors[f"{index}.{name}"][task].to(stack.device).clone()
                    for name in ("z", "exp_avg_sq")
                }
        for group, saved in zip(self.optimizer.param_groups, groups, strict=True):
            group.update(saved)


class Step:
    """Cross-entropy of T tasks on a batch and its gradients.

    `labels` [L, N] of the cache (None for a loader), `class_weight` [L, K] or None; `mode` is one of
    config.STEPS.
    """

    def __init__(
        self,
        adapter: TowerAdapter,
        heads: Heads,
        source: AdapterRows,
        labels: Tensor | None,
        class_weight: Tensor | None,
        mode: str,
        parallel: bool,
    ):
        self.adapter, self.heads, self.source = adapter, heads, source
        self.labels, self.class_weight, self.parallel = labels, class_weight, parallel
        capturable = source.device.type == "cuda" and source.resident is not None
        if mode == "graph" and not capturable:
            raise ValueError('step="graph" needs a CUDA device and a cache that fits in its memory')
        self.captures = mode == "graph" or (mode == "auto" and capturable)
        self.each = torch.compile(self._each) if mode == "compiled" else self._each
        self._graphs: dict[tuple[int, ...], _Captured] = {}

    def tasks(self, weights: TaskWeights, which: Tensor, order: Tensor) -> None:
        """The tasks from now on: their weights, which head and labels each has,
        which of the orders each follows."""
        self.weights, self.which, self.order = weights, which, order
        self.spread = not torch.equal(order, torch.arange(int(order.max()) + 1, device=order.device))
        self._graphs.clear()

    def __call__(self, batch: Batch) -> Tensor:
        """Takes one step; returns the loss [T] of the whole batch, every process's share included."""
        places = batch.places
        if self.captures and places is not None and places.rows.shape[1]:
            sizes = tuple(places.rows.shape) + tuple(places.everyone.shape)
            if sizes not in self._graphs:
                with torch.cuda.device(self.source.device):
                    self._graphs[sizes] = _Captured(self, places)
            loss, grads = self._graphs[sizes](places)
        else:
            loss, grads = self.compute(batch)
        if self.parallel:
            loss, grads = self._summed(loss, grads)
        self.weights.step(grads)
        return loss

    @torch.enable_grad()
    def compute(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Loss [T] of this process's share of a batch and its gradients, by parameter [T, ...]."""
        features, truth, factor = self.read(batch)
        several, rows = self._several(batch), truth.shape[1]
        row_bytes = bytes_of_a_row(features, truth.numel() if several else rows)
        groups = []
        current = self.weights.current()
        for block in blocks(len(self.weights), row_bytes, rows):
            own = [stack[block].detach().requires_grad_() for stack in current]
            some = {name: value[block] for name, value in features.items()} if several else features
            loss = self.each(some, own, truth[block], factor[block], self.which[block])
            groups.append((loss.detach(), torch.autograd.grad(loss.sum(), own)))
        if len(groups) == 1:
            return groups[0][0], list(groups[0][1])
        losses, grads = zip(*groups, strict=True)
        return torch.cat(losses), [torch.cat(one) for one in zip(*grads, strict=True)]

    def _several(self, batch: Batch) -> bool:
        """Whether features come in several orders, [S, n, ...]."""
        return batch.places is not None and len(batch.places.rows) > 1

    def read(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """features, labels [T, n], and factors [T, n] or [T, 1] that make the sum of losses their weighted
        mean."""
        count = len(self.weights)
        if batch.places is None or self.labels is None:
            features, truth = batch.features, batch.truth.expand(count, -1)
            whole = truth
        else:
            features = batch.features
            if self._several(batch) and self.spread:
                features = {name: value.index_select(0, self.order) for name, value in features.items()}
            truth = self.labels[self.which[:, None], batch.places.rows[self.order]]
            whole = self.labels[self.which[:, None], batch.places.everyone[self.order]]
        if self.class_weight is None:
            return features, truth, self.weights.stacks[0].new_full((count, 1), 1 / whole.shape[1])
        total = self.class_weight[self.which[:, None], whole].sum(1, keepdim=True)
        return features, truth, self.class_weight[self.which[:, None], truth] / total

    def _each(self, features, weights, truth, factor, which) -> Tensor:
        """The loss [T] of some tasks."""
        logits = self.heads.logits(self.adapter.from_features(features, weights), which)
        losses = F.cross_entropy(logits.flatten(0, 1), truth.flatten(), reduction="none")
        return (losses.view(truth.shape) * factor).sum(1)

    def _summed(self, loss: Tensor, grads: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        flat = distributed.total(torch.cat([loss, *(grad.flatten() for grad in grads)]))
        loss, *flat = flat.split([loss.numel(), *(grad.numel() for grad in grads)])
        return loss, [part.view(grad.shape) for part, grad in zip(flat, grads, strict=True)]


class _Captured:
    """A step on resident features as one CUDA graph: what is launched once is replayed with other rows."""

    def __init__(self, step: Step, places: Places):
        self.places = Places(*(rows.clone() for rows in places))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._compute(step)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = self._compute(step)

    def _compute(self, step: Step) -> tuple[Tensor, list[Tensor]]:
        return step.compute(Batch(step.source.gathered(self.places.rows), self.places))

    def __call__(self, places: Places) -> tuple[Tensor, list[Tensor]]:
        self.places.rows.copy_(places.rows)
        self.places.everyone.copy_(places.everyone)
        self.graph.replay()
        loss, grads = self.results
        return loss.clone(), grads
