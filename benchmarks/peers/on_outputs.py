"""Peers that read the tower's output [N, D] alone, encoded once: linear probe, CLIP-Adapter, Tip-Adapter."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.peers.tasks import Fitted, PeerTask, Split


def base(task: PeerTask, train: Split, settings: dict[str, Any], seed: int) -> Fitted:
    """The model as it is."""
    return Fitted(lambda split: task.head(split.units.output), 0)


def linear_probe(task: PeerTask, train: Split, settings: dict[str, Any], seed: int) -> Fitted:
    """Logistic regression on the outputs by L-BFGS, its strength chosen on validation (Radford et al.
    2021)."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=settings["C"], max_iter=5000, random_state=seed)
    model.fit(train.units.output.numpy(), train.labels.numpy())
    return Fitted(
        lambda split: torch.from_numpy(model.decision_function(split.units.output.numpy())).float(),
        model.coef_.size + model.intercept_.size,
    )


def train_adamw(
    parameters: list[Tensor],
    loss: Callable[[Tensor], Tensor],
    count: int,
    seed: int,
    *,
    lr: float,
    epochs: int,
    batch: int,
) -> None:
    """AdamW with a cosine schedule over shuffled rows."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(parameters, lr=lr, eps=1e-4, weight_decay=1e-2)
    steps = epochs * -(-count // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for rows in torch.randperm(count, generator=generator).split(batch):
            optimizer.zero_grad()
            loss(rows).backward()
            optimizer.step()
            schedule.step()


def clip_adapter(task: PeerTask, train: Split, settings: dict[str, Any], seed: int) -> Fitted:
    """A bottleneck of D/4 on the output, mixed back in by a ratio (Gao et al. 2021)."""
    dim = train.units.output.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        bottleneck = nn.Sequential(
            nn.Linear(dim, dim // 4, bias=False), nn.ReLU(), nn.Linear(dim // 4, dim, bias=False), nn.ReLU()
        )
    ratio = settings["ratio"]

    def embed(output: Tensor) -> Tensor:
        return ratio * bottleneck(output) + (1 - ratio) * output

    def loss(rows: Tensor) -> Tensor:
        return F.cross_entropy(task.head(embed(train.units.output[rows])), train.labels[rows])

    train_adamw(
        list(bottleneck.parameters()), loss, len(train.labels), seed, lr=settings["lr"], epochs=100, batch=32
    )
    return Fitted(
        lambda split: task.head(embed(split.units.output)), sum(p.numel() for p in bottleneck.parameters())
    )


class _KeyValueCache:
    """Tip-Adapter's logits: the text's, plus alpha * exp(-beta (1 - f . keys)) one_hot (Zhang et al.
    2022)."""

    def __init__(self, task: PeerTask, train: Split):
        self.head = task.head
        self.keys = F.normalize(train.units.output, dim=1)
        self.values = F.one_hot(train.labels, len(task.head.class_names)).float()
        self.alpha = self.beta = 1.0

    def read(self, output: Tensor, beta: float) -> Tensor:
        return torch.exp(beta * (F.normalize(output, dim=1) @ self.keys.T - 1)) @ self.values

    def logits(self, output: Tensor) -> Tensor:
        return self.head(output) + self.alpha * self.read(output, self.beta)

    @torch.no_grad()
    def search(self, val: Split) -> None:
        """alpha and beta by accuracy, then loss, on validation: a grid, as the authors' code does it."""
        text, output = self.head(val.units.output), val.units.output
        best = None
        for beta in torch.linspace(0.1, 12.0, 40).tolist():
            read = self.read(output, beta)
            for alpha in torch.linspace(0.1, 10.0, 20).tolist():
                logits = text + alpha * read
                hits = (logits.argmax(1) == val.labels).sum().item()
                score = (hits, -F.cross_entropy(logits, val.labels).item())
                if best is None or score > best:
                    best, self.alpha, self.beta = score, alpha, beta


def tip_adapter(task: PeerTask, train: Split, settings: dict[str, Any], seed: int) -> Fitted:
    """Nothing trained: the labelled outputs are the keys of a cache.

    Alpha and beta are searched on validation.
    """
    cache = _KeyValueCache(task, train)
    cache.search(task.val)
    return Fitted(lambda split: cache.logits(split.units.output), 0)


def tip_adapter_f(task: PeerTask, train: Split, settings: dict[str, Any], seed: int) -> Fitted:
    """The same with the keys trained from there (AdamW, eps 1e-4, cosine, batch 256),
    and searched once more."""
    cache = _KeyValueCache(task, train)
    cache.search(task.val)
    cache.keys.requires_grad_()

    def loss(rows: Tensor) -> Tensor:
        return F.cross_entropy(cache.logits(train.units.output[rows]), train.labels[rows])

    train_adamw(
        [cache.keys], loss, len(train.labels), seed, lr=settings["lr"], epochs=settings["epochs"], batch=256
    )
    cache.keys.requires_grad_(False)
    cache.search(task.val)
    return Fitted(lambda split: cache.logits(split.units.output), cache.keys.numel())
