"""Several adapters over one tower: what each gives alone is what its rows get side by side."""

import copy

import pytest
import torch
from test_towers import build, images_for

import residual_kernels as rk


@pytest.fixture(scope="module")
def tower():
    return build()


@pytest.fixture(scope="module")
def bases(tower):
    return rk.fit_bases(tower, [images_for(tower, 30)], kinds=("head", "mlp"))


def head_for(tower, classes, seed=0):
    vectors = torch.randn(32, classes, generator=torch.Generator().manual_seed(seed))
    return rk.ZeroShotHead(vectors, [f"class {i}" for i in range(classes)], 1.0)


def several(tower, bases):
    """Adapters of every kind a set takes; the first three differ in their weights alone."""
    in_stream = rk.fit_bases(tower, [images_for(tower, 10)], placement="stream").truncate(energy=0.9)
    fine = bases.of("head").truncate(energy=0.9)
    return {
        "digits": rk.ResiDual(tower, fine, init="normal", seed=1),
        "letters": rk.ResiDual(tower, fine, init="normal", seed=2),
        "shapes": rk.ResiDual(tower, fine, init="normal", seed=3),
        "full": rk.ResiDual(tower, bases, "sum", init="normal", seed=4),
        "full too": rk.ResiDual(tower, bases, "sum", init="normal", seed=5),
        "anchored": rk.ResiDual(tower, bases, "all", init="normal", seed=13),
        "anchored too": rk.ResiDual(tower, bases, "all", init="normal", seed=14),
        "mean": rk.ResiDual(tower, fine, "mean", init="normal", seed=6),
        "coarse": rk.CoarseHeads(tower, kinds=("head", "mlp"), init="normal", seed=7),
        "coarse too": rk.CoarseHeads(tower, kinds=("head", "mlp"), init="normal", seed=8),
        "output": rk.OutputSpectral(tower, bases, init="normal", seed=9),
        "stream": rk.ResiDual(tower, in_stream, placement="stream", init="normal", seed=10),
        "stream too": rk.ResiDual(tower, in_stream, placement="stream", init="normal", seed=11),
        "last layer": rk.ResiDual(tower, in_stream, placement="stream", layers=[1], init="normal", seed=12),
    }


def test_each_row_gets_what_its_adapter_gives_alone(tower, bases):
    alone = several(tower, bases)
    adapters = rk.AdapterSet(tower, alone)
    assert adapters.groups == (
        ("digits", "letters", "shapes"),
        ("full", "full too"),
        ("anchored", "anchored too"),
        ("mean",),
        ("coarse", "coarse too"),
        ("output",),
        ("stream", "stream too"),
        ("last layer",),
    )
    names = [*alone, None, "letters", "digits", None, "full"]
    images = images_for(tower, len(names))
    with torch.no_grad():
        expected = torch.cat(
            [
                (tower if name is None else alone[name])(image[None])
                for name, image in zip(names, images, strict=True)
            ]
        )
        found = adapters(images, names)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(found, adapters(images, adapters.index(names)))
        wrong = adapters(images, ["digits" if name == "letters" else name for name in names])
        changed = [name == "letters" for name in names]
        assert ((wrong - found).abs().amax(1) > 1e-2).tolist() == changed
        terms = adapters.collect(images)
        kept = [None if name in ("stream", "stream too", "last layer") else name for name in names]
        torch.testing.assert_close(adapters.from_units(terms, kept), adapters(images, kept))
        for name, adapter in alone.items():  # switched, the numbers are the adapter's own, bit for bit
            adapters.active = name
            assert torch.equal(adapters(images), adapter(images))
            assert torch.equal(adapters(images, name), adapter(images))
            torch.testing.assert_close(adapters.removed_mean, adapter.removed_mean)
        adapters.active = None
        assert torch.equal(adapters(images), tower(images))


def test_one_pass_of_the_backbone(tower, bases, monkeypatch):
    adapters = rk.AdapterSet(tower, several(tower, bases))
    calls = []
    view = type(adapters._view)
    terms = view.terms
    monkeypatch.setattr(
        view, "terms", lambda self, x, kinds, *more: calls.append(kinds) or terms(self, x, kinds, *more)
    )
    with torch.no_grad():
        adapters(images_for(tower, 4), ["digits", "full", None, "output"])
        adapters(images_for(tower, 2), ["digits", "letters"])
    assert [set(kinds) for kinds in calls] == [{"emb", "head", "mlp"}, {"head"}]


