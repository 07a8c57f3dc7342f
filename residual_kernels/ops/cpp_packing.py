"""How are constants laid out for the compiled backend? In blocks that stay in cache, as panels or pairs."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256  # components that stay in cache between the two products, at most
DEPTH = 32  # sums run over a multiple of so many bfloat16 numbers, filled with zeros
SIDE = 16  # columns of a panel of pairs


class Sizes(NamedTuple):
    """The numbers of a pack, by name."""

    instruction_set: int  # as the extension numbers it
    width: int  # C
    dim: int  # D
    components: int  # J


class Pack(NamedTuple):
    """The tensors of a pack, by name; what follows `offset` is there only where it is used."""

    blocks: Tensor  # int64 [B, 5], see blocks_of
    unit_offsets: Tensor
    proj: Tensor  # [J, C padded to whole vectors], at least float32
    basis: Tensor  # in panels, at least float32; bfloat16 in pairs where the set computes on pairs
    bias: Tensor
    slope: Tensor
    offset: Tensor
    paired_proj: Tensor | None = None
    folded: tuple[Tensor, Tensor] | None = (
        None  # proj [J, C] and basis [J, D] as they came: the folded route may pay
    )

    @property
    def direct(self) -> tuple[Tensor, ...]:
        """What the extension's loops read."""
        return self[:7]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "Pack":
        """From a list, as an operator takes it."""
        blocks, unit_offsets, proj, basis, bias, slope, offset, *more = tensors
        direct = cls(blocks, unit_offsets, proj, basis, bias, slope, offset)
        if len(more) == 2:
            return direct._replace(folded=(more[0], more[1]))
        return direct._replace(paired_proj=more[0]) if more else direct

    def listed(self) -> list[Tensor]:
        return [
            *self.direct,
            *(() if self.paired_proj is None else (self.paired_proj,)),
            *(self.folded or ()),
        ]


def widened(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def blocks_of(bounds: list[int], most: int, step: int) -> list[tuple[int, int, int, int, int]]:
    """Components cut into blocks of at most `most`: runs of whole units, or a piece of one larger unit.

    A block is (first, last+1, first unit, last+1 unit, first when every earlier block is padded to `step`).
    """
    blocks = []
    start = 0  # first unit of the block being filled
    for unit in range(len(bounds) - 1):
        low, high = bounds[unit], bounds[unit + 1]
        if high - bounds[start] > most and start < unit:
            blocks.append((bounds[start], low, start, unit))
            start = unit
        if high - low > most:
            pieces = -(-(high - low) // most)
            cuts = [low + (high - low) * piece // pieces for piece in range(pieces + 1)]
            blocks += [(a, b, unit, unit + 1) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
            start = unit + 1
    if start < len(bounds) - 1:
        blocks.append((bounds[start], bounds[-1], start, len(bounds) - 1))
    padded = [0]
    for low, high, _, _ in blocks:
        padded.append(padded[-1] + rounded_up(high - low, step))
    return [(*block, at) for block, at in zip(blocks, padded[:-1], strict=True)]


def rounded_up(count: int, step: int) -> int:
    return -(-count // step) * step


def in_panels(basis: Tensor, blocks: list, dtype: torch.dtype, lanes: int, panel: int) -> Tensor:
    """Per block: panels of `panel` columns, each [components, panel].

    The last as wide as whole vectors need.
    """
    components, dim = basis.shape
    padded_dim = rounded_up(dim, lanes)
    panels = basis.new_zeros(components * padded_dim, dtype=dtype)
    whole = dim // panel * panel  # columns in full panels
    for low, high, *_ in blocks:
        count = high - low
        block = panels[low * padded_dim : high * padded_dim]
        full, rest = block[: count * whole], block[count * whole :]
        in_panels = basis[low:high, :whole].reshape(count, whole // panel, panel)
        full.view(whole // panel, count, panel).copy_(in_panels.transpose(0, 1))
        rest.view(count, padded_dim - whole)[:, : dim - whole] = basis[low:high, whole:]
    return panels


def in_pairs(matrix: Tensor) -> Tensor:
    """[k, columns] -> flat [columns/16, k/2, 16, 2]: panels of columns, neighbours in k side by side."""
    depth, columns = matrix.shape
    return matrix.reshape(depth // 2, 2, columns // SIDE, SIDE).permute(2, 0, 3, 1).reshape(-1)


def basis_in_pairs(basis: Tensor, blocks: list) -> Tensor:
    """Per block: itself for forward, where components are summed over, then its transpose for backward."""
    dim = basis.shape[1]
    paired = []
    for low, high, *_ in blocks:
        block = basis.new_zeros(rounded_up(high - low, DEPTH), rounded_up(dim, DEPTH))
        block[: high - low, :dim] = basis[low:high]
        paired += [in_pairs(block), in_pairs(block.T)]
    return torch.cat(paired)


def proj_in_pairs(proj: Tensor, blocks: list, bounds: list[int]) -> Tensor:
    """Each unit's run of components in a block, padded to 16, transposed.

    Runs lie as Block::proj in csrc says.
    """
    components, width = proj.shape
    padded_width = rounded_up(width, DEPTH)
    rows = proj.new_zeros(components + SIDE * (len(blocks) + len(bounds) - 1), padded_width)
    for number, (first, last, first_unit, last_unit, _) in enumerate(blocks):
        for unit in range(first_unit, last_unit):
            low, high = max(bounds[unit], first), min(bounds[unit + 1], last)
            if low >= high:
                continue
            run = proj.new_zeros(rounded_up(high - low, SIDE), padded_width)
            run[: high - low, :width] = proj[low:high]
            start = low + SIDE * (number + unit)
            rows[start : start + len(run)] = in_pairs(run.T).view(len(run), padded_width)
    return rows
