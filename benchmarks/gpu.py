"""The kernels on a GPU: tests, the machine's roofs, and the benchmark table,
in parts of under 8 minutes each.

    TRITON_INTERPRET=0 python -m benchmarks.gpu --results DIR --part tests|host|core|wide|fit|peers
    TRITON_INTERPRET=1 python -m benchmarks.gpu --results DIR --part core --tiny   on a CPU, without times

Device time is that of CUDA-graph replays: inputs (constants too) rotate through more memory than the
second-level cache holds, and the median replay counts. Providers are those of benchmarks/bench_ops.py, eager
and compiled with dynamic sizes, in bf16 unless said. A provider that does not fit into memory, or for which
time runs out, is printed as such.
"""

import argparse
import importlib
import os
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent


def _package() -> None:
    """The kernels need torch and triton alone: where other dependencies are missing,
    the library's face is left out."""
    try:
        importlib.import_module("residual_kernels")
    except ImportError:
        for name in [name for name in sys.modules if name.split(".")[0] == "residual_kernels"]:
            del sys.modules[name]
        package = types.ModuleType("residual_kernels")
        package.__path__ = [str(ROOT / "residual_kernels")]
        sys.modules["residual_kernels"] = package


_package()

from benchmarks import counts, gpu_fit, gpu_tests  # noqa: E402
from benchmarks.bench_ops import PLAIN  # noqa: E402
from benchmarks.gpu_clock import Bench, Work  # noqa: E402
from residual_kernels import ops  # noqa: E402
from residual_kernels.experiments.shapes import SHAPES, Operands, Shape, problem  # noqa: E402
from residual_kernels.ops.triton import backend as triton_backend  # noqa: E402
from residual_kernels.ops.triton import routes as triton_routes  # noqa: E402

ROTATION = 160 << 20  # bytes of inputs to rotate through
ROWS = (64, 256, 1024, 8192)
NARROW_ROUTES = tuple(route.name for route in triton_backend.FORWARD if route.name != "matmul")


# --- roofs --------------------------------------------------------------------------------------------------


def roofs(bench: Bench) -> None:
    """Copy bandwidth, matrix rates, launch floor: what this machine does at best, measured."""
    size = 1 << 12 if bench.tiny else 1 << 29
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    seconds = bench.seconds([lambda: target.copy_(source)])
    bench.roofs["copy, bytes/s"] = None if seconds is None else 2 * size / seconds
    for name, dtype, edge in (
        ("half", torch.bfloat16, 8192),
        ("tf32", torch.float32, 8192),
        ("fp32", torch.float32, 4096),
    ):
        edge = 16 if bench.tiny else edge
        left, right = (torch.randn(edge, edge, dtype=dtype, device=bench.device) for _ in range(2))
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        seconds = bench.seconds([partial(torch.matmul, left, right)])
        bench.roofs[f"{name} product, FLOP/s"] = None if seconds is None else 2.0 * edge**3 / seconds
    torch.set_float32_matmul_precision("highest")
    one = torch.zeros(1, device=bench.device)
    bench.roofs["launch floor, s"] = bench.seconds([lambda: one.add_(1)])
    for name, value in bench.roofs.items():
        print(f"roof: {name} {'not timed' if value is None else f'{value:.3g}'}", flush=True)


def roof(bench: Bench, found: list[counts.Count], kind: str) -> float | None:
    bandwidth, rate = bench.roofs["copy, bytes/s"], bench.roofs[f"{kind} product, FLOP/s"]
    if bandwidth is None or rate is None:
        return None
    return counts.cheapest(found, bandwidth, rate).roof(bandwidth, rate)


# --- spectral_reweight --------------------------------------------------------------------------------------


