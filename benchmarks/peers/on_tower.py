"""What trains through the tower: full fine-tuning, LoRA, and ResiDual inside the stream.

One loop for the three.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import residual_kernels as rk
from benchmarks.peers.tasks import BATCH, Fitted, PeerTask, Split

BATCH_TRAIN = 32
STEPS = {40: 50, 160: 80}  # by the number of labelled images
MOST_STEPS = 200  # where there are others
CHECKS = 2  # of the validation accuracy while training; the best state is kept


def _train(
    task: PeerTask, module: nn.Module, train: Split, seed: int, *, lr: float, weight_decay: float = 0.0
) -> Fitted:
    """AdamW, a tenth of the steps as warm-up, then a cosine;
    cross-entropy of the model's own class vectors."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    steps = STEPS.get(len(train.labels), MOST_STEPS)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)

    @torch.no_grad()
    def logits(split: Split) -> Tensor:
        return torch.cat([task.head(module(images)) for images in split.images.split(BATCH)])

    best: tuple[float, float] | None = None
    kept = [p.detach().clone() for p in parameters]
    for step in range(1, steps + 1):
        if len(order) < BATCH_TRAIN:
            order = torch.cat([order, torch.randperm(len(train.labels), generator=generator)])
        rows, order = order[:BATCH_TRAIN], order[BATCH_TRAIN:]
        optimizer.zero_grad()
        F.cross_entropy(task.head(module(train.images[rows])), train.labels[rows]).backward()
        optimizer.step()
        schedule.step()
        if step * CHECKS % steps < CHECKS:
            found = logits(task.val)
            hits = (found.argmax(1) == task.val.labels).sum().item()
            score = (hits, -F.cross_entropy(found, task.val.labels).item())
            if best is None or score > best:
                best, kept = score, [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, value in zip(parameters, kept, strict=True):
            p.copy_(value)
    return Fitted(logits, sum(p.numel() for p in parameters))


def fine_tuning(task: PeerTask, train: Split, settings: dict[str, Any], seed: int) -> Fitted:
    """Every parameter of the image tower; the class vectors stay."""
    tower = copy.deepcopy(task.tower).requires_grad_(True)
    return _train(task, tower, train, seed, lr=settings["lr"], weight_decay=0.01)


def lora(task: PeerTask, train: Split, settings: dict[str, Any], seed: int) -> Fitted:
    """Low-rank changes to every attention's q, k, v and output projections, alpha = 2 rank, through peft."""
    from peft import LoraConfig, get_peft_model

    rank = settings["rank"]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["attn"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tower = get_peft_model(copy.deepcopy(task.tower), config)
    return _train(task, tower, train, seed, lr=settings["lr"])


def stream(task: PeerTask, train: Split, settings: dict[str, Any], seed: int) -> Fitted:
    """One number per kept component of every head, where the head enters the residual stream,
    for every token."""
    bases = task.stream_bases.truncate(energy=settings["energy"])
    residual = rk.ResiDual(copy.deepcopy(task.tower), bases, placement="stream")
    return _train(task, residual, train, seed, lr=settings["lr"])
