"""What the operators do with calls that are not the usual one: refused by name, or right."""

import fuzz_operators
import pytest
import torch
from test_spectral_reweight import problem, run
from torch.autograd import forward_ad
from torch.func import grad, hessian, jvp, vmap
from torch.utils._pytree import tree_map

from residual_kernels.ops import (
    backends,
    pack_units,
    packing,
    reference,
    spectral_reweight,
    spectral_reweight_packed,
    spectral_sum,
    unit_moments,
)

CPU = [name for name in ("cpp", "torch") if backends.missing(name, torch.device("cpu")) is None]
ALL = [*CPU, *(["triton"] if backends.missing("triton", torch.device("cpu")) is None else [])]  # interpreted
OPS = torch.ops.residual_kernels


def packed(backend="torch", **options):
    inputs, constants, weight, offsets = problem(tasks=2, **options)
    return inputs, weight, pack_units(*constants.values(), offsets, backend=backend)


def call(inputs, weight, pack, *, z=None, tensors=None, sizes=None, dim=None, index=None):
    return OPS.spectral_reweight(
        inputs[0] if z is None else z,
        *inputs[1:],
        weight,
        index,
        list(tensors or pack.tensors),
        list(sizes or pack.sizes),
        dim or pack.dim,
        pack.backend,
    )


@pytest.mark.parametrize("backend", ALL)
def test_the_registered_operator_refuses_what_does_not_fit_its_pack(backend):
    inputs, weight, pack = packed(backend, dtype=torch.float32)
    assert call(inputs, weight, pack).shape == (2, 7, 12)
    with pytest.raises(ValueError, match=r"z must be .* \[N, 4, 16\]"):
        call(inputs, weight, pack, z=inputs[0][:, :, :1].contiguous())
    with pytest.raises(ValueError, match="J = 27 as packed"):
        call(inputs, weight[:, :1], pack)
    with pytest.raises(ValueError, match="D = 1000000000"):
        call(inputs, weight, pack, dim=10**9)
    with pytest.raises(ValueError, match=r"pack|size"):
        call(inputs, weight, pack, sizes=[*pack.sizes[:-1], 10**7])
    with pytest.raises(ValueError, match=r"pack"):
        call(inputs, weight, pack, tensors=[*pack.tensors[:-1], pack.tensors[-1][:1]])
    with pytest.raises(ValueError, match="from 0 to 5, but there are T = 2"):
        call(inputs, weight, pack, index=torch.tensor([0, 1, 5, 0, 0, 0, 0]))
    with pytest.raises(ValueError, match="dy must be"):
        OPS.spectral_reweight_backward(
            torch.ones(2, 7, 3),
            *inputs,
            weight,
            None,
            list(pack.tensors),
            list(pack.sizes),
            [True] * 4,
            backend,
        )


@pytest.mark.skipif("cpp" not in CPU, reason="the extension is not built")
@pytest.mark.parametrize("column", range(5))
def test_the_table_of_blocks_and_the_offsets_are_checked_by_the_extension(column):
    inputs, weight, pack = packed("cpp")
    table, offsets = pack.tensors[0].clone(), pack.tensors[1].clone()
    table[-1, column] += 1 << 20
    with pytest.raises(ValueError, match="packed"):
        call(inputs, weight, pack, tensors=[table, *pack.tensors[1:]])
    offsets[1] = 1 << 40
    with pytest.raises(ValueError, match="packed"):
        call(inputs, weight, pack, tensors=[pack.tensors[0], offsets, *pack.tensors[2:]])


