"""The drop-in modules: what they compute, what they keep, what they refuse,
and how they live in other code."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from test_towers import build, images_for, relative

import residual_kernels as rk
from residual_kernels.adapters.residual import RESTS, TowerAdapter


@pytest.fixture
def tower():
    return build().double()


@pytest.fixture
def images(tower):
    return images_for(tower, 12, torch.float64)


@pytest.fixture
def bases(tower, images):
    return rk.fit_bases(tower, [images_for(tower, 30, torch.float64, seed=7)], kinds=("emb", "head", "mlp"))


def definition(tower, images, bases, weight_of, kinds, rest):
    """METHOD's formula, word for word: full units, full bases, no low rank."""
    with torch.no_grad():
        parts = rk.decompose(tower, images)
    units, y = parts.units(), 0
    for row in parts.layout:
        x = units[:, row.index]
        if row.kind in kinds:
            phi, mu = bases.components(row), bases.mean(row)
            y = y + ((x - mu) @ phi.T * weight_of(row)) @ phi
        elif rest == "sum":
            y = y + x
        elif rest == "mean":
            y = y + bases.mean(row)
    return y


@pytest.mark.parametrize("rest", ["zero", "sum", "mean"])
@pytest.mark.parametrize("kinds", [("head",), ("mlp",), ("head", "mlp"), ("emb", "head", "mlp")])
def test_residual_is_the_formula(tower, images, bases, kinds, rest):
    kept = bases.of(*kinds).truncate(energy=0.8)
    residual = rk.ResiDual(tower, kept, rest, init="normal", seed=3)
    assert sum(p.requires_grad for p in residual.parameters()) == 1
    expected = definition(
        tower,
        images,
        kept if rest != "mean" else bases_with_means(bases, kept),
        residual.weight_of,
        kinds,
        rest,
    )
    y = residual(images)
    assert relative(y, expected) < 1e-11
    with torch.no_grad():
        residual.weight[0] += 0.5
    assert relative(residual(images), expected) > 1e-9


def bases_with_means(bases, kept):
    """`kept` where it holds a kind, the full bases elsewhere (their means stand for the rest)."""
    return replace(bases, parts=bases.parts | kept.parts)


def test_full_rank_with_ones_and_kept_means_is_the_tower(tower, images, bases):
    """weight = 1, all components, rest = sum: what is lost is exactly the adapted units' means."""
    residual = rk.ResiDual(tower, bases.of("head", "mlp"), "sum")
    lost = sum(bases.mean(row) for row in residual.layout if row.kind != "emb")
    with torch.no_grad():
        assert relative(residual(images) + lost, tower(images)) < 1e-11


@pytest.mark.parametrize("rest", ["zero", "sum", "mean"])
def test_one_image_does_not_depend_on_its_neighbours(tower, images, bases, rest):
    residual = rk.ResiDual(tower, bases.of("head").truncate(energy=0.9), rest)
    with torch.no_grad():
        assert relative(residual(images[:1]), residual(images)[:1]) < 1e-12


def test_baselines_are_their_formulas(tower, images, bases):
    with torch.no_grad():
        parts = rk.decompose(tower, images)
        units, out = parts.units(), tower(images)
        weight = torch.randn(6, dtype=torch.float64)
        coarse = rk.CoarseHeads(tower, init=weight)
        heads = (units[:, 1:7] * weight[:, None]).sum(1)
        assert relative(coarse(images), heads) < 1e-12
        kept = rk.CoarseHeads(tower, "sum", init=weight)
        assert relative(kept(images), heads + units[:, [0, 7, 8]].sum(1)) < 1e-12
        mean = rk.CoarseHeads(tower, "mean", init=weight, bases=bases)
        assert relative(mean(images), heads + bases.mean(0) + bases.mean(7) + bases.mean(8)) < 1e-12
        spectral = rk.OutputSpectral(tower, bases, init="normal")
        part = bases.parts["output"]
        phi, mu = part.components, part.mean[0]
        assert relative(spectral(images), ((out - mu) @ phi.T * spectral.weight) @ phi) < 1e-12
        linear = rk.OutputLinear(tower, seed=4)
        assert relative(linear(images), out @ linear.linear.weight.T + linear.linear.bias) < 1e-12
        assert torch.equal(rk.OutputLinear(tower, seed=4).linear.weight, linear.linear.weight)
        assert not torch.equal(rk.OutputLinear(tower, seed=5).linear.weight, linear.linear.weight)


