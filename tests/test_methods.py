"""Methods by name: each record is true of what it builds, and what is built goes through every door."""

import copy
import inspect
import json
from pathlib import Path

import pytest
import torch
from test_towers import build, images_for, relative

import residual_kernels as rk
from residual_kernels.adapters import method_names, methods
from residual_kernels.adapters.methods import Method, identity

NAMES = tuple(rk.METHODS)


@pytest.fixture(scope="module")
def tower():
    return build().double()


@pytest.fixture(scope="module")
def bases(tower):
    some = [images_for(tower, 30, torch.float64, seed=7)]
    return {
        "output": rk.fit_bases(tower, some, kinds=("emb", "head", "mlp")),
        "stream": rk.fit_bases(tower, some, placement="stream"),
    }


def made(name, tower, bases, **options):
    return rk.build(name, tower, bases[rk.METHODS[name].placement], **options)


def test_the_table():
    assert {"base", "fine", "full", "coarse", "output", "linear", "anchored", "shared", "stream"} <= set(
        NAMES
    )
    with pytest.raises(TypeError):
        rk.METHODS["mine"] = rk.METHODS["fine"]
    for name, method in rk.METHODS.items():
        assert isinstance(method, Method)
        assert method.name == name
        assert method.summary


@pytest.mark.parametrize("name", NAMES)
def test_a_record_is_true_of_what_it_builds(tower, bases, name):
    method = rk.METHODS[name]
    adapter = made(name, tower, bases, seed=4)
    assert type(adapter) is method.adapter
    assert adapter.default_lr == method.lr
    assert adapter.adapted == method.kinds
    assert adapter.placement == method.placement
    assert method.learns == bool(adapter.trainable())
    assert method.runs_the_tower == (name == "stream")
    if method.start == "ones":
        assert (adapter.weight == 1).all()
        assert torch.equal(adapter.weight, made(name, tower, bases, init="ones").weight)
        with torch.no_grad():  # and ones are the tower
            images = images_for(tower, 3, torch.float64)
            assert relative(adapter(images), tower(images)) < 1e-12
    elif method.start == "normal":
        assert not (adapter.weight == 1).any()
        assert torch.equal(adapter.weight, made(name, tower, bases, init="normal", seed=4).weight)
        assert not torch.equal(adapter.weight, made(name, tower, bases, seed=5).weight)
    if method.needs_bases:
        with pytest.raises(ValueError, match=f"{name} needs bases"):
            rk.build(name, tower)
    if "rest" in method.options:
        own = adapter.rest.name
        assert method.rests[0] == own
        for rest in method.rests:
            assert made(name, tower, bases, rest=rest).rest.name == rest
    else:
        with pytest.raises(ValueError, match="rest='zero' is about other units"):
            made(name, tower, bases, rest="zero")
    if "components" in method.options:
        assert len(made(name, tower, bases, components=2).component_weight()) == 2 * sum(
            len(adapter.layout.select(kind)) for kind in method.kinds
        )
    else:
        with pytest.raises(ValueError, match=f"components belongs to fine.*; {name} keeps all"):
            made(name, tower, bases, components=2)
    with pytest.raises(ValueError, match=f"{name} has no option 'colour'"):
        made(name, tower, bases, colour="red")


def test_a_name_that_is_none(tower):
    with pytest.raises(ValueError, match="unknown method 'best'; choose from base, fine"):
        rk.build("best", tower)


@pytest.mark.parametrize("name", NAMES)
def test_saved_loaded_merged_and_measured(tower, bases, name, tmp_path):
    adapter = made(name, tower, bases, init="normal" if rk.METHODS[name].start else None, seed=1)
    images = images_for(tower, 6, torch.float64)
    head = rk.ZeroShotHead(torch.randn(32, 3, dtype=torch.float64), "abc", 1.0)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    loader = [(images, labels)]
    with torch.no_grad():
        expected = adapter(images)
        rk.save_adapter(adapter, tmp_path / "a")
        again = rk.load_adapter(copy.deepcopy(tower), tmp_path / "a")
        assert type(again) is type(adapter)
        assert again.method == name  # several methods share a class
        assert torch.equal(again(images), expected)
    truth = (head(expected).argmax(1) == labels).double().mean()
    assert rk.evaluate(again, head, loader).accuracy == pytest.approx(float(truth))
    assert torch.equal(rk.predict(again, head, images).labels, head(expected).argmax(1))
    if name != "stream":
        cache = rk.encode(tower, loader, kinds=("head", "mlp"), class_names="abc")
        assert rk.evaluate(again, head, cache).accuracy == pytest.approx(float(truth))
        assert relative(adapter.from_units(cache.terms(slice(None))), expected) < 1e-12
    merged = again.merge()  # of the stream: the tower, changed, so a copy of it was loaded around
    with torch.no_grad():
        assert relative(merged(images), expected) < 1e-11


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("base", "linear")])
def test_component_weights(tower, bases, name):
    """One number for every component that the adapter reads, in the order of the layout;
    of other weights too."""
    adapter = made(name, tower, bases, init="normal")
    own = adapter.component_weight()
    other = torch.randn(3, 2, len(adapter.weight), dtype=torch.float64)
    assert adapter.component_weight(other).shape == (3, 2, len(own))
    if name != "output":
        runs = [adapter.weight_of(unit) for kind in adapter.adapted for unit in adapter.layout.select(kind)]
        assert torch.equal(torch.cat(runs), own)
        with pytest.raises(ValueError, match="not adapted"):
            adapter.weight_of(0)


