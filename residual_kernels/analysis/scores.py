"""Which heads matter?

Correlation with the output (no labels needed), and each head's own zero-shot accuracy.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from residual_kernels import ops, towers
from residual_kernels.analysis import compiled
from residual_kernels.analysis.reading import (
    BasisReader,
    Coordinates,
    constants,
    coordinates,
    groups,
    map_rows,
    output_bases,
    short,
    units_of,
    width_of,
)
from residual_kernels.bases.principal import CONSTANT
from residual_kernels.bases.spectral_bases import SpectralBases
from residual_kernels.towers import Tower, Unit
from residual_kernels.units.cache import UnitCache
from residual_kernels.units.source import cache_of, cached_source, unit_source
from residual_kernels.zeroshot import ZeroShotHead

RANK_BYTES = 64 * 2**20  # of sorted keys at a time


@dataclass(frozen=True)
class CrossMoments:
    """Second moments of units' coordinates l and of the output o, over `count` images; float64.

    covariance [G, C+2, C+2] and mean [G, C+2] of l; cross [G, C+2, D] of l with o; output [D, D] of o with
    itself; all over n - 1. rows [G, C+2, D] (or [1, C+2, D]) map l to the output space.
    """

    units: list[Unit]
    count: int
    rows: Tensor
    mean: Tensor
    covariance: Tensor
    cross: Tensor
    output: Tensor


def cross_moments(
    tower: nn.Module, data: "UnitCache | Iterable", kind: str = "head", units: Iterable | None = None
) -> Iterable[CrossMoments]:
    """One :class:`CrossMoments` per group of units: one pass over the data each,
    all units at once in most towers.

    Sums run about the first batch's means; batches are multiplied in the outputs' dtype and added in float64.
    """
    view = towers.view_inside(tower)
    chosen = units_of(view, kind, units)
    width = width_of(view, kind)
    first = view.layout.span(kind).start
    grouped = list(groups(chosen, 16 * width * (width + 2 * view.dim)))
    source = (cached_source if len(grouped) > 1 else unit_source)(data, view.module, (kind,))
    for group in grouped:
        count = 0
        shift: Tensor | None = None
        for batch in source.batches():
            terms = batch.terms
            local, out = short(terms, group, first), terms.output.double()
            if shift is None:
                shift, centre = local.mean(0), out.mean(0)
                total, ahead = torch.zeros_like(shift), torch.zeros_like(centre)
                moment = shift.new_zeros(*shift.shape, shift.shape[1])
                cross = shift.new_zeros(shift.shape[0] * shift.shape[1], len(centre))
                square = centre.new_zeros(len(centre), len(centre))
            dtype = terms.output.dtype
            local, out = (local - shift).to(dtype), (out - centre).to(dtype)
            count += len(out)
            added, outer = ops.unit_moments(local, None, None)
            total += added[:, :-2]
            moment += outer[:, :-2, :-2]
            ahead += out.sum(0, dtype=torch.float64)
            cross += (local.flatten(1).T @ out).double()
            square += (out.T @ out).double()
        if shift is None or count < 2:
            raise ValueError(f"scores need at least 2 images; got {count}")
        mean, centred = total / count, ahead / count
        yield CrossMoments(
            units=group,
            count=count,
            rows=map_rows(view, group),
            mean=shift + mean,
            covariance=(moment - count * mean[:, :, None] * mean[:, None, :]) / (count - 1),
            cross=(cross.view(*shift.shape, -1) - count * mean[:, :, None] * centred) / (count - 1),
            output=(square - count * torch.outer(centred, centred)) / (count - 1),
        )


def property_basis(directions: Tensor | ZeroShotHead | None, dim: int) -> Tensor | None:
    """Orthonormal columns [D, k] spanning the rows of `directions` [p, D] or a head's class vectors;
    None for all of D.

    By Gram and Schmidt in the rows' order; where the rows depend on each other or are more than D, their
    right singular vectors, so that every row counts.
    """
    if directions is None:
        return None
    rows = directions.class_vectors.T if isinstance(directions, ZeroShotHead) else directions
    if rows.ndim != 2 or rows.shape[1] != dim or not len(rows):
        raise ValueError(f"a property basis needs rows of {dim} numbers; got {tuple(rows.shape)}")
    if not rows.isfinite().all():
        raise ValueError("the property basis holds NaN or Inf")
    rounding = torch.finfo(rows.dtype).eps * max(rows.shape)
    rows = rows.detach().cpu().double()
    _, values, right = torch.linalg.svd(rows, full_matrices=False)
    rank = int((values > values[0] * rounding).sum())
    if not rank:
        raise ValueError("the property basis is zero")
    return torch.linalg.qr(rows.T).Q if rank == len(rows) else right[:rank].T


def correlations(
    tower: nn.Module,
    data: "UnitCache | Iterable",
    kind: str = "head",
    *,
    units: Iterable | None = None,
    properties: Tensor | ZeroShotHead | None = None,
) -> Tensor:
    """Pearson correlation of every unit with the model's output, the mean over coordinates.

    Args:
        tower: a supported image tower, or an adapter around one.
        data: a UnitCache of this tower, or a loader; streamed, no labels needed.
        kind: of the units.
        units: some of the kind's units (layout indices, rows or (layer, head)); all by default.
        properties: coordinates to look at: an orthonormal basis of the span of these rows [p, D], or of a
            head's class vectors; the D coordinates of the output space by default.

    Returns:
        [R] float64. A constant unit or coordinate scores 0.

    Raises:
        ValueError: data of another tower, or without the kind.
    """
    found = [pearson(moments, properties) for moments in cross_moments(tower, data, kind, units)]
    return torch.cat(found).cpu()


def pearson(moments: CrossMoments, properties: Tensor | ZeroShotHead | None = None) -> Tensor:
    """:func:`correlations` of a group of units, from its moments."""
    basis = property_basis(properties, moments.rows.shape[2])
    if basis is None:
        rows, cross, output = moments.rows, moments.cross, moments.output.diagonal()
    else:
        basis = basis.to(moments.rows)
        rows, cross = moments.rows @ basis, moments.cross @ basis
        output = ((moments.output @ basis) * basis).sum(0)
    variance = ((moments.covariance @ rows) * rows).sum(1)  # [G, k]
    size = (moments.covariance.diagonal(dim1=1, dim2=2) + moments.mean.square())[:, :, None] * rows.square()
    shared = (rows * cross).sum(1)
    constant = (variance <= CONSTANT * size.sum(1)) | (output <= 0)
    scale = (variance.clamp_min(0) * output.clamp_min(0)).sqrt()
    return torch.where(constant, 0.0, shared / scale.masked_fill(constant, 1.0)).mean(1)


def rank_correlations(
    tower: nn.Module,
    data: "UnitCache | Iterable",
    kind: str = "head",
    *,
    units: Iterable | None = None,
    properties: Tensor | ZeroShotHead | None = None,
) -> Tensor:
    """Spearman's rank correlation of every unit with the model's output, the mean over coordinates.

    Args:
        tower, data, kind, units, properties: as in :func:`correlations`. A loader is encoded in memory first.

    Returns:
        [R] float64. Ties share their mean rank.

    Raises:
        ValueError: as :func:`correlations`.

    Ranks need a sort of N numbers per unit and coordinate, R * D sorts, in blocks of bounded memory: about 20
    ns a number on one core, 15 s for 144 heads, 512 coordinates and 10,000 images.
    """
    cache = cache_of(data, tower, (kind,))
    basis = property_basis(properties, cache.output.shape[1])
    out = cache.output.cpu().double()
    out = out - out.mean(0)
    out = (out if basis is None else out @ basis).to(cache.output.dtype).T.contiguous()  # [k, N]
    target = _centred_ranks(out)
    found: list[Tensor] = []
    fast = target.dtype == torch.float64 and cache.output.dtype == torch.float32 and compiled.runs(target)
    # NumPy sorts on one core, without the GIL; the compiled loops share the cores themselves
    with ThreadPoolExecutor(1 if fast else torch.get_num_threads()) as pool:
        for group in coordinates(tower, cache, kind, units):

            def score(position: int, group: Coordinates = group) -> Tensor:
                frame = group.frame_of(position).cpu()
                axes = (frame if basis is None else frame @ basis).to(group.points.dtype)  # [r, k]
                return _spearman(group.points[position], axes, target, fast)

            found += pool.map(score, range(len(group.units)))
    return torch.stack(found)


def _spearman(points: Tensor, axes: Tensor, target: Tensor, fast: bool) -> Tensor:
    """Mean over k coordinates of the rank correlation of points @ axes with ranks `target` [k, N],
    centred."""
    size = max(1, RANK_BYTES // (8 * len(points)))
    total: Tensor | float = 0.0
    for start in range(0, len(target), size):
        part = slice(start, start + size)
        values, other = axes[:, part].T @ points.T, target[part]
        if fast:
            shared, square = compiled.rank_sums(values, other)
        else:
            ranks = _centred_ranks(values)
            shared, square = (ranks * other).sum(1), ranks.square().sum(1)
        scale = (square * other.square().sum(1)).sqrt()
        total = total + torch.where(scale > 0, shared / scale.clamp_min(1.0), 0.0).sum()
    return cast(Tensor, total) / len(target)  # of one coordinate at least


def _centred_ranks(values: Tensor) -> Tensor:
    """Ranks within each row of [k, N] less their mean (N - 1) / 2, float64;
    ties get the mean of their places."""
    count = values.shape[1]
    ordered, order = _sorted(values)
    places = torch.arange(count, dtype=torch.float64).expand(len(values), -1)
    same = ordered[:, 1:] == ordered[:, :-1]
    tied = same.any(1).nonzero().flatten()
    if len(tied):
        places = places.clone()
        edge = torch.ones(len(tied), 1, dtype=torch.bool)
        index = torch.arange(count).expand(len(tied), -1)
        begins, ends = torch.cat([edge, ~same[tied]], 1), torch.cat([~same[tied], edge], 1)
        low = torch.where(begins, index, 0).cummax(1).values
        high = torch.where(ends, index, count - 1).flip(1).cummin(1).values.flip(1)
        places[tied] = (low + high).double() / 2
    return torch.empty_like(places).scatter_(1, order, places - (count - 1) / 2)


def _sorted(values: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of [k, N] in rising order, as keys that are equal where values are,
    and where each came from (int64).

    float32 is sorted as one int64 of value and position, which NumPy does several times faster than an
    argsort.
    """
    if values.dtype != torch.float32:
        ordered, order = values.sort(1)
        return ordered, order
    bits = (values + 0.0).contiguous().numpy().view(np.int32).astype(np.int64)  # + 0.0: no negative zero
    bits ^= (bits >> 63) & 0x7FFFFFFF  # negative numbers rise too
    keys = (bits << 32) | np.arange(values.shape[1])
    keys.sort(axis=1)
    joined = torch.from_numpy(keys)
    return joined >> 32, joined & 0xFFFFFFFF