@pytest.mark.skipif("cpp" not in CPU, reason="the extension is not built")
def test_coefficients_and_moments_are_checked_too():
    _, weight, pack = packed("cpp")
    c = torch.randn(7, 27, dtype=torch.float64)
    arguments = list(pack.tensors), list(pack.sizes)
    assert OPS.spectral_sum(c, weight, *arguments, pack.dim, "cpp").shape == (2, 7, 12)
    with pytest.raises(ValueError, match="J = 27"):
        OPS.spectral_sum(c[:, :3], weight, *arguments, pack.dim, "cpp")
    with pytest.raises(ValueError, match="float64 as packed"):
        OPS.spectral_sum(c.float(), weight, *arguments, pack.dim, "cpp")
    with pytest.raises(ValueError, match="D = 13"):
        OPS.spectral_sum(c, weight, *arguments, 13, "cpp")
    with pytest.raises(ValueError, match="dy must be"):
        OPS.spectral_sum_backward(c, c, weight, *arguments, "cpp")
    with pytest.raises(ValueError, match=r"shift must be float64 \[R, C\+2\]"):
        OPS.unit_moments(torch.randn(3, 2, 5), None, None, torch.zeros(2, 5, dtype=torch.float64), "cpp")
    with pytest.raises(ValueError, match="scale must be"):
        OPS.unit_moments(
            torch.randn(3, 2, 5), torch.ones(1), None, torch.zeros(2, 7, dtype=torch.float64), "cpp"
        )


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("empty", ["rows", "tasks", "components", "coordinates", "dimensions"])
def test_nothing_gives_nothing_or_zeros(backend, empty):
    inputs, constants, weight, offsets = problem(
        rows=0 if empty == "rows" else 7,
        coordinates=0 if empty == "coordinates" else 16,
        dim=0 if empty == "dimensions" else 12,
        sizes=(0, 0, 0, 0) if empty == "components" else (3, 1, 18, 5),
        tasks=0 if empty == "tasks" else 2,
        dtype=torch.float32,
    )
    leaves = [x.clone().requires_grad_() for x in (*inputs, weight)]
    y = run(spectral_reweight, leaves[:3], constants, leaves[3], offsets, backend=backend)
    right = run(reference.spectral_reweight, inputs, constants, weight, offsets)
    assert y.shape == right.shape
    assert torch.allclose(y, right, rtol=1e-4, atol=1e-4)
    for leaf, gradient in zip(leaves, torch.autograd.grad(y.sum(), leaves), strict=True):
        assert gradient.shape == leaf.shape
        assert gradient.isfinite().all()
    if empty == "components":
        assert not y.any()
        assert not any(
            x.any()
            for x in torch.autograd.grad(
                run(spectral_reweight, leaves[:3], constants, leaves[3], offsets, backend=backend).sum(),
                leaves[:3],
            )
        )
    total, moment = unit_moments(inputs[0], inputs[1], inputs[2], backend=backend)
    assert total.isfinite().all()
    assert moment.isfinite().all()


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("indexed", [False, True])
def test_forward_derivatives_of_every_operand(backend, indexed):
    inputs, constants, weight, offsets = problem(tasks=2)
    index = torch.arange(7) % 2 if indexed else None
    directions = tuple(torch.randn_like(x) for x in (*inputs, weight))

    def of(function, **options):
        return lambda z, s, m, w: run(
            function, (z, s, m), constants, w, offsets, weight_index=index, **options
        )

    right = torch.autograd.functional.jvp(of(reference.spectral_reweight), (*inputs, weight), directions)
    got = jvp(of(spectral_reweight, backend=backend), (*inputs, weight), directions)
    for one, other in zip(got, right, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-10)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(weight, directions[3])
        y = of(spectral_reweight, backend=backend)(*inputs, dual)
        slope = forward_ad.unpack_dual(y).tangent
    assert torch.allclose(slope, of(reference.spectral_reweight)(*inputs, directions[3]))


@pytest.mark.parametrize("backend", CPU)
def test_a_registered_operator_refuses_a_tangent_that_it_would_drop(backend):
    inputs, constants, weight, offsets = problem(tasks=2)
    pack = pack_units(*constants.values(), offsets, backend=backend)
    arguments = list(pack.tensors), list(pack.sizes)
    unpacked = [*constants.values(), offsets]
    dy = torch.ones(2, 7, pack.dim, dtype=weight.dtype)
    shift = torch.zeros(4, 18, dtype=torch.float64)
    calls = {
        "reweight": lambda w: OPS.spectral_reweight(*inputs, w, None, *arguments, pack.dim, backend),
        "reweight backward": lambda w: OPS.spectral_reweight_backward(
            dy, *inputs, w, None, *arguments, [True] * 4, backend
        )[1],
        "unpacked": lambda w: OPS.spectral_reweight_unpacked(*inputs, w, None, unpacked, backend),
        "unpacked backward": lambda w: OPS.spectral_reweight_unpacked_backward(
            dy, *inputs, w, None, unpacked, [True] * 4, backend
        )[1],
        "moments": lambda w: OPS.unit_moments(w.sum() * inputs[0], None, None, shift, backend)[0],
        "moments' function": lambda w: unit_moments(w.sum() * inputs[0], None, None, backend=backend)[0],
    }
    if backend == "cpp":
        c = torch.randn(7, 27, dtype=torch.float64)
        calls["sum"] = lambda w: OPS.spectral_sum(c, w, *arguments, pack.dim, "cpp")
        calls["sum backward"] = lambda w: OPS.spectral_sum_backward(dy, c, w, *arguments, "cpp")
    for call in calls.values():
        call(weight)
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="in forward mode"):
            call(forward_ad.make_dual(weight, torch.ones_like(weight)))


