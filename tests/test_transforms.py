"""The operator and adapters under torch.func: vmap over weights and rows, its gradients, forward mode."""

import pytest
import torch
from test_operator_entrances import CPU
from test_spectral_reweight import problem, run
from test_towers import build, images_for, relative
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap

import residual_kernels as rk
from residual_kernels.ops import pack_units, reference, spectral_reweight, spectral_reweight_packed

NAMES = ("z", "scale", "mean", "weight", "weight_index")


def operands(batched, tasks=2, indexed=False, batch=3):
    """z, scale, mean, weight [T, J] and index of 7 rows; `batched` ones have a batch as last dimension."""
    inputs, constants, weight, offsets = problem(tasks=tasks)
    index = torch.arange(7) % tasks if indexed else None
    values = dict(zip(NAMES, (*inputs, weight, index), strict=True))
    generator = torch.Generator().manual_seed(3)
    for name in batched:
        value = values[name]
        if name == "weight_index":
            each = [torch.randint(tasks, value.shape, generator=generator) for _ in range(batch)]
        else:
            each = [
                value + torch.randn(value.shape, generator=generator, dtype=value.dtype) for _ in range(batch)
            ]
        values[name] = torch.stack(each, dim=-1)
    return values, constants, offsets


BATCHED = {
    "weight": ("weight",),
    "z": ("z",),
    "rows": ("z", "scale", "mean"),
    "scale and weight": ("scale", "weight"),
    "all": ("z", "scale", "mean", "weight"),
}
INDEXED = {**BATCHED, "index": ("weight_index",), "index and weight": ("weight", "weight_index")}
CASES = [(names, 2, False) for names in BATCHED.values()] + [(names, 2, True) for names in INDEXED.values()]
CASES += [(("weight",), 1, False), (("z", "weight"), 1, False)]


def dims(values, batched):
    return tuple(-1 if name in batched else None for name in values)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["unpacked", "packed"])
def test_vmap_is_one_call_for_each_of_a_batch(backend, case, packed):
    batched, tasks, indexed = case
    values, constants, offsets = operands(batched, tasks, indexed)
    pack = pack_units(*constants.values(), offsets, backend=backend)

    def call(z, scale, mean, weight, index):
        if packed:
            return spectral_reweight_packed(z, scale, mean, weight, pack, index)
        return run(
            spectral_reweight,
            (z, scale, mean),
            constants,
            weight,
            offsets,
            weight_index=index,
            backend=backend,
        )

    def loss(*args):
        return call(*args).sin().sum()

    def plain(*args):
        y = run(reference.spectral_reweight, args[:3], constants, args[3], offsets, weight_index=args[4])
        return y.sin().sum()

    each = [
        [v if v is None or name not in batched else v[..., b] for name, v in values.items()] for b in range(3)
    ]
    got = vmap(call, in_dims=dims(values, batched))(*values.values())
    right = torch.stack(
        [run(reference.spectral_reweight, e[:3], constants, e[3], offsets, weight_index=e[4]) for e in each]
    )
    assert got.shape == right.shape
    assert relative(got, right) < 1e-12
    slopes = vmap(grad(loss, argnums=(0, 1, 2, 3)), in_dims=dims(values, batched))(*values.values())
    for place, e in enumerate(each):
        leaves = [x.clone().requires_grad_() for x in e[:4]]
        true = torch.autograd.grad(plain(*leaves, e[4]), leaves)
        for mine, one in zip(slopes, true, strict=True):
            assert relative(mine[place], one) < 1e-12
    assert relative(got.flip(0), right) > 1e-3  # the order of the batch matters


@pytest.mark.parametrize("backend", CPU)
def test_jacobians_nested_batches_and_second_derivatives(backend):
    inputs, constants, weight, offsets = problem(tasks=None)

    def call(z, weight, function=spectral_reweight, **options):
        return run(function, (z, *inputs[1:]), constants, weight, offsets, **options)

    z = inputs[0]
    right = torch.autograd.functional.jacobian(
        lambda z, w: call(z, w, reference.spectral_reweight), (z, weight)
    )
    for make in (jacrev, jacfwd):
        for argument in (0, 1):
            found = make(lambda z, w: call(z, w, backend=backend), argnums=argument)(z, weight)
            assert relative(found, right[argument]) < 1e-12
    grid = torch.randn(2, 3, len(weight), dtype=torch.float64)
    nested = vmap(vmap(lambda w: call(z, w, backend=backend)))(grid)
    assert (
        relative(nested, call(z, grid.flatten(0, 1), reference.spectral_reweight).unflatten(0, (2, 3)))
        < 1e-12
    )
    along = vmap(lambda w, t: jvp(lambda w: call(z, w, backend=backend), (w,), (t,))[1])
    assert relative(along(grid[0], grid[1]), call(z, grid[1], reference.spectral_reweight)) < 1e-12
    for second in (grad, lambda f: lambda w: jvp(f, (w,), (w,))[1]):
        with pytest.raises(RuntimeError, match="once differentiable"):
            second(lambda w: grad(lambda w: call(z, w, backend=backend).sin().sum())(w).sum())(weight)


@pytest.mark.parametrize("rest", ["zero", "sum", "mean", "all"])
def test_many_weights_of_an_adapter_at_once(rest):
    tower = build()
    images = images_for(tower, 8)
    residual = rk.ResiDual(tower, rk.fit_bases(tower, [images]).truncate(energy=0.9), rest=rest)
    cache = rk.encode(tower, [images])
    terms = cache.terms(slice(0, 8))
    weights = 1 + torch.randn(4, len(residual.weight), generator=torch.Generator().manual_seed(0))

    def loss(weight):
        return functional_call(residual, {"weight": weight}, (images,)).square().sum()

    def adapted(weight):
        return functional_call(residual, {"weight": weight}, (images,))

    features = residual.features(terms)
    got = vmap(adapted)(weights)
    many = vmap(lambda w: residual.from_features(features, [w]))(weights)
    slopes = vmap(grad(loss))(weights)
    for weight, y, also, slope in zip(weights, got, many, slopes, strict=True):
        with torch.no_grad():
            residual.weight.copy_(weight)
        assert relative(y, residual(images)) < 1e-5
        assert relative(also, residual(images)) < 1e-5
        (own,) = torch.autograd.grad(residual(images).square().sum(), residual.weight)
        assert relative(slope, own) < 1e-4


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("operator", ["packed", "unpacked"])
def test_a_compiler_drops_no_tangent(backend, operator):
    """It leaves a function with a forward-mode derivative alone, or refuses where the graph must be whole."""
    inputs, constants, weight, offsets = problem(dtype=torch.float32)
    pack = pack_units(*constants.values(), offsets, backend=backend)
    direction = torch.randn(len(weight))

    def output(weight):
        if operator == "packed":
            return spectral_reweight_packed(*inputs, weight, pack)
        return run(spectral_reweight, inputs, constants, weight, offsets, backend=backend)

    def tangent(weight, direction):
        return jvp(output, (weight,), (direction,))[1]

    def dual(weight, direction):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(output(forward_ad.make_dual(weight, direction))).tangent

    truth = output(direction) - output(torch.zeros_like(weight))  # y is affine in the weight
    for function in (
        (tangent,) if operator == "sum" else (tangent, dual)
    ):  # torch refuses duals of sums itself
        torch._dynamo.reset()
        assert relative(torch.compile(function)(weight, direction), truth) < 1e-5
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="Observed exception"):
        torch.compile(tangent, fullgraph=True)(weight, direction)
    assert relative(torch.compile(output)(weight), output(weight)) < 1e-6
