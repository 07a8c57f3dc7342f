"""The Triton kernels of spectral_reweight: values and gradients against float64, interpreted and on a GPU."""

import os
import subprocess
import sys
from dataclasses import replace
from itertools import combinations, product

import pytest
import torch
from property import given, settings, st
from tolerance import TF32, absolute, assert_within, enough_to_notice

from residual_kernels import ops
from residual_kernels.ops import backends, reference
from residual_kernels.ops.triton import routes as triton_routes

pytest.importorskip("triton", reason="the package triton is not installed")
from residual_kernels.ops.triton import backend as triton_backend
from residual_kernels.ops.triton import fold as triton_fold
from residual_kernels.ops.triton import forward as fused_route
from residual_kernels.ops.triton import kernel_layout, launch
from residual_kernels.ops.triton.tiles import INTERPRETED

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for the deterministic mode that poisons memory
NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU and TRITON_INTERPRET=0"
    ),
]
DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=NEEDS_GPU)]
gpu_only = pytest.mark.parametrize("device", [pytest.param("cuda", marks=NEEDS_GPU)])
ROW_ROUTES = ("fused", "two_pass")  # go row by row, so rows may choose their weights
NARROW_ROUTES = (*ROW_ROUTES, "folded")
INPUTS = ("weight", "z", "scale", "mean")


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty is full of NaN: what a kernel does not write, a comparison sees."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    launch.forget()  # plans of an earlier test
    yield
    launch.forget()
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def force(monkeypatch):
    """Makes both plans choose a route."""

    def choose(route):
        for name in ("plan_forward", "plan_backward"):
            plan = getattr(triton_backend, name)
            monkeypatch.setattr(triton_backend, name, lambda p, plan=plan: replace(plan(p), route=route))

    return choose


@pytest.fixture
def tf32():
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


