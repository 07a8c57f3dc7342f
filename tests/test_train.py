"""Heads, caches, fitting, evaluating, predicting."""

import math

import pytest
import torch
from test_towers import build, images_for

import residual_kernels as rk
from residual_kernels.train import compare


@pytest.fixture(scope="module")
def tower():
    return build()


@pytest.fixture(scope="module")
def data(tower):
    """60 images of 3 classes that differ in brightness, so that there is something to learn."""
    labels = torch.arange(60) % 3
    images = images_for(tower, 60) * 0.5 + (labels - 1.0)[:, None, None, None]
    return images, labels


@pytest.fixture(scope="module")
def bases(tower, data):
    return rk.fit_bases(tower, data[0].split(20), kinds=("head", "mlp"))


@pytest.fixture(scope="module")
def cache(tower, data):
    return rk.encode(
        tower,
        list(zip(data[0].split(16), data[1].split(16), strict=True)),
        kinds=("head", "mlp"),
        class_names="abc",
    )


@pytest.fixture
def head():
    return rk.ZeroShotHead(
        torch.randn(32, 3, generator=torch.Generator().manual_seed(2)), "abc", math.log(10.0)
    )


def test_head_is_the_formula(head):
    y = torch.randn(5, 32)
    expected = 10 * torch.nn.functional.normalize(y, dim=-1) @ head.class_vectors
    assert torch.allclose(head(y), expected, atol=1e-5)
    assert torch.allclose(head(100 * y), expected, atol=1e-4)  # only the angle counts
    with pytest.raises(ValueError, match="two different models"):
        head(torch.randn(5, 31))
    with pytest.raises(ValueError, match="column for each"):
        rk.ZeroShotHead(torch.zeros(32, 2), "abc")
    with pytest.raises(ValueError, match="NaN"):
        rk.ZeroShotHead(torch.full((32, 3), float("nan")), "abc")


def test_head_from_text_is_open_clips():
    import open_clip

    model, _, tokenizer = rk.load_bundled()
    names, templates = ["circle", "star"], ["a {}", "a blue {}"]
    head = rk.ZeroShotHead.from_text(model, tokenizer, names, templates)
    expected = open_clip.build_zero_shot_classifier(model, tokenizer, names, templates)
    assert torch.allclose(head.class_vectors, expected, atol=1e-6)
    assert torch.allclose(head.logit_scale, model.logit_scale.detach())
    model.train()
    model.visual.eval()
    mixed = rk.ZeroShotHead.from_text(model, tokenizer, names, ["a {}", lambda name: f"a blue {name}"])
    assert model.training  # every module's mode is as it was
    assert not model.visual.training
    rk.ZeroShotHead.from_text(model, tokenizer, names, ["a {} of {style}"])  # other braces are text
    assert torch.allclose(mixed.class_vectors, expected, atol=1e-6)
    for arguments, message in (
        (([], ["a {}"]), "must not be empty"),
        ((["x"], []), "must not be empty"),
        ((["x", "y", "x"], ["a {}"]), "class names repeat: 'x'"),
        ((["x"], ["a thing"]), "where the class name goes"),
    ):
        with pytest.raises(ValueError, match=message):
            rk.ZeroShotHead.from_text(model, tokenizer, *arguments)
    model.visual = build(embed_dim=17)
    with pytest.raises(ValueError, match="text tower embeds into 128 numbers but the image tower into 17"):
        rk.ZeroShotHead.from_text(model, tokenizer, names)


def test_head_from_prototypes(cache):
    head = rk.ZeroShotHead.from_prototypes(cache)
    for k in range(3):
        assert torch.allclose(head.class_vectors[:, k], cache.output[cache.labels == k].mean(0), atol=1e-6)
    assert head.class_names == ("a", "b", "c")
    assert head.logit_scale == 0
    for labels, names, message in (
        (cache.labels, "abcd", "no image of class d"),
        (cache.labels, "ab", "there are 2 classes"),
        (cache.labels - 1, "abc", "from -1 to 1"),
        (None, "abc", "need labels"),
    ):
        with pytest.raises(ValueError, match=message):
            rk.ZeroShotHead.from_prototypes(cache.output, labels, names)


def test_head_file(head, tmp_path):
    head.save(tmp_path / "head.safetensors")
    again = rk.ZeroShotHead.load(tmp_path / "head.safetensors")
    assert torch.equal(again.class_vectors, head.class_vectors)
    assert again.class_names == head.class_names


