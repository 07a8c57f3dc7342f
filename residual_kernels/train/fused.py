"""How are the steps of an epoch done by a GPU alone? A few kernels a step, several steps to a CUDA graph.

The epoch's order and the optimizer's numbers for all of its steps travel once. Then graphs are replayed.
Which rows are next, the gathering of their coefficients, head, loss, gradient and optimizer are all inside.
"""

import importlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from residual_kernels.ops import backends
from residual_kernels.train.plan import FitPlan
from residual_kernels.train.steps import TaskWeights

if TYPE_CHECKING:
    from residual_kernels.ops.triton.fit_step import FitStep

STEPS = 16  # that a graph holds at most
MOST_ROWS = 1024  # of a batch: every component's gradient is added up by one program


def fused_fit(plan: FitPlan) -> "FusedFit | None":
    """The fused steps of a plan, or None where they were not asked for or cannot serve.

    Raises ValueError where step="fused" cannot serve, with the reason.
    """
    if plan.config.step not in ("auto", "fused"):
        return None
    reason = refusal(plan)
    if reason is None:
        return FusedFit(plan)
    if plan.config.step == "fused":
        raise ValueError(f'step="fused" cannot serve this fit: {reason}')
    return None


def refusal(plan: FitPlan) -> str | None:
    """Why fused steps cannot serve a plan, in one clause."""
    form, rows = plan.adapter.spectral_form(), plan.rows
    if plan.device.type != "cuda" or rows.resident is None:
        return "it needs a CUDA device and a cache that fits in its memory"
    if form is None or rows.joined is None:
        return f"the output of a {type(plan.adapter).__name__} is no sum over components with a weight each"
    if plan.parallel:
        return "several processes share its gradient"
    if min(plan.config.batch_size, rows.count) > MOST_ROWS:
        return f"batch_size is {plan.config.batch_size}, and a step takes at most {MOST_ROWS} rows"
    dtypes = {
        rows.joined.dtype,
        plan.starts[0].dtype,
        torch.promote_types(plan.heads.vectors.dtype, torch.float32),
    }
    if dtypes != {torch.float32}:
        return f"it computes in float32, not in {', '.join(sorted(map(str, dtypes)))}"
    try:
        backend = backends.resolve(form.backend, plan.device, torch.float32)
    except RuntimeError as error:
        return str(error)
    return None if backend == "triton" else f"the backend is {backend}, not triton"


class FusedFit:
    """Epochs of T tasks whose steps are kernels; in the place of `steps.Step`."""

    def __init__(self, plan: FitPlan):
        self.plan, self.batch = plan, min(plan.config.batch_size, len(next(iter(plan.orders.values()))))
        form, rows, heads = plan.adapter.spectral_form(), plan.rows, plan.heads
        assert form is not None
        assert rows.joined is not None
        assert rows.resident is not None
        assert plan.labels is not None
        self.c, self.labels = rows.joined, plan.labels
        rest = rows.resident[form.rest] if isinstance(form.rest, str) else form.rest
        self.rest = None if rest is None else rest.detach().to(self.c).reshape(-1, rest.shape[-1])
        basis = torch.cat([one.detach().to(self.c) for one in form.bases])
        self.basis = F.pad(basis, (0, -basis.shape[1] % 8, 0, self.c.shape[1] - len(basis)))
        self.shift = form.shift
        self.vectors = F.pad(heads.vectors.to(self.c), (0, -heads.classes % 8)).contiguous()
        self.scale = heads.scale.to(self.c).exp().flatten()
        self.classes = torch.tensor(heads.sizes, device=self.c.device)
        self.class_weight = None if plan.class_weight is None else plan.class_weight.to(self.c).contiguous()
        length = len(next(iter(plan.orders.values())))
        self.steps = -(-length // self.batch)
        self.replays = -(-self.steps // STEPS)

    def tasks(self, weights: TaskWeights, which: Tensor, order_of: Tensor) -> None:
        """The tasks from now on: weights, the head and labels of each, the order that each follows."""
        fit_step = importlib.import_module("residual_kernels.ops.triton.fit_step")
        self.weights, new = weights, self.c.new_empty
        tasks, orders = len(weights), int(order_of.max()) + 1
        length = len(next(iter(self.plan.orders.values())))
        z, square = weights.moments()
        group = weights.optimizer.param_groups[0]
        one_head = len(self.vectors) == 1
        self.operands = fit_step.StepOperands(
            c=self.c,
            basis=self.basis,
            rest=self.rest,
            shift=self.shift - weights.centre,
            vectors=self.vectors,
            scale=self.scale,
            classes=self.classes,
            labels=self.labels,
            class_weight=self.class_weight,
            weight=weights.stacks[0],
            z=z,
            square=square,
            head=torch.zeros_like(which) if one_head else which,
            which=which,
            order_of=order_of,
            order=new(orders, length, dtype=torch.int64),
            rates=new(self.steps, tasks, fit_step.RATES),
            losses=new(tasks, length),
            place=new(3, dtype=torch.int64).zero_(),
        )
        self.step: FitStep = fit_step.FitStep(
            self.operands, self.batch, group["betas"][1], group["eps"], group["weight_decay"]
        )
        self.graph: torch.cuda.CUDAGraph | None = None

    def epoch(self, orders: Tensor) -> Tensor:
        """Takes all steps along orders [S, M]; the mean losses [T]."""
        if self.graph is None:
            self.graph = self._captured()
        self.operands.begin(orders, self.weights.advance(self.steps))
        for _ in range(self.replays):
            self.graph.replay()
        return self.operands.losses.double().mean(1)

    def _captured(self) -> torch.cuda.CUDAGraph:
        """A share of an epoch's steps as a graph. No rows are set yet: nothing changes while it is made."""
        with torch.cuda.device(self.c.device):
            return self._capture()

    def _capture(self) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.step()  # compiles the kernels
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(-(-self.steps // self.replays)):
                self.step()
        return graph
