"""What the Python in front of the kernels costs:
eager calls of the Triton backend with a driver that launches nothing.

    python -m benchmarks.host_time                 printed
    python -m benchmarks.host_time --write         into benchmarks/results/host/host_time.json

Tensors have real shapes and lie on the CPU; kernels are compiled for sm_90, and their launch is a function
that returns. The vendor's products are replaced likewise. What is left is what one core does before the
device can start: the library, PyTorch's dispatch and autograd, and Triton's launch without the driver's own
call (about 3 us each on a real machine). Quoted beside `add_` on one number.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

RESULTS = Path(__file__).parent / "results" / "host"
ROUNDS, CALLS = 7, 100


class _Launcher:
    """Instead of the C function that Triton compiles for a kernel."""

    def __init__(self, source: object, metadata: object) -> None:
        self.launch_cooperative_grid = False

    def __call__(self, *arguments: object) -> None:
        pass


class _Utilities:
    def load_binary(self, name, kernel, shared, device):
        return 1, 2, 100, 0, 1024

    def get_device_properties(self, device):
        return {
            "max_shared_mem": 232448,
            "multiprocessor_count": 132,
            "max_num_regs": 65536,
            "warpSize": 32,
            "sm_clock_rate": 1,
            "mem_clock_rate": 1,
            "mem_bus_width": 1,
        }

    def unload_module(self, module):
        pass


class _Driver:
    """What Triton asks of a driver between a call and a launch."""

    launcher_cls = _Launcher
    utils = _Utilities()

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def set_current_device(self, device):
        pass

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")


def install() -> None:
    """Every launch of this process goes nowhere from now on."""
    driver.set_active(_Driver())
    from residual_kernels.ops import backends

    backends._missing_triton = lambda device, by_name: None

    def product(left, right, *, out=None, out_dtype=None):
        return left.new_empty(len(left), right.shape[1], dtype=out_dtype) if out is None else out

    setattr(torch, "mm", product)  # noqa: B010 - a plain assignment is not of the declared type


def microseconds(call: Callable[[], object]) -> float:
    """Processor time of a call, the best of several rounds."""
    for _ in range(30):
        call()
    rounds = []
    for _ in range(ROUNDS):
        before = time.process_time()
        for _ in range(CALLS):
            call()
        rounds.append((time.process_time() - before) / CALLS * 1e6)
    return min(rounds)


def measure() -> dict[str, float]:
    """Microseconds by what was called: L/14, ragged, bf16."""
    from residual_kernels import ops
    from residual_kernels.experiments.shapes import SHAPES, problem

    shape = SHAPES["L/14"]
    one = torch.zeros(1)
    found = {"add_ on one number": microseconds(lambda: one.add_(1))}
    for rows in (64,):
        p = problem(shape, rows, shape.ragged(), torch.bfloat16, "cpu")
        pack = ops.pack_units(p.proj, p.bias, p.slope, p.offset, p.basis, p.unit_offsets, backend="triton")
        weight = p.weight.clone().requires_grad_()

        def forward(p=p, weight=weight, pack=pack):
            return ops.spectral_reweight_packed(p.z, p.scale, p.mean, weight, pack)

        def step(p=p, weight=weight, forward=forward):
            return torch.autograd.grad(forward(), weight, p.dy)

        with torch.no_grad():
            found[f"forward, no gradient, N = {rows}"] = microseconds(forward)
        found[f"forward, N = {rows}"] = microseconds(forward)
        found[f"step, N = {rows}"] = microseconds(step)
    found["add_ on one number, again"] = microseconds(lambda: one.add_(1))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help=f"into {RESULTS}")
    parser.add_argument("--profile", action="store_true", help="where the time of a step goes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    install()
    found = measure()
    for name, value in found.items():
        print(f"{name:40s} {value:7.1f} us")
    if options.write:
        RESULTS.mkdir(parents=True, exist_ok=True)
        record = {
            "note": "processor time of the Python in front of the kernels; no device, launches replaced",
            "machine": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "median_of_add": statistics.median(v for k, v in found.items() if k.startswith("add_")),
            "microseconds": found,
        }
        (RESULTS / "host_time.json").write_text(json.dumps(record, indent=1) + "\n")
    if options.profile:
        _profile()


def _profile() -> None:
    import cProfile
    import pstats

    from residual_kernels import ops
    from residual_kernels.experiments.shapes import SHAPES, problem

    shape = SHAPES["L/14"]
    p = problem(shape, 64, shape.ragged(), torch.bfloat16, "cpu")
    pack = ops.pack_units(p.proj, p.bias, p.slope, p.offset, p.basis, p.unit_offsets, backend="triton")
    weight = p.weight.clone().requires_grad_()
    watched = cProfile.Profile()
    watched.enable()
    for _ in range(1000):
        torch.autograd.grad(ops.spectral_reweight_packed(p.z, p.scale, p.mean, weight, pack), weight, p.dy)
    watched.disable()
    pstats.Stats(watched).sort_stats("tottime").print_stats(32)


if __name__ == "__main__":
    main()