def test_fit_learns_and_keeps_the_best_epoch(tower, bases, cache, head):
    residual = rk.ResiDual(tower, bases.of("head").truncate(energy=0.9))
    before = rk.evaluate(residual, head, cache)
    seen = []
    result = rk.fit(residual, head, cache, cache, epochs=12, progress=seen.append)
    after = rk.evaluate(residual, head, cache)
    assert after.accuracy > before.accuracy + 0.3
    assert after.accuracy == result.val_accuracy == max(row.val_accuracy for row in result.history)
    best = result.history[result.best_epoch]
    assert after.loss == pytest.approx(best.val_loss, rel=1e-5)
    assert seen == result.history
    assert [row.epoch for row in seen] == list(range(len(seen)))
    assert result.parameters == len(residual.weight)
    assert after.class_accuracy.mean() == pytest.approx(after.accuracy)


def test_fit_on_a_loader_is_fit_on_a_cache(tower, data, bases, cache, head):
    """The same batches in the same order: the same weights."""
    weights = []
    for train in (cache, [data]):
        residual = rk.ResiDual(tower, bases.of("head").truncate(energy=0.9), "sum")
        rk.fit(residual, head, train, epochs=3, batch_size=60)
        weights.append(residual.weight.detach())
    assert torch.allclose(*weights, atol=2e-4)
    assert (weights[0] - 1).abs().max() > 0.1


def test_fit_repeats_bit_for_bit_and_hears_its_seed(tower, bases, cache, head):
    runs = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        residual = rk.ResiDual(tower, bases, "sum")
        rk.fit(residual, head, cache, epochs=2, batch_size=16, seed=seed)
        runs[name] = residual.weight.detach().clone()
    assert torch.equal(runs["a"], runs["b"])
    assert not torch.equal(runs["a"], runs["c"])


def test_fit_stops_early_and_never_starts_again(tower, bases, cache, head):
    residual = rk.ResiDual(tower, bases.of("head").truncate(energy=0.9), init="normal")
    start = residual.weight.detach().clone()
    result = rk.fit(residual, head, cache, cache, lr=1e-12, patience=3)
    assert result.stopped_early
    assert len(result.history) == 4
    assert result.best_epoch == 0
    assert torch.equal(residual.weight, start)


@pytest.mark.parametrize(
    "make",
    [
        lambda tower, bases: rk.CoarseHeads(tower, init="normal"),
        lambda tower, bases: rk.CoarseHeads(tower, "sum", kinds=("head", "mlp")),
        lambda tower, bases: rk.OutputSpectral(tower, bases),
        lambda tower, bases: rk.OutputLinear(tower),
        lambda tower, bases: rk.ResiDual(tower, bases.of("mlp"), "mean"),
    ],
)
def test_every_adapter_fits(tower, bases, cache, head, make):
    adapter = make(tower, bases)
    before = rk.evaluate(adapter, head, cache).loss
    rk.fit(adapter, head, cache, epochs=5)
    assert rk.evaluate(adapter, head, cache).loss < before
    assert all(p.grad is None for p in adapter.parameters())


def test_a_diverging_fit_puts_the_weights_back(tower, bases, cache, head):
    residual = rk.ResiDual(tower, bases.of("head").truncate(energy=0.9))
    steep = rk.ZeroShotHead(head.class_vectors, "abc", 100.0)  # exp(100) is no float32
    with pytest.raises(FloatingPointError, match=r"NaN in epoch 1; lower lr \(now 0.8\)"):
        rk.fit(residual, steep, cache)
    assert (residual.weight == 1).all()


def test_predict(tower, data, bases, cache, head):
    residual = rk.ResiDual(tower, bases.of("head").truncate(energy=0.9), init="normal")
    with torch.no_grad():
        logits = head(residual(data[0]))
    for source in (data[0], cache, data[0].split(7), [(x, None) for x in data[0].split(9)]):
        found = rk.predict(residual, head, source)
        assert torch.equal(found.labels, logits.argmax(1))
        assert torch.allclose(found.probabilities, logits.softmax(1), atol=1e-5)
        assert torch.allclose(found.probabilities.sum(1), torch.ones(60), atol=1e-6)
    assert found.class_names == ("a", "b", "c")
    spoilt = data[0].clone()
    spoilt[11] = float("inf")
    with pytest.raises(ValueError, match="index 11"):
        rk.predict(residual, head, spoilt.split(5))


