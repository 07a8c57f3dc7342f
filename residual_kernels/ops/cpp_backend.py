"""The operators in compiled C++ on CPU tensors (csrc/), on the widest vectors the processor has.

This file lays the constants out, allocates results and hands addresses over; the loops never allocate
tensors. float64 computes in float64, everything else in float32: bfloat16 is widened and rounded while it is
read and written, float16 goes through a float32 copy. Results do not depend on the number of threads
(torch.get_num_threads() of them are used).

Units with many coordinates (an MLP's, the embedding's) and many rows are cheaper folded: weight, proj and
basis of a unit are multiplied first, and the rows pass through that one [C, D] matrix. These products are
torch's own, a unit at a time.
"""

import os
import time
from collections.abc import Sequence

import torch
from torch import Tensor

import residual_kernels._cpp as _cpp
from residual_kernels.ops.cpp_packing import (
    BLOCK,
    DEPTH,
    Pack,
    Sizes,
    basis_in_pairs,
    blocks_of,
    in_panels,
    proj_in_pairs,
    rounded_up,
    widened,
)

ENVIRONMENT_VARIABLE = "RESIDUAL_KERNELS_INSTRUCTION_SET"
# Slow to fast; the position is the extension's number.
INSTRUCTION_SETS = (
    "portable",
    "avx2",
    "avx512",
    "avx512bf16",
    "amx",
)
# What has been timed on each set, for doctor; the figures are in docs/MEASURED.md.
MEASURED = {
    "portable": "compared with float64, not timed",
    "avx2": "timed on an AMD EPYC",
    "avx512": "timed in float32 on an AMD of the Zen 5 class",
    "avx512bf16": "timed on an AMD of the Zen 5 class",
    "amx": "compared with float64 in emulation, not timed",
}
ON_PAIRS = ("avx512bf16", "amx")  # they take bfloat16 alone; csrc/pairs.h
_BY_NAME = ("amx",)  # taken only when asked for
FOLDED_PAYS = 0.75  # the folded route is taken below this share of the direct route's FLOP
FOLDED_WIDTH = (
    128  # and for units of at least so many coordinates: one product per unit must fill the machine
)
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}


def instruction_set() -> tuple[str, dict[str, str]]:
    """The instruction set in use, and for each faster one why it is not.

    RESIDUAL_KERNELS_INSTRUCTION_SET chooses one by name (for tests and comparisons); RuntimeError where it
    cannot run.
    """
    reasons = _cpp.instruction_sets()
    asked = os.environ.get(ENVIRONMENT_VARIABLE)
    if asked is None:
        chosen = [name for name in INSTRUCTION_SETS if reasons[name] is None and name not in _BY_NAME][-1]
    elif asked not in INSTRUCTION_SETS:
        raise RuntimeError(
            f"{ENVIRONMENT_VARIABLE} is {asked!r}; choose one of {', '.join(INSTRUCTION_SETS)}"
        )
    elif reasons[asked] is not None:
        raise RuntimeError(f"{ENVIRONMENT_VARIABLE} asks for {asked}, but {reasons[asked]}")
    else:
        chosen = asked
    if asked is None:
        by_name = f"so far it has run in emulation only; {ENVIRONMENT_VARIABLE}={{}} takes it"
        others = {name: by_name.format(name) for name in _BY_NAME}
    else:
        others = dict.fromkeys(INSTRUCTION_SETS, f"{ENVIRONMENT_VARIABLE} asks for {chosen}")
    faster = INSTRUCTION_SETS[INSTRUCTION_SETS.index(chosen) + 1 :]
    return chosen, {name: reasons[name] or others[name] for name in faster}


def peak(threads: int, dtype: torch.dtype = torch.float32, steps: int = 500_000, runs: int = 10) -> float:
    """The FLOP per second that `threads` cores reach in registers alone: the roof of the operators.

    bfloat16 is counted with the processor's own products where the set in use has them, else with float32's.
    The best of `runs` counts, each of `steps` rounds of a register loop (about a millisecond).
    """
    at = set_number()
    if dtype != torch.bfloat16 and INSTRUCTION_SETS[at] in ON_PAIRS:
        at = INSTRUCTION_SETS.index("avx512")
    best = 0.0
    for _ in range(runs):
        start = time.perf_counter()
        flop = _cpp.peak(at, threads, steps)
        best = max(best, flop / (time.perf_counter() - start))
    return best