def test_gradients_of_weight_and_images(tower, bases):
    residual = rk.ResiDual(tower, bases.of("head").truncate(components=2), "sum")
    images = images_for(tower, 2, torch.float64).requires_grad_()
    y = residual(images)
    upstream = torch.randn_like(y)
    dimages, dweight = torch.autograd.grad(y, (images, residual.weight), upstream)
    step = 1e-6
    direction = torch.randn_like(images)
    with torch.no_grad():
        slope = (
            (residual(images + step * direction) - residual(images - step * direction)) * upstream
        ).sum() / (2 * step)
        assert abs(float(slope) - float((dimages * direction).sum())) < 1e-6 * float(dimages.norm())
        residual.weight[3] += step
        high = residual(images)
        residual.weight[3] -= 2 * step
        low = residual(images)
    assert abs(float(((high - low) * upstream).sum() / (2 * step)) - float(dweight[3])) < 1e-6


def test_cached_units_give_the_same(tower, images, bases):
    for rest in ("zero", "sum", "mean"):
        residual = rk.ResiDual(tower, bases.of("head").truncate(energy=0.9), rest)
        cache = rk.encode(tower, images.split(5), kinds=("head",))
        with torch.no_grad():
            assert relative(residual.from_units(cache.terms(slice(None))), residual(images)) < 1e-12
    wrong = rk.encode(tower, [images], kinds=("mlp",))
    with pytest.raises(ValueError, match="no terms of kind head"):
        residual.from_units(wrong.terms(slice(None)))


def test_the_tower_shows_through(bases):
    tower = build(output_tokens=True).double()
    fitted = rk.fit_bases(tower, [images_for(tower, 9, torch.float64)])
    tower.preprocess_cfg = {"size": (16, 24)}
    residual = rk.ResiDual(tower, fitted)
    assert residual.tower is tower
    assert residual.image_size == tower.image_size
    assert residual.preprocess_cfg is tower.preprocess_cfg
    assert residual.output_tokens is True
    assert residual.no_weight_decay() == tower.no_weight_decay()
    images = images_for(tower, 2, torch.float64)
    y, tokens = residual(images)
    assert torch.allclose(tokens, tower(images)[1])
    assert y.shape == (2, 32)
    residual.set_grad_checkpointing(True)
    assert tower.transformer.grad_checkpointing
    assert residual.forward_intermediates(images, indices=1)["image_features"].shape == (2, 32)
    residual.output_tokens = False  # set on the tower, so that both agree
    assert tower.output_tokens is False
    assert residual(images).shape == (2, 32)
    assert "output_tokens" not in vars(residual)
    residual.lock()
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = residual.nothing_of_the_kind
    assert not hasattr(residual, "nothing_of_the_kind")
    residual.train()
    assert tower.training
    residual.eval()
    assert not tower.training


def test_frozen_while_wrapped_and_restored_by_detach(tower, bases):
    tower.requires_grad_(True)
    tower.conv1.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in tower.named_parameters()}
    kept = bases.of("head").truncate(energy=0.9)
    first, second = rk.ResiDual(tower, kept), rk.CoarseHeads(tower)
    assert not any(p.requires_grad for p in tower.parameters())
    assert first.detach() is tower
    assert not any(p.requires_grad for p in tower.parameters())  # the second still lives on it
    second.detach()
    assert flags == {name: p.requires_grad for name, p in tower.named_parameters()}
    third = rk.ResiDual(tower, kept)
    twin = copy.deepcopy(third)
    assert flags == {name: p.requires_grad for name, p in twin.detach().named_parameters()}
    assert not any(p.requires_grad for p in tower.parameters())
    third.detach()


