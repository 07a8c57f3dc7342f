"""The operator over the torch backend: against the reference in float64,
and what the functional face promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import absolute, assert_within, enough_to_notice

from residual_kernels.ops import backends, pack_units, reference, spectral_reweight, spectral_reweight_packed


def problem(rows=7, coordinates=16, dim=12, sizes=(3, 1, 18, 5), tasks=None, dtype=torch.float64, seed=0):
    """Random inputs: (z, scale, mean), constants by name, weight, unit_offsets."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    offsets = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()])
    total = int(offsets[-1])
    inputs = normal(rows, len(sizes), coordinates), normal(rows).abs() + 0.5, normal(rows)
    constants = {"proj": normal(total, coordinates)} | {n: normal(total) for n in ("bias", "slope", "offset")}
    constants["basis"] = normal(total, dim)
    weight = normal(total) if tasks is None else normal(tasks, total)
    return inputs, constants, weight, offsets


def run(function, inputs, constants, weight, offsets, **options):
    named = dict(constants)
    basis = named.pop("basis")
    return function(*inputs, *named.values(), weight, basis, offsets, **options)


def results(function, inputs, constants, weight, offsets, upstream, **options):
    """y and the gradient of every input that is there, and of the weight."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (*inputs, weight)]
    y = run(function, leaves[:3], constants, leaves[3], offsets, **options)
    return [y.detach(), *torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], upstream)]


def truth_and_terms(inputs, constants, weight, offsets, upstream, **options):
    """The results of the reference in float64, and the sums of their absolute terms."""
    given = {
        **dict(zip(("z", "scale", "mean"), inputs, strict=True)),
        **constants,
        "w": weight,
        "dy": upstream,
    }
    found = []
    for x in ({k: None if v is None else v.double() for k, v in given.items()}, absolute(given)):
        tensors = {name: x[name] for name in constants}
        weight, upstream = x["w"], x["dy"]
        found.append(
            results(
                reference.spectral_reweight,
                [x["z"], x["scale"], x["mean"]],
                tensors,
                weight,
                offsets,
                upstream,
                **options,
            )
        )
    return found


def assert_all_within(got, truth, terms, dtype):
    for one, *others in zip(got, truth, terms, strict=True):
        assert_within(one, *others, dtype=dtype)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 2, 7]),
    coordinates=st.sampled_from([1, 5, 16, 20]),
    dim=st.integers(1, 9),
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    tasks=st.sampled_from([None, 1, 3]),
    indexed=st.booleans(),
    scaled=st.booleans(),
    shifted=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_value_and_every_gradient(
    rows, coordinates, dim, sizes, tasks, indexed, scaled, shifted, dtype, seed
):
    inputs, constants, weight, offsets = problem(rows, coordinates, dim, sizes, tasks, dtype, seed)
    inputs = (inputs[0], inputs[1] if scaled else None, inputs[2] if shifted else None)
    index = torch.randint(tasks, (rows,)) if indexed and tasks else None
    lead = (rows,) if tasks is None or index is not None else (tasks, rows)
    upstream = torch.randn(*lead, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)
    task = (inputs, constants, weight, offsets, upstream)
    got = results(spectral_reweight, *task, weight_index=index)
    assert_all_within(got, *truth_and_terms(*task, weight_index=index), dtype)


@pytest.mark.parametrize("constant", ["proj", "bias", "slope", "offset", "basis"])
def test_a_perturbed_constant_is_noticed(constant):
    inputs, constants, weight, offsets = problem(dtype=torch.float32)
    upstream = torch.ones(7, 12)
    y, terms = (r[0] for r in truth_and_terms(inputs, constants, weight, offsets, upstream))

    def moved(step, dtype):
        tensor = constants[constant].to(dtype, copy=True)
        tensor[4] += step
        return {**constants, constant: tensor}

    change = truth_and_terms(inputs, moved(1, torch.float64), weight, offsets, upstream)[0][0] - y
    wrong = moved(enough_to_notice(change, terms), torch.float32)
    assert_within(run(spectral_reweight, inputs, constants, weight, offsets), y, terms)
    with pytest.raises(AssertionError, match="is off by"):
        assert_within(run(spectral_reweight, inputs, wrong, weight, offsets), y, terms)


def test_folded_is_the_same():
    inputs, constants, weight, offsets = problem()
    direct, terms = (r[0] for r in truth_and_terms(inputs, constants, weight, offsets, torch.ones(7, 12)))
    assert_within(run(reference.spectral_reweight_folded, inputs, constants, weight, offsets), direct, terms)


@pytest.mark.parametrize("wanted", range(1, 16))
def test_each_subset_of_gradients(wanted):
    inputs, constants, weight, offsets = problem()
    every = [t.clone().requires_grad_() for t in (*inputs, weight)]
    y = run(spectral_reweight, every[:3], constants, every[3], offsets)
    upstream = torch.randn_like(y)
    full = torch.autograd.grad(y, every, upstream)
    some = [t.clone().requires_grad_(bool(wanted >> i & 1)) for i, t in enumerate((*inputs, weight))]
    y = run(spectral_reweight, some[:3], constants, some[3], offsets)
    chosen = [t for t in some if t.requires_grad]
    for ours, i in zip(
        torch.autograd.grad(y, chosen, upstream), [i for i in range(4) if wanted >> i & 1], strict=True
    ):
        assert torch.equal(ours, full[i])


def test_strides_do_not_matter():
    inputs, constants, weight, offsets = problem(rows=6, sizes=(2, 3))
    z = inputs[0]
    plain = run(spectral_reweight, inputs, constants, weight, offsets)
    for view in (
        z.transpose(0, 1).contiguous().transpose(0, 1),
        z.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack([z, z], dim=-1)[..., 0],
    ):
        assert not view.is_contiguous()
        assert torch.allclose(
            run(spectral_reweight, (view, *inputs[1:]), constants, weight, offsets), plain, atol=1e-12
        )
    expanded = z[:1].expand(6, -1, -1)
    assert torch.allclose(
        run(spectral_reweight, (expanded, *inputs[1:]), constants, weight, offsets),
        run(spectral_reweight, (expanded.contiguous(), *inputs[1:]), constants, weight, offsets),
        atol=1e-12,
    )


def test_gradcheck_and_opcheck():
    inputs, constants, weight, offsets = problem(rows=3, coordinates=4, dim=5, sizes=(2, 1, 3))
    pack = pack_units(*constants.values(), offsets, backend="torch")
    leaves = [t.requires_grad_() for t in (*inputs, weight)]
    torch.autograd.gradcheck(lambda z, s, m, w: spectral_reweight_packed(z, s, m, w, pack), leaves)
    many = problem(rows=3, coordinates=4, dim=5, sizes=(2, 1, 3), tasks=2)[2].requires_grad_()
    index = torch.tensor([1, 0, 1])
    for chosen in (None, index):
        torch.autograd.gradcheck(
            lambda z, w, i=chosen: spectral_reweight_packed(z, None, None, w, pack, i), (leaves[0], many)
        )
        arguments = (*leaves[:3], many, chosen, list(pack.tensors), list(pack.sizes), pack.dim, "torch")
        torch.library.opcheck(torch.ops.residual_kernels.spectral_reweight.default, arguments)


def test_once_differentiable():
    inputs, constants, weight, offsets = problem()
    weight.requires_grad_()
    y = run(spectral_reweight, inputs, constants, weight, offsets)
    (grad,) = torch.autograd.grad(y.square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    inputs, constants, weight, offsets = problem(dtype=dtype)
    upstream = torch.randn(7, 12, generator=torch.Generator().manual_seed(1)).to(dtype)
    task = (inputs, constants, weight.float(), offsets, upstream)
    got = results(spectral_reweight, *task)
    assert [tensor.dtype for tensor in got] == [dtype, dtype, dtype, dtype, torch.float32]
    assert_all_within(got, *truth_and_terms(*task), dtype)


def test_repeats_bit_for_bit():
    inputs, constants, weight, offsets = problem(rows=65, tasks=3, dtype=torch.float32)
    weight.requires_grad_()
    index = torch.randint(3, (65,))
    runs = []
    for _ in range(3):
        y = run(spectral_reweight, inputs, constants, weight, offsets, weight_index=index)
        runs.append((y.detach(), *torch.autograd.grad(y.square().sum(), weight)))
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


def test_inputs_are_never_written():
    inputs, constants, weight, offsets = problem()
    tensors = [*inputs, *constants.values(), weight]
    before = [t.clone() for t in tensors]
    leaves = [t.requires_grad_() for t in (*inputs, weight)]
    y = run(spectral_reweight, leaves[:3], constants, weight, offsets)
    upstream = torch.randn_like(y)
    kept = upstream.clone()
    torch.autograd.grad(y, leaves, upstream)
    assert torch.equal(upstream, kept)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


def spoiled(**changes):
    inputs, constants, weight, offsets = problem()
    named = (
        dict(zip(("z", "scale", "mean"), inputs, strict=True))
        | constants
        | {"weight": weight, "unit_offsets": offsets}
    )
    return named | {name: change(named[name]) for name, change in changes.items()}


BAD = [
    ({"z": lambda t: t[0]}, r"z must be \[N, R, C\]"),
    ({"z": lambda t: t[:, :3]}, r"z must be \[N, R, C\]"),
    ({"z": lambda t: t[..., :5]}, r"z must be \[N, R, C\]"),
    ({"scale": lambda t: t[:-1]}, r"scale must be \[N\]"),
    ({"mean": lambda t: t[:, None]}, r"mean must be \[N\]"),
    ({"weight": lambda t: t[:-1]}, r"weight must be \[J\] or \[T, J\]"),
    ({"bias": lambda t: t[:-1]}, r"bias must have shape \[J\]"),
    ({"slope": lambda t: t[None]}, r"slope must have shape \[J\]"),
    ({"basis": lambda t: t[:-1]}, "with one J"),
    ({"proj": lambda t: t.clone().requires_grad_()}, "proj requires grad"),
    ({"offset": lambda t: t.clone().requires_grad_()}, "offset requires grad"),
    ({"bias": lambda t: t.long()}, "bias has dtype"),
    ({"unit_offsets": lambda t: t.int()}, "int64 tensor"),
    ({"unit_offsets": lambda t: t + 1}, "must rise from 0"),
    ({"unit_offsets": lambda t: t.flip(0)}, "must rise from 0"),
    ({"scale": lambda t: t.to("meta")}, "scale is on meta"),
    ({"weight": lambda t: t.to("meta")}, "weight is on meta"),
    ({"basis": lambda t: t.to("meta")}, "basis is on meta"),
]


@pytest.mark.parametrize("changes, message", BAD)
def test_bad_arguments_show_what_was_seen(changes, message):
    with pytest.raises(ValueError, match=message):
        spectral_reweight(**spoiled(**changes))


def test_bad_weight_index():
    for weight, index, message in (
        (lambda t: t, torch.zeros(7, dtype=torch.int64), "chooses among weights"),
        (lambda t: t[None], torch.zeros(6, dtype=torch.int64), "weight_index must be int64"),
        (lambda t: t[None], torch.zeros(7), "weight_index must be int64"),
        (lambda t: t[None], torch.full((7,), -1), "from -1 to -1, but there are T = 1"),
        (lambda t: t[None], torch.arange(7), "from 0 to 6, but there are T = 1"),
    ):
        with pytest.raises(ValueError, match=message):
            spectral_reweight(**spoiled(weight=weight), weight_index=index)


def test_dtype_of_z_and_pack_must_agree():
    inputs, constants, weight, offsets = problem()
    pack = pack_units(*constants.values(), offsets)
    with pytest.raises(ValueError, match="cast one to the other"):
        spectral_reweight_packed(inputs[0].float(), None, None, weight, pack)


def test_backends_are_chosen_as_documented(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    assert backends.available("cpu")[-1] == "torch"
    assert backends.resolve("auto", cpu) == backends.available("cpu")[0]
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "torch")
    assert backends.resolve("auto", cpu) == "torch"
    assert pack_units(*problem()[1].values(), problem()[3]).backend == "torch"
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "fortran")
    with pytest.raises(ValueError, match="unknown backend 'fortran'"):
        backends.resolve("auto", cpu)
    monkeypatch.setattr(
        backends, "missing", lambda name, *_, **__: None if name == "torch" else "it is not here"
    )
    with pytest.raises(RuntimeError, match="'cpp' was asked for on cpu, but it is not here"):
        backends.resolve("cpp", cpu)


def test_fullgraph_compile_follows_batch_size():
    _, constants, weight, offsets = problem(dtype=torch.float32)
    pack = pack_units(*constants.values(), offsets, backend="torch")
    weight.requires_grad_()
    compiled = torch.compile(
        lambda z, s, m, w: spectral_reweight_packed(z, s, m, w, pack).square().sum(),
        fullgraph=True,
        backend="aot_eager",
    )
    for rows in (2, 3, 5):
        inputs, _, _, _ = problem(rows=rows, dtype=torch.float32)
        (ours,) = torch.autograd.grad(compiled(*inputs, weight), weight)
        (truth,) = torch.autograd.grad(spectral_reweight_packed(*inputs, weight, pack).square().sum(), weight)
        assert torch.allclose(ours, truth, rtol=1e-5)
