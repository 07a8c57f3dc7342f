"""Every Triton kernel compiles for every target, inside its limits and with the instructions that were meant.

No GPU.

Runs in processes of its own, because TRITON_INTERPRET, which the other tests need, changes what a kernel is
at import.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_tests import TESTED

triton = pytest.importorskip("triton", reason="the package triton is not installed")

ROOT = Path(__file__).parent.parent
# Triton 3.4's compiler ends in an assertion of its own for kernels on sm_100; for AMD it asks for a linker
# (LLVM 19's).
OLD = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6)
LINKER = not OLD or "TRITON_HIP_LLD_PATH" in os.environ
INSTRUCTIONS = {"sm_80": "mma.sync", "sm_90": "wgmma"}
INSTRUCTIONS |= ({} if OLD else {"sm_100": "tcgen05.mma"}) | ({"gfx942": "v_mfma"} if LINKER else {})
OTHERS = ",".join(
    {"gfx942": "gfx942", "sm_100": "sm_100:1/4"}[x] for x in ("gfx942", "sm_100") if x in INSTRUCTIONS
)
SHARES = (("sm_90,sm_80:0/4",), (OTHERS, "--edges"))  # two processes, about equally long
KERNELS = {
    "spectral_reweight_fwd",
    "spectral_reweight_bwd",
    "coefficients",
    "sum_partials",
    "fold",
    "fold_bwd",
    "affine",
    "scaled",
    "spectral_sum_fwd",
    "spectral_sum_bwd",
    "dweight",
    "stream_bwd",
    "unit_moments",
    "merge_moments",
    "fit_forward",
    "fit_output",
    "fit_logits",
    "fit_loss",
    "fit_update",
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Rows of benchmarks.resources: a pairwise choice of routes, widths, dtypes, rows,
    flags and wanted gradients."""
    folder = tmp_path_factory.mktemp("resources")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    processes = []
    for number, share in enumerate(SHARES):
        command = [sys.executable, "-m", "benchmarks.resources", "--json", str(folder / f"{number}.json")]
        command += ["--targets", *share]
        processes.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    said = [process.communicate()[1] for process in processes]
    rows = []
    for number, text in enumerate(said):
        file = folder / f"{number}.json"
        assert file.exists(), text
        rows += json.loads(file.read_text())
    return rows


@pytest.mark.parametrize("target", INSTRUCTIONS)
def test_nothing_is_wrong_on(target, compiled):
    rows = [row for row in compiled if row["target"] == target]
    assert rows
    assert [f"{row['kernel']} {row['kind']}: {row['wrong']}" for row in rows if row["wrong"]] == []


def test_every_kernel_and_every_kind_of_product_is_there(compiled):
    assert {row["kernel"].split()[0] for row in compiled if row["target"] == "sm_90"} == KERNELS
    assert {row["kind"] for row in compiled} == {"bf16", "fp16", "tf32", "fp32", "none"}
    widths = {
        word
        for row in compiled
        if row["target"] == "sm_90"
        for word in row["kernel"].split()
        if word[0] == "c"
    }
    assert widths >= {f"c{width}" for width in (64, 72, 80, 88, 96, 104, 112)}


@pytest.mark.parametrize(("target", "instruction"), INSTRUCTIONS.items())
def test_the_target_s_own_matrix_instruction_is_used(target, instruction, compiled):
    rows = [row for row in compiled if row["target"] == target and row["kind"] in ("bf16", "fp16", "tf32")]
    assert any(instruction in row["instructions"] for row in rows)


def test_loads_are_wide(compiled):
    """A head width of 72 or 104 must not fall back to loads of one element."""
    widths = [f" c{width} " for width in (64, 72, 80, 88, 96, 104, 112)]
    readers = ("spectral_reweight_fwd", "coefficients", "unit_moments")
    for row in compiled:
        if row["target"] == "sm_90" and row["kernel"].startswith(readers):
            if not any(width in row["kernel"] for width in widths):
                continue
            assert row["wide_loads"] > 0, row["kernel"]