def make(
    rows, width, dim, kept, *, dtype=torch.float32, tasks=None, indexed=False, scale=True, mean=True, seed=0
):
    """Arguments of `spectral_reweight` by name, and an upstream gradient."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    wide = torch.promote_types(dtype, torch.float32)
    total = sum(kept)
    arguments = {
        "z": normal(rows, len(kept), width).to(dtype),
        "scale": (1 + 0.3 * normal(rows)).to(wide) if scale else None,
        "mean": normal(rows).to(wide) if mean else None,
        "proj": (normal(total, width) / width**0.5).to(dtype),
        "bias": normal(total).to(wide),
        "slope": normal(total).to(wide),
        "offset": normal(total).to(wide),
        "weight": normal(*(() if tasks is None else (tasks,)), total).to(wide),
        "basis": (normal(total, dim) / dim**0.5).to(dtype),
        "unit_offsets": torch.tensor([0, *kept]).cumsum(0),
        "weight_index": torch.randint(tasks, (rows,), generator=generator) if indexed else None,
    }
    lead = (rows,) if tasks is None or indexed else (tasks, rows)
    return arguments, normal(*lead, dim).to(dtype)


def to(arguments, device):
    return {name: None if value is None else value.to(device) for name, value in arguments.items()}


def apply(arguments, dy, backend, wanted=INPUTS):
    """y and the gradients of the wanted inputs that are there."""
    if backend == "truth":
        arguments = {
            k: v.double() if v is not None and v.is_floating_point() else v for k, v in arguments.items()
        }
        dy = dy.double()
    leaves = {name: arguments[name] for name in wanted if arguments[name] is not None}
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in leaves.items()}
    if backend == "truth":
        y = reference.spectral_reweight(**{**arguments, **leaves})
    else:
        y = ops.spectral_reweight(**{**arguments, **leaves}, backend=backend)
    grads = torch.autograd.grad(y, list(leaves.values()), dy) if leaves else ()
    return dict(zip(["y", *(f"d{name}" for name in leaves)], [y.detach(), *grads], strict=True))


def truth_and_terms(arguments, dy, wanted=INPUTS):
    """Each result in float64, and the sums of its absolute terms."""
    return apply(arguments, dy, "truth", wanted), apply(absolute(arguments), dy.abs(), "truth", wanted)


def check(arguments, dy, device, wanted=INPUTS, dtype=None):
    """Holds y and every gradient to the precision of z, or to that of `dtype`."""
    arguments, dy = to(arguments, device), dy.to(device)
    truth, terms = truth_and_terms(arguments, dy, wanted)
    got = apply(arguments, dy, "triton", wanted)
    assert got.keys() == truth.keys()
    for name in truth:
        like = dy if name == "y" else arguments[name[1:]]
        assert got[name].dtype == like.dtype, name
        assert_within(got[name], truth[name], terms[name], name, dtype=dtype or arguments["z"].dtype)
    return got


# --- values and gradients -----------------------------------------------------------------------------------

SUBSETS = [chosen for count in range(1, 5) for chosen in combinations(INPUTS, count)]
SHAPES = [  # rows, C, D, K of every unit
    (1, 16, 24, [1, 18, 5]),
    (7, 64, 40, [66, 1, 33]),
    (20, 80, 24, [82, 30]),
    (7, 104, 24, [14, 106]),
    (70, 72, 50, [30, 0, 74]),
    (5, 112, 17, [16, 48]),
    (3, 10, 33, [3, 12, 1]),
]


@pytest.mark.parametrize("table", ["FORWARD", "BACKWARD"])
def test_every_route_is_tried_here(table):
    assert sorted(route.name for route in getattr(triton_backend, table)) == sorted(
        [*NARROW_ROUTES, "matmul"]
    )


@pytest.mark.parametrize("route", NARROW_ROUTES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_every_gradient_float32(shape, route, device, force):
    force(route)
    check(*make(*shape), device)


@pytest.mark.parametrize("route", NARROW_ROUTES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:4], ids=str)
def test_values_and_every_gradient_half(shape, dtype, route, device, force):
    force(route)
    check(*make(*shape, dtype=dtype), device)


@pytest.mark.parametrize("route", ROW_ROUTES)
@pytest.mark.parametrize("shape", SHAPES[1:5], ids=str)
def test_the_tensor_core_path_of_float32(shape, route, device, force, tf32):
    force(route)
    exact = device == "cpu"  # the interpreter multiplies exactly whatever it is told
    check(*make(*shape), device, dtype=torch.float32 if exact else TF32)


@pytest.mark.parametrize("route", NARROW_ROUTES)
@pytest.mark.parametrize(("scale", "mean"), [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_without_scale_or_mean(dtype, scale, mean, route, device, force):
    force(route)
    check(*make(7, 16, 24, [1, 18, 5], dtype=dtype, scale=scale, mean=mean), device)


@pytest.mark.parametrize("route", NARROW_ROUTES)
@pytest.mark.parametrize("rows", [3, 40])
def test_several_weights_at_once(rows, route, device, force):
    force(route)
    check(*make(rows, 16, 24, [18, 5], tasks=3), device)


@pytest.mark.parametrize("route", ROW_ROUTES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_choose_their_weight(dtype, route, device, force):
    force(route)
    check(*make(20, 24, 24, [18, 0, 5], tasks=4, indexed=True, dtype=dtype), device)


@pytest.mark.parametrize("route", NARROW_ROUTES)
@pytest.mark.parametrize("wanted", SUBSETS, ids="-".join)
def test_each_subset_of_gradients(wanted, route, device, force):
    force(route)
    check(*make(7, 24, 20, [18, 5]), device, wanted)


@pytest.mark.parametrize("route", NARROW_ROUTES)
def test_strides_of_z_and_dy(route, device, force):
    force(route)
    arguments, dy = make(6, 32, 24, [18, 5])
    z = arguments["z"]
    layouts = {
        "transposed": z.transpose(0, 2).contiguous().transpose(0, 2),
        "strided": torch.randn(6, 4, 64)[:, ::2, 3:35],
        "expanded": z[:1].expand(6, 2, 32),
        "units first": z.transpose(0, 1).contiguous().transpose(0, 1),
    }
    for name, layout in layouts.items():
        upstream = {"transposed": dy.T.contiguous().T, "expanded": dy[:, :1].expand(6, 24)}.get(name, dy)
        check({**arguments, "z": layout}, upstream, device)
    swapped = {
        **arguments,
        "basis": arguments["basis"].T.contiguous().T,
        "proj": arguments["proj"].T.contiguous().T,
        "scale": torch.randn(12)[::2],
        "mean": torch.randn(1).expand(6),
    }
    check(swapped, dy, device)


@pytest.mark.parametrize("route", ["folded", "matmul"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_units_wider_than_a_tile(dtype, route, device, force):
    force(route)
    check(*make(9, 144, 40, [40, 17], dtype=dtype), device)
    check(*make(9, 144, 40, [40, 40], dtype=dtype, tasks=2), device)


def test_wide_units_that_choose_their_weight(device):
    check(*make(5, 144, 24, [24, 7], tasks=3, indexed=True), device)


@pytest.mark.parametrize("route", NARROW_ROUTES)
def test_blocks_of_rows_and_groups_of_units(route, device, force, monkeypatch):
    force(route)
    monkeypatch.setattr(triton_routes, "workspace_rows", lambda problem: 5)
    monkeypatch.setattr(triton_fold, "WORKSPACE", 2 * 16 * 24 * 4)
    for options in ({}, {"tasks": 2}, {"scale": False, "mean": False}):
        check(*make(13, 16, 24, [18, 5, 1, 7, 9], **options), device)
    if route != "folded":
        check(*make(13, 16, 24, [18, 5], tasks=3, indexed=True), device)


@pytest.mark.parametrize("splits", [1, 2, 5])
def test_any_number_of_partial_sums(splits, device, force, monkeypatch):
    force("fused")
    monkeypatch.setattr(fused_route, "splits_of", lambda problem, tiles: splits)
    check(*make(7, 16, 24, [18, 5, 16, 2]), device)


@pytest.mark.parametrize(
    ("rows", "kept", "tasks"),
    [(0, [3, 4], None), (0, [3], 2), (4, [0, 0], None), (4, [0], 3), (1, [1], None)],
)
def test_nothing_to_do(rows, kept, tasks, device):
    check(*make(rows, 16, 12, kept, tasks=tasks), device)


@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(0, 9),
    width=st.integers(1, 40),
    dim=st.integers(1, 40),
    fractions=st.lists(st.floats(0, 1), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
def test_any_small_shape(rows, width, dim, fractions, seed):
    kept = [round(fraction * min(width + 2, dim)) for fraction in fractions]
    check(*make(rows, width, dim, kept, seed=seed), "cpu")


@pytest.mark.parametrize("constant", ["weight", "bias", "slope", "offset"])
def test_a_perturbed_constant_fails(constant, device):
    """Values and gradients are linear in each constant,
    so the perturbation can be sized to be just noticed."""
    arguments, dy = make(7, 16, 24, [1, 18, 5])
    arguments, dy = to(arguments, device), dy.to(device)
    truth, terms = truth_and_terms(arguments, dy)
    check(arguments, dy, device)
    affected = {
        "weight": ("y", "dz", "dscale", "dmean"),
        "bias": ("y", "dweight", "dscale"),
        "slope": ("y", "dweight", "dmean"),
        "offset": ("y", "dweight"),
    }
    for name in affected[constant]:
        moved = arguments[constant].double()
        moved[3] += 1
        change = apply({**arguments, constant: moved}, dy, "truth")[name] - truth[name]
        wrong = {**arguments, constant: arguments[constant].clone()}
        wrong[constant][3] += enough_to_notice(change, terms[name])
        with pytest.raises(AssertionError, match=f"{name} is off by"):
            assert_within(apply(wrong, dy, "triton")[name], truth[name], terms[name], name)


@pytest.mark.parametrize("route", NARROW_ROUTES)
def test_the_same_bits_every_time(route, device, force):
    force(route)
    arguments, dy = make(33, 24, 40, [18, 26, 3], dtype=torch.float16)
    arguments, dy = to(arguments, device), dy.to(device)
    first = apply(arguments, dy, "triton")
    for _ in range(2):
        again = apply(arguments, dy, "triton")
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_inputs_are_left_alone(device):
    arguments, dy = make(7, 16, 24, [1, 18, 5])
    arguments, dy = to(arguments, device), dy.to(device)
    before = {
        name: None if value is None else value.clone() for name, value in {**arguments, "dy": dy}.items()
    }
    apply(arguments, dy, "triton")
    for name, value in {**arguments, "dy": dy}.items():
        assert value is None or torch.equal(value, before[name]), name


# --- routes and plans ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", [*NARROW_ROUTES, "matmul"])
def test_the_route_asked_for_is_the_route_taken(route, device, force, monkeypatch):
    force(route)
    taken = []
    for table in ("FORWARD", "BACKWARD"):
        watched = tuple(
            replace(one, run=lambda *args, one=one: (taken.append(one.name), one.run(*args))[1])
            for one in getattr(triton_backend, table)
        )
        monkeypatch.setattr(triton_backend, table, watched)
    arguments, dy = make(5, 144 if route == "matmul" else 16, 20, [18, 5])
    apply(to(arguments, device), dy.to(device), "triton")
    assert taken == [route, route]


L14 = triton_routes.Problem(
    rows=64,
    tasks=1,
    indexed=False,
    units=384,
    coordinates=64,
    components=384 * 66,
    padded=384 * 72,
    dim=768,
    chunks=384 * 3,
    block_k=32,
    longest=72,
    kind="half",
)


def test_the_plan_follows_the_shape():
    small, large = triton_backend.plan_forward(L14), triton_backend.plan_forward(replace(L14, rows=8192))
    assert (small.route, large.route) == ("fused", "folded")
    narrow = replace(L14, rows=8192, components=384 * 30, padded=384 * 32, longest=32, chunks=384)
    assert triton_backend.plan_forward(narrow).route == "two_pass"
    assert triton_backend.plan_backward(replace(L14, rows=16)).route == "fused"
    # Dweight alone from the fold's gradient; dz is almost free from t = dy . basis.
    full = replace(L14, rows=8192)
    assert triton_backend.plan_backward(full).route == "folded"
    assert triton_backend.plan_backward(replace(full, wanted=(True, True, False, False))).route == "two_pass"
    assert triton_backend.plan_backward(narrow).route == "two_pass"
    assert triton_backend.plan_forward(replace(L14, indexed=True, tasks=64, rows=8192)).route != "folded"
    assert triton_backend.plan_forward(replace(L14, coordinates=1024, indexed=True)).route == "matmul"
    stream = replace(
        L14, rows=65536, units=16, components=1024, padded=1024, dim=1024, chunks=32, longest=64, plain=True
    )
    assert triton_backend.plan_forward(stream).route == "folded"
    assert triton_backend.plan_backward(stream).route == "two_pass"
    for plan in (small, large):
        assert plan.estimates[plan.route] == min(plan.estimates.values())


def test_partial_sums_stay_inside_the_workspace():
    for rows, dim in product((1, 16, 64, 256, 8192), (256, 1536)):
        problem = replace(L14, rows=rows, dim=dim)
        splits = fused_route.splits_of(problem, fused_route.tiles_of(problem))
        assert splits == 1 or splits * rows * dim * 4 <= triton_routes.WORKSPACE
    assert fused_route.splits_of(L14, fused_route.tiles_of(L14)) > 16  # few rows: the units fill the chip


def test_explain_names_the_route_and_the_reason():
    arguments, _ = make(4, 16, 24, [18, 5])
    constants = [arguments[name] for name in ("proj", "bias", "slope", "offset", "basis", "unit_offsets")]
    text = str(ops.explain(ops.pack_units(*constants, backend="torch"), 64))
    assert "torch" in text
    if INTERPRETED:
        found = ops.explain(ops.pack_units(*constants, backend="triton"), 64)
        assert found.forward.route in found.forward.estimates
        assert "forward: " in str(found)
        assert "backward: " in str(found)
        assert "not measured" in str(found)


@given(st.lists(st.integers(0, 130), min_size=1, max_size=20), st.sampled_from([16, 32, 64]))
def test_chunks_cover_every_padded_run_once(sizes, block):
    runs = kernel_layout.padded_bounds(sizes)
    assert all(first % 8 == 0 for first in runs)
    chunks = triton_routes.cut_runs(runs, sizes, block)
    covered = [(unit, j) for unit, start, length in chunks for j in range(start, start + length)]
    assert covered == [
        (unit, j) for unit, size in enumerate(sizes) for j in range(runs[unit], runs[unit] + size)
    ]
    assert all(0 < length <= block and start % 8 == 0 for _, start, length in chunks)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(1, 40), st.integers(1, 20))
@settings(max_examples=30, deadline=None)
def test_the_layout_pads_with_zeros_and_decodes(sizes, width, dim):
    total = sum(sizes)
    given_rows = [
        torch.randn(total, width),
        torch.randn(total),
        torch.randn(total),
        torch.randn(total),
        torch.randn(total, dim),
    ]
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    held = kernel_layout.constants_of(*kernel_layout.pack(*given_rows, offsets))
    for name, rows in zip(("proj", "bias", "slope", "offset", "basis"), given_rows, strict=True):
        padded = getattr(held, name)
        inside = padded[held.slots] if rows.ndim == 1 else padded[held.slots][:, : rows.shape[1]]
        assert torch.equal(inside, rows)
        assert torch.equal(padded.abs().double().sum(), rows.abs().double().sum()) or torch.isclose(
            padded.abs().double().sum(), rows.abs().double().sum()
        )
    for code in held.chunks.tolist():
        unit, first, length, shift = code >> 45, (code >> 24 & 0x1FFFFF) * 8, code >> 17 & 127, code & 0x1FFFF
        assert offsets[unit] <= first - shift < first - shift + length <= offsets[unit + 1]
        assert held.slots[first - shift] == first


@given(st.integers(1, 128))
def test_pieces_cover_a_width_without_a_doubled_tile(width):
    main, tail = triton_routes.pieces(width)
    assert width <= main + tail < max(2 * width, 32)
    assert main & (main - 1) == 0
    assert tail == 0 or (tail >= 16 and tail & (tail - 1) == 0)


# --- the wrapping -------------------------------------------------------------------------------------------


def packed(arguments, backend="triton"):
    names = ("proj", "bias", "slope", "offset", "basis", "unit_offsets")
    return ops.pack_units(*(arguments[name] for name in names), backend=backend)


def test_compiles_without_a_graph_break(device):
    arguments, dy = make(7, 16, 24, [1, 18, 5])
    arguments, dy = to(arguments, device), dy.to(device)
    pack = packed(arguments)

    def loss(z, scale, mean, weight):
        return (ops.spectral_reweight_packed(z, scale, mean, weight, pack) * dy).sum()

    leaves = [arguments[name].requires_grad_() for name in ("z", "scale", "mean", "weight")]
    eager = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for one, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_autocast_casts_z_alone(device):
    arguments, _ = make(7, 16, 24, [1, 18, 5])
    arguments = to(arguments, device)
    with torch.autocast(device, torch.bfloat16):
        y = ops.spectral_reweight(**arguments, backend="triton")
    assert y.dtype == torch.bfloat16
    low = {**arguments, **{name: arguments[name].to(torch.bfloat16) for name in ("z", "proj", "basis")}}
    assert torch.equal(y, ops.spectral_reweight(**low, backend="triton"))


@pytest.mark.parametrize(
    "options", [{}, {"tasks": 2}, {"tasks": 3, "indexed": True}, {"scale": False, "mean": False}]
)
def test_passes_opcheck(options, device):
    arguments, _ = make(5, 16, 12, [3, 9], **options)
    arguments = to(arguments, device)
    pack = packed(arguments)
    weight = arguments["weight"] if arguments["weight"].ndim == 2 else arguments["weight"][None]
    leaves = [
        None if x is None else x.requires_grad_()
        for x in (arguments["z"], arguments["scale"], arguments["mean"])
    ]
    torch.library.opcheck(
        torch.ops.residual_kernels.spectral_reweight.default,
        (
            *leaves,
            weight.detach().requires_grad_(),
            arguments["weight_index"],
            list(pack.tensors),
            list(pack.sizes),
            pack.dim,
            "triton",
        ),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_float64_is_refused_by_name(device):
    arguments, _ = make(5, 16, 12, [3, 9], dtype=torch.float64)
    with pytest.raises(ValueError, match="float64; use backend='torch'"):
        packed(to(arguments, device))


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
def test_the_interpreter_is_never_chosen_by_itself(monkeypatch):
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    cpu = torch.device("cpu")
    assert backends.resolve("triton", cpu) == "triton"
    assert backends.resolve("auto", cpu) != "triton"
    assert "triton" not in backends.available(cpu)
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "triton")
    assert backends.resolve("auto", cpu) == "triton"
    assert "programs for the CPU" in backends.missing("triton", torch.device("cuda"))
    assert "not on mps" in backends.missing("triton", torch.device("mps"))
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1"):
        backends.resolve("triton", cpu)


def test_importing_the_library_imports_no_triton():
    code = (
        "import sys, torch, residual_kernels, residual_kernels.ops\n"
        "from residual_kernels import backends\n"
        "assert 'residual_kernels.ops.triton.backend' not in sys.modules\n"
        "assert backends.missing('triton', torch.device('cpu')) is not None\n"
        "assert 'residual_kernels.ops.triton.backend' not in sys.modules\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=os.getcwd())


# --- GPU only -----------------------------------------------------------------------------------------------


@gpu_only
@pytest.mark.parametrize("route", NARROW_ROUTES)
def test_a_cuda_graph_captures_forward_and_backward(route, device, force):
    force(route)
    arguments, dy = make(64, 80, 128, [30, 82, 1], dtype=torch.bfloat16)
    arguments, dy = to(arguments, "cuda"), dy.cuda()
    pack = packed(arguments)
    weight = arguments["weight"].requires_grad_()

    def step():
        y = ops.spectral_reweight_packed(arguments["z"], arguments["scale"], arguments["mean"], weight, pack)
        return y, *torch.autograd.grad(y, weight, dy)

    expected = step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for one, other in zip(expected, captured, strict=True):
        assert torch.equal(one, other)


@gpu_only
@pytest.mark.parametrize("route", NARROW_ROUTES)
def test_offsets_past_two_to_the_31(route, device, force):
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GB of free device memory")
    force(route)
    rows, units, width = (1 << 31) // (64 * 64) + 64, 64, 64
    arguments, dy = make(128, width, 64, [16] * units, dtype=torch.bfloat16)
    arguments, dy = to(arguments, "cuda"), dy.cuda()
    pack = packed(arguments)
    big = torch.zeros(rows, units, width, dtype=torch.bfloat16, device="cuda")
    big[-128:] = arguments["z"]
    scale, mean = torch.zeros(rows, device="cuda"), torch.zeros(rows, device="cuda")
    scale[-128:], mean[-128:] = arguments["scale"], arguments["mean"]
    weight = arguments["weight"].requires_grad_()
    y = ops.spectral_reweight_packed(big, scale, mean, weight, pack)
    upstream = torch.zeros_like(y)
    upstream[-128:] = dy
    (dweight,) = torch.autograd.grad(y, weight, upstream)
    truth, terms = truth_and_terms(arguments, dy, ("weight",))
    assert_within(y[-128:], truth["y"], terms["y"], "y")
    assert_within(dweight, truth["dweight"], terms["dweight"], "dweight", dtype=torch.bfloat16)


# --- workspace ----------------------------------------------------------------------------------------------


def test_a_caller_says_what_may_be_spent(monkeypatch):
    wide = replace(L14, rows=8192)
    assert triton_routes.workspace_rows(replace(wide, workspace=0)) == 64
    assert triton_routes.workspace_rows(replace(wide, workspace=1 << 40)) > wide.rows
    rows = triton_routes.workspace_rows(wide)
    assert rows * wide.padded * wide.itemsize <= triton_routes.workspace_bytes(wide)
    with pytest.raises(ValueError, match="at least 0 bytes; got -1"):
        ops.set_workspace(-1)
    ops.set_workspace(5)
    try:
        assert triton_routes.allowed_workspace() == 5
    finally:
        ops.set_workspace(None)
    monkeypatch.setenv("RESIDUAL_KERNELS_WORKSPACE", "many")
    with pytest.raises(ValueError, match="a number of bytes; got 'many'"):
        triton_routes.allowed_workspace()
    monkeypatch.setenv("RESIDUAL_KERNELS_WORKSPACE", "7")
    assert triton_routes.allowed_workspace() == 7


@pytest.mark.parametrize("wanted", [("weight",), ("z",), ("weight", "z")], ids="-".join)
@pytest.mark.parametrize("kept", [[16, 16, 16], [18, 5, 0]], ids=str)
def test_the_stream_form_on_tensor_cores(kept, wanted, device, force, tf32):
    """The kernel for scale = mean = None: t shares dz's memory when every unit keeps C components."""
    if device != "cpu":
        pytest.skip("tf32 has its own bound on a device")
    force("two_pass")
    check(*make(70, 16, 24, kept, scale=False, mean=False), device, wanted)
