"""What do the checks inside a registered operator cost? Microseconds a call, beside the whole call.

    python -m benchmarks.op_checks --results benchmarks/results/faults

The fastest of many short runs is taken: other work on the machine can only make a run slower.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from residual_kernels import ops
from residual_kernels.ops import backends
from residual_kernels.ops.operands import check_call, check_pack, check_upstream

RUNS, CALLS = 300, 200


def microseconds(call: Callable[[], object]) -> float:
    """Of one call: the fastest of RUNS runs of CALLS calls."""
    best = float("inf")
    for _ in range(RUNS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        best = min(best, time.perf_counter() - start)
    return 1e6 * best / CALLS


def measure(backend: str) -> dict:
    """Checks and whole calls of the smallest size that a layer of ViT-B/16 has: one image, 12 heads."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    units, width, components, dim = 12, 64, 12 * 8, 512
    offsets = torch.arange(0, components + 1, 8)
    bias, slope, offset = torch.randn(3, components)
    basis = torch.randn(components, dim)
    pack = ops.pack_units(
        torch.randn(components, width), bias, slope, offset, basis, offsets, backend=backend
    )
    z, scale, mean, weight = (
        torch.randn(1, units, width),
        torch.rand(1),
        torch.rand(1),
        torch.randn(1, components),
    )
    tensors, sizes, dy = list(pack.tensors), list(pack.sizes), torch.randn(1, 1, dim)

    def checks() -> None:
        shape = check_pack(tensors, sizes, backend)
        check_call(z, scale, mean, weight, None, tensors[0], shape)

    operator = torch.ops.residual_kernels.spectral_reweight
    return {
        "backend": backend,
        "forward_checks_us": round(microseconds(checks), 2),
        "nothing_us": round(microseconds(lambda: None), 2),
        "upstream_check_us": round(microseconds(lambda: check_upstream(dy, dy.shape, z)), 2),
        "whole_call_us": round(
            microseconds(lambda: operator(z, scale, mean, weight, None, tensors, sizes, dim, backend)), 2
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, help="folder for op_checks.json")
    options = parser.parse_args()
    rows = [measure(backend) for backend in backends.available()]
    found = {"torch": torch.__version__, "rows": rows}
    if options.results is not None:
        options.results.mkdir(parents=True, exist_ok=True)
        (options.results / "op_checks.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