@pytest.mark.skipif("cpp" not in CPU, reason="the extension is not built")
def test_transforms_of_the_sum():
    """Forward mode, vmap over tasks and over coefficients, gradients below a vmap."""
    _, constants, weight, offsets = problem(tasks=2)
    pack = pack_units(*constants.values(), offsets, backend="cpp")
    c, direction = torch.randn(7, 27, dtype=torch.float64), torch.randn_like(weight)
    basis = constants["basis"]

    def close(got, right):
        assert torch.allclose(got, right, rtol=1e-12, atol=1e-12)

    y, slope = jvp(lambda w: spectral_sum(c, w, pack), (weight,), (direction,))
    close(y, (c * weight[:, None]) @ basis)
    close(slope, (c * direction[:, None]) @ basis)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(spectral_sum(c, forward_ad.make_dual(weight, direction), pack))
        close(dual.tangent, slope)
    close(vmap(lambda w: spectral_sum(c, w, pack))(weight), y)
    many = torch.stack([c, 2 * c], 1)
    close(
        vmap(lambda one: spectral_sum(one, weight[0], pack), in_dims=1)(many), torch.stack([y[0], 2 * y[0]])
    )
    grads = vmap(grad(lambda w: spectral_sum(c, w, pack).square().sum()))(weight)
    close(grads, 2 * torch.einsum("nj,tnd,jd->tj", c, y, basis))
    with pytest.raises(RuntimeError, match="once differentiable"):
        hessian(lambda w: spectral_sum(c, w, pack).square().sum())(weight[0])


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("operand", ["weight", "z"])
def test_a_penalty_on_a_gradient_is_an_error_and_not_zero(backend, operand):
    """Also where the incoming gradient has none of its own, and the penalty is one term of several."""
    (z, scale, mean), constants, weight, offsets = problem()
    leaf = (weight if operand == "weight" else z).requires_grad_()
    for function in (
        lambda: run(spectral_reweight, (z, scale, mean), constants, weight, offsets, backend=backend),
        lambda: spectral_reweight_packed(
            z, scale, mean, weight, pack_units(*constants.values(), offsets, backend=backend)
        ),
    ):
        y = function()
        (slope,) = torch.autograd.grad(y.sum(), leaf, create_graph=True)
        assert slope.requires_grad
        with pytest.raises(RuntimeError, match="once differentiable"):
            (y.sum() + slope.square().sum()).backward()


def test_a_negative_view_is_read_with_its_sign():
    for dtype in (torch.float16, torch.float32):
        inputs, constants, weight, offsets = problem(dtype=dtype)
        right = run(spectral_reweight, inputs, constants, weight, offsets)
        flipped = [torch._neg_view(-x) for x in inputs]
        got = run(spectral_reweight, flipped, constants, torch._neg_view(-weight), offsets)
        assert torch.equal(got, right)
        y = run(spectral_reweight, inputs, constants, weight.requires_grad_(), offsets)
        assert torch.equal(
            torch.autograd.grad(y, weight, torch._neg_view(-torch.ones_like(y)), retain_graph=True)[0],
            torch.autograd.grad(y, weight, torch.ones_like(y))[0],
        )


class Marked(torch.Tensor):
    """A subclass that holds its numbers itself."""


