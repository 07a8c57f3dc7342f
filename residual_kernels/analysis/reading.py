"""What do the analyses read of units? Orthonormal coordinates of their own, and coefficients of components.

A unit lies in the span of its C+2 map rows M. With M^T = Q T (Q orthonormal) the distances and inner products
of the x_u are those of T l, so nothing here ever makes an [N, R, D] tensor.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from residual_kernels import towers
from residual_kernels.bases.principal import CONSTANT
from residual_kernels.bases.spectral_bases import SpectralBases
from residual_kernels.ops.reference import unit_coordinates
from residual_kernels.towers import Terms, Tower, Unit, UnitMaps
from residual_kernels.units.cache import UnitCache
from residual_kernels.units.source import ROWS, unit_source

GROUP_BYTES = 512 * 2**20  # what the units looked at together may hold


def units_of(view: Tower, kind: str, units: Iterable | None = None) -> list[Unit]:
    """Layout rows of one kind: all, or those named (by index, row or (layer, head));
    ValueError for another kind."""
    towers.check_kinds((kind,), view.layout)
    span = view.layout.span(kind)
    if units is None:
        return list(view.layout[span])
    found = [view.layout[view.layout.index(unit)] for unit in units]
    foreign = [unit for unit in found if unit.kind != kind]
    if foreign:
        raise ValueError(f"unit {foreign[0].index} is of kind {foreign[0].kind!r}, not {kind!r}")
    return found


def output_bases(view: Tower, bases: SpectralBases, kinds: Iterable[str]) -> None:
    """Raises ValueError unless these are bases of this very tower's units in the output space,
    with these kinds."""
    if bases.placement != "output":
        raise ValueError(
            f'these bases have placement="{bases.placement}"; units are looked at in the output space, so '
            'fit bases with placement="output"'
        )
    missing = [kind for kind in kinds if kind not in bases.parts]
    if missing:
        raise ValueError(f"these bases hold {', '.join(bases.kinds)}, not {', '.join(missing)}")
    bases.check_tower(view)


def groups(units: Sequence[Unit], bytes_each: int) -> Iterator[list[Unit]]:
    """Runs of units that together hold at most GROUP_BYTES; one unit at least."""
    size = max(1, GROUP_BYTES // max(1, bytes_each))
    for start in range(0, len(units), size):
        yield list(units[start : start + size])


def map_rows(view: Tower, units: Sequence[Unit]) -> Tensor:
    """M [G, C+2, D] of units of one kind, float64; [1, C+2, D] where they share one map, as MLPs do."""
    kind = units[0].kind
    first = view.layout.span(kind).start
    maps = view.maps(kind, [unit.index - first for unit in units])
    distinct = len(maps.A) if maps.A.stride(0) else 1
    return UnitMaps(maps.A[:distinct], maps.b[:distinct], maps.g, maps.e, maps.share).rows()


def width_of(view: Tower, kind: str) -> int:
    """C + 2 of a kind."""
    return view.maps(kind, [0]).A.shape[1] + 2


def constants(view: Tower, kind: str) -> Tensor:
    """e / share [D], float64: what every unit of a kind has besides l M."""
    maps = view.maps(kind, [0])
    return maps.e / maps.share


def short(terms: Terms, units: Sequence[Unit], first: int) -> Tensor:
    """l = (s*z, s, s*m) of some units, [n, G, C+2] float64;
    `first` is the layout index where their kind begins."""
    index = [unit.index - first for unit in units]
    z = terms.z[units[0].kind]
    if index != list(range(z.shape[1])):
        z = z[:, torch.tensor(index, device=z.device)]
    return unit_coordinates(z.double(), terms.scale.double(), terms.mean.double())


def _run(rows: Tensor) -> Tensor | slice:
    """Consecutive rows as a slice, which copies nothing."""
    low, high = int(rows[0]), int(rows[-1])
    return slice(low, high + 1) if high - low + 1 == len(rows) else rows


@dataclass(frozen=True)
class Coordinates:
    """Units in orthonormal frames: x_u - mean = points @ frame, up to rounding.

    points [G, N, r], centred, in the outputs' dtype; frame [G, r, D] (or [1, r, D], shared) with orthonormal
    rows, float64; mean [G, D] float64. r = min(C+2, D). A unit that is constant up to rounding is exactly
    zero.
    """

    units: list[Unit]
    points: Tensor
    frame: Tensor
    mean: Tensor

    def frame_of(self, position: int) -> Tensor:
        return self.frame[position if len(self.frame) > 1 else 0]


def coordinates(
    tower: nn.Module,
    cache: UnitCache,
    kind: str = "head",
    units: Iterable | None = None,
    rows: Tensor | None = None,
) -> Iterator[Coordinates]:
    """The units of a cache in their own coordinates, in groups of bounded memory;
    `rows` picks some of the images."""
    view = towers.view_inside(tower)
    chosen = units_of(view, kind, units)
    source = unit_source(cache, view.module, (kind,))
    rows = torch.arange(len(cache)) if rows is None else rows
    if not len(rows):
        raise ValueError("there are no images in this cache")
    width = width_of(view, kind)
    dtype, first = cache.output.dtype, view.layout.span(kind).start
    size = min(width, view.dim)
    for group in groups(chosen, len(rows) * size * dtype.itemsize + 3 * width * view.dim * 8):
        M = map_rows(view, group)
        Q, T = torch.linalg.qr(M.transpose(1, 2))  # [., D, r], [., r, C+2]
        short_map = T.transpose(1, 2).to(dtype)
        points = torch.empty(len(group), len(rows), size, dtype=dtype)
        shift: Tensor | None = None
        square: Tensor | None = None
        start = 0
        for batch in source.along(map(_run, rows.split(ROWS))):
            local = short(batch.terms, group, first)
            squares = local.square().sum(0)
            square = squares if square is None else square + squares
            if shift is None:  # provisional: subtracted in float64, before anything is rounded or multiplied
                shift = local.mean(0)
            local = (local - shift).to(dtype).transpose(0, 1)  # [G, n, C+2]
            points[:, start : start + len(batch)] = (local @ short_map).to(points.device)
            start += len(batch)
        assert shift is not None  # there is an image at least
        assert square is not None
        centre = points.mean(1, dtype=torch.float64)  # [G, r]
        points -= centre.to(dtype)[:, None, :]
        size_of = (square.sum(1) / len(rows) * M.square().sum((1, 2))).to(points.device)
        spread = points.square().sum((1, 2), dtype=torch.float64) / len(rows)
        points[spread <= CONSTANT * size_of] = 0.0
        frame = Q.transpose(1, 2)
        offset = (shift[:, None, :] @ M)[:, 0] + (centre.to(frame)[:, None, :] @ frame)[:, 0]
        yield Coordinates(group, points, frame, offset + constants(view, kind))


class BasisReader:
    """c = Phi_u (x_u - mu_u) of all kept components of a kind, [J, n] in the outputs' dtype,
    from terms of n images."""

    def __init__(self, view: Tower, bases: SpectralBases, kind: str):
        self.units, self.first = units_of(view, kind), view.layout.span(kind).start
        output_bases(view, bases, (kind,))
        part = bases.parts[kind]
        rows, constant = map_rows(view, self.units), constants(view, kind)
        self.projections, self.offsets = [], []
        for place in range(len(self.units)):
            M = rows[place if len(rows) > 1 else 0]
            phi = part.components[part.run(place)].to(M)
            self.projections.append(phi @ M.T)  # [K_u, C+2]
            self.offsets.append(phi @ (constant - part.mean[place].to(M)))

    def __call__(self, terms: Terms) -> Tensor:
        dtype = terms.output.dtype
        local = short(terms, self.units, self.first)
        # About the batch's mean, so that large means cancel in float64 and not in the product.
        shift = local.mean(0)
        local = (local - shift).to(dtype).permute(1, 2, 0).contiguous()  # [R, C+2, n]
        read = [
            torch.addmm(
                (projection @ shift[place] + offset).to(dtype)[:, None], projection.to(dtype), local[place]
            )
            for place, (projection, offset) in enumerate(zip(self.projections, self.offsets, strict=True))
        ]
        return torch.cat(read)
