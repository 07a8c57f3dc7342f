"""The Triton kernel of unit_moments against float64, in the interpreter and on a GPU."""

import os

import pytest
import torch
from property import given, settings, st
from tolerance import TF32, absolute, assert_within, enough_to_notice

from residual_kernels import ops
from residual_kernels.ops import reference, torch_backend

pytest.importorskip("triton", reason="the package triton is not installed")
from residual_kernels.ops.triton import unit_moments as triton_unit_moments

INTERPRETED = triton_unit_moments.INTERPRETED
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for the deterministic mode that poisons memory
NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU and TRITON_INTERPRET=0"
    ),
]
DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=NEEDS_GPU)]
gpu_only = pytest.mark.parametrize("device", [pytest.param("cuda", marks=NEEDS_GPU)])


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty is full of NaN: what a kernel does not write, a comparison sees."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def make(rows, units, width, *, dtype=torch.float32, scale=True, mean=True, shift=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    wide = torch.promote_types(dtype, torch.float32)
    centre = 3 * normal(units, width + 2)
    return {
        "z": (centre[:, :width] + normal(rows, units, width)).to(dtype),
        "scale": (1 + 0.1 * normal(rows)).to(wide) if scale else None,
        "mean": normal(rows).to(wide) if mean else None,
        "shift": centre if shift else None,
    }


def compute(arguments, backend):
    if backend == "truth":
        return reference.unit_moments(**arguments)
    return ops.unit_moments(**arguments, backend=backend)


def check(arguments, device, *, exact=True):
    """`exact`: the tile products are exact float32 ones, so the result is held to float32;
    else to z's dtype."""
    arguments = {name: None if value is None else value.to(device) for name, value in arguments.items()}
    truth, terms = compute(arguments, "truth"), compute(absolute(arguments), "truth")
    got = compute(arguments, "triton")
    for name, *tensors in zip(("total", "moment"), got, truth, terms, strict=True):
        assert tensors[0].dtype == torch.float64
        dtype = torch.float32 if exact or name == "total" else arguments["z"].dtype
        assert_within(*tensors, name, dtype=dtype, length=len(arguments["z"]))
    assert torch.equal(got[1], got[1].transpose(1, 2))
    return got


@pytest.mark.parametrize(
    "shape",
    [(1, 2, 16), (7, 3, 64), (33, 2, 80), (70, 2, 104), (5, 1, 128), (40, 2, 72), (9, 2, 17)],
    ids=str,
)
def test_float32(shape, device):
    check(make(*shape), device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(7, 3, 64), (70, 2, 80)], ids=str)
def test_half(shape, dtype, device):
    check(make(*shape, dtype=dtype), device, exact=device == "cpu")


@pytest.mark.parametrize(
    "options", [{"scale": False}, {"mean": False}, {"scale": False, "mean": False}, {"shift": False}]
)
def test_what_may_be_missing(options, device):
    check(make(37, 2, 24, **options), device)


def test_strides(device):
    arguments = make(20, 4, 32)
    z = arguments["z"]
    for layout in (
        z.transpose(0, 2).contiguous().transpose(0, 2),
        torch.randn(20, 8, 64)[:, ::2, 5:37],
        z[:1].expand(20, 4, 32),
    ):
        check(
            {**arguments, "z": layout, "scale": torch.rand(40)[::2], "mean": torch.rand(1).expand(20)}, device
        )


def test_runs_of_rows_merge_in_float64(device, monkeypatch):
    monkeypatch.setattr(triton_unit_moments, "ROWS_PER_SPLIT", 32)
    monkeypatch.setattr(triton_unit_moments, "PROGRAMS", 4)
    check(make(300, 2, 24), device)


@pytest.mark.parametrize("shape", [(0, 3, 64), (0, 1, 8), (4, 2, 8), (4, 2, 130)], ids=str)
def test_what_the_torch_backend_does(shape, device, monkeypatch):
    calls = []
    function = torch_backend.unit_moments
    monkeypatch.setattr(torch_backend, "unit_moments", lambda *args: (calls.append(1), function(*args))[1])
    arguments = {k: None if v is None else v.to(device) for k, v in make(*shape).items()}
    got, truth, terms = (
        compute(arguments, "triton"),
        compute(arguments, "truth"),
        compute(absolute(arguments), "truth"),
    )
    assert bool(calls) == (shape[0] > 0)  # no rows: no backend is asked
    for tensors in zip(got, truth, terms, strict=True):
        assert_within(*tensors, dtype=torch.float32, length=len(arguments["z"]))