def set_number() -> int:
    """The instruction set in use, as the extension numbers it."""
    return INSTRUCTION_SETS.index(instruction_set()[0])


def pack(
    proj: Tensor, bias: Tensor, slope: Tensor, offset: Tensor, basis: Tensor, unit_offsets: Tensor
) -> tuple[list[Tensor], list[int]]:
    """Tensors as in :class:`Pack` and sizes as in :class:`Sizes`."""
    number = set_number()
    paired = INSTRUCTION_SETS[number] in ON_PAIRS and proj.dtype == torch.bfloat16
    if INSTRUCTION_SETS[number] in ON_PAIRS and not paired:
        number = INSTRUCTION_SETS.index("avx512")  # sets on pairs multiply bfloat16 alone
    vector_bytes, vectors, most_in_block = _cpp.layout(number)
    dtype = widened(proj.dtype)
    lanes = vector_bytes // dtype.itemsize
    (components, width), dim = proj.shape, basis.shape[1]
    padded = proj.new_zeros(components, rounded_up(width, lanes), dtype=dtype)
    padded[:, :width] = proj
    blocks = blocks_of(unit_offsets.tolist(), most_in_block if paired else BLOCK, DEPTH if paired else 1)
    if paired:
        panels = basis_in_pairs(basis, blocks)
    else:
        panels = in_panels(basis, blocks, dtype, lanes, lanes * vectors)
    table = torch.tensor(blocks, dtype=torch.int64)
    folds = _folding_saves(1 << 40, unit_offsets.numel() - 1, width, dim, components, proj.dtype)
    made = Pack(
        table,
        unit_offsets.contiguous(),
        padded,
        panels,
        bias.contiguous(),
        slope.contiguous(),
        offset.contiguous(),
        paired_proj=proj_in_pairs(proj, blocks, unit_offsets.tolist()) if paired else None,
        folded=(proj, basis) if folds else None,
    )
    return made.listed(), list(Sizes(number, width, dim, components))


def shape(tensors: Sequence[Tensor], sizes: Sequence[int]) -> tuple[int, int, int, int]:
    """(R, C, J, D); ValueError when tensors and sizes of a pack contradict each other.

    What is left to the extension, which asks at every call: that the blocks and offsets hold every component,
    and that the constants have as many elements as the sizes say.
    """
    if len(sizes) != 4 or len(tensors) not in (7, 8, 9):
        raise ValueError(
            f"a pack of the compiled backend has 7 to 9 tensors and 4 sizes; got {len(tensors)} and "
            f"{len(sizes)}"
        )
    pack, number, width, dim, components = Pack.of(tensors), *sizes
    least, pairs = pack.proj.dtype, pack.paired_proj
    on_pairs = 0 <= number < len(INSTRUCTION_SETS) and INSTRUCTION_SETS[number] in ON_PAIRS
    if not (
        0 <= number < len(INSTRUCTION_SETS)
        and pack.blocks.dtype == pack.unit_offsets.dtype == torch.int64
        and (pack.basis.dtype == least or (pack.basis.dtype == torch.bfloat16 and on_pairs))
        and pack.bias.dtype == pack.slope.dtype == pack.offset.dtype == least
        and pack.blocks.numel() > 0
        and pack.unit_offsets.numel() > 1
        and all(x.is_contiguous() and x.device.type == "cpu" for x in pack.direct)
        and (pairs is None or (pairs.dtype == pack.basis.dtype and pairs.is_contiguous()))
        and (
            pack.folded is None
            or (pack.folded[0].shape == (components, width) and pack.folded[1].shape == (components, dim))
        )
    ):
        raise ValueError(
            "the packed tensors are not those that pack_units made for the compiled backend. "
            f"Got {[(x.dtype, tuple(x.shape)) for x in tensors]} for {list(sizes)}"
        )
    return pack.unit_offsets.numel() - 1, width, components, dim


def _folding_saves(rows: int, units: int, width: int, dim: int, components: int, dtype: torch.dtype) -> bool:
    """Whether the folded route needs clearly fewer FLOP than the direct one:
    the same rule forward and backward."""
    direct = rows * components * (width + dim)
    folded = (rows * units + components) * width * dim
    return width >= FOLDED_WIDTH and dtype in (torch.float32, torch.float64) and folded < FOLDED_PAYS * direct


