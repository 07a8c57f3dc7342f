"""How the CPU benchmarks take time: variants in turns,
so that what the machine does meanwhile falls on all alike."""

import platform
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch


def cpu_name() -> str:
    """The processor's own name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
        platform.processor() or platform.machine(),
    )


def machine_name() -> str:
    """The folder of results of this machine: its processor and the instruction set in use,
    as amd-zen5-avx512bf16."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    family = next(iter(re.findall(r"^cpu family\s*: (\d+)", text, re.MULTILINE)), "")
    cores = {"23": "amd-zen2", "25": "amd-zen4" if "avx512f" in text else "amd-zen3", "26": "amd-zen5"}
    name = cores.get(family) if "AuthenticAMD" in text else None
    from residual_kernels.ops import cpp_backend  # the extension is optional elsewhere

    return f"{name or slug(cpu_name())}-{cpp_backend.instruction_set()[0]}"


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def copy_bandwidth() -> Callable[[], float]:
    """A run that copies 256 MB and gives the bytes moved: read once, written once."""
    source = torch.ones(2**26)
    target = torch.empty_like(source)

    def run() -> float:
        target.copy_(source)
        return 2.0 * source.numel() * source.element_size()

    return run


def interleaved(variants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every variant in every round; each is run once before, and they take turns."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for run in variants.values():
        run()
    for _ in range(rounds):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times
