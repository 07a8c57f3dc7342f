"""How good is it? Accuracies, loss and confusions of an adapter, and the labels it gives to new images."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from residual_kernels import display, distributed
from residual_kernels.adapters.tower_adapter import TowerAdapter
from residual_kernels.train.batches import AdapterRows, blocks, bytes_of_a_row, source_of, whole, widest
from residual_kernels.units.cache import UnitCache
from residual_kernels.visible import visible
from residual_kernels.zeroshot import ZeroShotHead

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Evaluation:
    """How well an adapter reads labelled images. Made by :func:`evaluate`.

    Attributes:
        accuracy: share of images read right, in [0, 1].
        loss: mean cross-entropy, in nats.
        count: how many images.
        class_accuracy: [K]; NaN where a class has no image.
        balanced_accuracy: mean of class_accuracy over the classes that have images.
        confusion: [K, K] int64, images of the row's class that were given the column's.
    """

    accuracy: float
    loss: float
    count: int
    class_accuracy: Tensor = field(repr=False)
    balanced_accuracy: float
    confusion: Tensor = field(repr=False)

    @classmethod
    def of(cls, confusion: Tensor, loss: float) -> "Evaluation":
        """The evaluation that a confusion matrix and a loss describe.

        Args:
            confusion: [K, K] int64.
            loss: mean cross-entropy.

        Returns:
            The evaluation.

        Raises:
            ValueError: the matrix counts no images.
        """
        count = int(confusion.sum())
        if not count:
            raise ValueError("there are no images to evaluate on")
        hits, seen = confusion.diagonal().double(), confusion.sum(1).double()
        return cls(
            accuracy=float(hits.sum()) / count,
            loss=loss,
            count=count,
            class_accuracy=hits / seen,
            balanced_accuracy=float(balanced(hits, seen)),
            confusion=confusion,
        )

    def plot(self, class_names: Sequence[str] | None = None) -> "Figure":
        """The confusion matrix.

        Args:
            class_names: K names; numbers by default.

        Returns:
            A matplotlib Figure.

        Raises:
            ValueError: not K names.
            ImportError: matplotlib is missing.
        """
        return display.drawing().confusion(_names(class_names, len(self.confusion)), self.confusion)

    def _repr_html_(self) -> str:
        facts = {
            "accuracy": self.accuracy,
            "balanced accuracy": self.balanced_accuracy,
            "loss": self.loss,
            "images": self.count,
            "classes": len(self.confusion),
        }
        return display.card("Evaluation", facts)


@dataclass(frozen=True)
class Comparison:
    """An adapter beside its tower alone, on the same images.

    Attributes:
        before: of the tower's own output.
        after: of the adapter.
        mended: how many images are misread before and right after.
        broken: how many images are right before and misread after.
    """

    before: Evaluation
    after: Evaluation
    mended: int
    broken: int

    def plot(self, class_names: Sequence[str] | None = None) -> "Figure":
        """Every class's accuracy before and after.

        Args:
            class_names: K names; numbers by default.

        Returns:
            A matplotlib Figure.

        Raises:
            ValueError: not K names.
            ImportError: matplotlib is missing.
        """
        before, after = self.before.class_accuracy, self.after.class_accuracy
        return display.drawing().class_changes(_names(class_names, len(before)), before, after)

    def _repr_html_(self) -> str:
        names = ("accuracy", "balanced_accuracy", "loss")
        rows = [[name, getattr(self.before, name), getattr(self.after, name)] for name in names]
        facts = {"images": self.after.count, "mended": self.mended, "broken": self.broken}
        return display.card("Comparison", facts, ("", "tower", "adapter"), rows)


@dataclass(frozen=True)
class Prediction:
    """labels [N] int64, probabilities [N, K] float32 or better (rows add to one), and the K class names."""

    labels: Tensor
    probabilities: Tensor
    class_names: tuple[str, ...]

    def __repr__(self) -> str:
        """One line: how many images got each of the labels given most."""
        counts = torch.bincount(self.labels.cpu(), minlength=len(self.class_names))
        most = [k for k in counts.argsort(descending=True, stable=True).tolist() if counts[k]]
        said = ", ".join(f"{self.class_names[k]!r}: {int(counts[k]):,}" for k in most[:5])
        more = f", and {len(most) - 5} more classes" if len(most) > 5 else ""
        return f"Prediction({len(self.labels):,} images, {len(self.class_names)} classes; {said}{more})"


def _names(class_names: Sequence[str] | None, classes: int) -> list[str]:
    """Names for a figure: the classes' numbers where there are none."""
    names = list(map(str, range(classes))) if class_names is None else list(map(visible, class_names))
    if len(names) != classes:
        raise ValueError(f"class_names must hold {classes} names, one per class; got {len(names)}")
    return names