def _folds(
    z: Tensor, weight: Tensor, weight_index: Tensor | None, pack: Pack, sizes: Sizes
) -> tuple[Tensor, Tensor] | None:
    """proj and basis for the folded route where it is taken."""
    if len(weight) != 1 or weight_index is not None or pack.folded is None:
        return None
    saves = _folding_saves(z.shape[0], z.shape[1], sizes.width, sizes.dim, sizes.components, z.dtype)
    return pack.folded if saves else None


def _folded_forward(z, scale, mean, weight, pack: Pack, folded: tuple[Tensor, Tensor]) -> Tensor:
    """y = scale * (z F + bias + mean * slope) - offset with F, bias, slope,
    offset folded over the components."""
    proj, basis = folded
    bias, slope, offset = ((weight * x) @ basis for x in (pack.bias, pack.slope, pack.offset))  # each [1, D]
    y = bias.repeat(len(z), 1)
    bounds = pack.unit_offsets.tolist()
    for unit, (low, high) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        y.addmm_(z[:, unit], proj[low:high].T @ (weight[0, low:high, None] * basis[low:high]))
    if mean is not None:
        y.addcmul_(mean[:, None], slope)
    if scale is not None:
        y *= scale[:, None]
    y -= offset
    return y.unsqueeze(0)


def _folded_dweight(dy, z, scale, mean, pack: Pack, folded: tuple[Tensor, Tensor]) -> Tensor:
    """dweight[j] = basis[j] . sum_n c[n,j] dy[n], the sum taken before the components are read from it."""
    proj, basis = folded
    scaled = dy[0] if scale is None else scale[:, None] * dy[0]
    dweight = (basis @ scaled.sum(0)) * pack.bias - (basis @ dy[0].sum(0)) * pack.offset
    if mean is not None:
        dweight += (basis @ (mean @ scaled)) * pack.slope
    bounds = pack.unit_offsets.tolist()
    for unit, (low, high) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        fold = z[:, unit].T @ scaled  # [C, D]
        dweight[low:high] += ((proj[low:high] @ fold) * basis[low:high]).sum(1)
    return dweight.unsqueeze(0)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _addresses(pack: Pack) -> tuple[list[int], list[int]]:
    """Where the packed tensors lie and how many elements each has; 0 where proj in pairs is missing."""
    read = (*pack.direct, pack.paired_proj)
    return [_address(x) for x in read], [0 if x is None else x.numel() for x in read]


def _common(
    z, scale, mean, weight, weight_index, pack: Pack, sizes: Sizes
) -> tuple[list, list[Tensor | None]]:
    """The arguments that forward and backward share, and what must stay alive while they run."""
    if widened(z.dtype) != pack.proj.dtype:  # the loops would read numbers of another size
        raise ValueError(
            f"z is {z.dtype}, but the constants are packed for {pack.proj.dtype}; pack them again"
        )
    kept = [None if x is None else x.contiguous() for x in (scale, mean, weight, weight_index)]
    arguments = [
        sizes.instruction_set,
        _DTYPES[z.dtype],
        torch.get_num_threads(),
        [*z.shape[:2], *sizes[1:], weight.shape[0], pack.blocks.shape[0]],
        *_addresses(pack),
        z.data_ptr(),
        z.stride(),
        *map(_address, kept),
    ]
    return arguments, kept


def spectral_reweight_forward(
    z: Tensor,
    scale: Tensor | None,
    mean: Tensor | None,
    weight: Tensor,
    weight_index: Tensor | None,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
) -> Tensor:
    """weight [T, J] -> y [T, N, D], or [N, D] with weight_index [N]."""
    if z.dtype == torch.float16:
        y = spectral_reweight_forward(z.float(), scale, mean, weight, weight_index, tensors, sizes)
        return y.to(z.dtype)
    pack, numbers = Pack.of(tensors), Sizes(*sizes)
    folded = _folds(z, weight, weight_index, pack, numbers)
    if folded is not None:
        return _folded_forward(z, scale, mean, weight, pack, folded)
    lead = (len(z),) if weight_index is not None else (len(weight), len(z))
    y = z.new_empty(*lead, numbers.dim)
    arguments, _kept = _common(z, scale, mean, weight, weight_index, pack, numbers)
    _cpp.forward(*arguments, y.data_ptr())
    return y