def class_maps(view: Tower, units: list[Unit], head: ZeroShotHead) -> tuple[Tensor, Tensor]:
    """M V [G, C+2, K] (or [1, C+2, K]) and the constant [K] of units of one kind: l (M V) + constant are the
    dot products of x_u with the class vectors V, whose largest is the unit's label whatever its norm."""
    V = head.class_vectors.double()
    rows = map_rows(view, units)
    V = V.to(rows.device)
    if V.shape[0] != rows.shape[2]:
        raise ValueError(
            f"embeddings have {rows.shape[2]} numbers but the class vectors {V.shape[0]}: "
            "they come from two different models"
        )
    return rows @ V, constants(view, units[0].kind) @ V


def own_accuracy(
    tower: nn.Module,
    data: "UnitCache | Iterable",
    head: ZeroShotHead,
    kind: str = "head",
    *,
    units: Iterable | None = None,
) -> Tensor:
    """Zero-shot accuracy of every unit alone: head(x_u).

    Args:
        tower: the image tower, or an adapter around one.
        data: a labelled UnitCache or loader; it is streamed.
        head: the class vectors.
        kind: of the units.
        units: some units only; all of the kind by default.

    Returns:
        [R] float64. A constant unit always gives the same class, and scores that class's share.

    Raises:
        ValueError: no labels, or labels that the head does not know.
    """
    view = towers.view_inside(tower)
    chosen = units_of(view, kind, units)
    classes = len(head.class_names)
    first = view.layout.span(kind).start
    grouped = list(groups(chosen, 8 * width_of(view, kind) * (view.dim + classes)))
    make = cached_source if len(grouped) > 1 else unit_source
    source = make(data, view.module, (kind,), labelled=True, class_names=head.class_names)
    found = []
    for group in grouped:
        maps, constant = class_maps(view, group, head)
        hits, count = torch.zeros(len(group), dtype=torch.float64), 0
        for batch in source.batches():
            terms, labels = batch.terms, batch.truth
            dtype = terms.output.dtype
            local = short(terms, group, first).to(dtype).transpose(0, 1)
            for start in range(0, len(group), 64):  # [64, n, K] at a time
                part = slice(start, start + 64)
                map_part = maps if len(maps) == 1 else maps[part]
                named = (local[part] @ map_part.to(dtype) + constant.to(dtype)).argmax(2)
                hits[part] += (named.cpu() == labels).sum(1)
            count += len(labels)
        if not count:
            raise ValueError("there are no images to score on")
        found.append(hits / count)
    return torch.cat(found)


