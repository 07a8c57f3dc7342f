"""What does a compiled kernel do? Instructions, barriers and products by the depth of their loops."""

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from pathlib import Path

import triton

from benchmarks.compile_targets import RecordedLaunch, binary, occupancy, resources_of


@dataclass(frozen=True)
class Code:
    """A disassembled kernel: instructions by loop depth, and what a step of its innermost loop holds."""

    instructions: tuple[int, ...]  # at depth 0, 1, 2 ...
    barriers: tuple[int, ...]
    products: tuple[int, ...]  # tensor-core instructions
    operations: tuple[float, ...]  # of these products, for a warp
    narrow: tuple[int, ...]  # global accesses of 2 and 4 bytes a lane
    tile_bytes: tuple[float, ...]  # of 16-byte global loads, for a warp
    occupancy: float

    def total(self, name: str, trips: list[float]) -> float:
        """Sum of `name` over depths, each times how often it runs.

        A loop that was unrolled away has no depth.
        """
        values = getattr(self, name)
        inner = trips[1:]
        used = [trips[0], *inner[len(inner) - (len(values) - 1) :]] if len(values) - 1 <= len(inner) else None
        if used is None:
            raise ValueError(
                f"the code has {len(values) - 1} nested loops, {len(inner)} trip counts were given"
            )
        return sum(value * count for value, count in zip(values, used, strict=True))


_NVIDIA = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*)")
_AMD = re.compile(r"^\s+((?:v|s|ds|global|buffer|flat|scratch)_\w+)\s*([^;]*)")


def _parse(text: str, amd: bool) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """Instructions (opcode, operands) and labels by position."""
    found: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    pattern = _AMD if amd else _NVIDIA
    for line in text.splitlines():
        label = re.match(r"^(\.L\w+):", line)
        if label:
            labels[label[1]] = len(found)
        match = pattern.match(line)
        if match:
            found.append((match[1], match[2]))
    return found, labels


def _depths(instructions: list[tuple[str, str]], labels: dict[str, int]) -> list[int]:
    """How many loops each instruction is in: a branch to a label above it closes a loop
    (a jump to itself: a trap).

    A branch right behind a try at a barrier is no loop: it waits, or comes back from where the waiting is
    done.
    """
    loops: dict[int, int] = {}
    for at, (opcode, operands) in enumerate(instructions):
        if not opcode.startswith(("BRA", "s_cbranch", "s_branch")):
            continue
        label = re.search(r"\.L\w+", operands)
        start = labels.get(label[0]) if label else None
        waits = any("TRYWAIT" in other for other, _ in instructions[max(at - 3, 0) : at])
        if start is not None and start < at and not waits:
            loops[start] = max(loops.get(start, 0), at)
    return [sum(start <= at <= end for start, end in loops.items()) for at in range(len(instructions))]


def _product_operations(opcode: str) -> float:
    """Operations of a tensor-core instruction, for one warp."""
    shape = re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", opcode)
    if shape:
        return 2.0 * int(shape[1]) * int(shape[2]) * int(shape[3]) / 4
    shape = re.match(r"HMMA\.(\d\d)(\d)(\d+)", opcode)
    if shape:
        return 2.0 * int(shape[1]) * int(shape[2]) * int(shape[3])
    shape = re.match(r"v_mfma_\w+_(\d+)x(\d+)x(\d+)", opcode)
    return 2.0 * int(shape[1]) * int(shape[2]) * int(shape[3]) if shape else 0.0


def blackwell_products(ptx: str) -> list[float]:
    """Operations of the tcgen05 instructions in their order:
    each is issued by one warp for its whole program."""
    values = {name: int(value) for name, value in re.findall(r"mov\.b32\s+(%r\d+), (\d+);", ptx)}
    found = []
    for kind, name in re.findall(r"tcgen05\.mma\S*kind::(\w+) [^,]+, [^,]+, [^,]+, (%r\d+),", ptx):
        shape = values[name]  # the instruction descriptor: N / 8 from bit 17, M / 16 from bit 24
        rows, columns = (shape >> 24 & 31) * 16, (shape >> 17 & 63) * 8
        found.append(2.0 * rows * columns * (8 if kind == "tf32" else 16))
    return found


def read_code(text: str, amd: bool, occupied: float, issued: Sequence[float] = ()) -> Code:
    """Counts of a disassembly; `issued` are the operations of its UTCHMMA instructions, for one warp."""
    blackwell = iter(issued)
    instructions, labels = _parse(text, amd)
    depths = _depths(instructions, labels)
    size = max(depths, default=0) + 1
    counts, barriers, products, narrow = ([0] * size for _ in range(4))
    operations, tile = [0.0] * size, [0.0] * size
    for (opcode, _), depth in zip(instructions, depths, strict=True):
        if opcode.startswith("NOP") or opcode == "s_nop":
            continue
        counts[depth] += 1
        barriers[depth] += opcode.startswith(("BAR", "s_barrier"))
        work = next(blackwell, 0.0) if opcode.startswith("UTCHMMA") else _product_operations(opcode)
        products[depth] += work > 0 or opcode.startswith("UTCHMMA")
        operations[depth] += work
        if opcode.startswith(("LDG", "STG")):
            wide = ".128" in opcode
            narrow[depth] += not wide and ".64" not in opcode
            tile[depth] += 32 * 16 if wide and opcode.startswith("LDG") else 0
        elif opcode.startswith(("global_", "buffer_load", "buffer_store")):
            wide = "x4" in opcode
            narrow[depth] += not wide and "x2" not in opcode
            tile[depth] += 64 * 16 if wide and "load" in opcode else 0
    return Code(
        tuple(counts),
        tuple(barriers),
        tuple(products),
        tuple(operations),
        tuple(narrow),
        tuple(tile),
        occupied,
    )