def test_two_on_one_tower(tower, images, bases):
    fine = rk.ResiDual(tower, bases.of("head").truncate(energy=0.5), init="normal")
    full = rk.ResiDual(tower, bases.of("head", "mlp"), "sum", init="normal")
    with torch.no_grad():
        alone = fine(images)
        full(images)
        assert torch.equal(fine(images), alone)
        before = tower(images)
    assert relative(alone, before) > 1e-3


def test_train_tower(tower, bases):
    kept = bases.of("head").truncate(energy=0.9)
    tower.requires_grad_(True)
    with pytest.raises(ValueError, match="folded into the constants"):
        rk.ResiDual(tower, kept, train_tower=True)
    for name, p in tower.named_parameters():
        if "out_proj" in name or name.startswith("ln_post") or name == "proj":
            p.requires_grad_(False)
    residual = rk.ResiDual(tower, kept, train_tower=True)
    residual(images_for(tower, 2, torch.float64)).square().sum().backward()
    assert residual.weight.grad.abs().sum() > 0
    assert tower.conv1.weight.grad.abs().sum() > 0
    assert tower.transformer.resblocks[0].mlp.c_fc.weight.grad.abs().sum() > 0
    assert tower.proj.grad is None
    residual.lock()
    frozen = rk.CoarseHeads(tower)
    with pytest.raises(ValueError, match="nothing in this tower would train"):
        rk.ResiDual(tower, kept, train_tower=True)
    with pytest.raises(ValueError, match="folded into the constants"):
        frozen.lock(unlocked_groups=1)
    assert not any(p.requires_grad for p in tower.parameters())


def test_initial_weights(tower, bases):
    kept = bases.of("head").truncate(energy=0.9)
    assert (rk.ResiDual(tower, kept).weight == 1).all()
    drawn = rk.ResiDual(tower, bases, "sum", init="normal", seed=1).weight
    assert abs(float(drawn.detach().mean()) - 1) < 0.2
    assert abs(float(drawn.detach().std()) - 1) < 0.2
    assert torch.equal(drawn, rk.ResiDual(tower, bases, "sum", init="normal", seed=1).weight)
    assert not torch.equal(drawn, rk.ResiDual(tower, bases, "sum", init="normal", seed=2).weight)
    values = torch.arange(len(rk.ResiDual(tower, kept).weight), dtype=torch.float64)
    own = rk.ResiDual(tower, kept, init=values)
    with torch.no_grad():
        own.weight.zero_()
    assert values[-1] > 0  # a copy
    runs = torch.cat(
        [rk.ResiDual(tower, kept, init=values).weight_of(row) for row in own.layout.select("head")]
    )
    assert torch.equal(runs, values)
    with pytest.raises(ValueError, match="not adapted"):
        own.weight_of(0)


def test_refusals_leave_the_tower_as_it_was(bases):
    tower = build().double()  # trainable: a constructor that froze it and failed would show
    kept = bases.of("head").truncate(energy=0.9)
    cases = [
        (lambda: rk.ResiDual(tower, kept, "everything"), "rest must be one of"),
        (lambda: rk.ResiDual(tower, kept, init="zeros"), "init must be"),
        (lambda: rk.ResiDual(tower, kept, init=torch.ones(3)), "init must have shape"),
        (lambda: rk.CoarseHeads(tower, "mean"), "needs bases"),
        (lambda: rk.CoarseHeads(tower, "mean", kinds=("mlp",), bases=kept), "needs bases of kind 'mlp'"),
        (lambda: rk.CoarseHeads(tower, kinds=("neck",)), "must name"),
        (lambda: rk.ResiDual(tower, kept, backend="cuda"), "unknown backend"),
        (lambda: rk.ResiDual(tower, rk.fit_bases(build(seed=9).double(), FEW)), "other weights"),
        (
            lambda: rk.ResiDual(tower, rk.fit_bases(build(head_width=24).double(), FEW)),
            "another tower: .* heads",
        ),
        (lambda: rk.ResiDual(tower, rk.fit_bases(build(layers=3).double(), FEW)), "another tower"),
    ]
    for make, message in cases:
        with pytest.raises(ValueError, match=message):
            make()
        assert all(p.requires_grad for p in tower.parameters())
    residual = rk.ResiDual(tower, kept)
    for make in (lambda: rk.ResiDual(residual, kept), lambda: rk.OutputLinear(residual)):
        with pytest.raises(ValueError, match="wrapped in a ResiDual already"):
            make()