class Heads:
    """Zero-shot heads of several tasks at once: fewer classes are padded to the most,
    and padding is never chosen."""

    def __init__(self, heads: Sequence[ZeroShotHead], device: torch.device):
        self.sizes = [len(head.class_names) for head in heads]
        self.classes = max(self.sizes)
        widths = sorted({len(head.class_vectors) for head in heads})
        if len(widths) > 1:
            raise ValueError(f"all heads must read embeddings of one width; got {widths}")
        vectors = [
            F.pad(head.class_vectors.to(device), (0, self.classes - size))
            for head, size in zip(heads, self.sizes, strict=True)
        ]
        self.vectors = torch.stack(vectors)  # [L, D, K]
        self.scale = torch.stack([head.logit_scale.to(device) for head in heads])[:, None, None]
        sizes = torch.tensor(self.sizes, device=device)[:, None, None]
        padding = torch.arange(self.classes, device=device) >= sizes  # [L, 1, K]
        self.padding = padding if padding.any() else None

    def logits(self, y: Tensor, which: Tensor) -> Tensor:
        """[T, n, K] of y [T, n, D]; head which[t] reads task t."""
        if y.shape[-1] != self.vectors.shape[1]:
            raise ValueError(
                f"embeddings have {y.shape[-1]} numbers but the class vectors {self.vectors.shape[1]}: "
                "they come from two different models"
            )
        dtype = torch.promote_types(y.dtype, self.vectors.dtype)
        one = len(self.vectors) == 1
        vectors = (self.vectors[0] if one else self.vectors[which]).to(dtype)
        scale = (self.scale if one else self.scale[which]).to(dtype).exp()
        logits = F.normalize(y.to(dtype), dim=-1) @ vectors * scale
        if self.padding is None:
            return logits
        return logits.masked_fill(self.padding[which], float("-inf"))

    def one(self, y: Tensor) -> Tensor:
        """[n, K] of one task's y, [n, D] or [1, n, D], by the first head."""
        return self.logits(y, torch.zeros(1, dtype=torch.int64, device=y.device)).view(-1, self.classes)


def balanced(hits: Tensor, seen: Tensor) -> Tensor:
    """Mean accuracy [...] over the classes that have images, from counts [..., K]."""
    present = seen > 0
    return torch.where(present, hits / seen.clamp_min(1), 0.0).sum(-1) / present.sum(-1)


@torch.no_grad()
def measure(
    adapter: TowerAdapter,
    rows: AdapterRows,
    heads: Heads,
    which: Tensor,
    weights: Sequence[Tensor],
    labels: Tensor | None,
) -> list[tuple[float, float, float]]:
    """Loss, accuracy and balanced accuracy of T tasks on all processes' rows.

    `which` [T] are their label sets, `weights` their stacks [T, ...], in the order of `adapter.trainable()`;
    `labels` [L, N] of the rows, or None where a loader brings them.
    """
    tasks, classes = len(which), heads.classes
    loss = torch.zeros(tasks, dtype=widest(rows.device), device=rows.device)
    counts = loss.new_zeros(2, tasks, classes)  # hits, images
    for batch in rows.in_order():
        count = len(next(iter(batch.features.values())))
        for part in blocks(tasks, bytes_of_a_row(batch.features, count), count):
            y = adapter.from_features(batch.features, [stack[part] for stack in weights])
            logits = heads.logits(y, which[part])
            if labels is None or batch.places is None:
                truth = batch.truth.expand(len(y), -1)
            else:
                truth = labels[which[part, None], batch.places.rows]
            losses = F.cross_entropy(logits.flatten(0, 1), truth.flatten(), reduction="none")
            loss[part] += losses.view(truth.shape).to(loss).sum(1)
            place = truth + classes * torch.arange(len(y), device=rows.device)[:, None]
            right = logits.argmax(-1) == truth
            for into, chosen in zip(counts, (place[right], place.flatten()), strict=True):
                into[part] += torch.bincount(chosen, minlength=len(y) * classes).view(len(y), classes)
    if rows.part is not whole:
        loss, counts = distributed.total(loss), distributed.total(counts)
    hits, images = counts
    if not images.sum():
        raise ValueError("there are no images to evaluate on")
    number = images.sum(1)
    found = torch.stack([loss / number, hits.sum(1) / number, balanced(hits, images)], 1)
    return [tuple(row) for row in found.tolist()]


@torch.no_grad()
def tower_accuracy(rows: AdapterRows, heads: Heads, labels: Tensor | None) -> list[float]:
    """Accuracy of the untouched tower's output under each head or label set.

    Rows and labels as in :func:`measure`.
    """
    sets = max(len(heads.vectors), 1 if labels is None else len(labels))
    which = torch.arange(sets, device=rows.device)
    hits, count = torch.zeros(sets, dtype=torch.float64), 0
    for batch in rows.source.batches():
        output = batch.terms.output.to(rows.device)
        logits = heads.logits(output.expand(sets, *output.shape), which)
        truth = batch.truth[None] if labels is None else labels[:, batch.rows.to(labels.device)]
        hits += (logits.argmax(-1) == truth.to(rows.device)).sum(1).cpu().double()
        count += len(output)
    if not count:
        raise ValueError("there are no images to evaluate on")
    return (hits / count).tolist()