@lru_cache(maxsize=1024)
def code_of(launch: RecordedLaunch, target: str) -> Code:
    """Compiles a launch and reads its machine code."""
    compiled = binary(launch, target)
    registers, _, _ = resources_of(compiled, target)
    occupied = occupancy(target, launch.warps, registers, compiled.metadata.shared)
    if "amdgcn" in compiled.asm:
        return read_code(compiled.asm["amdgcn"], True, occupied)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    issued = [operations / launch.warps for operations in blackwell_products(compiled.asm["ptx"])]
    if len(issued) != len(re.findall(r"\bUTCHMMA\b", text)):
        issued = []  # the assembler has unrolled or shared some: their operations are not known
    return read_code(text, False, occupied, issued)


def trips(launch: RecordedLaunch, chunks: int) -> list[float]:
    """Programs of a launch, then the trips of its nested loops over all programs;
    `chunks` are those of the pack."""
    a, programs = launch.values, float(launch.programs)
    name = launch.kernel.__name__.strip("_").removesuffix("_kernel")
    if name == "coefficients":
        steps = float(ceil(a["N"] / a["BLOCK_N"]) * chunks)
        return [programs, steps, steps * a["TASKS"]]
    if name == "spectral_reweight_fwd":
        return [programs, programs / launch.grid[2] * len(a["chunk_ptr"])]
    if name == "dweight":
        tiles = launch.grid[1] * ceil(a["N"] / a["BLOCK_N"])
        return (
            [programs, tiles]
            if a["t_ptr"] is not None
            else [programs, tiles, tiles * ceil(a["D"] / a["BLOCK_D"])]
        )
    if name == "stream_bwd":
        return [programs, launch.grid[1] * ceil(a["N"] / a["BLOCK_N"])]
    if name == "spectral_reweight_bwd":
        steps = float(ceil(a["N"] / a["BLOCK_N"]) * chunks)
        if a["t_ptr"] is not None:
            return [programs, steps, steps * a["TASKS"]]
        return [programs, steps, steps * a["TASKS"], steps * a["TASKS"] * ceil(a["D"] / a["BLOCK_D"])]
    if name == "sum_partials":
        return [programs, programs * ceil(a["SPLITS"] / a["BLOCK_S"])]
    if name == "fold":
        tiles = launch.grid[0] * launch.grid[1]
        shares = launch.grid[2] - a["COUNT"]
        return [
            programs,
            tiles * chunks * a["COUNT"] / a["R"] + launch.grid[0] * shares * a["SHARE"] / a["BLOCK_K"],
        ]
    if name == "fold_bwd":
        columns = ceil(a["D"] / a["BLOCK_D"])
        return [programs, programs * columns, programs * columns * ceil(a["C"] / a["BLOCK_C"])]
    if name == "spectral_sum_fwd":
        return [programs, launch.grid[0] * launch.grid[1] * ceil(a["J"] / a["BLOCK_K"])]
    if name == "spectral_sum_bwd":
        tiles = launch.grid[1] * launch.grid[2] * ceil(a["N"] / a["BLOCK_N"])
        return [programs, tiles, tiles * ceil(a["D"] / a["BLOCK_D"])]
    if name == "merge_moments":
        return [programs, programs * a["COUNT"]]
    if name == "fit_forward":
        return [programs, launch.grid[0] * launch.grid[1] * ceil(a["P"] / a["BLOCK_K"])]
    if name == "fit_output":
        return [programs, programs * ceil(a["splits"] / a["BLOCK_S"])]
    if name == "fit_logits":
        return [programs, programs * ceil(a["D"] / a["BLOCK_D"])]
    if name == "fit_loss":
        return [programs, programs * ceil(a["K"] / a["BLOCK_K"])]  # of both loops over the classes
    if name == "fit_update":
        tiles = programs * ceil(a["batch"] / a["BLOCK_N"])
        return [programs, tiles, tiles * ceil(a["D"] / a["BLOCK_D"])]
    if name == "scaled":
        return [programs, programs * ceil(a["rows_per_split"] / a["BLOCK_N"])]
    if name == "affine":
        return [programs, programs * a["SHARES"]]
    if name == "unit_moments":
        return [programs, programs * ceil(a["rows_per_split"] / a["BLOCK_N"])]
    return [programs]
