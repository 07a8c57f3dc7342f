"""How fast the operators are on this machine's CPU, beside every way of writing them in PyTorch.

    python -m benchmarks.bench_ops                    # the table on record: interleaved rounds, medians
    pytest benchmarks/bench_ops.py --benchmark-only   # one provider at a time, by pytest-benchmark

Within a group (operator, shape, components, rows, dtype, mode) the providers take turns, round after round,
with this machine's own fp32 matrix product and its roofs between them: compare rows of one group only. The
roof of arithmetic is the multiply-adds that all threads reach in registers (bfloat16: the processor's own dot
products, where it has them). FLOP are those of the formula, and what a provider recomputes or wastes is not
counted in its favour: forward 2 N J (C + D), backward for weight 2 N J D.
"""

import argparse
import ctypes
import functools
import gc
import importlib
import json
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from benchmarks.cpu_clock import copy_bandwidth, cpu_name, interleaved, machine_name
from residual_kernels import ops
from residual_kernels.experiments.shapes import SHAPES, Operands, Shape, problem
from residual_kernels.ops import backends, reference, torch_backend

GEMM_SIZE = 2048
Forward = Callable[[Tensor, Tensor], Tensor]  # (z or units, weight) -> y

# --- providers: spectral_reweight ---------------------------------------------------------------------------