def test_rows_train_their_own_adapter_only(tower, bases):
    alone = {
        name: adapter for name, adapter in several(tower, bases).items() if name in ("digits", "letters")
    }
    adapters = rk.AdapterSet(tower, alone)
    images = images_for(tower, 4)
    adapters(images, ["digits", "letters", "digits", "digits"]).square().sum().backward()
    for name, rows in (("digits", [0, 2, 3]), ("letters", [1])):
        alone[name](images[rows]).square().sum().backward()
        torch.testing.assert_close(
            adapters.members[name].weight.grad, alone[name].weight.grad, rtol=1e-4, atol=1e-4
        )
    assert adapters.trainable()[0] is adapters.members["digits"].weight
    assert not any(p.requires_grad for p in tower.parameters())


def test_logits_are_read_by_each_rows_own_head(tower, bases):
    alone = several(tower, bases)
    heads = {"digits": head_for(tower, 10), "full": head_for(tower, 3, 1), "coarse": head_for(tower, 10, 2)}
    adapters = rk.AdapterSet(tower, alone, heads=heads)
    images = images_for(tower, 4)
    names = ["full", "digits", "coarse", "full"]
    with torch.no_grad():
        found = adapters.logits(images, names)
        assert found.shape == (4, 10)
        for row, name in enumerate(names):
            expected = heads[name](alone[name](images[row : row + 1]))[0]
            torch.testing.assert_close(found[row, : len(expected)], expected, rtol=1e-4, atol=1e-4)
            assert (found[row, len(expected) :] == float("-inf")).all()
        assert adapters.logits(images, "full").shape == (4, 3)
        assert adapters.logits(images).shape == (4, 10)
    for chosen, message in [
        (["full", None, "full", "full"], "without an adapter"),
        ("mean", "'mean' has no head"),
    ]:
        with pytest.raises(ValueError, match=message):
            adapters.logits(images, chosen)


def test_added_removed_and_kept(tower, bases, tmp_path):
    alone = several(tower, bases)
    digits, letters = alone["digits"], alone["letters"]
    adapters = rk.AdapterSet(tower, {"digits": digits})
    images = images_for(tower)
    adapters.add("letters", letters, head_for(tower, 4))
    adapters.add("mean", alone["mean"])
    assert adapters.names == ("digits", "letters", "mean")
    assert adapters.active == "digits"
    assert sum(key.startswith("shared.") and key.endswith("basis") for key in adapters.state_dict()) == 2
    with torch.no_grad():
        both = adapters(images, ["letters", "mean", "digits"])
        again = rk.AdapterSet(tower, {"digits": letters, "letters": digits, "mean": alone["mean"]})
        again.add("more", digits)
        again.remove("more")
        again.members["letters"].head = head_for(tower, 4, seed=5)
        again.load_state_dict(adapters.state_dict())
        assert torch.equal(again(images, ["letters", "mean", "digits"]), both)
        adapters.remove("digits")
        assert adapters.active is None
        assert torch.equal(adapters(images), tower(images))
        assert not adapters.removed_mean.any()
        with pytest.raises(ValueError, match="no adapter is active"):
            adapters.trainable()
        assert torch.equal(adapters(images, "letters"), letters(images))
        adapters.remove("mean")
        assert adapters.groups == (("letters",),)
        before = letters.weight.clone()
        adapters.members["letters"].weight.add_(1.0)
        assert torch.equal(letters.weight, before)  # the adapter it was made of stays as it is


