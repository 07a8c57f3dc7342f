"""What is the convex problem of an adapter?

Its coefficients and output as rows, labels, splits, and who judges.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from residual_kernels import distributed
from residual_kernels.adapters.residual import ResiDual
from residual_kernels.adapters.tower_adapter import TowerAdapter
from residual_kernels.ops.backends import multiplies_bfloat16
from residual_kernels.train.batches import AdapterRows, room
from residual_kernels.train.config import ConvexConfig
from residual_kernels.train.folds import folds_of
from residual_kernels.train.labels import label_table, shots_of, weights_of_classes
from residual_kernels.train.logistic import Objective, Readout, ResidentRows, Rows, RowSource, Targets
from residual_kernels.train.path import FitGroup, Outside, Path
from residual_kernels.units.source import UnitSource
from residual_kernels.zeroshot import ZeroShotHead

if TYPE_CHECKING:
    from typing_extensions import TypeIs

FLOOR = 1e-3  # of the mean variance: components that never move are not blown up
SORTED = 256  # rows of a fold from which on it pays to keep them together
CONSTANT = 1e-4  # of the mean square of their means: nor are they where none moves


@dataclass(frozen=True)
class Labels:
    """Labels [L, N] int64 of L sets, or shares of every class [L, N, K]."""

    values: Tensor

    @property
    def shares(self) -> bool:
        return self.values.ndim == 3

    @property
    def count(self) -> int:
        """N."""
        return self.values.shape[1]

    @property
    def numbers(self) -> Tensor:
        """[L, N]: the label, or the class of the largest share; what shots and folds go by."""
        return self.values.argmax(-1) if self.shares else self.values

    def of(self, sets: slice) -> "Labels":
        """Those of some label sets."""
        return Labels(self.values[sets])

    def at(self, rows: slice, device: torch.device, dtype: torch.dtype) -> "Labels":
        return Labels(self.values[:, rows].to(device, dtype if self.shares else None))


def labels_of(source: UnitSource, given: Sequence[Tensor] | None, sizes: Sequence[int], name: str) -> Labels:
    """The label sets of a source: those given, [N] or shares [N, K] each, or its own.

    Each checked against its head.
    """
    shares = [np.ndim(one) == 2 for one in given or ()]
    if given is None or not any(shares):
        sets = 1 if given is None else len(given)
        return Labels(label_table(source, given, sets, sizes, name))
    if not all(shares):
        raise ValueError(f"{name} must all be [N] or all be [N, K]; got both")
    found = []
    for number, one in enumerate(given):
        one = torch.as_tensor(one).detach().cpu().double()
        wanted = (source.count, sizes[number if len(sizes) > 1 else 0])
        if one.shape != wanted:
            raise ValueError(f"{name} must be shares [N, K] = {wanted}; got {tuple(one.shape)}")
        if not (one.isfinite().all() and (one >= 0).all() and (one.sum(1) > 0).all()):
            raise ValueError(
                f"{name} must be finite, not below zero, and above zero for at least one class of every image"
            )
        found.append(one / one.sum(1, keepdim=True))
    if len({one.shape for one in found}) > 1:
        raise ValueError(f"{name} of heads with different numbers of classes cannot be fitted at once")
    return Labels(torch.stack(found))


def is_linear(adapter: TowerAdapter) -> "TypeIs[ResiDual]":
    """Whether the logits are linear in the adapter's weight, one number a component,
    so that the convex solver fits."""
    if not isinstance(adapter, ResiDual) or adapter.placement != "output":
        return False
    return len(adapter.weight) == sum(len(adapter.units[kind].basis) for kind in adapter.adapted)


class _Streamed:
    """Rows that are read from the cache again at every evaluation."""

    def __init__(self, form: "Form", rows: AdapterRows):
        self.form, self.rows = form, rows
        self.part = rows.part(rows.count)

    def __len__(self) -> int:
        return self.part.stop - self.part.start

    def blocks(self) -> Iterator[Rows]:
        start = 0
        for batch in self.rows.in_order():
            found = self.form.rows(batch.features)
            count = len(found[1])
            yield Rows(slice(start, start + count), *found)
            start += count


class Form:
    """An adapter as the problem reads it: y = output + sum_j (weight_j - 1) c_j basis_j."""

    def __init__(self, adapter: ResiDual, with_components: bool = True):
        self.adapter, self.with_components = adapter, with_components
        self.ones = torch.ones_like(adapter.weight)[None].detach()
        kinds = adapter.adapted if with_components else ()
        self.kinds = kinds
        like = adapter.weight.detach()
        each = [adapter.units[kind].basis.to(like) for kind in kinds]
        self.basis = torch.cat(each) if each else like.new_zeros(0, adapter.dim)

    def readout(self, head: ZeroShotHead) -> Readout:
        vectors = head.class_vectors.to(self.basis)
        if vectors.shape[0] != self.basis.shape[1]:
            raise ValueError(
                f"embeddings have {self.basis.shape[1]} numbers but the class vectors {vectors.shape[0]}: "
                "they come from two different models"
            )
        return Readout(self.basis, vectors, float(head.logit_scale.exp()))

    @torch.no_grad()
    def rows(self, features: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], Tensor]:
        """(coefficients of each kind, output at weight 1), in the adapter's dtype,
        whatever the cache holds."""
        if self.adapter.rest.name == "all":
            output = features["rest"]
        else:
            output = self.adapter.from_features(features, [self.ones])[0]
        return tuple(features[f"{kind}.c"].to(self.basis) for kind in self.kinds), output.to(self.basis)

    def source(self, rows: AdapterRows, narrow: bool = False, fold: Tensor | None = None) -> RowSource:
        """The rows for the products; where they are in memory, `narrow` and `fold` as in ResidentRows."""
        if rows.resident is None:
            return _Streamed(self, rows)
        mine = rows.part(rows.count)
        features = {name: value[mine] for name, value in rows.resident.items()}
        return ResidentRows(*self.rows(features), narrow=narrow, fold=fold)


def moments(rows: RowSource, readout: Readout) -> tuple[Tensor, float]:
    """Variances [J] of r c_j with a floor, and the mean variance of r f, over all processes' rows,
    labelled or not."""

    def scaled(block: Rows) -> Tensor:
        r = readout.base(block.output)[1]
        return torch.cat([*(c.to(r.dtype) for c in block.coefficients), block.output], 1) * r[:, None]

    components, dim = readout.basis.shape
    zero = torch.zeros(components + dim, dtype=torch.float64, device=readout.basis.device)
    count, mean, squares = 0, zero, zero
    for block in rows.blocks():
        values = scaled(block)
        if not len(values):
            continue
        own = values.mean(0)
        around = values.sub_(own).square_().sum(0).double()
        count, mean, squares = _joined(count, mean, squares, len(values), own.double(), around)
    if distributed.world() > 1:
        everyone = float(distributed.total(zero.new_full((), count)))
        whole = distributed.total(mean * count) / max(1.0, everyone)
        squares = distributed.total(squares + (mean - whole).square() * count)
        count, mean = int(everyone), whole
    variance = squares / max(1, count - 1)
    own, power = variance[:components], mean[:components].square()
    if components:
        floor = max(FLOOR * float(own.mean()), CONSTANT * float(power.mean()))
        own = own.clamp_min(max(floor, torch.finfo(readout.basis.dtype).tiny))
    return own.to(readout.basis), float(variance[components:].mean())


@dataclass(frozen=True)
class MeasuredRows:
    """Rows for the products, with what :func:`moments` says of them."""

    source: RowSource
    variance: Tensor
    of_outputs: float


def _joined(n: int, mean: Tensor, squares: Tensor, m: int, other: Tensor, more: Tensor) -> tuple:
    """Count, mean and sum of squares around it, of two parts together (Chan, Golub, LeVeque 1983)."""
    away, both = other - mean, max(1, n + m)
    return n + m, mean + away * (m / both), squares + more + away.square() * (n * m / both)


@dataclass(frozen=True)
class ConvexProblem:
    """What is fitted, before anybody says which numbers are learned: rows, labels, splits and who judges.

    `rows_of` opens the rows of an adapter; everything else is the same for all candidates, so that they are
    judged on the same images in the same folds.
    """

    config: ConvexConfig
    labels: Labels
    groups: Sequence[FitGroup]
    fold: Tensor
    folds: int
    row_weight: Tensor | None
    outside: Labels | None
    outside_weight: Tensor | None

    @classmethod
    def of(
        cls,
        config: ConvexConfig,
        labels: Labels,
        classes: Sequence[str],
        seeds: Sequence[int],
        outside: Labels | None,
    ) -> "ConvexProblem":
        """Groups run over label sets, then seeds."""
        numbers = labels.numbers
        sets, count = numbers.shape
        groups: list[FitGroup] = []
        fold: list[Tensor] = []
        folds = min(config.folds, count)
        for which in range(sets):
            for seed in seeds:
                chosen = torch.arange(count)
                if config.shots is not None:
                    chosen = shots_of(numbers[which], config.shots, seed, classes)
                own = torch.full((count,), -1, dtype=torch.int16)
                own[chosen] = folds_of(numbers[which][chosen], folds, seed)
                idle = len(numbers[which][chosen].unique()) < 2
                groups.append(FitGroup(which, len(fold), idle))
                fold.append(own)
        even = config.shots is not None and isinstance(config.class_weight, str)
        given = None if even else config.class_weight
        sizes = [len(classes)]
        weight = outside_weight = None
        if given is not None:
            by_class = weights_of_classes(given, numbers, sizes)
            weight = by_class.gather(1, numbers)
            weight = weight / weight.mean(1, keepdim=True)
            if outside is not None:
                by_class = weights_of_classes(given, outside.numbers, sizes)
                outside_weight = by_class.gather(1, outside.numbers)
        return cls(config, labels, groups, torch.stack(fold), folds, weight, outside, outside_weight)

    def measured(self, form: "Form", head: ZeroShotHead, rows: AdapterRows) -> "MeasuredRows":
        """Rows as the products read them, and their variances: the same for any class vectors."""
        readout = form.readout(head)
        spare = room(rows.device, self.config.memory) - rows.bytes
        wide = readout.basis.dtype == torch.float32 and multiplies_bfloat16(rows.device)
        narrow = wide and 2 * spare >= rows.bytes  # the copy is half as large again
        fold = None
        if len(self.fold) == 1 and rows.resident is not None:
            mine = self.fold[0, rows.part(rows.count)]
            copies = (3 if narrow else 2) * rows.bytes
            if len(mine) >= SORTED * (self.folds + 1) and 2 * spare >= copies:
                fold = mine.to(readout.basis.device)
        source = form.source(rows, narrow, fold)
        return MeasuredRows(source, *moments(source, readout))

    def path(
        self,
        form: "Form",
        head: ZeroShotHead,
        rows: AdapterRows,
        outside_rows: AdapterRows | None,
        *,
        class_vectors: bool = False,
        measured: "MeasuredRows | None" = None,
    ) -> Path:
        """The path of every group for one choice of what is learned; `measured` where it is known already."""
        readout = form.readout(head)
        like = readout.basis
        mine = rows.part(rows.count)
        if measured is None:
            measured = self.measured(form, head, rows)
        source = measured.source
        fold = self.fold[:, mine].to(like.device)
        weight = None if self.row_weight is None else self.row_weight[:, mine].to(like)
        own = self.labels.at(mine, like.device, like.dtype)
        targets = Targets(own.values, self.config.label_smoothing, weight)
        objective = Objective(
            source,
            readout,
            targets,
            measured.variance.sqrt(),
            vector_variance=measured.of_outputs if class_vectors else None,
        )
        outside = None
        if outside_rows is not None and self.outside is not None:
            there = outside_rows.part(outside_rows.count)
            known = self.outside.at(there, like.device, like.dtype)
            counts = like.new_ones(known.numbers.shape)
            if self.outside_weight is not None:
                counts = self.outside_weight[:, there].to(like)
            outside = Outside(form.source(outside_rows), Targets(known.values), counts)
        return Path(
            objective,
            self.groups,
            fold,
            self.folds,
            outside,
            freedoms=self.config.freedoms,
            side_by_side=isinstance(source, _Streamed),
        )
