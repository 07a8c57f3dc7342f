"""Fitting the weights: schedule-free AdamW on cross-entropy, the paper's protocol by default."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from residual_kernels.cache import UnitCache
from residual_kernels.decomposition import check_finite
from residual_kernels.modules import TowerAdapter, UnitAdapter
from residual_kernels.zeroshot import ZeroShotHead

EVALUATION_ROWS = 512


@dataclass(frozen=True)
class Epoch:
    """One row of the history; epoch 0 is the state before training (its train_loss is None)."""

    epoch: int
    train_loss: float | None
    val_loss: float | None
    val_accuracy: float | None
    seconds: float


@dataclass
class FitResult:
    """What :func:`fit` did. `best_epoch` is the epoch whose weights the adapter now holds."""

    best_epoch: int
    val_accuracy: float | None
    parameters: int
    seconds: float
    stopped_early: bool
    history: list[Epoch] = field(repr=False)


@dataclass(frozen=True)
class Evaluation:
    """Accuracy and mean cross-entropy over `count` images; class_accuracy [K] is NaN where a class has no image."""

    accuracy: float
    loss: float
    count: int
    class_accuracy: Tensor = field(repr=False)


@dataclass(frozen=True)
class Prediction:
    """labels [N] int64, probabilities [N, K] float32 or better (rows add to one), and the K class names."""

    labels: Tensor
    probabilities: Tensor
    class_names: tuple[str, ...]


class _CachedData:
    """A UnitCache as an adapter reads it. The rest does not depend on the weights, so it is computed once."""

    def __init__(self, adapter: TowerAdapter, cache: UnitCache):
        cache.check_tower(adapter.tower)
        self.adapter, self.cache, self.labels = adapter, cache, cache.labels
        self.device = adapter.trainable()[0].device
        self.rest = None
        if isinstance(adapter, UnitAdapter):
            missing = [kind for kind in adapter.adapted if kind not in cache.kinds]
            if missing:
                raise ValueError(
                    f"this cache holds no terms of kind {', '.join(missing)}; encode with kinds that include it"
                )
            with torch.no_grad():
                parts = [
                    adapter.rest(cache.terms(rows, self.device))
                    for rows in _runs(len(cache), EVALUATION_ROWS)
                ]
            if parts[0] is not None and parts[0].ndim == 2:
                self.rest = torch.cat(parts)

    def embed(self, rows: Tensor | slice) -> Tensor:
        terms = self.cache.terms(rows, self.device)
        if self.rest is None:
            return self.adapter.from_units(terms)
        return self.adapter.adapted_sum(terms) + self.rest[rows]

    def epoch(self, batch_size: int, generator: torch.Generator | None) -> Iterator[tuple[Tensor, Tensor]]:
        """(y, labels) of every batch, shuffled when there is a generator."""
        if generator is None:
            runs = _runs(len(self.cache), batch_size)
        else:
            runs = torch.randperm(len(self.cache), generator=generator).split(batch_size)
        for rows in runs:
            labels = None if self.labels is None else self.labels[rows].to(self.device)
            yield self.embed(rows), labels


class _LoadedData:
    """A loader of (images, labels): the tower runs for every batch. Shuffling and batch size are the loader's own."""

    def __init__(self, adapter: TowerAdapter, loader: Iterable):
        self.adapter, self.loader = adapter, loader
        self.device = adapter.trainable()[0].device

    def epoch(self, batch_size: int, generator: torch.Generator | None) -> Iterator[tuple[Tensor, Tensor]]:
        count = 0
        for batch in self.loader:
            images, labels = (batch[0], batch[1]) if isinstance(batch, list | tuple) else (batch, None)
            check_finite(images, first=count)
            count += len(images)
            y = self.adapter(images.to(self.device))
            labels = (
                None if labels is None else torch.as_tensor(labels, dtype=torch.int64, device=self.device)
            )
            yield (y[0] if isinstance(y, tuple) else y), labels