def component_correlations(
    tower: nn.Module, data: "UnitCache | Iterable", bases: SpectralBases, kind: str = "head"
) -> Tensor:
    """Pearson correlation of every kept component's coefficient with the output along the component.

    Args:
        tower: the image tower, or an adapter around one.
        data: a UnitCache or a loader; it is streamed, and needs no labels.
        bases: of this tower, with the kind.
        kind: of the units.

    Returns:
        [J] float64; 0 for a component without variance.
    """
    view = towers.view_inside(tower)
    output_bases(view, bases, (kind,))
    found = [component_pearson(moments, bases) for moments in cross_moments(tower, data, kind)]
    return torch.cat(found).cpu()


def component_pearson(moments: CrossMoments, bases: SpectralBases) -> Tensor:
    """:func:`component_correlations` of a group of units, from its moments."""
    found = []
    for place, unit in enumerate(moments.units):
        rows = moments.rows[place if len(moments.rows) > 1 else 0]
        phi = bases.components(unit).to(rows)
        to_phi = phi @ rows.T  # [K, C+2]: c = to_phi l
        variance = ((to_phi @ moments.covariance[place]) * to_phi).sum(1)
        output = ((phi @ moments.output) * phi).sum(1)
        shared = ((to_phi @ moments.cross[place]) * phi).sum(1)
        size = moments.covariance[place].diagonal() + moments.mean[place].square()
        constant = (variance <= CONSTANT * (to_phi.square() @ size)) | (output <= 0)
        scale = (variance.clamp_min(0) * output.clamp_min(0)).sqrt().masked_fill(constant, 1.0)
        found.append(torch.where(constant, 0.0, shared / scale))
    return torch.cat(found)