def input_sets(
    shape: Shape, rows: int, components: list[int], dtype: torch.dtype, device: torch.device
) -> list[Operands]:
    """Problems of one shape with different data, enough of them to leave the cache between two uses of
    one."""
    first = problem(shape, rows, components, dtype, device)
    weight = sum(x.numel() * x.element_size() for x in vars(first).values())
    more = min(max(ROTATION // max(weight, 1), 1), 7)
    if device.type == "cpu":
        more = 1
    fresh = {"z", "proj", "basis", "bias", "slope", "offset", "weight", "dy", "scale", "mean"}
    copies = [
        replace(
            first,
            **{
                name: value.roll(turn + 1, 0).contiguous()
                for name, value in vars(first).items()
                if name in fresh
            },
        )
        for turn in range(more)
    ]
    return [first, *copies]


def calls_of(
    make: Callable[[Operands], Callable], sets: list[Operands], mode: str, first: str = "z"
) -> list[Work]:
    """One call per input set: the forward pass, or forward and the gradient of weight."""
    calls: list[Work] = []
    for p in sets:
        forward = make(p)
        x = (
            p.z
            if first == "z"
            else torch.randn(p.z.shape[1], p.z.shape[0], p.basis.shape[1], device=p.z.device).to(p.z.dtype)
        )
        weight = p.weight.clone().requires_grad_(mode == "step")

        def call(forward=forward, x=x, weight=weight, p=p):
            if mode == "fwd":
                with torch.no_grad():
                    return forward(x, weight)
            return torch.autograd.grad(forward(x, weight), weight, p.dy)[0]

        calls.append(call)
    return calls


def packed(p: Operands) -> ops.PackedUnits:
    return ops.pack_units(p.proj, p.bias, p.slope, p.offset, p.basis, p.unit_offsets, backend="triton")


def ours(route: str | None = None) -> Callable[[Operands], Callable]:
    """This library's kernels, with the planned route or one of our choosing (forward only)."""

    def make(p: Operands) -> Callable:
        pack = packed(p)
        if route is None:
            return lambda z, weight: ops.spectral_reweight_packed(z, p.scale, p.mean, weight, pack)
        tensors, sizes = list(pack.tensors), list(pack.sizes)
        return lambda z, weight: triton_backend.spectral_reweight_forward(
            z, p.scale, p.mean, weight[None], None, tensors, sizes, route
        )

    return make


def compiled(make: Callable[[Operands], Callable]) -> Callable[[Operands], Callable]:
    return lambda p: torch.compile(make(p), dynamic=True)


def reweight(
    bench: Bench, shape: Shape, kind: str, rows: int, dtype: torch.dtype, *, everything: bool
) -> None:
    components = shape.components(kind)
    if bench.late():
        print(f"spectral_reweight {shape.name} {kind} {rows} {dtype}: time ran out", flush=True)
        return
    product = "tf32" if torch.get_float32_matmul_precision() != "highest" else "fp32"
    product = "half" if dtype.itemsize == 2 else product
    sets = input_sets(shape, rows, components, dtype, bench.device)
    print(ops.explain(packed(sets[0]), rows), flush=True)
    label = {"half": str(dtype).removeprefix("torch."), "tf32": "tf32", "fp32": "float32"}[product]
    for mode in ("fwd", "step"):
        found = counts.reweight(shape, sum(components), rows, mode, dtype.itemsize)
        fields = {
            "operator": "spectral_reweight",
            "shape": shape.name,
            "components": kind,
            "N": rows,
            "dtype": label,
            "mode": mode,
            "roof": roof(bench, found, product),
        }

        def timed(provider, make, few=sets, first="z", mode=mode, fields=fields):
            bench.row(provider, lambda: calls_of(make, few, mode, first), **fields)

        timed("triton", ours())
        if mode == "fwd" and everything:
            for route in NARROW_ROUTES:
                timed(f"triton {route}", ours(route))
        for name in ("lowrank", "folded", "textbook", "encodings") if everything else ("lowrank", "folded"):
            make, first = PLAIN[name], "x" if name == "encodings" else "z"
            few = sets[:1] if name in ("textbook", "encodings") else sets  # past the cache by themselves
            timed(name, make, few, first)
            if not bench.tiny:
                timed(f"{name} compiled", compiled(make), few, first)
        judge(bench, fields, rows, kind)


def judge(bench: Bench, fields: dict, rows: int, kind: str) -> None:
    """The aims of a pooled case."""
    if fields["dtype"] != "bfloat16":
        return
    where = f"{fields['shape']} K {kind} N {rows} {fields['mode']}"
    key = {name: fields[name] for name in ("operator", "shape", "components", "N", "dtype", "mode")}
    own = bench.find("triton", **key)
    if rows <= 256 or rows >= 1024:
        # 8 us for launches are allowed where launches are what a case is made of
        share, launches = (0.7, 8e-6) if rows <= 256 else (0.55, 0.0)
        limit = None if fields["roof"] is None else fields["roof"] / share + launches
        outcome = None if own is None or limit is None else own / limit
        bench.aim(
            f"{where}: time over (roof / {share}{' + 8 us' if launches else ''})",
            outcome,
            1.0,
            at_least=False,
        )
    names = ("lowrank", "lowrank compiled", "folded", "folded compiled")
    rivals = [seconds for name in names if (seconds := bench.find(name, **key)) is not None]
    ratio = min(rivals) / own if rivals and own else None
    bench.aim(
        f"{where}: best of lowrank and folded over ours", ratio, 1.3 if rows <= 256 else 0.95, at_least=True
    )
    textbook = bench.find("textbook compiled", **key)
    if kind == "ragged" and rows >= 1024:
        bench.aim(
            f"{where}: textbook compiled over ours",
            textbook / own if textbook and own else None,
            10.0,
            at_least=True,
        )


def memory(bench: Bench, shape: Shape, rows: int) -> None:
    """Extra memory of a step, over what goes in and comes out."""
    p = input_sets(shape, rows, shape.full(), torch.bfloat16, bench.device)[0]
    (call,) = calls_of(ours(), [p], "step")
    call()
    if bench.tiny:
        outcome = None
    else:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept: Any = call()
        extra = torch.cuda.max_memory_allocated() - before
        inout = (
            sum(x.numel() * x.element_size() for x in vars(p).values()) + kept.numel() * 4 + p.dy.numel() * 2
        )
        extra -= kept.numel() * 4 + p.dy.numel() * 2  # outputs are made inside, too
        outcome = extra / (0.1 * inout + (32 << 20))
    what = f"{shape.name} N {rows} step: extra memory over (10 % of inputs and outputs + 32 MB)"
    bench.aim(what, outcome, 1.0, at_least=False)


# --- stream, tasks, moments ---------------------------------------------------------------------------------


def stream(bench: Bench, shape: Shape, rows: int) -> None:
    """Reweighting inside a block for every token: no scale, no mean, K = C, the width of the model."""
    kept = [shape.coordinates] * shape.units
    p = problem(shape, rows, kept, torch.bfloat16, bench.device)
    pack = packed(p)
    proj, basis = (x.view(shape.units, shape.coordinates, -1) for x in (p.proj, p.basis))
    bare = torch.bmm(proj.transpose(1, 2), basis).flatten(0, 1)

    def fold(z: Tensor, weight: Tensor) -> Tensor:
        weighted = basis * weight.to(basis.dtype).view(shape.units, shape.coordinates, 1)
        row = ((p.bias - p.offset) * weight).to(basis.dtype) @ p.basis
        return torch.addmm(row, z.flatten(1), torch.bmm(proj.transpose(1, 2), weighted).flatten(0, 1))

    def kernels(z: Tensor, weight: Tensor) -> Tensor:
        return ops.spectral_reweight_packed(z, None, None, weight, pack)

    providers = {"triton": kernels, "fold": fold}
    if not bench.tiny:
        providers["fold compiled"] = torch.compile(fold, dynamic=True)
    for mode in ("fwd", "step", "step with dz"):
        fields = {
            "operator": "stream",
            "shape": shape.name,
            "components": "C",
            "N": rows,
            "dtype": "bfloat16",
            "mode": mode,
        }
        for name, forward in providers.items():
            z = p.z.clone().requires_grad_(mode == "step with dz")
            weight = p.weight.clone().requires_grad_(mode != "fwd")
            leaves = [x for x in (weight, z) if x.requires_grad]

            def call(forward=forward, z=z, weight=weight, leaves=leaves):
                y = forward(z, weight)
                return torch.autograd.grad(y, leaves, p.dy) if leaves else y

            bench.row(name, partial(list, (call,)), **fields)
        own = bench.find("triton", **fields)
        if mode == "fwd":
            product = bench.row("bare product", lambda: [lambda: p.z.flatten(1) @ bare], **fields)
            ratio = own / product if own and product else None
            bench.aim(f"{shape.name} forward over the bare product", ratio, 1.05, at_least=False)
        else:
            names = ("fold", "fold compiled")
            rivals = [seconds for name in names if (seconds := bench.find(name, **fields)) is not None]
            ratio = min(rivals) / own if rivals and own else None
            wanted = 1.1 if shape.dim <= 1024 else 1.2
            bench.aim(f"{shape.name} {mode}: fold + autograd over ours", ratio, wanted, at_least=True)


def tasks(bench: Bench, shape: Shape, rows: int, count: int) -> None:
    """Several weights on the same coefficients, and rows that choose theirs."""
    sets = input_sets(shape, rows, shape.ragged(), torch.bfloat16, bench.device)
    times = {}
    for name, number, indexed in (
        ("one", 1, False),
        (f"T = {count}", count, False),
        (f"index of {count}", count, True),
    ):

        def make(number=number, indexed=indexed):
            calls = []
            for p in sets:
                pack = packed(p)
                weight = p.weight[None].expand(number, -1).contiguous()
                index = torch.arange(rows, device=bench.device) % number if indexed else None
                calls.append(
                    lambda p=p, pack=pack, weight=weight, index=index: ops.spectral_reweight_packed(
                        p.z, p.scale, p.mean, weight, pack, index
                    )
                )
            return calls

        times[name] = bench.row(
            f"triton {name}",
            make,
            operator="tasks",
            shape=shape.name,
            components="ragged",
            N=rows,
            dtype="bfloat16",
            mode="fwd",
        )
    one, many = times["one"], times[f"T = {count}"]
    bench.aim(
        f"{shape.name} N {rows}: {count} tasks over one",
        many / one if one and many else None,
        8.0,
        at_least=False,
    )


def moments(bench: Bench, shape: Shape, rows: int) -> None:
    for label, dtype in (("bfloat16", torch.bfloat16), ("tf32", torch.float32), ("float32", torch.float32)):
        torch.set_float32_matmul_precision("high" if label == "tf32" else "highest")
        p = problem(shape, rows, [1] * shape.units, dtype, bench.device)
        shift = torch.zeros(shape.units, shape.coordinates + 2, device=bench.device, dtype=torch.float64)
        count = counts.moments(shape, rows, dtype.itemsize)
        fields = {"operator": "unit_moments", "shape": shape.name, "N": rows, "dtype": label, "mode": "fwd"}
        for backend in ("triton", "torch"):

            def call(p=p, shift=shift, backend=backend):
                return ops.unit_moments(p.z, p.scale, p.mean, shift, backend=backend)

            bench.row(backend, partial(list, (call,)), **fields)
        own, bandwidth = bench.find("triton", **fields), bench.roofs["copy, bytes/s"]
        if label != "float32" and (bench.tiny or count.bytes >= 128e6):
            share = count.bytes / own / bandwidth if own and bandwidth else None
            bench.aim(
                f"unit_moments {shape.name} {label}: share of copy bandwidth", share, 0.7, at_least=True
            )
    torch.set_float32_matmul_precision("highest")


# --- parts --------------------------------------------------------------------------------------------------

TINY = (Shape("tiny", 3, 16, 24, 8),)


def core(bench: Bench) -> None:
    """The pooled regime at B/16 and L/14."""
    roofs(bench)
    for rows in (7, 20) if bench.tiny else ROWS:
        for shape in TINY if bench.tiny else (SHAPES["L/14"], SHAPES["B/16"]):
            for kind in ("ragged", "full"):
                reweight(bench, shape, kind, rows, torch.bfloat16, everything=shape.name in ("L/14", "tiny"))
    memory(bench, TINY[0] if bench.tiny else SHAPES["L/14"], 20 if bench.tiny else 1024)


def wide(bench: Bench) -> None:
    """The large towers, float32 and tf32, the stream regime, tasks and moments."""
    roofs(bench)
    for shape in TINY if bench.tiny else counts.STREAM:
        stream(bench, shape, 40 if bench.tiny else 65536)
    moments(bench, TINY[0] if bench.tiny else SHAPES["L/14"], 40 if bench.tiny else 4096)
    tasks(bench, TINY[0] if bench.tiny else SHAPES["L/14"], 7 if bench.tiny else 64, 3 if bench.tiny else 64)
    for rows in (7,) if bench.tiny else (64, 1024):
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            shape = TINY[0] if bench.tiny else SHAPES["L/14"]
            reweight(bench, shape, "ragged", rows, torch.float32, everything=False)
        torch.set_float32_matmul_precision("highest")
    for rows in (7,) if bench.tiny else ROWS:
        for shape in TINY if bench.tiny else (SHAPES["H/14"], SHAPES["bigG/14"]):
            for kind in ("ragged", "full"):
                reweight(bench, shape, kind, rows, torch.bfloat16, everything=False)
    memory(bench, TINY[0] if bench.tiny else SHAPES["bigG/14"], 20 if bench.tiny else 1024)


def host(bench: Bench) -> None:
    """Wall time of eager calls, with what the Python in front of them takes, beside the replay of a graph."""
    shape = TINY[0] if bench.tiny else SHAPES["L/14"]
    for rows in (7,) if bench.tiny else ROWS:
        p = input_sets(shape, rows, shape.ragged(), torch.bfloat16, bench.device)[0]
        for mode in ("fwd", "step"):
            (call,) = calls_of(ours(), [p], mode)
            fields = {
                "operator": "host",
                "shape": shape.name,
                "components": "ragged",
                "N": rows,
                "dtype": "bfloat16",
                "mode": mode,
            }
            replayed = bench.row("replayed", partial(list, (call,)), **fields)
            walled = bench.wall("eager", call, **fields)
            if replayed and walled:
                print(f"eager over replayed: {walled / replayed:.2f}", flush=True)


def small(device: torch.device) -> None:
    """Every kernel once on a small ragged case: what compute-sanitizer watches."""
    shape = Shape("small", 3, 80, 200, 20)
    for dtype in (torch.bfloat16, torch.float32):
        p = problem(shape, 21, [82, 1, 30], dtype, device)
        tensors, sizes = triton_backend.pack(p.proj, p.bias, p.slope, p.offset, p.basis, p.unit_offsets)
        weight = p.weight[None]
        for route in NARROW_ROUTES:
            y = triton_backend.spectral_reweight_forward(
                p.z, p.scale, p.mean, weight, None, tensors, sizes, route
            )
            grads = triton_backend.spectral_reweight_backward(
                p.dy[None], p.z, p.scale, p.mean, weight, None, tensors, sizes, [True] * 4, route
            )
            assert all(torch.isfinite(x).all() for x in (y, *grads))
        ops.unit_moments(p.z, p.scale, p.mean, backend="triton")
    print("small cases ran")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, required=True, help="folder for JSON and Markdown")
    parts = ("tests", "host", "core", "wide", "fit", "peers", "small")
    parser.add_argument("--part", choices=parts, required=True)
    parser.add_argument(
        "--tiny", action="store_true", help="tiny shapes in the interpreter: the flow, no times"
    )
    options = parser.parse_args(arguments)
    if options.tiny != triton_backend.INTERPRETED:
        print(f"set TRITON_INTERPRET={int(options.tiny)} for this run", file=sys.stderr)
        return 2
    if not options.tiny and not torch.cuda.is_available():
        print(
            "no CUDA or ROCm device here; --tiny with TRITON_INTERPRET=1 runs the flow without one",
            file=sys.stderr,
        )
        return 2
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64
    if options.part == "small":
        small(torch.device("cpu" if options.tiny else "cuda"))
        return 0
    if options.part in ("tests", "peers"):
        return {"tests": gpu_tests.tests, "peers": gpu_tests.peers}[options.part](options.results)
    bench = Bench(options.results, options.part, options.tiny)
    {"core": core, "wide": wide, "host": host, "fit": gpu_fit.fit}[options.part](bench)
    bench.finish()
    print(
        f"routes are planned with nominal rates: {triton_routes.BANDWIDTH:.3g} bytes/s, "
        f"{triton_routes.VENDOR_RATE}"
    )
    print(f"written: {bench.folder / options.part}.json and .md")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / "build" / "inductor"))
    sys.exit(main())
