"""Ahead-of-time compilation of every kernel a launcher would launch, for devices that need not be here.

The launchers run on meta tensors of real shapes while their launches are recorded, so that what is compiled
is what they choose: tiles, warps, flags and all. Import it only in a process without TRITON_INTERPRET.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from residual_kernels.ops.triton import backend as triton_backend
from residual_kernels.ops.triton import fit_step, unit_moments

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes a program may ask for.
SHARED_LIMIT = {
    "sm_80": 166912,
    "sm_90": 232448,
    "sm_100": 232448,
    "gfx942": 65536,
}
_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
MATRIX_INSTRUCTIONS = ("wgmma", "tcgen05.mma", "mma.sync", "v_mfma")


@dataclass(frozen=True)
class RecordedLaunch:
    """One recorded launch: everything that decides what is compiled."""

    kernel: JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    aligned: tuple[int, ...]  # arguments divisible by 16
    warps: int
    stages: int
    values: dict = field(compare=False, repr=False)  # arguments of this launch
    grid: tuple = field(compare=False, default=(1,))

    @property
    def programs(self) -> int:
        return prod(self.grid)

    def constant(self, name: str) -> object:
        return dict(self.constants).get(name)

    def type_of(self, name: str) -> str:
        return dict(self.signature)[name]

    @property
    def label(self) -> str:
        name = self.kernel.__name__.strip("_").removesuffix("_kernel")
        flags = [key.lower() for key, value in self.constants if value is True]
        sizes = [
            f"{key.removeprefix('BLOCK_').lower()}{value}"
            for key, value in self.constants
            if key.startswith("BLOCK_") or key == "C"
        ]
        return " ".join([name, *sizes, *flags])

    @property
    def kind(self) -> str:
        """bf16, fp16, tf32, fp32: what the matrix products of this launch compute in."""
        if self.constant("PRECISION") == "bf16":
            return "bf16"
        for name in ("proj_ptr", "z_ptr", "basis_ptr", "vectors_ptr"):
            if name in dict(self.signature):
                item = self.type_of(name).removeprefix("*")
                return "tf32" if item == "fp32" and self.constant("PRECISION") == "tf32" else item
        return "none"


@dataclass
class Resources:
    """What a compiled kernel takes from the chip: spills in bytes a thread,
    occupancy as a share of all warps."""

    kernel: str
    kind: str
    target: str
    warps: int
    stages: int
    registers: int
    spills: int
    shared: int
    instructions: list[str]
    wide_loads: int
    occupancy: float

    def as_dict(self) -> dict:
        return asdict(self)


@contextmanager
def recorded(target: str) -> Iterator[list[RecordedLaunch]]:
    """Launches made inside are recorded, not run, as if on `target`."""
    launches: list[RecordedLaunch] = []
    run, hip, capability = JITFunction.run, torch.version.hip, unit_moments.capability

    def record(self, *args, grid, warmup, **kwargs):
        launches.append(_launch(self, args, kwargs, grid))

    JITFunction.run = record
    torch.version.hip = "compile only" if TARGETS[target].backend == "hip" else None
    arch = TARGETS[target].arch
    unit_moments.capability = lambda device: arch // 10 if isinstance(arch, int) else None
    try:
        yield launches
    finally:
        JITFunction.run, torch.version.hip, unit_moments.capability = run, hip, capability


def _launch(kernel: JITFunction, args: tuple, kwargs: dict, grid: tuple) -> RecordedLaunch:
    options = {"num_warps": kwargs.pop("num_warps"), "num_stages": kwargs.pop("num_stages")}
    kwargs = {key: value for key, value in kwargs.items() if key in kernel.arg_names}
    values = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
    signature, constants, aligned = {}, {}, []
    for position, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and special):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
            aligned.append(position)
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and special:
                aligned.append(position)
    return RecordedLaunch(
        kernel,
        tuple(signature.items()),
        tuple(constants.items()),
        tuple(aligned),
        options["num_warps"],
        options["num_stages"],
        values,
        tuple(grid),
    )


def binary(launch: RecordedLaunch, target: str) -> Any:
    """The launch compiled for `target`."""
    attributes = {(position,): [["tt.divisibility", 16]] for position in launch.aligned}
    source = ASTSource(launch.kernel, dict(launch.signature), dict(launch.constants), attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    return triton.compile(source, target=TARGETS[target], options=options)


def resources_of(compiled: Any, target: str) -> tuple[int, int, str]:
    """Registers a thread, bytes of spills a thread,
    and the text in which matrix instructions are looked for."""
    return (_read_amd if TARGETS[target].backend == "hip" else _read_nvidia)(compiled)


def compile_launch(launch: RecordedLaunch, target: str) -> Resources:
    """Compiles for `target` and reads the resources back."""
    compiled = binary(launch, target)
    registers, spills, text = resources_of(compiled, target)
    shared = compiled.metadata.shared
    kinds = [name for name in MATRIX_INSTRUCTIONS if name in text]
    if not kinds and launch.kind != "none":
        kinds = ["fma"]
    wide = len(re.findall(r"ld\.global\S*\.v4|cp\.async\.cg|global_load_dwordx4|buffer_load_dwordx4", text))
    return Resources(
        launch.label,
        launch.kind,
        target,
        launch.warps,
        launch.stages,
        registers,
        spills,
        shared,
        kinds,
        wide,
        occupancy(target, launch.warps, registers, shared),
    )


def _number(pattern: str, text: str) -> int:
    """The number that `pattern` finds in a tool's text; another form of the text is an error, not a zero."""
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern} in {text[:200]!r}")
    return int(found[1])


