"""The parts of `make gpu` that pytest runs: the tests of the kernels with compute-sanitizer,
and peers as JSON."""

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu_clock import BUDGET

ROOT = Path(__file__).resolve().parent.parent
TESTED = ("spectral_reweight", "unit_moments", "spectral_sum", "fit_step")  # tests/test_triton_*.py
TESTS_BUDGET = 400.0  # seconds of the tests, which leaves the rest of a part to compute-sanitizer


def tests(folder: Path) -> int:
    """The GPU tier of the test suite, then compute-sanitizer on small cases where it is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    # The tests poison memory by torch's deterministic mode.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    files = [str(ROOT / "tests" / f"test_triton_{name}.py") for name in TESTED]
    begun = time.monotonic()
    pytest = importlib.import_module("pytest")
    arguments = ["-q", "-m", "gpu", f"--junitxml={folder / 'tests.xml'}", "--rootdir", str(ROOT), *files]
    code = int(pytest.main(arguments, plugins=[_Deadline(begun + TESTS_BUDGET)]))
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer is not installed: memcheck and racecheck left out")
        return code
    for tool in ("memcheck", "racecheck"):
        left = BUDGET - (time.monotonic() - begun)
        if left < 30:
            print(f"{tool}: time ran out")
            continue
        command = [
            sanitizer,
            "--tool",
            tool,
            "--error-exitcode",
            "1",
            sys.executable,
            "-m",
            "benchmarks.gpu",
            "--part",
            "small",
            "--results",
            str(folder),
        ]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=left)
        except subprocess.TimeoutExpired:
            print(f"{tool}: time ran out")
            continue
        (folder / f"{tool}.txt").write_text(done.stdout + done.stderr)
        print(f"{tool}: {'clean' if done.returncode == 0 else 'FAILED, see ' + tool + '.txt'}")
        code = code or done.returncode
    return code


class _Deadline:
    """A pytest plugin: the run ends with what it has when its time is over, and says so."""

    def __init__(self, end: float) -> None:
        self.end = end

    def pytest_runtest_setup(self, item) -> None:
        if time.monotonic() > self.end:
            item.session.shouldstop = "time ran out; the tests that are left were not run"


def peers(folder: Path) -> int:
    """Providers one at a time, as JSON in pytest-benchmark's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    if importlib.util.find_spec("pytest_benchmark") is None:
        print("peers: left out, the package pytest-benchmark is not installed")
        return 0
    pytest = importlib.import_module("pytest")
    arguments = [
        "-q",
        "--benchmark-only",
        f"--benchmark-json={folder / 'peers.json'}",
        "--rootdir",
        str(ROOT),
        str(ROOT / "benchmarks" / "bench_gpu.py"),
    ]
    return int(pytest.main(arguments, plugins=[_Deadline(time.monotonic() + TESTS_BUDGET)]))
