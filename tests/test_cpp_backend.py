"""The compiled CPU backend: values and every gradient against float64,
on every instruction set this machine has."""

import os
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import absolute, assert_within, enough_to_notice

from residual_kernels import ops
from residual_kernels.cli import doctor
from residual_kernels.ops import backends, reference

_cpp = pytest.importorskip("residual_kernels._cpp", reason="the extension was not built (no C++ compiler)")
from residual_kernels.ops import cpp_backend  # noqa: E402

SETS = [name for name, reason in _cpp.instruction_sets().items() if reason is None]
ALL = [True, True, True, True]
NAMES = ("dweight", "dz", "dscale", "dmean")


@pytest.fixture(params=SETS)
def instruction_set(request, monkeypatch):
    monkeypatch.setenv(cpp_backend.ENVIRONMENT_VARIABLE, request.param)
    return request.param


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def make(rows, width, dim, kept, *, dtype=torch.float32, tasks=None, indexed=False, bare=False, seed=0):
    """Arguments of `spectral_reweight` (weight_index last) and an upstream gradient."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    wide = torch.promote_types(dtype, torch.float32)
    total = sum(kept)
    arguments = {
        "z": normal(rows, len(kept), width).to(dtype),
        "scale": None if bare else (1 + 0.3 * normal(rows)).to(wide),
        "mean": None if bare else normal(rows).to(wide),
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


def apply(arguments, dy, backend):
    """y and the gradients of weight, z, scale and mean (those that are there)."""
    torch.set_num_threads(2 if backend == "cpp" else 1)
    leaves = {
        name: arguments[name] for name in ("weight", "z", "scale", "mean") if arguments[name] is not None
    }
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in leaves.items()}
    if backend == "truth":
        wide = {k: v.double() if v is not None and v.is_floating_point() else v for k, v in arguments.items()}
        leaves = {name: tensor.detach().double().requires_grad_() for name, tensor in leaves.items()}
        y = reference.spectral_reweight(**{**wide, **leaves})
        dy = dy.double()
    else:
        y = ops.spectral_reweight(**{**arguments, **leaves}, backend=backend)
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return dict(zip(["y", *(f"d{name}" for name in leaves)], [y.detach(), *grads], strict=True))


def truth_and_terms(arguments, dy):
    """Each result in float64, and the sums of its absolute terms."""
    return apply(arguments, dy, "truth"), apply(absolute(arguments), dy.abs(), "truth")


def check(arguments, dy, monkeypatch):
    """Holds y and every gradient to the precision of z, on every instruction set."""
    truth, terms = truth_and_terms(arguments, dy)
    for chosen in SETS:
        monkeypatch.setenv(cpp_backend.ENVIRONMENT_VARIABLE, chosen)
        got = apply(arguments, dy, "cpp")
        for name in truth:
            assert got[name].dtype == (dy if name == "y" else arguments[name[1:]]).dtype
            assert_within(
                got[name], truth[name], terms[name], f"{name} ({chosen})", dtype=arguments["z"].dtype
            )


def at_op_level(arguments, dy, wanted=ALL, pack=None):
    """Forward and backward called on the backend itself."""
    x = arguments
    if pack is None:
        pack = cpp_backend.pack(x["proj"], x["bias"], x["slope"], x["offset"], x["basis"], x["unit_offsets"])
    weight = x["weight"] if x["weight"].ndim == 2 else x["weight"][None]
    if dy.ndim == 2 and x["weight_index"] is None:
        dy = dy[None]
    head = (x["z"], x["scale"], x["mean"], weight, x["weight_index"], *pack)
    return [
        cpp_backend.spectral_reweight_forward(*head),
        *cpp_backend.spectral_reweight_backward(dy, *head, wanted),
    ]


def assert_same_bits(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


SHAPES = {  # rows, width, dim, kept
    "one of everything": (1, 16, 8, [1]),
    "few": (7, 17, 33, [1, 5, 0, 19]),
    "no rows": (0, 16, 32, [3, 4]),
    "no components": (5, 16, 32, [0, 0]),
    "no coordinates": (2, 0, 33, [0, 19, 7]),
    "heads": (130, 64, 100, [66, 66, 66, 66, 1, 30, 15]),
    "wide heads": (97, 80, 264, [82] * 4),
    "wider heads": (33, 104, 96, [106, 3, 106, 0]),
    "one large unit": (40, 300, 257, [302]),
    "large beside small": (20, 270, 64, [5, 272, 1, 272, 0]),
    "model width": (5, 1792, 24, [1794]),
}
VARIANTS = {
    "one weight": {},
    "bare": {"bare": True},
    "3 weights": {"tasks": 3},
    "9 weights": {"tasks": 9},
    "1 weight as [T, J]": {"tasks": 1},
    "3 weights by row": {"tasks": 3, "indexed": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, dtype, monkeypatch):
    for variant in VARIANTS.values():
        check(*make(*SHAPES[shape], dtype=dtype, **variant), monkeypatch)


def test_float16_goes_through_float32(monkeypatch):
    check(*make(*SHAPES["few"], dtype=torch.float16, tasks=2), monkeypatch)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(0, 70),
    width=st.integers(1, 40),
    dim=st.integers(1, 90),
    kept=st.lists(st.integers(0, 45), min_size=1, max_size=6),
    tasks=st.none() | st.integers(1, 6),
    indexed=st.booleans(),
    bare=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_any_shape(rows, width, dim, kept, tasks, indexed, bare, dtype):
    indexed = indexed and tasks is not None
    problem = make(rows, width, dim, kept, dtype=dtype, tasks=tasks, indexed=indexed, bare=bare)
    with pytest.MonkeyPatch.context() as monkeypatch:
        check(*problem, monkeypatch)


def test_each_set_of_wanted_gradients(instruction_set):
    for variant in ({}, {"tasks": 3}, {"tasks": 3, "indexed": True}):
        arguments, dy = make(50, 20, 70, [22, 3, 22], **variant)
        _, *everything = at_op_level(arguments, dy)
        for mask in range(16):
            wanted = [bool(mask >> i & 1) for i in range(4)]
            _, *some = at_op_level(arguments, dy, wanted)
            assert_same_bits(some, [grad for grad, want in zip(everything, wanted, strict=True) if want])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_any_strides_and_alignment(dtype, instruction_set):
    arguments, dy = make(37, 24, 70, [26, 3, 26, 9], dtype=dtype, tasks=2)
    plain = at_op_level(arguments, dy)
    z, shape = arguments["z"], arguments["z"].shape

    def shifted(tensor):  # starts one element into its storage: no longer aligned to a vector
        return tensor.new_zeros(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)

    def odd(tensor):  # starts one byte into its storage: not aligned to an element
        raw = bytearray(1 + tensor.numel() * tensor.element_size())
        view = torch.frombuffer(raw, dtype=torch.uint8)[1:]
        view.copy_(tensor.contiguous().view(-1).view(torch.uint8))
        return torch.frombuffer(raw, dtype=tensor.dtype, offset=1).view(tensor.shape)

    def wide_rows(tensor):
        larger = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), float("nan"), dtype=tensor.dtype)
        larger[..., ::2] = tensor
        return larger[..., ::2]

    def reversed_axes(tensor):
        axes = tuple(reversed(range(tensor.ndim)))
        return tensor.permute(axes).contiguous().permute(axes)

    for view in (shifted, odd, wide_rows, reversed_axes):
        assert_same_bits(at_op_level({**arguments, "z": view(z)}, view(dy)), plain)
    one_row = {**arguments, "z": z[:1].expand(shape)}
    same = {**arguments, "z": z[:1].repeat(shape[0], 1, 1)}
    constant = dy[:, :1, :1]
    assert_same_bits(
        at_op_level(one_row, constant.expand(dy.shape)), at_op_level(same, constant.repeat(1, 37, 70))
    )
    for name in ("scale", "mean", "weight"):  # copied where they must be
        assert_same_bits(at_op_level({**arguments, name: wide_rows(arguments[name])}, dy), plain)


def test_strides_past_2_31_elements():  # of memory that is only touched at its ends
    stride = 2**31 + 40
    arguments, dy = make(2, 20, 30, [3, 22], dtype=torch.bfloat16)
    z = arguments["z"]
    # Touched at its ends only.
    far = torch.empty(stride + z[0].numel(), dtype=z.dtype).as_strided(z.shape, (stride, 20, 1))
    far.copy_(z)
    assert_same_bits(at_op_level({**arguments, "z": far}, dy), at_op_level(arguments, dy))
    for one, other in zip(_moments(far), _moments(z), strict=True):
        assert torch.equal(one, other)


def _moments(z, scale=None, mean=None, shift=None):
    shift = torch.zeros(z.shape[1], z.shape[2] + 2, dtype=torch.float64) if shift is None else shift
    return cpp_backend.unit_moments(z, scale, mean, shift)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_output_element_is_written(variant, instruction_set, monkeypatch):
    arguments, dy = make(50, 20, 70, [22, 0, 3, 22], **VARIANTS[variant])
    want = [True, True, not VARIANTS[variant].get("bare"), not VARIANTS[variant].get("bare")]
    plain = at_op_level(arguments, dy, want)
    moments = _moments(arguments["z"])

    def poisoned(make_empty):
        return lambda *a, **k: make_empty(*a, **k).fill_(float("nan"))

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    assert torch.empty(1).isnan()
    assert_same_bits(at_op_level(arguments, dy, want), plain)
    assert_same_bits(_moments(arguments["z"]), moments)


@pytest.mark.parametrize("rows", [1, 20, 300])
def test_same_bits_for_any_number_of_threads(rows, instruction_set, threads):
    for variant in ({}, {"tasks": 9}, {"tasks": 3, "indexed": True}):
        arguments, dy = make(rows, 30, 70, [32] * 20 + [1, 5], **variant)
        results = []
        for count in (1, 2, 4):
            threads(count)
            results.append([*at_op_level(arguments, dy), *_moments(arguments["z"], arguments["scale"])])
        assert_same_bits(results[0], results[1])
        assert_same_bits(results[0], results[2])


def test_calls_from_several_threads_at_once(threads):
    threads(2)
    problems = [make(60 + 10 * i, 24, 70, [26] * 12, seed=i) for i in range(6)]
    alone = [at_op_level(*problem) for problem in problems]
    together = [None] * len(problems)

    def work(i):
        for _ in range(8):
            together[i] = at_op_level(*problems[i])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(problems))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
        assert not worker.is_alive()
    for one, other in zip(alone, together, strict=True):
        assert_same_bits(one, other)


class _Computing(torch.utils.data.Dataset):
    """Runs the operator, on two threads, in whichever process asks for an item."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        torch.set_num_threads(2)
        return at_op_level(*make(100, 24, 70, [26] * 12, seed=index))[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_fork_in_data_loader_workers(threads):
    threads(2)
    dataset = _Computing()
    here = [dataset[i] for i in range(4)]  # the pool has started before the fork
    loader = torch.utils.data.DataLoader(dataset, num_workers=2, multiprocessing_context="fork", timeout=60)
    for one, other in zip(here, loader, strict=True):
        assert torch.equal(one, other[0])
    assert torch.equal(dataset[0], here[0])  # and goes on here


def test_auto_takes_it_and_named_sets_are_obeyed(monkeypatch):
    arguments, _ = make(2, 16, 8, [3])
    packable = {k: arguments[k] for k in ("proj", "bias", "slope", "offset", "basis", "unit_offsets")}
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    assert ops.pack_units(**packable).backend == "cpp"
    monkeypatch.delenv(cpp_backend.ENVIRONMENT_VARIABLE, raising=False)
    chosen, faster = cpp_backend.instruction_set()
    assert chosen == [name for name in SETS if name != "amx"][-1]
    assert all(faster.values())  # each has its reason
    for name in SETS:
        monkeypatch.setenv(cpp_backend.ENVIRONMENT_VARIABLE, name)
        chosen, faster = cpp_backend.instruction_set()
        assert chosen == name
        assert list(faster) == list(
            cpp_backend.INSTRUCTION_SETS[cpp_backend.INSTRUCTION_SETS.index(name) + 1 :]
        )
        taken = "avx512" if name in cpp_backend.ON_PAIRS else name  # they multiply bfloat16 alone
        assert ops.pack_units(**packable).sizes[0] == cpp_backend.INSTRUCTION_SETS.index(taken)
        half = {k: v.bfloat16() if k in ("proj", "basis") else v for k, v in packable.items()}
        assert ops.pack_units(**half).sizes[0] == cpp_backend.INSTRUCTION_SETS.index(name)
    monkeypatch.setenv(cpp_backend.ENVIRONMENT_VARIABLE, "sse9")
    with pytest.raises(RuntimeError, match="portable, avx2, avx512, avx512bf16, amx"):
        ops.pack_units(**packable)


def test_a_set_that_cannot_run_is_refused(monkeypatch):
    lacking = [name for name, reason in _cpp.instruction_sets().items() if reason is not None]
    for name in lacking:
        with pytest.raises(RuntimeError, match="cannot run here"):
            _cpp.layout(cpp_backend.INSTRUCTION_SETS.index(name))
        monkeypatch.setenv(cpp_backend.ENVIRONMENT_VARIABLE, name)
        with pytest.raises(RuntimeError, match=f"asks for {name}"):
            cpp_backend.instruction_set()
    with pytest.raises(ValueError, match="no instruction set number 99"):
        _cpp.layout(99)


def test_the_extension_is_the_one_meant():
    assert os.environ.get("EXTENSION_UNDER_TEST", "") in _cpp.__file__  # `make sanitize` names its own


def test_other_devices_are_refused():
    assert "CPU tensors only" in backends.missing("cpp", torch.device("meta"))
    assert backends.missing("cpp", torch.device("cpu")) is None


def test_weight_index_out_of_range_is_an_error():
    arguments, dy = make(4, 16, 8, [3], tasks=2, indexed=True)
    for bad in (-1, 2):
        arguments["weight_index"][2] = bad
        with pytest.raises(IndexError, match=rf"weight_index\[2\] is {bad}"):
            at_op_level(arguments, dy)


@pytest.mark.parametrize("constant", ["weight", "bias", "slope", "offset"])
def test_a_perturbed_constant_fails(constant, monkeypatch):
    """Values and gradients are linear in each constant,
    so the perturbation can be sized to be just noticed."""
    arguments, dy = make(20, 24, 70, [26, 3, 26])
    truth, terms = truth_and_terms(arguments, dy)
    check(arguments, dy, monkeypatch)
    affected = {
        "weight": ("y", "dz", "dscale", "dmean"),
        "bias": ("y", "dweight", "dscale"),
        "slope": ("y", "dweight", "dmean"),
        "offset": ("y", "dweight"),
    }
    for name in affected[constant]:
        moved = arguments[constant].double()
        moved[7] += 1
        change = apply({**arguments, constant: moved}, dy, "truth")[name] - truth[name]
        wrong = {**arguments, constant: arguments[constant].clone()}
        wrong[constant][7] += enough_to_notice(change, terms[name])
        with pytest.raises(AssertionError, match=f"{name} is off by"):
            assert_within(apply(wrong, dy, "cpp")[name], truth[name], terms[name], name)


def test_gradcheck():
    arguments, _ = make(5, 6, 7, [3, 0, 4], dtype=torch.float64, tasks=2)
    names = ("z", "scale", "mean", "weight")

    def function(*leaves):
        return ops.spectral_reweight(**{**arguments, **dict(zip(names, leaves, strict=True))}, backend="cpp")

    assert torch.autograd.gradcheck(function, [arguments[name].requires_grad_() for name in names])


@pytest.mark.parametrize("variant", ["one weight", "3 weights by row", "bare"])
def test_opcheck(variant):
    x, _ = make(9, 16, 24, [5, 18], **VARIANTS[variant])
    pack = ops.pack_units(
        x["proj"], x["bias"], x["slope"], x["offset"], x["basis"], x["unit_offsets"], backend="cpp"
    )
    weight = (x["weight"] if x["weight"].ndim == 2 else x["weight"][None]).requires_grad_()
    operator = torch.ops.residual_kernels.spectral_reweight
    tail = (x["weight_index"], list(pack.tensors), list(pack.sizes), pack.dim, "cpp")
    torch.library.opcheck(operator, (x["z"].requires_grad_(), x["scale"], x["mean"], weight, *tail))
    shift = torch.zeros(2, 18, dtype=torch.float64)
    torch.library.opcheck(
        torch.ops.residual_kernels.unit_moments, (x["z"].detach(), x["scale"], x["mean"], shift, "cpp")
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bare", [False, True])
def test_many_rows_of_wide_units_fold(dtype, bare, monkeypatch):
    arguments, dy = make(900, 130, 140, [132, 40, 132], dtype=dtype, bare=bare)
    taken = []
    for name in ("_folded_forward", "_folded_dweight"):
        route = getattr(cpp_backend, name)
        monkeypatch.setattr(
            cpp_backend, name, lambda *a, route=route, name=name: taken.append(name) or route(*a)
        )
    leaf = arguments["weight"].requires_grad_()
    y = ops.spectral_reweight(**arguments, backend="cpp")
    (dweight,) = torch.autograd.grad(y, leaf, dy)
    assert taken == ["_folded_forward", "_folded_dweight"]
    truth, terms = truth_and_terms(arguments, dy)
    assert_within(y, truth["y"], terms["y"], "y")
    assert_within(dweight, truth["dweight"], terms["dweight"], "dweight")
    check(arguments, dy, monkeypatch)  # with all gradients wanted backward is direct
    assert taken.count("_folded_dweight") == 1
    taken.clear()
    check(*make(900, 64, 140, [66, 66], dtype=dtype), monkeypatch)  # heads never fold
    assert not taken


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "size",
    [
        (0, 2, 16),
        (1, 1, 16),
        (7, 3, 17),
        (600, 2, 64),
        (130, 5, 80),
        (1100, 1, 104),
        (40, 1, 400),
        (9, 1, 1792),
    ],
    ids=str,
)
def test_unit_moments(size, dtype, instruction_set):
    torch.set_num_threads(1)
    rows, units, width = size
    generator = torch.Generator().manual_seed(1)
    z = (30 + torch.randn(rows, units, width, generator=generator)).to(dtype)
    scale, mean = (1 + 0.1 * torch.randn(rows, generator=generator) for _ in range(2))
    for s, m in ((scale, mean), (None, None), (scale, None)):
        coordinates = reference.unit_coordinates(*(None if x is None else x.double() for x in (z, s, m)))
        zero = torch.zeros(units, width + 2, dtype=torch.float64)
        for shift in (zero, coordinates.mean(0) if rows else zero):
            given = {"z": z, "scale": s, "mean": m, "shift": shift}
            truth, terms = reference.unit_moments(**given), reference.unit_moments(**absolute(given))
            got = cpp_backend.unit_moments(**given)
            # The results are float64, their summands have the precision of the data.
            precision = torch.promote_types(dtype, torch.float32)
            for name, *tensors in zip(("total", "moment"), got, truth, terms, strict=True):
                assert_within(*tensors, name, dtype=precision, length=rows)
            assert torch.equal(got[1], got[1].mT)


def test_unit_moments_of_any_strides(instruction_set):
    z = torch.randn(90, 3, 20, generator=torch.Generator().manual_seed(2))
    scale = torch.linspace(0.5, 2, 90)
    plain = _moments(z, scale)
    for view in (z.transpose(0, 2).contiguous().transpose(0, 2), z.repeat_interleave(2, dim=2)[:, :, ::2]):
        assert_same_bits(_moments(view, scale), plain)
    assert_same_bits(_moments(z[:1].expand(90, 3, 20), scale), _moments(z[:1].repeat(90, 1, 1), scale))


@pytest.mark.parametrize("name", SETS)
def test_the_peak_counts_what_its_loop_does(name):
    """Twice the rounds are twice the FLOP, and every thread does its own."""
    at = cpp_backend.INSTRUCTION_SETS.index(name)
    one = _cpp.peak(at, 1, 10)
    assert one > 0
    assert [_cpp.peak(at, 1, 20), _cpp.peak(at, 2, 10)] == [2 * one, 2 * one]
    with pytest.raises(ValueError, match="at least 1"):
        _cpp.peak(at, 0, 10)


def test_doctor_says_what_was_timed_on_the_set_in_use(instruction_set):
    """A set that is said to have been timed has results; one that has not, has none."""
    assert tuple(cpp_backend.MEASURED) == cpp_backend.INSTRUCTION_SETS
    said = doctor.facts()["devices"][0]["backends"]["cpp"]
    assert f"instruction set {instruction_set}, {cpp_backend.MEASURED[instruction_set]}" in said
    results = Path(__file__).parent.parent / "benchmarks" / "results"
    machines = {"avx2": "amd-epyc", "avx512": "amd-zen5-avx512bf16"}
    folder = results / machines.get(instruction_set, f"amd-zen5-{instruction_set}")
    timed = cpp_backend.MEASURED[instruction_set].startswith("timed")
    assert (folder / "ops.json").is_file() == timed