def _read_nvidia(compiled) -> tuple[int, int, str]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
        file.write(compiled.asm["cubin"])
    try:
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    finally:
        os.unlink(file.name)
    registers = _number(r"REG:(\d+)", usage.stdout)
    # A kernel without arrays keeps nothing there but spills.
    stack = _number(r"STACK:(\d+)", usage.stdout)
    return registers, stack, compiled.asm["ptx"]


def _read_amd(compiled) -> tuple[int, int, str]:
    text = compiled.asm["amdgcn"]
    registers = _number(r"\.vgpr_count:\s+(\d+)", text)
    spills = _number(r"\.vgpr_spill_count:\s+(\d+)", text)
    return registers, 4 * spills, text


def occupancy(target: str, warps: int, registers: int, shared: int) -> float:
    """Resident warps over the most a multiprocessor holds: counted from registers and shared memory,
    not measured."""
    if target == "gfx942":
        waves = min(8, 512 // max(-(-registers // 8) * 8, 8)) * 4
        programs = min(waves // warps, 65536 // shared if shared else 32)
        return programs * warps / 32
    per_warp = -(-registers // 8) * 8 * 32
    programs = min(65536 // (per_warp * warps), 64 // warps, 32)
    if shared:
        programs = min(programs, (SHARED_LIMIT[target] + 1024) // (shared + 1024))
    return programs * warps / 64


# --- cases --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KernelCase:
    """A call whose launches are compiled."""

    operator: str  # forward, backward, unit_moments
    route: str
    width: int
    size: int  # K of every unit
    rows: int
    dtype: torch.dtype
    tf32: bool = False
    constants: bool = True  # scale and mean
    tasks: int = 1
    indexed: bool = False
    wanted: tuple[bool, bool, bool, bool] = (True, False, False, False)
    dim: int = 768
    units: int = 16


def launches_of(case: KernelCase, target: str) -> list[RecordedLaunch]:
    """The launches of a call, each kind once."""
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if case.tf32 else "highest")
    try:
        with recorded(target) as launches:
            _call(case)
    finally:
        torch.set_float32_matmul_precision(previous)
    return list(dict.fromkeys(launches))


def _call(case: KernelCase) -> None:
    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*size, dtype=dtype, device="meta")

    z = empty(case.rows, case.units, case.width, dtype=case.dtype)
    scale = empty(case.rows) if case.constants else None
    mean = empty(case.rows) if case.constants else None
    if case.operator == "spectral_sum":
        _sum(case, empty)
        return
    if case.operator == "fit_step":
        fit_step_of(case.rows, case.units * case.size, case.dim, case.width, case.tasks)()
        return
    if case.operator == "unit_moments":
        triton_backend.unit_moments(z, scale, mean, empty(case.units, case.width + 2, dtype=torch.float64))
        return
    total = case.units * case.size
    offsets = torch.arange(case.units + 1) * case.size
    proj, basis = empty(total, case.width, dtype=case.dtype), empty(total, case.dim, dtype=case.dtype)
    tensors, sizes = triton_backend.pack(proj, empty(total), empty(total), empty(total), basis, offsets)
    weight = empty(case.tasks, total)
    index = empty(case.rows, dtype=torch.int64) if case.indexed else None
    if case.operator == "forward":
        triton_backend.spectral_reweight_forward(z, scale, mean, weight, index, tensors, sizes, case.route)
        return
    dy = empty(*(() if case.indexed else (case.tasks,)), case.rows, case.dim, dtype=case.dtype)
    wanted = [want and (position < 2 or case.constants) for position, want in enumerate(case.wanted)]
    triton_backend.spectral_reweight_backward(
        dy, z, scale, mean, weight, index, tensors, sizes, wanted, case.route
    )


def _sum(case: KernelCase, empty: Callable[..., Tensor]) -> None:
    """Both passes of spectral_sum: a step of a fit on cached coefficients."""
    total = case.units * case.size
    offsets = torch.arange(case.units + 1) * case.size
    vector, basis = empty(total), empty(total, case.dim)
    tensors, sizes = triton_backend.pack(empty(total, case.width), vector, vector, vector, basis, offsets)
    c, weight = empty(case.rows, total), empty(case.tasks, total)
    y = triton_backend.spectral_sum_forward(c, weight, tensors, sizes)
    triton_backend.spectral_sum_backward(y, c, weight, tensors, sizes)


def fit_step_of(rows: int, components: int, dim: int, classes: int, tasks: int = 1) -> fit_step.FitStep:
    """A step of a fit on meta tensors: an epoch of one batch; with several tasks, classes weigh."""

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*size, dtype=dtype, device="meta")

    def numbers(*size: int) -> Tensor:
        return empty(*size, dtype=torch.int64)

    padded = -(-components // 8) * 8
    operands = fit_step.StepOperands(
        c=empty(rows, padded),
        basis=empty(padded, -(-dim // 8) * 8),
        rest=empty(rows, dim) if tasks > 1 else None,
        shift=1.0,
        vectors=empty(1, dim, -(-classes // 8) * 8),
        scale=empty(1),
        classes=numbers(1),
        labels=numbers(1, rows),
        class_weight=empty(1, classes) if tasks > 1 else None,
        weight=empty(tasks, components),
        z=empty(tasks, components),
        square=empty(tasks, components),
        head=numbers(tasks),
        which=numbers(tasks),
        order_of=numbers(tasks),
        order=numbers(1, rows),
        rates=empty(1, tasks, fit_step.RATES),
        losses=empty(tasks, rows),
        place=numbers(3),
    )
    return fit_step.FitStep(operands, rows, 0.999, 1e-8, 0.0)


# Routes for units of one tile, and those among them whose rows may choose their weights: from the backend's
# tables.
NARROW_ROUTES = tuple(route.name for route in triton_backend.FORWARD if route.name != "matmul")
ROW_ROUTES = tuple(name for name in NARROW_ROUTES if name != "folded")

WIDTHS = (64, 72, 80, 88, 96, 104, 112)
SPLITS = (64, 80, 96, 112)  # one width for each way a width is split: 64, 64 + 16, 64 + 32, 128
SIZES = (14, 30, 64)  # K that packs into chunks of 16, 32 and 64 components
KINDS = ((torch.bfloat16, False), (torch.float16, False), (torch.float32, True), (torch.float32, False))
ROWS = (7, 64, 512)  # one for each tile the launcher knows
WANTED = ((True, False, False, False), (True, True, True, True), (False, True, False, False))


def cases(widths: tuple[int, ...], kinds: tuple, constants: tuple[bool, ...]) -> list[KernelCase]:
    """Every tile and flag the launchers can choose for these widths and kinds."""
    found = []
    for width, size, (dtype, tf32), rows, given in product(widths, SIZES, kinds, ROWS, constants):
        for route in ROW_ROUTES:
            found.append(KernelCase("forward", route, width, size, rows, dtype, tf32, given))
            found.append(
                KernelCase("forward", route, width, size, rows, dtype, tf32, given, tasks=3, indexed=True)
            )
            for wanted in WANTED:
                found.append(
                    KernelCase("backward", route, width, size, rows, dtype, tf32, given, wanted=wanted)
                )
        if dtype == torch.float32 and given and size == SIZES[0] and width == widths[0]:
            found.append(KernelCase("spectral_sum", "", width, size, rows, dtype, tf32))
            tasks = 1 if rows < ROWS[-1] else 3
            found.append(KernelCase("fit_step", "", width, size, rows, dtype, tf32, tasks=tasks))
        if rows == ROWS[-1]:
            found.append(KernelCase("forward", "folded", width, size, rows, dtype, tf32, given))
            found.append(KernelCase("backward", "folded", width, size, rows, dtype, tf32, given))
            found.append(KernelCase("unit_moments", "", width, size, rows, dtype, tf32, given))
    return found


def all_cases() -> list[KernelCase]:
    """Everything, for a pairwise choice."""
    return cases(WIDTHS, KINDS, (True, False))


def distinct_cases() -> list[KernelCase]:
    """The configurations that can differ in resources: bf16 stands for fp16,
    each split of a width for its widths."""
    return cases(SPLITS, KINDS[:1] + KINDS[2:], (True,))


def edge_cases() -> list[KernelCase]:
    """Sizes of one, which Triton makes constants of, several tasks in one tile,
    and units wider than a tile."""
    half, single = torch.bfloat16, torch.float32
    one: dict[str, Any] = {"rows": 1, "units": 1, "dim": 1, "width": 1, "size": 1}
    found = []
    for dtype, route in product((half, single), NARROW_ROUTES):
        found.append(KernelCase("forward", route, dtype=dtype, **one))
        found.append(KernelCase("backward", route, dtype=dtype, wanted=WANTED[1], **one))
        found.append(KernelCase("forward", route, 64, 30, 7, dtype, tasks=3))
        found.append(KernelCase("forward", route, 64, 30, 100, dtype, tasks=3))
        found.append(KernelCase("backward", route, 64, 30, 7, dtype, tasks=3, wanted=WANTED[1]))
    for operator in ("forward", "backward"):
        found.append(KernelCase(operator, "folded", 1024, 768, 64, half, wanted=WANTED[1], units=1))
    return [
        *found,
        KernelCase("forward", "folded", 64, 14, 64, half, units=700),  # F in several groups of units
        KernelCase("unit_moments", "", 16, 1, 1, half, units=1),
        KernelCase("unit_moments", "", 128, 1, 70, half),
    ]


def pairwise(cases: list[KernelCase]) -> list[KernelCase]:
    """Few cases in which every pair of values of two fields occurs that occurs in `cases` at all (greedy)."""
    names = [
        field
        for field in KernelCase.__dataclass_fields__
        if field not in ("dim", "units", "operator", "route")
    ]

    def pairs(case: KernelCase) -> set:
        values = [("call", (case.operator, case.route))] + [(name, getattr(case, name)) for name in names]
        return {(a, b) for at, a in enumerate(values) for b in values[at + 1 :]}

    covers = [pairs(case) for case in cases]
    left = set().union(*covers)
    chosen = []
    while left:
        best = max(range(len(cases)), key=lambda at: len(covers[at] & left))
        chosen.append(cases[best])
        left -= covers[best]
    return chosen