class Wrapped(torch.Tensor):
    """A subclass that holds another tensor, and no memory of its own: reading its address would be wrong."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, strides=inner.stride()
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        plain = tree_map(lambda x: x.inner if isinstance(x, cls) else x, (arguments, options or {}))
        return tree_map(
            lambda x: cls(x) if isinstance(x, torch.Tensor) else x, function(*plain[0], **plain[1])
        )


@pytest.mark.parametrize("backend", CPU)
def test_subclasses_of_a_tensor_are_read_right(backend):
    inputs, constants, weight, offsets = problem(dtype=torch.float32)
    right = run(spectral_reweight, inputs, constants, weight, offsets, backend=backend)
    marked = [x.as_subclass(Marked) for x in inputs]
    got = run(spectral_reweight, marked, constants, weight.as_subclass(Marked), offsets, backend=backend)
    assert torch.equal(got.as_subclass(torch.Tensor), right)
    with torch.no_grad():
        wrapped = [Wrapped(x) for x in inputs]
        got = run(spectral_reweight, wrapped, constants, Wrapped(weight), offsets, backend=backend)
    assert isinstance(got, Wrapped)
    assert torch.equal(got.inner, right)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_sparse_nested_and_complex_operands_are_refused():
    (z, scale, mean), constants, weight, offsets = problem()
    for bad in (z.to_sparse(), torch.nested.nested_tensor([z[0], z[1]])):
        with pytest.raises(ValueError, match="dense"):
            run(spectral_reweight, (bad, None, None), constants, weight, offsets)
        with pytest.raises(ValueError, match="dense"):
            unit_moments(bad, None, None)
    with pytest.raises(ValueError, match="weight must be a dense real tensor"):
        run(spectral_reweight, (z, scale, mean), constants, weight.to(torch.complex128), offsets)
    with pytest.raises(ValueError, match="basis must be a dense tensor"):
        run(
            spectral_reweight,
            (z, scale, mean),
            {**constants, "basis": constants["basis"].to_sparse()},
            weight,
            offsets,
        )


@pytest.mark.parametrize("backend", CPU)
def test_the_unpacked_operator_compiles_for_any_number_of_rows(backend):
    (z, scale, mean), constants, weight, offsets = problem()
    weight.requires_grad_()

    @torch.compile(dynamic=True, fullgraph=True, backend="aot_eager")
    def compiled(z, scale, mean, weight):
        return run(spectral_reweight, (z, scale, mean), constants, weight, offsets, backend=backend)

    for rows in (7, 5, 3):
        inputs = z[:rows], scale[:rows], mean[:rows]
        right = run(spectral_reweight, inputs, constants, weight, offsets, backend=backend)
        got = compiled(*inputs, weight)
        assert torch.equal(got, right)
        assert torch.equal(
            torch.autograd.grad(got.sum(), weight)[0], torch.autograd.grad(right.sum(), weight)[0]
        )


def test_unpacked_calls_remember_their_pack_until_a_constant_changes(monkeypatch):
    inputs, constants, weight, offsets = problem()
    made = []
    real = packing.pack_units
    monkeypatch.setattr(packing, "pack_units", lambda *a, **k: made.append(1) or real(*a, **k))
    first = run(spectral_reweight, inputs, constants, weight, offsets)
    assert torch.equal(run(spectral_reweight, inputs, constants, weight, offsets), first)
    assert len(made) == 1
    constants["basis"].mul_(2)  # the version counter rises
    assert torch.allclose(run(spectral_reweight, inputs, constants, weight, offsets), 2 * first)
    assert len(made) == 2
    del constants  # the tensors are gone, and their pack with them
    assert not packing._remembered


def test_a_slice_of_the_fuzzer():
    counts = fuzz_operators.fuzz(calls=240, seed=1)
    assert sum(count for name, count in counts.items() if name.endswith("right")) == 120
    assert sum(count for name, count in counts.items() if name.endswith("refused")) > 60


def test_the_fuzzer_notices_a_wrong_value(monkeypatch):
    module = backends.load("torch")
    real = module.spectral_reweight_forward
    monkeypatch.setattr(module, "spectral_reweight_forward", lambda *a: real(*a) * 1.01)
    with pytest.raises(AssertionError, match="is off by"):
        fuzz_operators.fuzz(calls=40, seed=1, only=[("torch", None)])


def test_packed_calls_refuse_the_wrong_dtype_and_sums_the_wrong_device():
    inputs, weight, pack = packed()
    with pytest.raises(ValueError, match="cast one to the other"):
        spectral_reweight_packed(inputs[0].float(), None, None, weight, pack)
    with pytest.raises(ValueError, match="spectral_sum takes"):
        spectral_sum(torch.randn(7, 27), weight, pack)