def test_refusals_change_nothing(tower, bases):
    adapters = rk.AdapterSet(tower, {"digits": several(tower, bases)["digits"]})
    images = images_for(tower, 2)
    other = build(seed=3)
    streams = rk.AdapterSet(tower, {"s": several(tower, bases)["stream"]})
    terms = streams.collect(images)
    merged = several(tower, bases)["stream"]
    merged._originals = {}
    cases = [
        (lambda: rk.AdapterSet(tower, {}), "at least one"),
        (lambda: rk.AdapterSet(adapters, {}), "wrapped in a AdapterSet"),
        (lambda: rk.AdapterSet(tower, {"a": rk.CoarseHeads(tower)}, heads={"b": None}), "heads names b"),
        (lambda: adapters.add("digits", rk.CoarseHeads(tower)), "there is an adapter 'digits' already"),
        (lambda: adapters.add("a.b", rk.CoarseHeads(tower)), "without dots"),
        (lambda: adapters.add("training", rk.CoarseHeads(tower)), "nn.ModuleDict"),
        (lambda: adapters.add(3, rk.CoarseHeads(tower)), "nn.ModuleDict"),
        (lambda: adapters.add("keys", rk.CoarseHeads(tower)), "nn.ModuleDict"),
        (lambda: adapters.add("linear", rk.OutputLinear(tower)), "one weight vector"),
        (lambda: adapters.add("set", adapters), "one weight vector"),
        (lambda: adapters.add("other", rk.CoarseHeads(other)), "wraps another tower"),
        (
            lambda: adapters.add("h", rk.CoarseHeads(tower), rk.ZeroShotHead(torch.ones(5, 2), "ab")),
            "takes embeddings of 5 numbers",
        ),
        (lambda: adapters.remove("letters"), "known are digits"),
        (lambda: setattr(adapters, "active", "letters"), "no adapter 'letters'"),
        (lambda: adapters(images, "letters"), "no adapter 'letters'"),
        (lambda: adapters(images, ["digits"]), "1 entries for 2 images"),
        (lambda: adapters(images, ["digits", "letters"]), "no adapter 'letters'"),
        (lambda: adapters(images, torch.tensor([0, 1])), "from 0 to 1, but there are 1"),
        (lambda: adapters(images, torch.tensor([0, -2])), "from -2 to 0"),
        (lambda: adapters(images, torch.tensor([0.0, 1.0])), "int64"),
        (lambda: adapters.add("m", merged), "unmerge it first"),
        (lambda: adapters.merge(), "no one weight"),
        (lambda: streams.from_units(terms, ["s"] * 2), "works inside the tower"),
        (lambda: rk.save_adapter(adapters, "nowhere"), "save_adapter keeps"),
    ]
    for run, message in cases:
        with pytest.raises(ValueError, match=message):
            run()
    assert adapters.names == ("digits",)
    assert adapters.groups == (("digits",),)
    rk.CoarseHeads(tower)  # the tower is still bare


def test_compiled_moved_attached_and_fitted():
    tower = build()
    bases = rk.fit_bases(tower, [images_for(tower, 30)], kinds=("head", "mlp"))
    alone = {name: a for name, a in several(tower, bases).items() if name in ("digits", "letters")}
    adapters = rk.AdapterSet(tower, alone, heads={"digits": head_for(tower, 4)})
    images = images_for(tower, 4)
    index = adapters.index(["letters", None, "digits", "letters"])
    compiled = torch.compile(adapters, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = adapters(images, index)
        torch.testing.assert_close(compiled(images, index), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(compiled(images), adapters(images), rtol=1e-5, atol=1e-5)

    labels = torch.arange(20) % 4
    cache = rk.encode(tower, [(images_for(tower, 20, seed=5), labels)])
    head = adapters.members["digits"].head
    before = adapters.members["digits"].weight.detach().clone()
    kept = adapters.members["letters"].weight.detach().clone()
    result = rk.fit(adapters, head, cache, epochs=3, lr=0.1)
    assert result.history[-1].train_loss < result.history[1].train_loss
    assert not torch.equal(adapters.members["digits"].weight, before)
    assert torch.equal(adapters.members["letters"].weight, kept)

    low = copy.deepcopy(adapters).to(torch.bfloat16)
    assert low.members["digits"].weight.dtype == torch.float32
    with torch.no_grad():
        y = low(images.bfloat16(), index)
        assert y.dtype == torch.bfloat16
        assert (y.float() - adapters(images, index)).norm() < 0.05 * adapters(images, index).norm()
    assert adapters.detach() is tower
    assert adapters.tower is tower


def test_evaluated_like_the_adapter_itself(tower, bases):
    alone = several(tower, bases)
    adapters = rk.AdapterSet(tower, alone)
    head = head_for(tower, 4)
    batches = [(images_for(tower, 12, seed=5), torch.arange(12) % 4)]
    cache = rk.encode(tower, batches, kinds=("head", "mlp"))
    for name in ("digits", "full", "coarse", "output", "stream"):
        data = batches if name == "stream" else cache
        adapters.active = name
        found, expected = rk.evaluate(adapters, head, data), rk.evaluate(alone[name], head, data)
        assert found.accuracy == expected.accuracy
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    with pytest.raises(ValueError, match="works inside the tower"):
        rk.evaluate(adapters, head, cache)
    adapters.active = None
    with pytest.raises(ValueError, match="no adapter is active"):
        rk.evaluate(adapters, head, cache)