def test_spills_elsewhere_are_reported(compiled, capsys):
    with capsys.disabled():
        worst = max((row for row in compiled if row["target"] == "sm_80"), key=lambda row: row["spills"])
        print(f" [most spilled on sm_80: {worst['spills']} bytes, {worst['kernel']} {worst['kind']}]", end="")


def test_a_complaint_is_made():
    """The negative case: rows that break each rule."""
    code = (
        "from dataclasses import replace\n"
        "from benchmarks.compile_targets import Resources\n"
        "from benchmarks.resources import complaints\n"
        "good = Resources('fwd c64 n64', 'bf16', 'sm_90', 4, 3, 100, 0, 1000, ['wgmma'], 4, 0.5)\n"
        "assert complaints(good) == []\n"
        "for change in ({'spills': 32}, {'shared': 300000}, {'instructions': ['mma.sync']}, {'kind': "
        "'fp32'},\n"
        "               {'instructions': ['fma']}, {'target': 'gfx942'}):\n"
        "    assert complaints(replace(good, **change)), change\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment)


def run_plain(*command: str) -> subprocess.CompletedProcess:
    """A program in a process of its own, where kernels are not interpreted."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_a_gpu_runs_every_test_of_the_kernels():
    files = {
        path.stem.removeprefix("test_triton_") for path in Path(__file__).parent.glob("test_triton_*.py")
    }
    assert files == set(TESTED)


def test_no_kernel_needs_more_than_its_budget():
    done = run_plain("-m", "benchmarks.budget")
    assert done.returncode == 0, done.stderr


def test_a_worse_kernel_is_told():
    """The negative case of the budget, and the reading of machine code that it rests on."""
    code = (
        "import json\n"
        "from benchmarks import budget, machine_code\n"
        "held = json.loads(budget.FILE.read_text())['cases']\n"
        "assert budget.worse(held, held) == []\n"
        "case = next(iter(held))\n"
        "kernel = next(iter(held[case]['kernels']))\n"
        "for change in ({'launches': 99}, {'floor_us': 1e3}, {'kernels': {kernel: 1e3}}):\n"
        "    assert len(budget.worse({**held, case: {**held[case], **change}}, held)) == 1, change\n"
        "text = '''\n"
        "        /*0000*/                   LDC R1, c[0x0][0x28] ;\n"
        ".L_x_0:\n"
        "        /*0010*/              @!P0 LDG.E.128 R4, desc[UR6][R2.64] ;\n"
        "        /*0020*/                   LDG.E R8, desc[UR6][R2.64] ;\n"
        ".L_x_1:\n"
        "        /*0030*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8], R24 ;\n"
        "        /*0040*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;\n"
        "        /*0050*/              @P1  BRA `(.L_x_1) ;\n"
        "        /*0060*/               @P0 BRA `(.L_x_0) ;\n"
        "        /*0070*/                   EXIT ;\n"
        ".L_x_2:\n"
        "        /*0080*/                   BRA `(.L_x_2);\n"
        "'''\n"
        "found = machine_code.read_code(text, False, 0.5)\n"
        "assert found.instructions == (3, 3, 3) and found.barriers == (0, 0, 1) and found.narrow == (0, "
        "1, 0)\n"
        "assert found.operations == (0.0, 0.0, 2.0 * 64 * 32 * 16 / 4) and found.tile_bytes == (0.0, "
        "512.0, 0.0)\n"
        "assert found.total('instructions', [10, 100, 1000]) == 30 + 300 + 3000\n"
        "ptx = 'mov.b32 %r5, 136314896; @%p1 tcgen05.mma.cta_group::1.kind::f16 [ %r1 + 0 ], %rd1, %rd2, "
        "%r5, %p2;'\n"
        "assert machine_code.blackwell_products(ptx) == [2.0 * 128 * 128 * 16]\n"
        "waiting = text.replace('BAR.SYNC.DEFER_BLOCKING', 'SYNCS.PHASECHK.TRANS64.TRYWAIT')\n"
        "assert machine_code.read_code(waiting, False, 0.5).instructions == (9,)  # no loop\n"
    )
    done = run_plain("-c", code)
    assert done.returncode == 0, done.stderr