@settings(max_examples=10, deadline=None)
@given(rows=st.integers(0, 70), units=st.integers(1, 3), width=st.integers(16, 40), seed=st.integers(0, 99))
@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
def test_any_small_shape(rows, units, width, seed):
    check(make(rows, units, width, seed=seed), "cpu")


@pytest.mark.parametrize("result", [0, 1], ids=["total", "moment"])
def test_a_perturbed_shift_fails(result, device):
    arguments = {name: value.to(device) for name, value in make(20, 2, 24).items()}
    truth, terms = compute(arguments, "truth")[result], compute(absolute(arguments), "truth")[result]
    assert_within(compute(arguments, "triton")[result], truth, terms, dtype=torch.float32)

    def moved(step):
        shift = arguments["shift"].clone()
        shift[1, 5] += step
        return {**arguments, "shift": shift}

    step = 1e-4  # the moment is all but linear for so small a step
    change = (compute(moved(step), "truth")[result] - truth) / step
    wrong = compute(moved(enough_to_notice(change, terms)), "triton")[result]
    with pytest.raises(AssertionError, match="is off by"):
        assert_within(wrong, truth, terms, dtype=torch.float32)


def test_the_same_bits_every_time(device):
    arguments = {name: value.to(device) for name, value in make(700, 3, 24).items()}
    first = compute(arguments, "triton")
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(first, compute(arguments, "triton"), strict=True))


def test_compiles_and_refuses_float64(device):
    arguments = {name: value.to(device) for name, value in make(9, 2, 24).items()}

    def total(z, scale):
        return ops.unit_moments(z, scale, None, backend="triton")[0] + 1

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    assert torch.equal(
        compiled(arguments["z"], arguments["scale"]), total(arguments["z"], arguments["scale"])
    )
    with pytest.raises(ValueError, match="float64; use backend='torch'"):
        compute({**arguments, "z": arguments["z"].double()}, "triton")


@pytest.mark.parametrize("width", [16, 17, 64, 72, 80, 96, 104, 112, 128])
def test_columns_are_covered_by_two_tiles(width):
    main, tail = triton_unit_moments.column_tiles(width)
    assert main <= width <= main + tail
    assert tail == 0 or (tail >= 16 and tail & (tail - 1) == 0)


def test_wide_units_take_few_rows_where_more_would_spill():
    tiles = triton_unit_moments.tiles_of
    assert [tiles(128, True, chip)[0] for chip in (8, 9, None)] == [16, 32, 32]
    assert [tiles(columns, True, 8)[0] for columns in (64, 80, 96)] == [64, 64, 32]
    assert tiles(128, False, 8) == (32, 8, 2)


def test_old_compilers_do_not_prefetch_on_new_chips():
    cases = [("3.6.0", 9), ("3.6.0", 10), ("3.8.0", 10), ("3.10.1+git", 12)]
    assert [triton_unit_moments.pipelines(*case) for case in cases] == [True, False, True, True]


@gpu_only
def test_a_small_variance_far_from_the_origin_survives_16_bits(device):
    arguments = {name: value.to(device) for name, value in make(4096, 2, 64, dtype=torch.bfloat16).items()}
    truth, got = compute(arguments, "truth"), compute(arguments, "triton")
    error = (got[1] - truth[1]).norm() / truth[1].norm()
    assert error < 1e-4  # a plain bfloat16 product would leave 2e-3


@gpu_only
def test_tf32_stays_inside_its_bound(device):
    arguments = {name: value.to(device) for name, value in make(1024, 2, 80).items()}
    torch.set_float32_matmul_precision("high")
    try:
        got = compute(arguments, "triton")
    finally:
        torch.set_float32_matmul_precision("highest")
    truth = compute(arguments, "truth")
    wide = [arguments[name].double() for name in ("z", "scale", "mean")]
    centred = (
        reference.unit_coordinates(*wide) - arguments["shift"]
    ).abs()  # what tf32 rounds; it is made in float32
    terms = torch.einsum("nri,nrj->rij", centred, centred)
    assert_within(got[1], truth[1], terms, "moment", dtype=TF32, length=1024)


@gpu_only
def test_offsets_past_two_to_the_31(device):
    if torch.cuda.mem_get_info()[0] < 10 << 30:
        pytest.skip("needs 10 GB of free device memory")
    rows = (1 << 31) // (32 * 64) + 64
    z = torch.zeros(rows, 32, 64, dtype=torch.bfloat16, device=device)
    z[-64:] = 1
    total, moment = ops.unit_moments(z, None, None, backend="triton")
    assert torch.all(total[:, :64] == 64)
    assert torch.all(moment[:, :64, :64] == 64)