def spectral_reweight_backward(
    dy: Tensor,
    z: Tensor,
    scale: Tensor | None,
    mean: Tensor | None,
    weight: Tensor,
    weight_index: Tensor | None,
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    wanted: list[bool],
) -> list[Tensor]:
    """The wanted ones of (dweight, dz, dscale, dmean), in this order."""
    if z.dtype == torch.float16:
        exact = spectral_reweight_backward(
            dy.float(), z.float(), scale, mean, weight, weight_index, tensors, sizes, wanted
        )
        return [g.to(z.dtype) if g.shape == z.shape else g for g in exact]
    pack, numbers = Pack.of(tensors), Sizes(*sizes)
    if wanted == [True, False, False, False]:
        folded = _folds(z, weight, weight_index, pack, numbers)
        if folded is not None:
            return [_folded_dweight(dy, z, scale, mean, pack, folded)]
    least = widened(z.dtype)
    shapes = (weight.shape, z.shape, z.shape[:1], z.shape[:1])
    dtypes = (least, z.dtype, least, least)
    grads = [
        z.new_empty(shape, dtype=dtype) if want else None
        for shape, dtype, want in zip(shapes, dtypes, wanted, strict=True)
    ]
    if dy.ndim == 2:
        dy = dy.unsqueeze(0)
    arguments, _kept = _common(z, scale, mean, weight, weight_index, pack, numbers)
    _cpp.backward(*arguments, dy.data_ptr(), dy.stride(), *map(_address, grads))
    return [grad for grad in grads if grad is not None]


def _sum_arguments(c: Tensor, weight: Tensor, pack: Pack, sizes: Sizes) -> list:
    return [
        sizes.instruction_set,
        _DTYPES[c.dtype],
        torch.get_num_threads(),
        [c.shape[0], pack.unit_offsets.numel() - 1, *sizes[1:], weight.shape[0], pack.blocks.shape[0]],
        *_addresses(pack),
        c.data_ptr(),
        c.stride(),
        weight.data_ptr(),
    ]


def spectral_sum_forward(
    c: Tensor, weight: Tensor, tensors: Sequence[Tensor], sizes: Sequence[int]
) -> Tensor:
    """c [N, J], weight [T, J] -> y [T, N, D]."""
    weight = weight.contiguous()
    numbers = Sizes(*sizes)
    y = c.new_empty(len(weight), len(c), numbers.dim)
    _cpp.sum_forward(*_sum_arguments(c, weight, Pack.of(tensors), numbers), y.data_ptr())
    return y


def spectral_sum_backward(
    dy: Tensor, c: Tensor, weight: Tensor, tensors: Sequence[Tensor], sizes: Sequence[int]
) -> Tensor:
    """dy [T, N, D] -> dweight [T, J]."""
    weight = weight.contiguous()
    dweight = weight.new_empty(weight.shape)
    arguments = _sum_arguments(c, weight, Pack.of(tensors), Sizes(*sizes))
    _cpp.sum_backward(*arguments, dy.data_ptr(), dy.stride(), dweight.data_ptr())
    return dweight


def unit_moments(
    z: Tensor, scale: Tensor | None, mean: Tensor | None, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """Sums and second moments of l - shift.

    512 rows at a time are summed in float32 (float64 for float64 z).
    """
    if z.dtype == torch.float16:
        z = z.float()
    _, units, width = z.shape
    scale, mean = (None if x is None else x.to(widened(z.dtype)).contiguous() for x in (scale, mean))
    shift = shift.contiguous()
    total = torch.empty(units, width + 2, dtype=torch.float64)
    moment = torch.empty(units, width + 2, width + 2, dtype=torch.float64)
    _cpp.moments(
        set_number(),
        _DTYPES[z.dtype],
        torch.get_num_threads(),
        z.shape,
        z.data_ptr(),
        z.stride(),
        _address(scale),
        _address(mean),
        shift.data_ptr(),
        total.data_ptr(),
        moment.data_ptr(),
    )
    return total, moment