def _runs(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _data(adapter: TowerAdapter, data: UnitCache | Iterable) -> _CachedData | _LoadedData:
    if not isinstance(adapter, TowerAdapter):
        raise ValueError(
            f"expected a ResiDual or another adapter of this library; got {type(adapter).__name__}"
        )
    return _CachedData(adapter, data) if isinstance(data, UnitCache) else _LoadedData(adapter, data)


def _check_labels(labels: Tensor | None, head: ZeroShotHead) -> None:
    if labels is None:
        raise ValueError("this needs labels; the data holds only images")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(head.class_names):
        raise ValueError(
            f"labels run from {int(labels.min())} to {int(labels.max())}, "
            f"but the head has {len(head.class_names)} classes"
        )


def fit(
    adapter: TowerAdapter,
    head: ZeroShotHead,
    train: UnitCache | Iterable,
    val: UnitCache | Iterable | None = None,
    *,
    lr: float | None = None,
    epochs: int = 30,
    batch_size: int = 64,
    patience: int = 5,
    weight_decay: float = 0.0,
    seed: int = 0,
    progress: Callable[[Epoch], None] | None = None,
) -> FitResult:
    """Fits an adapter's weights by cross-entropy of head(y) with schedule-free AdamW.

    Args:
        adapter: ResiDual, CoarseHeads, OutputSpectral or OutputLinear. Its weights are the starting point.
        head: the classifier, which stays as it is.
        train, val: UnitCaches (seconds) or loaders of (images, labels) (the tower runs every epoch). Without `val`
            there is no early stopping and the last epoch is kept.
        lr: the adapter's own default, the paper's: 0.8 for weights on components and heads, 1e-3 for `output` and
            `linear`.
        epochs, batch_size, patience: at most this many epochs; stop after `patience` without a better accuracy on val.
        seed: of the shuffling.
        progress: called with every :class:`Epoch`.

    Returns:
        A :class:`FitResult`; the adapter holds the weights of its best epoch (by accuracy on val, the earlier of
        equals; epoch 0 is the start).

    Raises:
        ValueError: no labels, labels out of range, a cache of another tower or without the kinds needed.
        FloatingPointError: the loss is not finite; the starting weights are put back.

    Deterministic for the same inputs, seed and number of threads.
    """
    import schedulefree

    if epochs < 1 or batch_size < 1 or patience < 1:
        raise ValueError(
            f"epochs, batch_size and patience must be at least 1; got {epochs}, {batch_size}, {patience}"
        )
    start = time.perf_counter()
    source = _data(adapter, train)
    for cache in (train, val):
        if isinstance(cache, UnitCache):
            _check_labels(cache.labels, head)
    held_out = None if val is None else _data(adapter, val)
    parameters = [p for p in adapter.parameters() if p.requires_grad]
    head = head.to(source.device)
    optimizer = schedulefree.AdamWScheduleFree(
        parameters, lr=adapter.default_lr if lr is None else lr, weight_decay=weight_decay
    )
    generator = torch.Generator().manual_seed(seed)
    initial = [p.detach().clone() for p in parameters]
    best, best_epoch, best_accuracy = initial, 0, None
    history: list[Epoch] = []

    def record(epoch: int, train_loss: float | None) -> Epoch:
        seen = None if held_out is None else _evaluate(held_out, head)
        row = Epoch(
            epoch,
            train_loss,
            None if seen is None else seen.loss,
            None if seen is None else seen.accuracy,
            time.perf_counter() - start,
        )
        history.append(row)
        if progress is not None:
            progress(row)
        return row

    stopped = False
    try:
        best_accuracy = record(0, None).val_accuracy
        for epoch in range(1, epochs + 1):
            optimizer.train()
            total, count = 0.0, 0
            for y, labels in source.epoch(batch_size, generator):
                _check_labels(labels, head)
                loss = F.cross_entropy(head(y), labels)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                total, count = total + loss.detach() * len(labels), count + len(labels)
            if not count:
                raise ValueError("the training data gave no images")
            mean_loss = float(total / count)
            if mean_loss != mean_loss or mean_loss in (float("inf"), float("-inf")):
                raise FloatingPointError(
                    f"the training loss became {mean_loss} in epoch {epoch}; "
                    f"lower lr (now {optimizer.param_groups[0]['lr']}) or look for NaN in the cached units"
                )
            optimizer.eval()
            row = record(epoch, mean_loss)
            if held_out is None or row.val_accuracy > best_accuracy:
                best, best_epoch, best_accuracy = (
                    [p.detach().clone() for p in parameters],
                    epoch,
                    row.val_accuracy,
                )
            elif epoch - best_epoch >= patience:
                stopped = True
                break
    except BaseException:
        best = initial
        raise
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, best, strict=True):
                p.copy_(value)
                p.grad = None
    return FitResult(
        best_epoch=best_epoch,
        val_accuracy=best_accuracy,
        parameters=sum(p.numel() for p in parameters),
        seconds=time.perf_counter() - start,
        stopped_early=stopped,
        history=history,
    )


@torch.no_grad()
def _evaluate(source: _CachedData | _LoadedData, head: ZeroShotHead) -> Evaluation:
    classes = len(head.class_names)
    hits = torch.zeros(classes, dtype=torch.float64)
    seen = torch.zeros(classes, dtype=torch.float64)
    loss, count = 0.0, 0
    for y, labels in source.epoch(EVALUATION_ROWS, None):
        _check_labels(labels, head)
        logits = head(y)
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        count += len(labels)
        right = (logits.argmax(1) == labels).double().cpu()
        members = F.one_hot(labels.cpu(), classes).double()
        seen += members.sum(0)
        hits += right @ members
    if not count:
        raise ValueError("there are no images to evaluate on")
    return Evaluation(
        accuracy=float(hits.sum()) / count, loss=loss / count, count=count, class_accuracy=hits / seen
    )


def evaluate(adapter: TowerAdapter, head: ZeroShotHead, data: UnitCache | Iterable) -> Evaluation:
    """Accuracy and loss of an adapter on a UnitCache or a loader of (images, labels)."""
    source = _data(adapter, data)
    return _evaluate(source, head.to(source.device))


@torch.no_grad()
def predict(adapter: TowerAdapter, head: ZeroShotHead, data: Tensor | UnitCache | Iterable) -> Prediction:
    """Labels and probabilities for images [N, 3, H, W], a loader of image batches, or a UnitCache.

    A batch of zero images gives an empty prediction. Raises ValueError for images the tower cannot take, NaN and Inf
    named by index.
    """
    source = _data(adapter, [data] if isinstance(data, Tensor) else data)
    head = head.to(source.device)
    logits = [head(y).cpu() for y, _ in source.epoch(EVALUATION_ROWS, None)]
    if not logits:
        raise ValueError("there are no images to predict")
    logits = torch.cat(logits)
    return Prediction(logits.argmax(1), logits.softmax(1), head.class_names)
