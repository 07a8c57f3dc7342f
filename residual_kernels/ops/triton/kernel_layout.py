"""How do the kernels read the constants? Runs of components padded to eight, and the table of chunks.

A unit's run of components starts at a multiple of 8 and is padded with zero rows to a multiple of 8, so that
whatever runs along components (coefficients, dy . basis, masks) is read and written 16 bytes at a time. A
padding row has proj = basis = 0 and bias = slope = offset = 0: its coefficient is 0. `weight` and `dweight`
keep the caller's order.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import torch
from torch import Tensor

from residual_kernels.ops.triton.routes import Problem, block_components, cut_runs, pieces

MOST_UNITS = 1 << 14  # what a chunk's code has room for
# Bits below each field of a chunk's code: shift | length | first / 8 | unit.
_FIRST, _LENGTH, _UNIT = (
    17,
    24,
    45,
)


@dataclass(frozen=True)
class Constants:
    """The packed constants of narrow units, by name; the first tensors and sizes of `pack` in their order."""

    proj: Tensor  # [P, C rounded up to 16]; P = J with every run padded to a multiple of 8
    bias: Tensor  # [P]
    slope: Tensor  # [P]
    offset: Tensor  # [P]
    basis: Tensor  # [P, D rounded up to 8]
    chunks: (
        Tensor  # int64 [chunks]: unit << 45 | first / 8 << 24 | length << 17 | first - (first of the caller)
    )
    runs: Tensor  # int32 [2, R+1]: first padded component of each unit, then the first in the caller's order
    slots: Tensor  # int64 [J]: where each component of the caller stands
    sources: Tensor  # int64 [P]: the inverse; padding points at component 0
    units: int
    coordinates: int
    components: int  # J
    dim: int  # D
    block_k: int
    longest: int  # largest padded K_u
    padded: int  # P
    chunk_count: int

    @property
    def narrow_basis(self) -> Tensor:
        """basis [P, D], for the vendor's products."""
        return self.basis[:, : self.dim]


TENSORS = 9
SIZES = 8


MOVING = ("z_ptr", "scale_ptr", "mean_ptr", "proj_ptr", "bias_ptr", "slope_ptr", "offset_ptr")


@dataclass(slots=True)
class Call:
    """What a route computes from. scale and mean are None for 1 and 0.

    Index [N] where rows choose their weights.

    `key` holds all that a launch depends on except the tensors' addresses.
    """

    z: Tensor
    scale: Tensor | None
    mean: Tensor | None
    weight: Tensor  # [T, J]
    index: Tensor | None
    constants: Constants
    precision: str
    problem: Problem
    pack: tuple[Sequence[Tensor], Sequence[int]]  # tensors and sizes as packed
    key: Hashable

    def rows(self, first: int, count: int) -> "Call":
        """The same call for `count` rows from `first` on."""
        if first == 0 and count == self.z.shape[0]:
            return self
        part = slice(first, first + count)
        scale, mean, index = (None if x is None else x[part] for x in (self.scale, self.mean, self.index))
        return replace(self, z=self.z[part], scale=scale, mean=mean, index=index, key=(self.key, count))

    def leading(self) -> tuple[Tensor | None, ...]:
        """The tensors of MOVING, in their order."""
        c = self.constants
        return self.z, self.scale, self.mean, c.proj, c.bias, c.slope, c.offset

    def arguments(self) -> dict:
        """Sizes and flags that every kernel reading z takes."""
        z, scale, mean, constants = self.z, self.scale, self.mean, self.constants
        main, tail = pieces(constants.coordinates)
        return {
            "stride_zn": z.stride(0),
            "stride_zr": z.stride(1),
            "stride_zc": z.stride(2),
            "stride_sn": 0 if scale is None else scale.stride(0),
            "stride_mn": 0 if mean is None else mean.stride(0),
            "HAS_SCALE": scale is not None,
            "HAS_MEAN": mean is not None,
            "PRECISION": self.precision,
            "C": constants.coordinates,
            "C_MAIN": main,
            "C_TAIL": tail,
            "STRIDE_PJ": constants.proj.stride(0),
            "ALIGN_Z": gcd(z.stride(0), z.stride(1), 16),
            "BLOCK_K": constants.block_k,
        }


def pack(
    proj: Tensor, bias: Tensor, slope: Tensor, offset: Tensor, basis: Tensor, unit_offsets: Tensor
) -> tuple[list[Tensor], list[int]]:
    """Tensors and sizes of :class:`Constants` in their order."""
    bounds = unit_offsets.tolist()
    units = len(bounds) - 1
    if units > MOST_UNITS:
        raise ValueError(f"the Triton backend takes at most R = {MOST_UNITS} units; got {units}")
    (components, width), dim = proj.shape, basis.shape[1]
    kept = [high - low for low, high in zip(bounds[:-1], bounds[1:], strict=True)]
    block_k = block_components(kept, proj.dtype.itemsize)
    runs = padded_bounds(kept)
    chunks = cut_runs(runs, kept, block_k)
    codes = [
        unit << _UNIT | first // 8 << _LENGTH | length << _FIRST | first - low
        for unit, first, low, length in (
            (unit, first, bounds[unit] + first - runs[unit], length) for unit, first, length in chunks
        )
    ]
    slots = torch.cat(
        [torch.arange(first, first + size) for first, size in zip(runs[:-1], kept, strict=True)]
        or [torch.zeros(0, dtype=torch.int64)]
    )
    sources = torch.zeros(runs[-1], dtype=torch.int64).index_copy_(0, slots, torch.arange(components))
    device = proj.device
    slots, sources = slots.to(device), sources.to(device)

    def spread(rows: Tensor, columns: int) -> Tensor:
        out = rows.new_zeros(runs[-1], columns)
        out[slots, : rows.shape[1]] = rows
        return out

    vectors = [spread(x[:, None], 1).flatten() for x in (bias, slope, offset)]
    tensors = [
        spread(proj, -(-width // 16) * 16),
        *vectors,
        spread(basis, -(-dim // 8) * 8),
        torch.tensor(codes, dtype=torch.int64, device=device),
        torch.tensor([runs, bounds], dtype=torch.int32, device=device),
        slots,
        sources,
    ]
    longest = max((high - low for low, high in zip(runs[:-1], runs[1:], strict=True)), default=0)
    return tensors, [units, width, components, dim, block_k, longest, runs[-1], len(codes)]


def padded_bounds(kept: list[int]) -> list[int]:
    """First padded component of each unit, and the end: runs of multiples of 8."""
    bounds = [0]
    for size in kept:
        bounds.append(bounds[-1] + -(-size // 8) * 8)
    return bounds


def constants_of(tensors: Sequence[Tensor], sizes: Sequence[int]) -> Constants:
    """The constants of a pack by name."""
    fields: tuple[Any, ...] = (*tensors[:TENSORS], *sizes[:SIZES])  # in the order of the record
    return Constants(*fields)