def variance_between_classes(
    tower: nn.Module,
    data: "UnitCache | Iterable",
    bases: SpectralBases,
    classes: int,
    kind: str = "head",
) -> Tensor:
    """How well each component separates classes: the variance between their mean coefficients.

    Args:
        tower: the image tower, or an adapter around one.
        data: a labelled UnitCache or loader; it is streamed. A class counts in proportion to its images.
        bases: of this tower, with the kind.
        classes: how many classes there are.
        kind: of the units.

    Returns:
        [J] float64.
    """
    view = towers.view_inside(tower)
    read = BasisReader(view, bases, kind)
    sums: Tensor | None = None
    counts: Tensor | None = None
    for batch in unit_source(data, view.module, (kind,), labelled=True, classes=classes).batches():
        terms, labels = batch.terms, batch.truth
        members = torch.nn.functional.one_hot(labels, classes).double().to(terms.output.device)
        added = members.T @ read(terms).double().T
        sums = added if sums is None else sums + added
        counts = members.sum(0) if counts is None else counts + members.sum(0)
    if sums is None or counts is None:
        raise ValueError("there are no images to score on")
    share = counts / counts.sum()
    means = sums / counts.clamp_min(1)[:, None]
    whole = share @ means
    return (share @ (means - whole).square()).cpu()
