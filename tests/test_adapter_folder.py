"""One folder of an adapter: written from Python, by `fit` and for the hub alike,
and used by every command alike."""

import csv
import json

import pytest
import torch
from PIL import Image
from test_cli import run  # noqa: F401 (a fixture)
from test_cli_fit import NAMES, digits  # noqa: F401 (a fixture)

import residual_kernels as rk
from residual_kernels.adapters.hub import HubAdapter


class World:
    """The bundled model, bases from the digits themselves, and a head that reads them."""

    def __init__(self, folder):
        self.model, self.preprocess, tokenizer = rk.load_bundled()
        self.tower = self.model.visual
        self.head = rk.ZeroShotHead.from_text(self.model, tokenizer, NAMES, ["the number {}"])
        self.test = rk.UnitCache.load(folder / "c" / "test")
        images = torch.randn(60, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        self.bases = {
            "output": rk.fit_bases(self.tower, [images], kinds=("head", "mlp")),
            "stream": rk.fit_bases(self.tower, [images], placement="stream"),
        }

    def built(self, name):
        method = rk.METHODS[name]
        adapter = rk.build(name, self.tower, self.bases[method.placement], init="ones")
        with torch.no_grad():  # not what it starts from, and not far from the tower
            for p in adapter.trainable():
                p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * p.abs().mean()
        return adapter


@pytest.fixture(scope="module")
def world(digits):  # noqa: F811
    return World(digits)


@pytest.mark.parametrize("name", rk.METHODS)
def test_saved_in_python_used_by_the_commands(run, world, digits, tmp_path, name):  # noqa: F811
    adapter = world.built(name)
    rk.save_adapter(adapter, tmp_path / "a", head=world.head, class_names=NAMES)
    images = [str(path) for path in sorted((digits / "test").rglob("*.png"))]
    batch = torch.stack([world.preprocess(Image.open(path)) for path in images])
    found = rk.predict(adapter, world.head, batch)
    truth = torch.tensor([NAMES.index(path.split("/")[-2]) for path in images])
    code, out, err = run(
        "eval", "--adapter", tmp_path / "a", "--data", digits / "test", "--json", tmp_path / "e.json"
    )
    assert code == 0, err
    seen = json.loads((tmp_path / "e.json").read_text())
    assert seen["accuracy"] == pytest.approx(float((found.labels == truth).double().mean()))
    if name not in ("anchored", "shared", "base", "stream"):  # one of each sort goes through every command
        return
    code, out, err = run(
        "predict", "--adapter", tmp_path / "a", "--data", digits / "test", "--out", tmp_path / "p.csv"
    )
    assert code == 0, err
    with (tmp_path / "p.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == [NAMES[label] for label in found.labels.tolist()]
    ending = "safetensors" if name == "stream" else "pt2"
    code, out, err = run("merge", "--adapter", tmp_path / "a", "--out", tmp_path / f"m.{ending}")
    assert code == 0, err
    if name != "stream":  # which a report refuses: it reads units
        code, out, err = run(
            "report", tmp_path / "a", "--data", digits / "test", "--out", tmp_path / "r.html"
        )
        assert code == 0, err
        assert (tmp_path / "r.html").stat().st_size > 1000


def test_the_names_of_a_head_stand_for_folders_that_were_not_named(run, world, digits, tmp_path):  # noqa: F811
    rk.save_adapter(world.built("fine"), tmp_path / "a", head=world.head)
    code, _, err = run("eval", "--adapter", tmp_path / "a", "--data", digits / "test")
    assert code == 0, err
    other = rk.ZeroShotHead(world.head.class_vectors, ["4", "1", "0"])
    rk.save_adapter(world.built("fine"), tmp_path / "a", head=other)
    code, _, err = run("eval", "--adapter", tmp_path / "a", "--data", digits / "test")
    assert code == 2
    assert "classes that the adapter was not fitted to: four" in err
    rk.save_adapter(world.built("fine"), tmp_path / "a", head=other, class_names=NAMES)
    code, out, err = run("eval", "--adapter", tmp_path / "a", "--data", digits / "test")
    assert code == 0, err


def test_the_model_alone_is_read_by_the_head_it_had_before_the_fit(run, world, digits, tmp_path):  # noqa: F811
    # Every class vector stands for another class.
    moved = rk.ZeroShotHead(world.head.class_vectors.flip(1), NAMES)
    adapter = rk.build("base", world.tower)
    rk.save_adapter(adapter, tmp_path / "a", head=moved, base_head=world.head, class_names=NAMES)
    code, _, err = run(
        "eval", "--adapter", tmp_path / "a", "--data", digits / "test", "--json", tmp_path / "e.json"
    )
    assert code == 0, err
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["base_accuracy"] == pytest.approx(rk.evaluate(adapter, world.head, world.test).accuracy)
    assert found["accuracy"] < found["base_accuracy"]
    other = rk.ZeroShotHead(world.head.class_vectors, ["a", "b", "c"])
    with pytest.raises(ValueError, match="base_head must have the classes of head"):
        rk.save_adapter(adapter, tmp_path / "b", head=moved, base_head=other)


def test_without_a_head(run, world, digits, tmp_path):  # noqa: F811
    rk.save_adapter(world.built("fine"), tmp_path / "a")
    for command in (
        ("eval", "--adapter", tmp_path / "a", "--data", digits / "test"),
        ("predict", "--adapter", tmp_path / "a", "--data", digits / "test", "--out", tmp_path / "p.csv"),
        ("report", tmp_path / "a", "--data", digits / "test"),
    ):
        code, _, err = run(*command)
        assert code == 2
        assert "was saved without a head; save it again with save_adapter(adapter, path, head=head)" in err
    code, _, err = run("merge", "--adapter", tmp_path / "a", "--out", tmp_path / "m.pt2")
    assert code == 0, err


def test_names_that_do_not_fit_are_refused(world, tmp_path):
    adapter = world.built("fine")
    for names, message in (
        (NAMES[:2], "class_names has 2 names, but the head has 3 classes"),
        ("abc", "class_names must be several names"),
        (("one", "one", "two"), "class_names repeat: one"),
    ):
        with pytest.raises(ValueError, match=message):
            rk.save_adapter(adapter, tmp_path / "a", head=world.head, class_names=names)
        assert not (tmp_path / "a").exists()
    with pytest.raises(ValueError, match="takes embeddings of 31 numbers"):
        rk.save_adapter(adapter, tmp_path / "a", head=rk.ZeroShotHead(torch.ones(31, 3), "abc"))
    with pytest.raises(ValueError, match="head must be a ZeroShotHead"):
        rk.save_adapter(adapter, tmp_path / "a", head=world.head.class_vectors)


def test_the_folder_of_a_command_and_of_the_hub_are_the_same(run, world, digits, tmp_path):  # noqa: F811
    code, _, err = run(
        "fit",
        "--method",
        "fine",
        "--data",
        digits / "c" / "train",
        "--epochs",
        1,
        "--out",
        tmp_path / "fitted",
    )
    assert code == 0, err
    adapter, head = rk.pull_adapter(world.tower, tmp_path / "fitted")
    assert head.class_names == NAMES
    folder = rk.AdapterFolder.open(tmp_path / "fitted")
    assert folder.class_names == NAMES
    assert torch.equal(folder.head.class_vectors, head.class_vectors)
    assert torch.equal(folder.adapter(world.tower).weight, adapter.weight)
    HubAdapter(adapter, head, class_names=NAMES).save_pretrained(tmp_path / "pushed")
    rk.save_adapter(adapter, tmp_path / "saved", head=head, class_names=NAMES)
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {path.name for path in (tmp_path / "fitted").iterdir()} == names
    assert {path.name for path in (tmp_path / "pushed").iterdir()} - names == {"README.md", "config.json"}
    found = []
    for place in ("fitted", "pushed", "saved"):
        code, _, err = run(
            "eval",
            "--adapter",
            tmp_path / place,
            "--data",
            digits / "c" / "test",
            "--json",
            tmp_path / "e.json",
        )
        assert code == 0, err
        found.append(json.loads((tmp_path / "e.json").read_text()))
        files = json.loads((tmp_path / place / "adapter.json").read_text())["files"]
        assert files == json.loads((tmp_path / "saved" / "adapter.json").read_text())["files"]
    assert found[0] == found[1] == found[2]


def test_a_folder_of_version_0_1(run, world, digits, tmp_path):  # noqa: F811
    """Its config names no files, and head and classes lie beside it by their plain names."""
    adapter = world.built("fine")
    rk.save_adapter(adapter, tmp_path / "a", head=world.head, class_names=NAMES)
    config = json.loads((tmp_path / "a" / "adapter.json").read_text())
    del config["files"]
    (tmp_path / "a" / "adapter.json").write_text(json.dumps(config))
    folder = rk.AdapterFolder.open(tmp_path / "a")
    assert folder.class_names == NAMES
    assert torch.equal(folder.adapter(world.tower).weight, adapter.weight)
    code, _, err = run("eval", "--adapter", tmp_path / "a", "--data", digits / "test")
    assert code == 0, err
    (tmp_path / "a" / "head.safetensors").unlink()
    assert rk.AdapterFolder.open(tmp_path / "a").head is None
