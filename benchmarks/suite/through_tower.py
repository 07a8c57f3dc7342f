"""Peers that train the image tower: LoRA on queries, keys and values, CLIP-SVD, and fine-tuning.

One loop for the three: AdamW, batch 32, cosine, cross-entropy of the model's own class vectors, which stay
(the papers train the text tower too). A fixed number of steps and the last weights: nobody has validation
images. The papers take 500 steps a label and class for LoRA, thousands in all; here there are STEPS, a budget
of processor time.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

import residual_kernels as rk
from benchmarks.peers.tasks import BATCH, Fitted, Split
from benchmarks.suite.rates import RATES
from benchmarks.suite.tasks import SuiteTask

BATCH_TRAIN = 32
STEPS = 60


@dataclass(frozen=True)
class TrainedTower(Fitted):
    """`outputs(split)` are the embeddings [N, D], which can be read by other names too."""

    outputs: Callable[[Split], Tensor]


def _trained(
    task: SuiteTask,
    train: Split,
    head: rk.ZeroShotHead,
    seed: int,
    parameters: list[Tensor],
    changed: Callable[[], dict[str, Tensor]],
    lr: float,
    weight_decay: float,
) -> Fitted:
    """Trains `parameters`; `changed` gives the tower's weights that they stand for."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    # No gradient of the rest.
    still = {name: weight.detach() for name, weight in task.tower.named_parameters()}
    for _ in range(STEPS):
        while len(order) < BATCH_TRAIN:
            order = torch.cat([order, torch.randperm(len(train.labels), generator=generator)])
        rows, order = order[:BATCH_TRAIN], order[BATCH_TRAIN:]
        optimizer.zero_grad()
        seen = functional_call(task.tower, still | changed(), (train.images[rows],))
        F.cross_entropy(head(seen), train.labels[rows]).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        final = {name: weight.detach().clone() for name, weight in changed().items()}

    @torch.no_grad()
    def outputs(split: Split) -> Tensor:
        parts = split.images.split(BATCH)
        return torch.cat([functional_call(task.tower, final, (images,)) for images in parts])

    return TrainedTower(lambda split: head(outputs(split)), sum(p.numel() for p in parameters), outputs)


def _weights(task: SuiteTask, endings: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in task.tower.named_parameters() if name.endswith(endings)}


def lora(task: SuiteTask, train: Split, head: rk.ZeroShotHead, seed: int) -> Fitted:
    """Rank 2 on queries, keys and values of every block, scaled by 1/sqrt(2) (Zanella and Ben Ayed 2024).

    Weight decay 0.01 as theirs. Their dropout of 0.25 in front of the low-rank part is left out.
    """
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, weight in _weights(task, ("attn.in_proj_weight",)).items():
        width = weight.shape[1]
        bound = 1 / math.sqrt(width)
        parts[name] = [
            (
                ((2 * torch.rand(2, width, generator=generator) - 1) * bound).requires_grad_(),
                torch.zeros(width, 2, requires_grad=True),
            )
            for _ in range(3)
        ]
    fixed = _weights(task, ("attn.in_proj_weight",))

    def changed() -> dict[str, Tensor]:
        return {
            name: fixed[name] + torch.cat([up @ down for down, up in three]) / math.sqrt(2)
            for name, three in parts.items()
        }

    numbers = [one for three in parts.values() for pair in three for one in pair]
    return _trained(task, train, head, seed, numbers, changed, RATES["LoRA"], 0.01)


def clip_svd(task: SuiteTask, train: Split, head: rk.ZeroShotHead, seed: int) -> Fitted:
    """The singular values of every attention and MLP matrix (Koleilat et al.
    2025): queries, keys, values apart."""
    fixed: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    endings = ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    for name, weight in _weights(task, endings).items():
        matrices = weight.chunk(3) if name.endswith("in_proj_weight") else (weight,)
        factors = [torch.linalg.svd(one, full_matrices=False) for one in matrices]
        fixed[name] = [(u, s.clone().requires_grad_(), v) for u, s, v in factors]

    def changed() -> dict[str, Tensor]:
        return {
            name: torch.cat([(u * s) @ v for u, s, v in factors])
            if len(factors) > 1
            else (factors[0][0] * factors[0][1]) @ factors[0][2]
            for name, factors in fixed.items()
        }

    numbers = [s for factors in fixed.values() for _, s, _ in factors]
    return _trained(task, train, head, seed, numbers, changed, RATES["CLIP-SVD"], 0.01)


def fine_tuning(task: SuiteTask, train: Split, head: rk.ZeroShotHead, seed: int) -> Fitted:
    """Every parameter of the image tower."""
    numbers = {name: p.detach().clone().requires_grad_() for name, p in task.tower.named_parameters()}
    return _trained(
        task, train, head, seed, list(numbers.values()), lambda: numbers, RATES["fine-tuning"], 0.01
    )