def padded(p: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """proj [R, K, C] and basis [R, K, D] with K the largest K_u, zeros behind,
    and the slots [J] of real components."""
    (proj, slots, *_), (units, longest) = torch_backend.pack(
        p.proj, p.bias, p.slope, p.offset, p.basis, p.unit_offsets
    )
    basis = p.basis.new_zeros(units * longest, p.basis.shape[1]).index_copy_(0, slots, p.basis)
    return proj, basis.view(units, longest, -1), slots


def textbook(p: Operands) -> Forward:
    """From z: every head to its D outputs, centred, onto its components, reweighted, back."""
    proj, basis, slots = padded(p)
    units, longest, _ = proj.shape
    # Any map to D outputs whose components are proj will do: A = proj^T basis, since the basis is near
    # orthonormal.
    to_outputs = torch.matmul(proj.transpose(1, 2), basis)  # [R, C, D]
    mean = basis.new_zeros(units, 1, basis.shape[2])

    def forward(z: Tensor, weight: Tensor) -> Tensor:
        x = torch.bmm((p.scale.to(z.dtype)[:, None, None] * z).transpose(0, 1), to_outputs)  # [R, N, D]
        c = torch.bmm(x - mean, basis.transpose(1, 2))  # [R, N, K]
        all_weights = weight.new_zeros(units * longest).index_copy(0, slots, weight).view(units, 1, longest)
        return torch.bmm(c * all_weights.to(c.dtype), basis).sum(0)

    return forward


def encodings(p: Operands) -> Forward:
    """On units [R, N, D] that somebody else has made: centred, onto components, reweighted, back."""
    _, basis, slots = padded(p)
    units, longest, dim = basis.shape
    mean = basis.new_zeros(units, 1, dim)

    def forward(x: Tensor, weight: Tensor) -> Tensor:
        c = torch.bmm(x - mean, basis.transpose(1, 2))
        all_weights = weight.new_zeros(units * longest).index_copy(0, slots, weight).view(units, 1, longest)
        return torch.bmm(c * all_weights.to(c.dtype), basis).sum(0)

    return forward


def lowrank(p: Operands) -> Forward:
    """The low-rank form: one batched product reads all coefficients, one product writes all components."""
    proj, _, slots = padded(p)
    ragged = slots.numel() != proj.shape[0] * proj.shape[1]
    transposed = proj.transpose(1, 2).contiguous()

    def forward(z: Tensor, weight: Tensor) -> Tensor:
        c = torch.bmm(z.transpose(0, 1), transposed).transpose(0, 1).flatten(1)  # [N, R * K]
        c = c.index_select(1, slots) if ragged else c
        c = torch.addcmul(c + p.bias, p.mean[:, None], p.slope) * p.scale[:, None] - p.offset
        return (c * weight).to(z.dtype) @ p.basis

    return forward


def folded(p: Operands) -> Forward:
    """The constants folded first: y = (scale * z) F + affine, one large product."""
    proj, basis, slots = padded(p)
    units, longest, _ = proj.shape
    ragged = slots.numel() != units * longest
    transposed = proj.transpose(1, 2).contiguous()

    def forward(z: Tensor, weight: Tensor) -> Tensor:
        all_weights = weight.new_zeros(units * longest).index_copy(0, slots, weight) if ragged else weight
        weighted = basis * all_weights.to(basis.dtype).view(units, longest, 1)  # [R, K, D]
        fold = torch.bmm(transposed, weighted).flatten(0, 1)  # [R * C, D]
        kinds = torch.stack([p.bias, p.slope, p.offset]) * weight
        affine = kinds.to(basis.dtype) @ p.basis  # [3, D]
        y = torch.addmm(affine[0], z.flatten(1), fold)
        y = p.scale[:, None] * (y + p.mean[:, None] * affine[1]) - affine[2]
        return y.to(z.dtype)

    return forward


def of_backend(name: str) -> Callable[[Operands], Forward]:
    def provider(p: Operands) -> Forward:
        pack = ops.pack_units(p.proj, p.bias, p.slope, p.offset, p.basis, p.unit_offsets, backend=name)
        return lambda z, weight: ops.spectral_reweight_packed(z, p.scale, p.mean, weight, pack)

    return provider


def compiled(make: Callable[[Operands], Forward]) -> Callable[[Operands], Forward]:
    return lambda p: torch.compile(make(p), dynamic=True)


PLAIN = {"textbook": textbook, "encodings": encodings, "lowrank": lowrank, "folded": folded}
PROVIDERS: dict[str, Callable[[Operands], Forward]] = {
    **PLAIN,
    **{f"{name} compiled": compiled(make) for name, make in PLAIN.items()},
    **{name: of_backend(name) for name in backends.BACKENDS},
}
SMALL_SET = ("lowrank", "lowrank compiled", "folded", "folded compiled", "torch", "cpp")
OWN_FLOAT32 = "cpp in float32"
EVERYTHING = tuple(name for name in PROVIDERS if name != "triton")


def inputs_of(name: str, p: Operands, copies: int) -> list[Tensor]:
    """`copies` different first arguments of a provider, so that the cache does not hold the next one."""
    if name.startswith("encodings"):
        generator = torch.Generator().manual_seed(1)
        shape = (p.z.shape[1], p.z.shape[0], p.basis.shape[1])
        return [torch.randn(shape, generator=generator).to(p.z.dtype)]
    return [p.z, *(p.z.roll(i + 1, 0) for i in range(copies - 1))]


# --- measuring ----------------------------------------------------------------------------------------------


def cpp_backend() -> ModuleType:
    """The compiled backend with what it alone has: its peak and its instruction set."""
    return importlib.import_module("residual_kernels.ops.cpp_backend")


def flop(shape: Shape, components: int, rows: int, mode: str) -> float:
    forward = 2.0 * rows * components * (shape.coordinates + shape.dim)
    return forward if mode == "fwd" else forward + 2.0 * rows * components * shape.dim


def runner(name: str, forward: Forward, p: Operands, mode: str) -> Callable[[], Tensor]:
    inputs = inputs_of(name, p, copies=3)
    weight = p.weight.clone().requires_grad_(mode == "step")
    turn = iter(range(10**9))

    def run() -> Tensor:
        x = inputs[next(turn) % len(inputs)]
        if mode == "fwd":
            with torch.no_grad():
                return forward(x, weight)
        (gradient,) = torch.autograd.grad(forward(x, weight), weight, p.dy)
        return gradient

    return run


def measured(
    runs: Mapping[str, Callable[[], object]], dtype: torch.dtype, rounds: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of every run in every round, and the roofs of the same rounds."""
    threads = torch.get_num_threads()
    peaks: list[float] = []
    copy = copy_bandwidth()
    others = {
        "sgemm": gemm_runner(),
        "copy": copy,
        "peak": lambda: peaks.append(cpp_backend().peak(threads, dtype)),
    }
    times = interleaved({**runs, **others}, rounds)
    roof = {
        "peak_gflops": statistics.median(peaks) / 1e9,
        "sgemm_gflops": 2.0 * GEMM_SIZE**3 / statistics.median(times.pop("sgemm")) / 1e9,
        "copy_gb_s": copy() / statistics.median(times.pop("copy")) / 1e9,
    }
    times.pop("peak")
    return times, roof


def gemm_runner() -> Callable[[], Tensor]:
    a, b = torch.randn(GEMM_SIZE, GEMM_SIZE), torch.randn(GEMM_SIZE, GEMM_SIZE)
    return lambda: a @ b


def extra_memory(run: Callable[[], object]) -> int | None:
    """Bytes by which the process grew at most while it ran; None where the kernel does not tell."""

    def status(field: str) -> int:
        found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if found is None:
            raise OSError(f"/proc/self/status tells no {field}")
        return int(found[1]) * 1024

    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        before = status("VmRSS")
        kept = run()
        high = status("VmHWM")
        del kept
    except (OSError, AttributeError):
        return None
    return max(0, high - before)


def bench_reweight(
    shape: Shape,
    kind: str,
    rows: int,
    dtype: torch.dtype,
    providers: tuple[str, ...],
    rounds: int,
    modes: tuple[str, ...],
) -> list[dict]:
    """One group per mode."""
    components = shape.components(kind)
    p = problem(shape, rows, components, dtype)
    table = []
    for mode in modes:
        runs = {}
        for name in providers:
            runs[name] = runner(name, PROVIDERS[name](p), p, mode)
            runs[name]()  # warm: compiles, packs, touches memory
        if dtype == torch.bfloat16:  # the same work in float32, in the same rounds
            wider = problem(shape, rows, components)
            runs[OWN_FLOAT32] = runner("cpp", PROVIDERS["cpp"](wider), wider, mode)
            runs[OWN_FLOAT32]()
        memory = {name: extra_memory(run) for name, run in runs.items()}
        times, roof = measured(runs, dtype, rounds)
        for name, values in times.items():
            rate = flop(shape, sum(components), rows, mode) / statistics.median(values)
            table.append(
                {
                    "operator": "spectral_reweight",
                    "shape": shape.name,
                    "components": kind,
                    "J": sum(components),
                    "N": rows,
                    "dtype": str(dtype).removeprefix("torch."),
                    "mode": mode,
                    "provider": name,
                    "median_s": statistics.median(values),
                    "best_s": min(values),
                    "rounds": rounds,
                    "gflops": rate / 1e9,
                    **roof,
                    "share_of_peak": rate / 1e9 / roof["peak_gflops"],
                    "extra_bytes": memory[name],
                }
            )
        del runs
    return table


def einsum_moments(z: Tensor, scale: Tensor, mean: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """What one writes first: l, centred, and torch.einsum in fp32."""
    centred = reference.unit_coordinates(z, scale, mean) - shift
    return centred.sum(0), torch.einsum("nri,nrj->rij", centred, centred)


def bench_moments(shape: Shape, rows: int, rounds: int) -> list[dict]:
    p = problem(shape, rows, [1] * shape.units)
    shift = reference.unit_coordinates(p.z[:8], p.scale[:8], p.mean[:8]).mean(0)
    compiled = torch.compile(einsum_moments)
    runs: dict[str, Callable[[], object]] = {
        "einsum": lambda: einsum_moments(p.z, p.scale, p.mean, shift),
        "einsum compiled": lambda: compiled(p.z, p.scale, p.mean, shift),
        **{
            name: functools.partial(ops.unit_moments, p.z, p.scale, p.mean, shift, backend=name)
            for name in ("torch", "cpp")
        },
    }
    for run in runs.values():
        run()
    memory = {name: extra_memory(run) for name, run in runs.items()}
    times, roof = measured(runs, torch.float32, rounds)
    size = shape.coordinates + 2
    table = []
    for name, values in times.items():
        rate = rows * shape.units * size * (size + 1) / statistics.median(values)  # the symmetric half
        table.append(
            {
                "operator": "unit_moments",
                "shape": shape.name,
                "components": "-",
                "J": 0,
                "N": rows,
                "dtype": "float32",
                "mode": "fwd",
                "provider": name,
                "median_s": statistics.median(values),
                "best_s": min(values),
                "rounds": rounds,
                "gflops": rate / 1e9,
                **roof,
                "share_of_peak": rate / 1e9 / roof["peak_gflops"],
                "share_of_copy": p.z.numel() * 4 / statistics.median(values) / 1e9 / roof["copy_gb_s"],
                "extra_bytes": memory[name],
            }
        )
    return table


# --- the table ----------------------------------------------------------------------------------------------


def markdown(record: dict) -> str:
    machine = record["machine"]
    lines = [
        "# Operators on the CPU",
        "",
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, instruction set "
        f"{machine['instruction_set']}. Command: `{machine['command']}`.",
        "",
        "Medians of interleaved rounds. `time / cpp`: how many times the compiled backend's time. `of "
        "peak`: the formula's FLOP per second over the multiply-adds the same threads reach in registers, "
        "in the same rounds. `extra`: growth of the process.",
    ]
    groups: dict[tuple, list[dict]] = {}
    for row in record["rows"]:
        # What was measured together stands beside one and the same roof.
        key = (
            row["operator"],
            row["shape"],
            row["components"],
            row["N"],
            row["dtype"],
            row["mode"],
            row["peak_gflops"],
        )
        groups.setdefault(key, []).append(row)
    for (operator, shape, components, rows, dtype, mode, peak), members in groups.items():
        about = f"{operator}, {shape}, " + ("" if operator == "unit_moments" else f"K {components}, ")
        first = members[0]
        lines += [
            "",
            f"## {about}N = {rows}, {dtype}, {mode}",
            "",
            f"Peak {peak:.0f} GFLOP/s, sgemm {first['sgemm_gflops']:.0f} GFLOP/s, copy "
            f"{first['copy_gb_s']:.0f} GB/s.",
            "",
            "| provider | ms | time / cpp | GFLOP/s | of peak | extra MB |",
            "|---|---|---|---|---|---|",
        ]
        own = next((m["median_s"] for m in members if m["provider"] == "cpp"), None)
        for m in sorted(members, key=lambda m: m["median_s"]):
            ratio = "-" if own is None else f"{m['median_s'] / own:.2f}"
            extra = "-" if m["extra_bytes"] is None else f"{m['extra_bytes'] / 2**20:.1f}"
            lines.append(
                f"| {m['provider']} | {m['median_s'] * 1e3:.1f} | {ratio} | {m['gflops']:.1f} "
                f"| {100 * m['share_of_peak']:.0f} % | {extra} |"
            )
    return "\n".join(lines) + "\n"


def main_plan(rounds: int) -> list[tuple[str, Callable[[], list[dict]]]]:
    """The groups on record, the most telling first."""
    fp32, bf16 = torch.float32, torch.bfloat16
    b16, l14, h14 = SHAPES["B/16"], SHAPES["L/14"], SHAPES["H/14"]
    step = ("step",)
    bf16_providers = ("lowrank", "lowrank compiled", "folded", "folded compiled", "cpp")
    few_rows = ("lowrank", "lowrank compiled", "cpp")  # folding pays with many rows only
    plan: list[tuple[str, Callable[[], list[dict]]]] = []

    def add(shape, kind, rows, dtype=fp32, providers=SMALL_SET, times=rounds, modes=("step", "fwd")):
        title = f"{shape.name} K {kind} N {rows} {dtype} {'+'.join(modes)}"
        plan.append((title, lambda: bench_reweight(shape, kind, rows, dtype, providers, times, modes)))

    def add_bf16(shape, kind, rows):
        folding = rows == 1024 or (rows == 256 and shape is b16)
        add(shape, kind, rows, bf16, bf16_providers if folding else few_rows, modes=step)

    add(l14, "full", 256)
    for rows in (64, 256):
        add_bf16(b16, "full", rows)
    add(b16, "full", 256, times=rounds + 2)
    plan.append(("moments B/16 N 1024", lambda: bench_moments(b16, 1024, rounds + 4)))
    add(b16, "full", 64, times=rounds + 2, modes=step)
    add_bf16(l14, "full", 64)
    add_bf16(l14, "full", 256)
    add(b16, "ragged", 256, times=rounds + 4)
    add(b16, "full", 1024, times=rounds + 2, modes=step)
    add_bf16(b16, "full", 1024)
    add_bf16(b16, "ragged", 64)
    add_bf16(h14, "full", 256)
    add(l14, "full", 64, modes=step)
    add(b16, "ragged", 64, times=rounds + 4, modes=step)
    add(b16, "ragged", 1024, times=rounds + 4, modes=step)
    add(l14, "full", 1024, times=max(3, rounds - 2), modes=step)
    for rows in (256, 1024):
        add_bf16(b16, "ragged", rows)
    add_bf16(h14, "full", 64)
    add_bf16(l14, "full", 1024)
    add(h14, "full", 256, times=max(3, rounds - 2), modes=step)
    plan.append(("moments L/14 N 1024", lambda: bench_moments(l14, 1024, rounds)))
    add_bf16(h14, "full", 1024)
    for shape in (l14, h14):
        for rows in (64, 256, 1024):
            add_bf16(shape, "ragged", rows)
    add(b16, "full", 256, providers=EVERYTHING, times=3, modes=step)
    add(h14, "full", 64, modes=step)
    add(
        l14, "full", 256, providers=("textbook", "encodings", "lowrank", "folded", "cpp"), times=3, modes=step
    )
    add(h14, "full", 1024, times=3, modes=step)

    return plan


def measure(plan: list[tuple[str, Callable[[], list[dict]]]], budget: float) -> list[dict]:
    """The groups of a plan; what does not fit into `budget` seconds is left out by name."""
    start, table = time.perf_counter(), []
    for title, run in plan:
        spent = time.perf_counter() - start
        if spent > budget:
            print(f"left out, the time is up: {title}", file=sys.stderr)
            continue
        print(f"[{spent:5.0f} s] {title}", file=sys.stderr, flush=True)
        table += run()
        torch._dynamo.reset()
        gc.collect()
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, help="folder for ops.json and ops.md; default: results/<processor and set>"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--budget", type=float, default=540.0, help="seconds after which no further group is started"
    )
    arguments = parser.parse_args()
    record = {
        "machine": {
            "cpu": cpu_name(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "instruction_set": cpp_backend().instruction_set()[0],
            "command": " ".join(["python -m benchmarks.bench_ops", *sys.argv[1:]]),
        },
        "rows": measure(main_plan(arguments.rounds), arguments.budget),
    }
    out = arguments.out or Path(__file__).parent / "results" / machine_name()
    out.mkdir(parents=True, exist_ok=True)
    (out / "ops.json").write_text(json.dumps(record, indent=1) + "\n")
    text = markdown(record)
    (out / "ops.md").write_text(text)
    print(text)


# --- the same providers under pytest-benchmark --------------------------------------------------------------


@pytest.mark.parametrize("rows", [64, 256])
@pytest.mark.parametrize("mode", ["fwd", "step"])
@pytest.mark.parametrize("provider", EVERYTHING)
def test_spectral_reweight(benchmark, provider: str, mode: str, rows: int) -> None:
    if "cpp" in provider and (reason := backends.missing("cpp", torch.device("cpu"))):
        pytest.skip(reason)
    shape = SHAPES["B/16"]
    p = problem(shape, rows, shape.full())
    benchmark.group = f"spectral_reweight {shape.name} K full N {rows}"
    benchmark(runner(provider, PROVIDERS[provider](p), p, mode))


@pytest.mark.parametrize("provider", ["torch", "cpp"])
def test_unit_moments(benchmark, provider: str) -> None:
    if reason := backends.missing(provider, torch.device("cpu")):
        pytest.skip(reason)
    shape = SHAPES["B/16"]
    p = problem(shape, 1024, [1] * shape.units)
    benchmark.group = f"unit_moments {shape.name} N 1024"
    benchmark(lambda: ops.unit_moments(p.z, p.scale, p.mean, backend=provider))


if __name__ == "__main__":
    main()