FEW = [torch.randn(4, 3, 16, 24, dtype=torch.float64)]


def test_flags_survive_adapters_that_were_dropped(tower, bases):
    kept = bases.of("head").truncate(energy=0.9)
    rk.ResiDual(tower, kept)  # garbage at once, never detached
    rk.CoarseHeads(tower).detach()
    assert all(p.requires_grad for p in tower.parameters())


def test_casts_keep_weights_and_offsets_in_float32(bases):
    tower = build()
    residual = rk.ResiDual(
        tower, rk.fit_bases(tower, [images_for(tower, 20)], kinds=("head", "mlp")), "mean", init="normal"
    )
    images = images_for(tower, 4)
    with torch.no_grad():
        truth = residual(images)
        held = {
            name: value.clone() for name, value in residual.named_buffers() if not name.startswith("tower.")
        }
        residual.to(torch.bfloat16)
        low = residual(images.bfloat16())
        assert low.dtype == torch.bfloat16
        assert relative(low.float(), truth) < 0.03
        for name, value in residual.named_buffers():
            if name in held:
                assert value.dtype == held[name].dtype
                assert torch.equal(value, held[name]), name
        assert residual.weight.dtype == torch.float32
        assert residual.tower.conv1.weight.dtype == torch.bfloat16
        residual.double()
        assert residual(images.double()).dtype == torch.float64
        assert residual.weight.dtype == torch.float64


def test_autocast(bases):
    tower = build()
    residual = rk.ResiDual(tower, rk.fit_bases(tower, [images_for(tower, 20)]).truncate(energy=0.9))
    images = images_for(tower, 4)
    truth = residual(images)
    with torch.autocast("cpu", torch.bfloat16):
        y = residual(images)
        loss = y.float().square().mean()
    loss.backward()
    assert relative(y.float(), truth) < 0.05
    assert residual.weight.grad.dtype == torch.float32
    assert torch.isfinite(residual.weight.grad).all()


def every_adapter(tower, bases):
    kept = bases.of("head").truncate(energy=0.9)
    yield from (rk.ResiDual(tower, kept, rest, init="normal") for rest in RESTS)
    yield from (rk.CoarseHeads(tower, rest, bases=bases, init="normal") for rest in RESTS)
    yield rk.OutputSpectral(tower, bases, init="normal")
    yield rk.OutputLinear(tower)


def test_state_dict_carries_everything_to_another_tower(tower, images, bases):
    """Loaded into an adapter around a tower with other weights, it gives the first one's numbers,
    cached units too."""
    other = build(seed=5).double()
    theirs = rk.fit_bases(other, [images_for(other, 30, torch.float64, seed=7)], kinds=("emb", "head", "mlp"))
    sized = bases.of("head").truncate(energy=0.9)
    sizes = [len(sized.components(row)) for row in sized.layout.select("head")]
    own = copy.deepcopy(other.state_dict())
    for one, two in zip(list(every_adapter(tower, bases)), list(every_adapter(other, theirs)), strict=True):
        other.load_state_dict(own)
        if isinstance(one, rk.ResiDual):  # as many components as the first one's, head by head
            part = theirs.parts["head"]
            from residual_kernels.bases.spectral_bases import _take

            held = replace(theirs.of("head"), parts=theirs.of("head").parts | {"head": _take(part, sizes)})
            two = rk.ResiDual(other, held, one.rest.name)
        with torch.no_grad():
            expected = one(images)
            assert relative(two(images), expected) > 1e-3
            two.load_state_dict(copy.deepcopy(one.state_dict()))
            assert relative(two(images), expected) < 1e-12
            cache = rk.encode(tower, [images])
            cached = two.from_units(cache.terms(slice(None)))
            assert relative(cached, expected) < 1e-12


