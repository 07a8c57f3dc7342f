"""How fast is it here? The operator on the heads of a real tower, by every backend that is ready on a device.

Backends take turns, round after round, with this device's own matrix product between them, so that a busy
machine slows all alike; figures are medians. FLOP are those of the formula: forward 2 N J (C + D), backward
for weight 2 N J D. What a backend computes again or saves is not counted.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from residual_kernels import ops
from residual_kernels.experiments.shapes import Operands, Shape, problem
from residual_kernels.ops import backends

MODES = ("forward", "step")  # step: forward and backward for weight, what a fit does
PRODUCT = {"cpu": 1536, "cuda": 8192}  # size of the square matrix product that rates are compared with
ROUND = 0.05  # seconds that a backend gets in a round, at least one call


@dataclass(frozen=True)
class Speed:
    """One backend in one mode: median seconds of a call, FLOP per second,
    and their share of the matrix product's."""

    backend: str
    mode: str
    seconds: float
    flops: float
    share: float


def _calls(p: Operands, backend: str) -> dict[str, Callable[[], object]]:
    pack = ops.pack_units(p.proj, p.bias, p.slope, p.offset, p.basis, p.unit_offsets, backend=backend)
    weight = p.weight.clone().requires_grad_()

    def forward():
        with torch.no_grad():
            return ops.spectral_reweight_packed(p.z, p.scale, p.mean, weight, pack)

    def step():
        y = ops.spectral_reweight_packed(p.z, p.scale, p.mean, weight, pack)
        return torch.autograd.grad(y, weight, p.dy)

    return {"forward": forward, "step": step}


def _timer(call: Callable[[], object], threads: int):
    from torch.utils.benchmark import Timer  # looks for a CUDA toolkit, and warns of one that has no GPU

    return Timer("call()", globals={"call": call}, num_threads=threads)  # waits for a device by itself


def measure(
    shape: Shape,
    rows: int,
    components: str | int = "ragged",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    rounds: int = 7,
) -> list[Speed]:
    """Speeds of every ready backend on `rows` images' heads, the fastest first in each mode.

    Args:
        shape: the heads of a tower, of :data:`residual_kernels.experiments.shapes.SHAPES` or your own.
        components: "ragged" (as an energy of 0.90 leaves them), "full" (C + 2 each), or a number for all.
        dtype, device: of the inputs.
        rounds: turns that every backend gets.

    Raises ValueError for numbers below 1.
    """
    if rows < 1 or rounds < 1:
        raise ValueError(f"rows and rounds must be at least 1; got {rows} and {rounds}")
    device = torch.device(device)
    kept = shape.components(str(components))
    p = problem(shape, rows, kept, dtype, device)
    total = sum(kept)
    work = {"forward": 2.0 * rows * total * (shape.coordinates + shape.dim)}
    work["step"] = work["forward"] + 2.0 * rows * total * shape.dim

    size = PRODUCT.get(device.type, PRODUCT["cuda"])
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    calls = {("product", ""): lambda: left @ right}
    for backend in backends.available(device, dtype):
        calls |= {(backend, mode): call for mode, call in _calls(p, backend).items()}
    threads = torch.get_num_threads()
    timers = {name: _timer(call, threads) for name, call in calls.items()}
    counts = {}
    for name, timer in timers.items():
        timer.timeit(1)  # compiles, fills caches
        counts[name] = max(1, math.ceil(ROUND / timer.timeit(1).mean))
    times: dict[tuple[str, str], list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            times[name].append(timer.timeit(counts[name]).mean)
    rate = 2.0 * size**3 / statistics.median(times.pop(("product", "")))
    found = []
    for (backend, mode), seconds in times.items():
        median = statistics.median(seconds)
        flops = work[mode] / median
        found.append(Speed(backend, mode, median, flops, flops / rate))
    return sorted(found, key=lambda speed: (MODES.index(speed.mode), speed.seconds))
