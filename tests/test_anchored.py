"""The anchored form: y = f(x) + sum_j (weight_j - 1) c_j basis_j,
which weights of one leave as the tower is."""

import copy
import json
import math

import pytest
import test_hugging_face as hugging_face
import test_stream_towers as families
import torch
from test_cli import run  # noqa: F401 (a fixture)
from test_cli_fit import digits  # noqa: F401 (a fixture)
from test_towers import CUSTOM, build, images_for, plain, relative

import residual_kernels as rk
from residual_kernels import towers
from residual_kernels.analysis.weights import read_weights, reset_accuracy

EVERY = ("emb", "head", "mlp")
KINDS = [("head",), ("mlp",), ("head", "mlp"), EVERY]
TOWERS = ["class token", "average, norm before", "tokens returned"]
CLASSES = "abc"


def fitted(tower, kinds=EVERY, **truncation):
    dtype = next(tower.parameters()).dtype
    bases = rk.fit_bases(tower, [images_for(tower, 30, dtype, seed=7)], kinds=kinds)
    return bases.truncate(**truncation) if truncation else bases


def first(output):
    return output[0] if isinstance(output, tuple) else output


def changed(tower, images, bases, weight_of):
    """The formula on units made in full: the tower's output,
    and weight - 1 of what each unit has on its components."""
    with torch.no_grad():
        parts = rk.decompose(tower, images)
    units, y = parts.units(), plain(tower, images)
    for row in parts.layout:
        if row.kind in bases.kinds:
            phi, mu = bases.components(row), bases.mean(row)
            y = y + ((units[:, row.index] - mu) @ phi.T * (weight_of(row) - 1)) @ phi
    return y


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("name", TOWERS)
def test_it_is_the_formula_by_every_door(name, kinds):
    tower = build(**CUSTOM[name]).double()
    bases, images = fitted(tower, kinds, energy=0.8), images_for(tower, 6, torch.float64)
    residual = rk.ResiDual(tower, bases, "all", init="normal", seed=3)
    expected = changed(tower, images, bases, residual.weight_of)
    cache = rk.encode(tower, [images], kinds=kinds)
    terms = cache.terms(slice(None))
    doors = {
        "call": first(residual(images)),
        "units": residual.from_units(terms),
        "features": residual.from_features(residual.features(terms), [residual.weight]),
        "images' features": residual.from_features(residual.features_of_images(images), [residual.weight]),
        "merged": first(residual.merge()(images)),
        "set": first(rk.AdapterSet(tower, {"a": residual})(images)),
    }
    for door, y in doors.items():
        assert relative(y, expected) < 1e-11, door
    assert relative(expected, plain(tower, images)) > 1e-3  # and the change is one
    with torch.no_grad():
        residual.weight[0] += 0.5
    assert relative(first(residual(images)), expected) > 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", TOWERS)
def test_weight_one_is_the_tower_to_the_bit(name, dtype):
    tower = build(**CUSTOM[name])
    bases = fitted(tower, components=5)
    tower = tower.to(dtype)
    images = images_for(tower, 5, dtype)
    residual, coarse = rk.ResiDual(tower, bases, rest="all"), rk.CoarseHeads(tower, "all")
    assert (residual.weight == 1).all()
    assert residual.removed_mean.count_nonzero() == 0
    cache = rk.encode(tower, [images], kinds=EVERY)
    terms = cache.terms(slice(None))
    for adapter in (residual, coarse):
        with torch.no_grad():
            expected = tower(images)
            found = adapter(images)
            if isinstance(expected, tuple):
                assert torch.equal(found[1], expected[1])
            assert torch.equal(first(found), first(expected))
            assert torch.equal(first(rk.AdapterSet(tower, {"a": adapter})(images)), first(expected))
            assert torch.equal(adapter.from_units(terms), terms.output)
            features = adapter.features(terms)
            ones = torch.ones(3, len(adapter.weight), dtype=adapter.weight.dtype)
            y = adapter.from_features(features, [ones])
            assert torch.equal(y, terms.output.to(y.dtype).expand(3, -1, -1))
            apart = {key: torch.stack([value] * 3) for key, value in features.items()}
            assert torch.equal(adapter.from_features(apart, [ones]), y)
            # read along with the units, which sums in another order: the numbers of decompose
            merged, output = first(adapter.merge()(images)), rk.decompose(tower, images).output
            assert torch.equal(merged, output)
        with_gradients = first(adapter(images))
        assert torch.equal(with_gradients, first(tower(images)))
        assert with_gradients.requires_grad
        with torch.no_grad():
            adapter.weight[0] += 0.5
            assert not torch.equal(adapter.from_units(terms), terms.output)
            assert not torch.equal(first(adapter(images)), first(expected))