def test_packed_constants_follow_a_load(tower, images, bases):
    """Constants loaded after a first call are the ones used."""
    kept = bases.of("head").truncate(components=3)
    one, other = rk.ResiDual(tower, kept), rk.ResiDual(tower, kept)
    held = kept.parts["head"].components.clone()
    with torch.no_grad():
        other.units["head"].basis.mul_(2.0)  # its own copy: neither the bases nor `one` change
        twice = copy.deepcopy(other.state_dict())
        first = one(images)
        one.load_state_dict(twice)
        assert relative(one(images), 2 * first) < 1e-12
    assert torch.equal(kept.parts["head"].components, held)


def test_the_towers_own_checkpoint_loads(tower, images, bases):
    residual = rk.ResiDual(tower, bases.of("head").truncate(energy=0.9), init="normal")
    own = copy.deepcopy(tower.state_dict())
    weight = residual.weight.detach().clone()
    with torch.no_grad():
        expected = residual(images)
        tower.transformer.resblocks[0].mlp.c_fc.weight.zero_()
        assert relative(residual(images), expected) > 1e-3
        residual.load_state_dict(own)
        assert torch.equal(residual(images), expected)
    assert torch.equal(residual.weight, weight)
    other = {name: value + 0.1 for name, value in own.items()}
    with pytest.raises(ValueError, match="so the constants would not match"):
        residual.load_state_dict(other)
    assert torch.equal(tower.conv1.weight, own["conv1.weight"])  # nothing was loaded
    clip = torch.nn.Module()
    clip.visual = residual
    clip.load_state_dict({f"visual.{name}": value for name, value in own.items()})
    with torch.no_grad():
        assert torch.equal(residual(images), expected)


def test_copies_and_pickles(tower, images, bases):
    residual = rk.ResiDual(tower, bases.of("head").truncate(energy=0.9), "sum", init="normal")
    with torch.no_grad():
        expected = residual(images)
        for twin in (copy.deepcopy(residual), pickle.loads(pickle.dumps(residual))):
            assert torch.equal(twin(images), expected)
            twin.weight.zero_()
            assert not torch.equal(twin(images), expected)
        assert torch.equal(residual(images), expected)


def test_meta_construction_then_load(tower, images, bases):
    for one in every_adapter(tower, bases):
        empty = copy.deepcopy(one).to("meta")
        assert all(p.is_meta for p in empty.parameters())
        empty.to_empty(device="cpu")
        empty.load_state_dict(one.state_dict())
        with torch.no_grad():
            assert torch.equal(empty(images), one(images))


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_training_step(autocast):
    """One graph without a break, even as the module's first call; the same loss and gradient as eager."""
    tower = build()
    bases = rk.fit_bases(tower, [images_for(tower, 20)]).truncate(energy=0.9)
    residual, twin = (rk.ResiDual(tower, bases, init="normal") for _ in range(2))
    images = images_for(tower, 4)

    def loss_of(module, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return module(x).float().square().mean()

    eager = loss_of(twin, images)
    (expected,) = torch.autograd.grad(eager, twin.weight)
    loss = torch.compile(lambda x: loss_of(residual, x), fullgraph=True, backend="aot_eager")(images)
    (grad,) = torch.autograd.grad(loss, residual.weight)
    bound = 0.05 if autocast else 1e-4
    assert abs(float(loss.detach() / eager.detach()) - 1) < bound
    assert relative(grad, expected) < bound


def test_every_public_adapter_is_one(tower, bases):
    for adapter in (
        rk.ResiDual(tower, bases),
        rk.CoarseHeads(tower),
        rk.OutputSpectral(tower, bases),
        rk.OutputLinear(tower),
    ):
        assert isinstance(adapter, TowerAdapter)
        assert adapter.dim == 32
        assert [p.requires_grad for p in adapter.trainable()] == [True] * len(adapter.trainable())
        assert sum(p.numel() for p in adapter.trainable()) in (len(getattr(adapter, "weight", [])), 32 * 33)