def test_what_has_no_components_says_so(tower, bases):
    for name in ("base", "linear"):
        with pytest.raises(ValueError, match="reweights no components"):
            made(name, tower, bases).component_weight()


def test_the_base_is_the_model(tower, bases):
    adapter, images = identity(tower), images_for(tower, 4, torch.float64)
    assert not adapter.trainable()
    head = rk.ZeroShotHead(torch.randn(32, 2, dtype=torch.float64), "ab", 1.0)
    cache = rk.encode(tower, [(images, torch.tensor([0, 1, 0, 1]))], class_names="ab")
    with torch.no_grad():
        assert torch.equal(adapter(images), tower(images))
        assert torch.equal(adapter.from_units(cache.terms(slice(None))), cache.output)
    with pytest.raises(ValueError, match="OutputIdentity learns nothing"):
        rk.fit(adapter, head, cache)


def test_the_streams_door(tower, bases):
    """ResiDual(placement="stream") makes a StreamResiDual, which is still a ResiDual to who asks."""
    one = rk.ResiDual(tower, bases["stream"], placement="stream", layers=[1], init="normal", seed=2)
    two = rk.StreamResiDual(tower, bases["stream"], layers=[1], init="normal", seed=2)
    assert type(one) is type(two) is rk.StreamResiDual
    assert isinstance(one, rk.ResiDual)
    assert one.placement == "stream"
    assert not one.merged
    images = images_for(tower, 2, torch.float64)
    with torch.no_grad():
        assert torch.equal(one(images), two(images))
        assert torch.equal(copy.deepcopy(one)(images), two(images))
    assert "bases" in inspect.signature(rk.ResiDual).parameters
    output = rk.ResiDual(tower, bases["output"].of("head"))
    assert output.placement == "output"
    assert not isinstance(output, rk.StreamResiDual)
    with pytest.raises(ValueError, match="SharedResiDual works at the output; use StreamResiDual"):
        rk.METHODS["shared"].adapter(tower, bases["stream"], placement="stream")


def test_a_folder_of_version_0_1_that_holds_a_stream(tower, bases, tmp_path):
    """Then one class stood for both placements, and its options named the stream."""
    adapter = rk.StreamResiDual(tower, bases["stream"].truncate(components=3), init="normal")
    rk.save_adapter(adapter, tmp_path)
    config = json.loads((tmp_path / "adapter.json").read_text())
    config |= {"class": "ResiDual", "options": {"placement": "stream", **config["options"]}}
    (tmp_path / "adapter.json").write_text(json.dumps(config))
    again = rk.load_adapter(copy.deepcopy(tower), tmp_path)
    with torch.no_grad():
        images = images_for(tower, 2, torch.float64)
        assert torch.equal(again(images), adapter(images))


def test_a_folder_that_names_another_method_is_refused(tower, bases, tmp_path):
    rk.save_adapter(made("full", tower, bases), tmp_path)
    config = json.loads((tmp_path / "adapter.json").read_text())
    assert config["method"] == "full"
    for name in ("shared", "unknown"):
        (tmp_path / "adapter.json").write_text(json.dumps(config | {"method": name}))
        with pytest.raises(
            ValueError, match=f"names the method '{name}'; those of class ResiDual are fine, full"
        ):
            rk.load_adapter(tower, tmp_path)
    older = {key: value for key, value in config.items() if key != "method"}  # as folders were before
    (tmp_path / "adapter.json").write_text(json.dumps(older))
    assert rk.load_adapter(tower, tmp_path).method is None


def test_every_file_of_the_room_is_in_the_table():
    files = {path.stem for path in Path(methods.__file__).parent.glob("*.py")} - {"__init__", "record"}
    assert files == set(method_names.NAMES)
