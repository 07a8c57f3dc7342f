"""Fitting the weights: schedule-free AdamW on cross-entropy, the paper's protocol by default."""

import copy
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from residual_kernels.cache import UnitCache
from residual_kernels.decomposition import checked_batches, checked_labels
from residual_kernels.modules import TowerAdapter, UnitAdapter
from residual_kernels.zeroshot import ZeroShotHead

EVALUATION_ROWS = 512  # of a cache
PREDICTED_ROWS = 64  # images through the tower at a time


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

    def __init__(self, adapter: TowerAdapter, cache: UnitCache, head: ZeroShotHead, labelled: bool):
        cache.check(adapter.tower, getattr(adapter, "adapted", ()))
        if labelled:
            if cache.labels is None:
                raise ValueError("this needs labels; the cache holds only images")
            _check_range(cache.labels, head)
        self.adapter, self.cache, self.labels = adapter, cache, cache.labels
        self.device = adapter.trainable()[0].device
        self.rest = None
        if isinstance(adapter, UnitAdapter):
            runs = _runs(len(cache), EVALUATION_ROWS)
            with torch.no_grad():
                parts = [adapter.rest(cache.terms(rows, self.device)) for rows in runs]
            if parts and parts[0] is not None and parts[0].ndim == 2:
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

    def __init__(self, adapter: TowerAdapter, loader: Iterable, head: ZeroShotHead, labelled: bool):
        self.adapter, self.loader, self.head, self.labelled = adapter, loader, head, labelled
        self.device = adapter.trainable()[0].device

    def epoch(self, batch_size: int, generator: torch.Generator | None) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in checked_batches(self.adapter._view, self.loader):
            if self.labelled:
                if labels is None:
                    raise ValueError("this needs labels; the loader gives only images")
                labels = checked_labels(labels, len(images))
                _check_range(labels, self.head)
                labels = labels.to(self.device)
            y = self.adapter(images)
            yield (y[0] if isinstance(y, tuple) else y), labels


def _runs(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _data(
    adapter, data: UnitCache | Iterable, head: ZeroShotHead, *, labelled: bool
) -> _CachedData | _LoadedData:
    if not isinstance(adapter, TowerAdapter):
        raise ValueError(
            f"expected a ResiDual or another adapter of this library; got {type(adapter).__name__}"
        )
    kind = _CachedData if isinstance(data, UnitCache) else _LoadedData
    return kind(adapter, data, head, labelled)


def _check_range(labels: Tensor, head: ZeroShotHead) -> None:
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(head.class_names):
        raise ValueError(
            f"labels run from {int(labels.min())} to {int(labels.max())}, "
            f"but the head has {len(head.class_names)} classes"
        )


def _placed(head: ZeroShotHead, device: torch.device) -> ZeroShotHead:
    """The head on `device`; the caller's own stays where it is."""
    return head if head.class_vectors.device == device else copy.deepcopy(head).to(device)


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
    """Fits an adapter's own weights by cross-entropy of head(y) with schedule-free AdamW; the tower never trains here.

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
        ValueError: no labels, labels out of range, a cache of another tower or without the kinds needed, a loader that
            can be read only once.
        FloatingPointError: the loss is not finite; the starting weights are put back.

    Deterministic for the same inputs, seed and number of threads.
    """
    import schedulefree

    if epochs < 1 or batch_size < 1 or patience < 1:
        raise ValueError(
            f"epochs, batch_size and patience must be at least 1; got {epochs}, {batch_size}, {patience}"
        )
    start = time.perf_counter()
    for name, data in (("train", train), ("val", val)):
        if isinstance(data, Iterator):
            raise ValueError(
                f"{name} can be read only once; give a loader or a list that every epoch can read anew"
            )
    source = _data(adapter, train, head, labelled=True)
    held_out = None if val is None else _data(adapter, val, head, labelled=True)
    parameters = adapter.trainable()
    head = _placed(head, source.device)
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
                loss = F.cross_entropy(head(y), labels)
                for p, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                    p.grad = grad  # of these alone: a tower that is not frozen gathers nothing
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
    source = _data(adapter, data, head, labelled=True)
    return _evaluate(source, _placed(head, source.device))


@torch.no_grad()
def predict(adapter: TowerAdapter, head: ZeroShotHead, data: Tensor | UnitCache | Iterable) -> Prediction:
    """Labels and probabilities for images [N, 3, H, W], a loader of image batches, or a UnitCache.

    No images give an empty prediction. Raises ValueError for images the tower cannot take, NaN and Inf named by index.
    """
    batches = data.split(PREDICTED_ROWS) if isinstance(data, Tensor) else data
    source = _data(adapter, batches, head, labelled=False)
    head = _placed(head, source.device)
    logits = [head(y).cpu() for y, _ in source.epoch(EVALUATION_ROWS, None)]
    logits = torch.cat(logits) if logits else head.class_vectors.new_zeros(0, len(head.class_names)).cpu()
    return Prediction(logits.argmax(1), logits.softmax(1), head.class_names)