def test_refusals(tower, data, bases, cache, head):
    residual = rk.ResiDual(tower, bases.of("head").truncate(energy=0.9))
    other = rk.encode(build(seed=4), [data], kinds=("head",))
    mlp = rk.encode(tower, [data], kinds=("mlp",))
    plain = rk.encode(tower, [data[0]])
    high = rk.encode(tower, [(data[0], data[1] + 1)])
    cases = [
        (lambda: rk.fit(residual, head, other), "other weights"),
        (lambda: rk.fit(residual, head, mlp), "no terms of kind head"),
        (lambda: rk.fit(residual, head, plain), "needs labels"),
        (lambda: rk.fit(residual, head, high), "labels run from 1 to 3, but the head has 3 classes"),
        (lambda: rk.fit(residual, head, cache, epochs=0), "at least 1"),
        (lambda: rk.fit(residual, head, []), "no images"),
        (lambda: rk.fit(tower, head, cache), "expected a ResiDual"),
        (lambda: rk.evaluate(residual, head, []), "no images"),
        (lambda: rk.fit(residual, head, iter([data])), "train can be read only once"),
        (lambda: rk.fit(residual, head, cache, iter([data])), "val can be read only once"),
        (lambda: rk.fit(residual, head, [(data[0], data[1][:5])]), "60 images but labels"),
        (lambda: rk.evaluate(residual, head, [data[0]]), "needs labels"),
        (lambda: rk.evaluate(residual, head, [data[0][0, 0, 0]]), "must be a tensor"),
        (lambda: rk.evaluate(residual, head, [{"image": data[0]}]), "under .pixel_values."),
    ]
    for run, message in cases:
        with pytest.raises(ValueError, match=message):
            run()
        assert (residual.weight == 1).all()


def test_fit_trains_the_adapter_alone(data, head):
    """README's own sequence: detach, then fit again.

    The tower's parameters are trainable again, and stay put.
    """
    tower = build()
    tower.requires_grad_(True)
    residual = rk.ResiDual(tower, rk.fit_bases(tower, [data[0]]).truncate(energy=0.9))
    residual.detach()
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    result = rk.fit(residual, head, [data], epochs=2)
    assert result.parameters == len(residual.weight)
    assert all(torch.equal(before[name], value) for name, value in tower.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in tower.parameters())


def test_empty_batches_are_passed_over(tower, data, bases, head):
    residual = rk.ResiDual(tower, bases.of("head"))
    none = data[0][:0], data[1][:0]
    whole = rk.evaluate(residual, head, [data])
    assert rk.evaluate(residual, head, [none, data, none]).loss == pytest.approx(whole.loss)
    found = rk.predict(residual, head, data[0][:0])
    assert found.labels.shape == (0,)
    assert found.probabilities.shape == (0, 3)


def test_the_callers_head_stays_where_it_is(tower, data, bases, cache, head):
    before = head.class_vectors
    rk.fit(rk.ResiDual(tower, bases.of("head")), head, cache, epochs=1)
    assert head.class_vectors is before


def test_bases_from_a_cache_are_bases_from_the_images(tower, data, bases, cache):
    again = rk.fit_bases(tower, cache, kinds=("head", "mlp"))
    for row in again.layout:
        if row.kind != "emb":
            assert torch.allclose(again.mean(row), bases.mean(row), atol=1e-6)
            assert torch.allclose(
                again.explained_variance(row), bases.explained_variance(row), rtol=1e-3, atol=1e-7
            )
    with pytest.raises(ValueError, match="no terms of kind emb"):
        rk.fit_bases(tower, cache, kinds=("emb",))
    with pytest.raises(ValueError, match="other weights"):
        rk.fit_bases(build(seed=4), cache)


def test_random_patch_dropout_is_refused(data):
    tower = build(patch_dropout=0.5)
    rk.encode(tower, [data[0]])
    tower.train()
    for run in (lambda: rk.encode(tower, [data[0]]), lambda: rk.fit_bases(tower, [data[0]])):
        with pytest.raises(ValueError, match="drops patches at random"):
            run()


def test_an_adapter_beside_its_tower(tower, data, bases, cache, head):
    residual = rk.ResiDual(tower, bases.of("head").truncate(energy=0.9), init="normal")
    before = rk.predict(rk.build("base", tower), head, cache).labels == cache.labels
    after = rk.predict(residual, head, cache).labels == cache.labels
    for source in (cache, [data]):
        found = compare(residual, head, source)
        assert found.before == evaluation(rk.evaluate(rk.build("base", tower), head, cache))
        assert found.after == evaluation(rk.evaluate(residual, head, cache))
        assert (found.mended, found.broken) == (int((after & ~before).sum()), int((before & ~after).sum()))
    assert found.mended
    with pytest.raises(ValueError, match="no images"):
        compare(residual, head, [])


def evaluation(wanted):
    """Equal to evaluations of the same confusions and nearly the same loss."""

    class Alike:
        def __eq__(self, other):
            return torch.equal(other.confusion, wanted.confusion) and other.loss == pytest.approx(wanted.loss)

    return Alike()
