"""How is a form inside the tower fitted?

The tower runs at every step, so images are read, one fit after another.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from residual_kernels.adapters.tower_adapter import TowerAdapter
from residual_kernels.train.labels import shots_of
from residual_kernels.train.results import Epoch, FitResult, ManyFits, Task
from residual_kernels.units.cache import HELD_OUT
from residual_kernels.zeroshot import ZeroShotHead


class StreamImages:
    """Training images with their labels [N], and validation images:
    some that are held out where there are none."""

    def __init__(
        self,
        source: Dataset,
        labels: Tensor,
        other: Dataset | None,
        seed: int,
        batch_size: int = 64,
        workers: int = 0,
    ):
        self.batch_size, self.workers = batch_size, workers
        rows = torch.arange(len(labels))
        if other is None:
            count = round(HELD_OUT * len(labels))
            if not count:
                raise ValueError(
                    f"{len(labels)} images are too few to hold some out for validation; give --val"
                )
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
            rows, other = order[count:], Subset(source, order[:count].tolist())
        self.source, self.rows, self.labels = source, rows, labels[rows]
        self.validation = self.loader(other)

    def loader(self, images: Dataset) -> DataLoader:
        return DataLoader(images, self.batch_size, num_workers=self.workers)

    def __len__(self) -> int:
        return len(self.rows)

    def keep(self, chosen: Tensor) -> None:
        """Goes on with some of the training images, by position."""
        self.rows, self.labels = self.rows[chosen], self.labels[chosen]

    def in_order(self) -> DataLoader:
        return self.loader(Subset(self.source, self.rows.tolist()))

    def shuffled(self, seed: int, chosen: Tensor | None = None) -> DataLoader:
        rows = self.rows if chosen is None else self.rows[chosen]
        order = torch.Generator().manual_seed(seed)
        return DataLoader(
            Subset(self.source, rows.tolist()),
            self.batch_size,
            shuffle=True,
            generator=order,
            num_workers=self.workers,
        )


def fit_stream(
    adapter: TowerAdapter,
    head: ZeroShotHead,
    images: StreamImages,
    *,
    lrs: Sequence[float] | None,
    seeds: Sequence[int],
    shots: int | None,
    **options,
) -> ManyFits:
    """One fit for each seed and learning rate, all from the adapter's present weights.

    It has them again at the end.
    """
    from residual_kernels.train import fit

    start = [p.detach().clone() for p in adapter.trainable()]
    tasks, results, kept = [], [], []
    for seed in seeds:
        chosen = None if shots is None else shots_of(images.labels, shots, seed, head.class_names)
        for lr in lrs or [adapter.default_lr]:
            try:
                result = fit(
                    adapter,
                    head,
                    images.shuffled(seed, chosen),
                    images.validation,
                    lr=lr,
                    seed=seed,
                    **options,
                )
            except FloatingPointError:
                if len(seeds) * len(lrs or [0]) == 1:
                    raise
                result = FitResult(0, None, start[0].numel(), 0.0, False, [], diverged=True)
            tasks.append(Task(lr, seed, 0))
            results.append(result)
            kept.append([p.detach().clone() for p in adapter.trainable()])
            with torch.no_grad():
                for parameter, value in zip(adapter.trainable(), start, strict=True):
                    parameter.copy_(value)
    if all(result.diverged for result in results):
        raise FloatingPointError("every fit diverged; lower --lr")
    results = [replace(one, history=one.history or [Epoch(0, None, None, None, 0.0)]) for one in results]
    tensors = [torch.stack(one) for one in zip(*kept, strict=True)]
    return ManyFits(tasks, results, tensors, isinstance(options.get("class_weight"), str))