@torch.no_grad()
def evaluate(adapter: TowerAdapter, head: ZeroShotHead, data: UnitCache | Iterable) -> Evaluation:
    """Accuracies, loss and confusions of an adapter on labelled images.

    Args:
        adapter: of any method; `rk.build("base", tower)` measures the untouched model.
        head: the class vectors that read its embedding.
        data: a UnitCache with labels, or a loader of (images [N, 3, H, W], labels [N] int64).

    Returns:
        An :class:`Evaluation`: accuracy, balanced accuracy, loss (nats), and the confusion matrix [K, K].

    Raises:
        ValueError: no images, no labels, labels that the head does not know, or another tower's cache.

    In a process group this process evaluates alone, on all that it is given.
    """
    classes = len(head.class_names)
    source = AdapterRows(adapter, source_of(adapter, data, labelled=True, class_names=head.class_names))
    heads, tally = Heads([head], source.device), _Tally(classes, source.device)
    weights = [p.detach()[None] for p in adapter.trainable()]
    for batch in source.in_order():
        tally.add(heads.one(adapter.from_features(batch.features, weights)), batch.truth)
    return tally.evaluation()


@torch.no_grad()
def compare(
    adapter: TowerAdapter,
    head: ZeroShotHead,
    data: UnitCache | Iterable,
    base_head: ZeroShotHead | None = None,
) -> Comparison:
    """:func:`evaluate` of an adapter and of its tower alone, in one pass over the data.

    `base_head` reads the tower alone, where the fit moved the class vectors of `head`.
    """
    classes = len(head.class_names)
    source = AdapterRows(adapter, source_of(adapter, data, labelled=True, class_names=head.class_names))
    heads = Heads([head], source.device)
    alone = heads if base_head is None else Heads([base_head], source.device)
    weights = [p.detach()[None] for p in adapter.trainable()]
    before, after = _Tally(classes, source.device), _Tally(classes, source.device)
    mended = broken = 0
    for batch in source.source.batches():
        truth = batch.truth.to(source.device)
        was = before.add(alone.one(batch.terms.output.to(source.device)), truth)
        now = after.add(heads.one(adapter.from_features(source.features(batch), weights)), truth)
        mended += int((now & ~was).sum())
        broken += int((was & ~now).sum())
    return Comparison(before.evaluation(), after.evaluation(), mended, broken)


class _Tally:
    """Confusions and losses, batch by batch."""

    def __init__(self, classes: int, device: torch.device):
        self.classes = classes
        self.confusion = torch.zeros(classes * classes, dtype=torch.int64, device=device)
        self.loss = torch.zeros((), dtype=widest(device), device=device)

    def add(self, logits: Tensor, truth: Tensor) -> Tensor:
        """Counts logits [n, K] of images of classes [n]; returns which of them are right, [n]."""
        named = logits.argmax(1)
        self.loss += F.cross_entropy(logits, truth, reduction="none").to(self.loss).sum()
        self.confusion += torch.bincount(truth * self.classes + named, minlength=self.classes**2)
        return named == truth

    def evaluation(self) -> Evaluation:
        confusion = self.confusion.view(self.classes, self.classes).cpu()
        return Evaluation.of(confusion, float(self.loss) / max(1, int(confusion.sum())))


@torch.no_grad()
def predict(adapter: TowerAdapter, head: ZeroShotHead, data: Tensor | UnitCache | Iterable) -> Prediction:
    """Labels and probabilities for images.

    Args:
        adapter: of any method.
        head: the class vectors that read its embedding.
        data: images [N, 3, H, W], a loader of image batches, or a UnitCache. No images give an empty
            prediction.

    Returns:
        A :class:`Prediction`: labels [N] int64 and probabilities [N, K].

    Raises:
        ValueError: images that the tower cannot take; NaN and Inf are named by the index of their image.
    """
    logits, _ = logits_of(adapter, head, data)
    return Prediction(logits.argmax(1), logits.softmax(1), head.class_names)


@torch.no_grad()
def logits_of(
    adapter: TowerAdapter, head: ZeroShotHead, data: Tensor | UnitCache | Iterable, labelled: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Logits [N, K] on the CPU, and the labels [N] that a labelled source brings."""
    classes = len(head.class_names)
    options = {"labelled": True, "class_names": head.class_names} if labelled else {}
    rows = AdapterRows(adapter, source_of(adapter, data, **options))
    heads = Heads([head], rows.device)
    weights = [p.detach()[None] for p in adapter.trainable()]
    logits, labels = [], []
    for batch in rows.in_order():
        logits.append(heads.one(adapter.from_features(batch.features, weights)).cpu())
        if labelled:
            labels.append(batch.truth.cpu())
    found = torch.cat(logits) if logits else head.class_vectors.new_zeros(0, classes).cpu()
    return found, torch.cat(labels) if labels else None
