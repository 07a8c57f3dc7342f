"""The operators on a GPU in pytest-benchmark's form: one provider at a time, synchronised, in bf16.

    TRITON_INTERPRET=0 pytest benchmarks/bench_gpu.py --benchmark-only --benchmark-json=FILE

A group is operator and shape; parameters are provider, mode and dtype: the layout that Liger-Kernel and
others publish. `make gpu PART=peers` runs it. Wall time of a synchronised call, with its launches;
benchmarks/gpu.py has device time.
"""

from collections.abc import Callable

import pytest
import torch

from benchmarks.bench_ops import PLAIN
from residual_kernels import ops
from residual_kernels.experiments.shapes import SHAPES, Operands, problem

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
PROVIDERS = ("triton", "lowrank", "lowrank compiled", "folded", "folded compiled")


def forward_of(provider: str, p: Operands) -> Callable:
    if provider == "triton":
        pack = ops.pack_units(p.proj, p.bias, p.slope, p.offset, p.basis, p.unit_offsets, backend="triton")
        return lambda z, weight: ops.spectral_reweight_packed(z, p.scale, p.mean, weight, pack)
    name, _, compiled = provider.partition(" ")
    made = PLAIN[name](p)
    return torch.compile(made, dynamic=True) if compiled else made


@pytest.mark.parametrize("rows", [64, 256, 1024])
@pytest.mark.parametrize("shape", ["B/16", "L/14"])
@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=["bfloat16"])
@pytest.mark.parametrize("mode", ["fwd", "step"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_spectral_reweight(
    benchmark, provider: str, mode: str, dtype: torch.dtype, shape: str, rows: int
) -> None:
    found = SHAPES[shape]
    p = problem(found, rows, found.ragged(), dtype, torch.device("cuda"))
    forward = forward_of(provider, p)
    weight = p.weight.clone().requires_grad_(mode == "step")

    def call() -> None:
        if mode == "fwd":
            with torch.no_grad():
                forward(p.z, weight)
        else:
            torch.autograd.grad(forward(p.z, weight), weight, p.dy)
        torch.cuda.synchronize()

    call()
    benchmark.group = f"spectral_reweight {shape} K ragged N {rows}"
    benchmark.extra_info.update(device=torch.cuda.get_device_name(), torch=torch.__version__)
    benchmark.pedantic(call, rounds=30, warmup_rounds=5)


@pytest.mark.parametrize("provider", ["triton", "torch"])
def test_unit_moments(benchmark, provider: str) -> None:
    shape = SHAPES["L/14"]
    p = problem(shape, 1024, [1] * shape.units, torch.bfloat16, torch.device("cuda"))

    def call() -> None:
        ops.unit_moments(p.z, p.scale, p.mean, backend=provider)
        torch.cuda.synchronize()

    call()
    benchmark.group = "unit_moments L/14 N 1024"
    benchmark.pedantic(call, rounds=30, warmup_rounds=5)