def test_gradients_at_one_and_elsewhere():
    """Against finite differences of the formula.

    At one, where the tower itself answers, as just beside it.
    """
    tower = build().double()
    bases, images = fitted(tower, ("head", "mlp"), components=3), images_for(tower, 4, torch.float64)
    upstream = torch.randn(4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for init in ("ones", "normal"):
        residual = rk.ResiDual(tower, bases, "all", init=init)
        inputs = images.clone().requires_grad_()
        dweight, dimages = torch.autograd.grad((residual(inputs) * upstream).sum(), (residual.weight, inputs))
        expected = []
        for j in range(0, len(residual.weight), 5):
            values = []
            for step in (1e-5, -1e-5):
                moved = copy.deepcopy(residual)
                with torch.no_grad():
                    moved.weight[j] += step
                    values.append((moved(images) * upstream).sum())
            expected.append((values[0] - values[1]) / 2e-5)
        assert relative(dweight[::5], torch.stack(expected)) < 1e-7
        slow = rk.ResiDual(tower, bases, "all", init=residual.weight.detach() + 1e-12)
        inputs = images.clone().requires_grad_()
        others = torch.autograd.grad((slow(inputs) * upstream).sum(), (slow.weight, inputs))
        assert relative(dweight, others[0]) < 1e-9
        assert relative(dimages, others[1]) < 1e-9


def test_backends_agree():
    tower = build()
    bases, images = fitted(tower, components=4), images_for(tower, 7)
    truth = rk.ResiDual(build().double(), bases, "all", init="normal", seed=1)(images.double()).detach()
    for backend in ("torch", "cpp", "triton"):
        residual = rk.ResiDual(tower, bases, "all", init="normal", seed=1, backend=backend)
        assert relative(residual(images), truth) < 1e-5
        residual.weight.data.fill_(1)
        assert torch.equal(residual(images), tower(images))


def test_coarse_heads_with_the_whole_output_are_those_with_the_rest():
    tower = build().double()
    images = images_for(tower, 4, torch.float64)
    for kinds in (("head",), EVERY):
        one, other = (
            rk.CoarseHeads(tower, rest, kinds=kinds, init="normal", seed=2) for rest in ("all", "sum")
        )
        assert relative(one(images), other(images)) < 1e-12


@pytest.fixture(scope="module")
def task():
    """90 images of 3 classes that differ in brightness, their cache, bases and a head."""
    tower = build().double()
    labels = torch.tensor([0] * 50 + [1] * 25 + [2] * 15)
    images = images_for(tower, 90, torch.float64) * 0.5 + (labels - 1.0)[:, None, None, None]
    cache = rk.encode(tower, [(images, labels)], kinds=("head", "mlp"), class_names=CLASSES)
    vectors = torch.randn(32, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return (
        tower,
        images,
        cache,
        rk.fit_bases(tower, cache, ("head", "mlp")),
        rk.ZeroShotHead(vectors, CLASSES, math.log(10.0)),
    )


def test_a_fit_starts_at_the_tower(task, tmp_path):
    tower, images, cache, bases, head = task
    order = torch.randperm(90, generator=torch.Generator().manual_seed(0))
    train, val = cache.subset(order[:60]), cache.subset(order[60:])
    base = (head(val.output).argmax(1) == val.labels).double().mean()
    for rate in (0.3, 0.01):
        residual = rk.ResiDual(tower, bases, "all")
        result = rk.fit(residual, head, train, val, lr=rate, epochs=4, batch_size=16)
        assert result.history[0].val_accuracy == pytest.approx(float(base))
        assert result.val_accuracy >= float(base)
        many = rk.fit_many(
            rk.ResiDual(tower, bases, "all"), head, train, val, lrs=[1.0, rate], epochs=4, batch_size=16
        )
        assert (many.weight[1] - residual.weight).abs().max() < 1e-9
    loader = [(images[rows], cache.labels[rows]) for rows in order[60:].split(7)]
    assert rk.evaluate(residual, head, loader).accuracy == rk.evaluate(residual, head, val).accuracy
    found = rk.predict(residual, head, images[order[60:]])
    assert torch.equal(found.labels, rk.predict(residual, head, val).labels)
    loaded = rk.ResiDual(tower, bases, "all")
    rk.fit(loaded, head, [(images[order[:60]], cache.labels[order[:60]])], lr=0.01, epochs=2)
    assert not (loaded.weight == 1).all()


def test_it_is_kept_and_loaded(task, tmp_path):
    tower, images, _, bases, _ = task
    residual = rk.ResiDual(tower, bases.truncate(energy=0.8), "all", init="normal")
    rk.save_adapter(residual, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter.json").read_text())["options"] == {"rest": "all"}
    again = rk.load_adapter(copy.deepcopy(tower), tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(again(images[:5]), residual(images[:5]))


def test_rows_of_a_set_have_their_own_weights(task):
    tower, images, _, bases, _ = task
    alone = {
        "a": rk.ResiDual(tower, bases, "all", init="normal", seed=1),
        "ones": rk.ResiDual(tower, bases, "all"),
        "sum": rk.ResiDual(tower, bases, "sum", init="normal", seed=1),
    }
    adapters = rk.AdapterSet(tower, alone)
    assert adapters.groups == (("a", "ones"), ("sum",))
    names = ["a", "ones", None, "sum", "ones", "a"]
    with torch.no_grad():
        found = adapters(images[:6], names)
        for row, name in enumerate(names):
            expected = tower(images[row : row + 1]) if name is None else alone[name](images[row : row + 1])
            assert relative(found[row], expected[0]) < 1e-11
        terms = adapters.collect(images[:6])
        y = adapters.from_units(terms, ["ones"] * 6)
        assert torch.equal(y, terms.output)


def test_weights_are_read_and_reset(task):
    tower, images, cache, bases, head = task
    residual = rk.ResiDual(tower, bases.of("head").truncate(components=4), "all", init="normal")
    reading = read_weights(residual, cache)
    assert torch.allclose(reading.effect, (residual.weight.detach() - 1) * reading.std)
    lost = reset_accuracy(residual, cache, head)
    assert lost.accuracy == pytest.approx(rk.evaluate(residual, head, cache).accuracy)
    for place, unit in enumerate(lost.units[:3]):
        one = copy.deepcopy(residual)
        with torch.no_grad():
            one.weight_of(unit).fill_(1)
        assert float(lost.reset[place]) == pytest.approx(rk.evaluate(one, head, cache).accuracy)


def test_in_the_stream_all_is_what_there_is():
    """Nothing is dropped there, so rest="all" says nothing new; another rest is refused."""
    tower = build()
    bases = rk.fit_bases(tower, [images_for(tower, 20)], placement="stream")
    one = rk.ResiDual(tower, bases, "all", placement="stream", init="normal")
    two = rk.ResiDual(tower, bases, placement="stream", init="normal")
    with torch.no_grad():
        assert torch.equal(one(images_for(tower)), two(images_for(tower)))
    assert one.options() == two.options()
    with pytest.raises(ValueError, match="keeps every other unit"):
        rk.ResiDual(tower, bases, "sum", placement="stream")


def test_by_name(task):
    tower, images, _, bases, _ = task
    adapter = rk.build("anchored", tower, bases)
    assert adapter.adapted == ("head", "mlp")
    assert adapter.rest.name == "all"
    assert (adapter.weight == 1).all()
    assert len(adapter.weight) == sum(len(bases.parts[kind].components) for kind in ("head", "mlp"))
    fewer = rk.build("anchored", tower, bases, components=2)
    assert len(fewer.weight) == 2 * 8
    with pytest.raises(ValueError, match="rest of anchored must be one of all; got 'sum'"):
        rk.build("anchored", tower, bases, rest="sum")
    with pytest.raises(ValueError, match="anchored needs bases"):
        rk.build("anchored", tower)


def test_merged_it_exports(task, tmp_path):
    tower, images, _, bases, _ = task
    residual = rk.ResiDual(copy.deepcopy(tower).float(), bases, "all", init="normal")
    error = rk.export.write(residual.merge(), tmp_path / "m.pt2", images[:2].float())
    assert error < 1e-5


def test_compiled_without_a_break():
    tower = build()
    residual = rk.ResiDual(tower, fitted(tower, ("head",), components=3), "all")
    images = images_for(tower)
    compiled = torch.compile(residual, fullgraph=True, backend="aot_eager")
    assert relative(compiled(images), residual(images)) < 1e-5
    with torch.no_grad():
        residual.weight[1] = 3.0  # the graph does not hold the weight it was made with
        assert relative(compiled(images), residual(images)) < 1e-5
        assert relative(compiled(images), tower(images)) > 1e-3


def test_on_the_command_line(run, digits, tmp_path):  # noqa: F811
    cache = digits / "c" / "train"
    code, out, err = run(
        "encode", "--data", digits / "train", "--out", tmp_path / "c", "--kinds", "head", "--kinds", "mlp"
    )
    assert code == 0, err
    code, out, err = run(
        "fit",
        "--method",
        "anchored",
        "--data",
        tmp_path / "c",
        "--lr",
        0.05,
        "--epochs",
        2,
        "--out",
        tmp_path / "a",
        "--json",
        tmp_path / "f.json",
    )
    assert code == 0, err
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["method"] == "anchored"
    assert found["val_accuracy"] >= found["base_accuracy"]
    for command in (
        ("eval", "--adapter", tmp_path / "a", "--data", digits / "test"),
        ("report", tmp_path / "a", "--data", digits / "test", "--out", tmp_path / "report.html"),
        ("merge", "--adapter", tmp_path / "a", "--out", tmp_path / "m.pt2"),
    ):
        code, out, err = run(*command)
        assert code == 0, err
    assert "the rest: all" in (tmp_path / "report.html").read_text()
    code, out, err = run(
        "fit", "--method", "anchored", "--rest", "zero", "--data", cache, "--out", tmp_path / "b"
    )
    assert code == 2
    assert "rest of anchored must be one of all" in err


@pytest.mark.parametrize("name", [*families.TIMM[::3], *families.HUGGING_FACE[::2], "attention pooling"])
def test_in_other_families_of_towers(name):
    model, images, embedding_of = families.made(name)
    kinds = tuple(kind for kind in towers.view(model).layout.kinds if kind != "emb")
    spread = (
        images + 0.5 * torch.randn(12, *images.shape, generator=torch.Generator().manual_seed(0)).double()
    )
    bases = rk.fit_bases(model, [spread.flatten(0, 1)], kinds=kinds).truncate(components=3)
    own = embedding_of(model, images)
    residual = rk.ResiDual(model, bases, "all")
    with torch.no_grad():
        assert torch.equal(residual(images), residual.tower(images))
        assert relative(residual(images), own) < 1e-12
        residual.weight.normal_(1, 1, generator=torch.Generator().manual_seed(1))
        expected = changed(residual.tower, images, bases, residual.weight_of)
        assert relative(residual(images), expected) < 1e-10
        assert relative(expected, own) > 1e-3
        assert relative(residual.merge()(images), expected) < 1e-10


def test_in_a_transformers_model():
    """Attached, the model's own logits are unchanged by weights of one, to the bit, and changed by others."""
    model = hugging_face.clip().eval()
    images = hugging_face.images_for(model, 4)
    bases = rk.fit_bases(model, [hugging_face.images_for(model, 20, seed=5)])
    text = {"input_ids": torch.tensor([[1, 5, 3]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
    with torch.no_grad():
        before = model(pixel_values=images, **text).logits_per_image
        with rk.attach(model, adapter=rk.build("base", model)):
            assert torch.equal(model(pixel_values=images, **text).logits_per_image, before)
        with rk.attach(model, bases, rest="all") as handle:
            with pytest.raises(ValueError, match="images of 16 x 16 pixels"):
                handle.residual(images[:, :, :8])
            assert torch.equal(model(pixel_values=images, **text).logits_per_image, before)
            handle.residual.weight[3] += 2.0
            assert not torch.equal(model(pixel_values=images, **text).logits_per_image, before)
        assert torch.equal(model(pixel_values=images, **text).logits_per_image, before)
