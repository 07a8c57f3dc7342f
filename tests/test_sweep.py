"""Sweeps: plans that are wrong are named, work is done once, and the table says what the rows say."""

import csv
import datetime
import json
import statistics
import sys
import zipfile

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from residual_kernels import cli
from residual_kernels import train as training
from residual_kernels.adapters.methods import identity
from residual_kernels.data import models as sources
from residual_kernels.demo import story as demo
from residual_kernels.experiments import sweep
from residual_kernels.experiments.sweep import Sweep, SweepPlan, SweepTable

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 1},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two data sets: real digits in folders with a validation part, and colours in a zip without one."""
    root = tmp_path_factory.mktemp("data")
    images, labels = demo.digit_images()
    sizes = {"train": range(12), "val": range(12, 18), "test": range(18, 24)}
    seen = [0] * 10
    for image, label in zip(images, labels.tolist(), strict=True):
        for part, places in sizes.items():
            if seen[label] in places:
                folder = root / "digits" / part / demo.DIGITS[label]
                folder.mkdir(parents=True, exist_ok=True)
                image.save(folder / f"{seen[label]:03d}.png")
        seen[label] += 1
    noise = np.random.default_rng(0)
    with zipfile.ZipFile(root / "colours.zip", "w") as file:
        for part, count in (("train", 10), ("test", 5)):
            for channel, colour in enumerate(("red", "green", "blue")):
                for number in range(count):
                    pixels = noise.integers(0, 120, (32, 32, 3), np.uint8)
                    pixels[..., channel] += 100
                    with file.open(f"{part}/{colour}/{number}.png", "w") as member:
                        Image.fromarray(pixels).save(member, "PNG")
    return root


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A second model that open_clip knows by name."""
    import open_clip

    path = tmp_path_factory.mktemp("models") / "tiny-sweep.json"
    path.write_text(json.dumps(TINY))
    open_clip.add_model_config(path)
    yield {"model": "tiny-sweep", "pretrained": "none"}
    open_clip.factory._MODEL_CONFIG_PATHS.remove(path)
    del open_clip.factory._MODEL_CONFIGS["tiny-sweep"]


@pytest.fixture
def written(data, tiny):
    """The plan as a user writes it."""
    digits = {part: str(data / "digits" / part) for part in ("train", "val", "test")}
    colours = {part: str(data / "colours.zip" / part) for part in ("train", "test")}
    return {
        "towers": [{"model": "bundled"}, tiny],
        "data": [{"name": "digits", **digits}, {"name": "colours", **colours}],
        "methods": ["base", "fine", "linear"],
        "seeds": 2,
        "rates": [1.0, 0.3],
        "epochs": 2,
    }


def read(plan, tmp_path) -> SweepPlan:
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan))
    return SweepPlan.read(path)


def test_two_towers_two_data_sets(written, tmp_path, monkeypatch):
    """Every cell of the table is there and right,
    and a second run does only what is missing or has changed."""
    plan = read(written, tmp_path)
    torch.manual_seed(0)  # of the tiny model's weights
    rows = Sweep(plan, tmp_path / "out").run()
    assert len(rows) == 2 * 2 * (1 + 2 * 2)
    assert {row["data"] for row in rows} == {"digits", "colours"}
    assert {row["images"] for row in rows} == {60, 15}

    table = SweepTable.of(rows)
    assert table.columns == ("digits", "colours", "average")
    assert [line[:2] for line in table.lines[:3]] == [("bundled", m) for m in plan.methods]
    fine = [row["accuracy"] for row in rows if (row["tower"], row["method"]) == ("bundled", "fine")]
    mean = table.lines[1][3]
    assert mean[2][0] == pytest.approx(statistics.fmean(fine))
    assert mean[0][0] == pytest.approx(statistics.fmean(fine[:2]))
    assert mean[0][1] == pytest.approx(statistics.stdev(fine[:2]))

    model, preprocess, tokenizer = sources.load_model("bundled")
    images = sweep.open_images(written["data"][0]["test"], preprocess)
    head = sweep.ZeroShotHead.from_text(model, tokenizer, images.class_names, ("a {}",))
    cache = sweep.encode(model.visual, torch.utils.data.DataLoader(images, batch_size=64))
    assert rows[0]["accuracy"] == training.evaluate(identity(model.visual), head, cache).accuracy

    def refuse(*arguments, **options):
        raise AssertionError("this was done before")

    monkeypatch.setattr(sweep, "encode", refuse)
    monkeypatch.setattr(training, "fit_many", refuse)
    assert Sweep(plan, tmp_path / "out").run() == rows
    monkeypatch.undo()

    (tmp_path / "out" / "results" / "bundled" / "colours" / "linear-1.json").unlink()
    fitted = []
    fit_many = training.fit_many
    monkeypatch.setattr(training, "fit_many", lambda *a, **o: fitted.append(o["seeds"]) or fit_many(*a, **o))
    again = Sweep(plan, tmp_path / "out").run()
    assert fitted == [(1,)]
    timeless = [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
    assert [{key: value for key, value in row.items() if key != "seconds"} for row in again] == timeless
    longer = read(written | {"towers": written["towers"][:1], "epochs": 3}, tmp_path)
    fitted.clear()
    Sweep(longer, tmp_path / "out").run()
    assert len(fitted) == 2 * 2 * 2


def test_shared_bases_and_shots(written, data, tmp_path):
    """With `bases` all data sets share those of one set of images; labels of it are not needed."""
    plan = written | {"towers": written["towers"][:1], "seeds": 1, "methods": ["fine"], "shots": 2}
    own = Sweep(read(plan, tmp_path), tmp_path / "own").run()
    general = plan | {"bases": str(data / "digits")}
    shared = Sweep(read(general, tmp_path), tmp_path / "shared").run()
    assert shared[0]["parameters"] == shared[1]["parameters"]
    assert own[0]["parameters"] != own[1]["parameters"]


def test_the_stream_form_and_marks(written, tmp_path):
    """stream is fitted on the images themselves.

    Cells below the model and seeds that collapsed are marked.
    """
    plan = written | {"towers": written["towers"][:1], "seeds": 1, "methods": ["base", "stream"], "epochs": 1}
    rows = Sweep(read(plan, tmp_path), tmp_path / "out").run()
    assert [row["method"] for row in rows] == ["base", "stream"] * 2
    for base, stream in zip(rows[::2], rows[1::2], strict=True):
        assert stream["base_accuracy"] == base["accuracy"] == base["base_accuracy"]
        assert stream["images"] == base["images"]
        assert 0 <= stream["val_accuracy"] <= 1
    accuracies = {"base": (0.6,), "output": (0.7, 0.1), "fine": (0.7, 0.65), "full": (0.58, 0.6)}
    shared = {"tower": "a", "data": "x", "parameters": 5, "base_accuracy": 0.6}
    made = [
        shared | {"method": method, "seed": seed, "accuracy": accuracy}
        for method, found in accuracies.items()
        for seed, accuracy in enumerate(found)
    ]
    table = SweepTable.of(made)
    assert table.marks == (((False, 0, 1),), ((True, 1, 2),), ((False, 0, 2),), ((True, 0, 2),))
    lines = table.markdown().splitlines()
    assert "↓ (1 of 2 collapsed)" in lines[3]
    assert "↓" not in lines[4] + lines[2]
    assert "↓" in lines[5]
    assert "collapsed" not in lines[5]
    assert lines[-1].startswith("↓ below the model itself")
    table.write(tmp_path)
    with (tmp_path / "table.csv").open() as file:
        found = list(csv.DictReader(file))
    assert [line["x (below the model)"] for line in found] == ["0", "1", "0", "1"]
    assert [line["x (collapsed seeds)"] for line in found] == ["0", "1", "0", "0"]


def test_the_command(written, tmp_path, capsys, monkeypatch):
    plan = written | {"towers": written["towers"][:1], "seeds": 1, "methods": ["base", "coarse"]}
    read(plan, tmp_path)
    arguments = ["sweep", tmp_path / "plan.yaml", "--out", tmp_path / "out", "--json", tmp_path / "s.json"]
    monkeypatch.setattr(sys, "argv", ["residual-kernels", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert "coarse" in shown
    rows = json.loads((tmp_path / "s.json").read_text())["rows"]
    with (tmp_path / "out" / "table.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["method"] for line in lines] == ["base", "coarse"]
    assert float(lines[1]["digits"]) == pytest.approx(rows[1]["accuracy"], abs=1e-6)
    text = (tmp_path / "out" / "table.md").read_text()
    assert text.startswith("| tower | method | learned numbers | digits | colours | average |")
    assert "**" in text
    with Image.open(tmp_path / "out" / "table.png") as image:
        assert min(image.size) > 100


def test_a_sweep_accounts_for_all_it_read(written, data, tmp_path, capsys, monkeypatch):
    """Unreadable images fail or are left out and named, also by a sweep that finds all its fits there."""
    photos = tmp_path / "photos"
    for part in ("train", "test"):
        for label, name in enumerate(("0", "1")):
            (photos / part / name).mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (8, 8), (60 * label, 20 * number, 0)).save(
                    photos / part / name / f"{number}.png"
                )
    (photos / "test" / "1" / "bad.png").write_bytes(b"x")
    (photos / "test" / "1" / "notes.txt").write_text("x")
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    plan = {
        "towers": written["towers"][:1],
        "methods": ["base", "coarse"],
        "epochs": 1,
        "bases": str(photos / "train"),
        "data": [
            {
                "name": "p",
                **{part: str(photos / part) for part in ("train", "test")},
                "class_names": str(tmp_path / "names.txt"),
            }
        ],
    }
    read(plan, tmp_path)

    def call(*options):
        arguments = [
            "sweep",
            tmp_path / "plan.yaml",
            "--out",
            tmp_path / "out",
            "--json",
            tmp_path / "s.json",
        ]
        monkeypatch.setattr(sys, "argv", ["residual-kernels", *map(str, (*arguments, *options))])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code or 0, *capsys.readouterr()

    code, _, err = call()
    assert code == 2
    assert "bad.png is not a readable image" in err
    # Made; found there; asked of the plan.
    for options in (
        ("--unreadable", "skip"),
        ("--unreadable", "skip"),
        (),
    ):
        if not options:
            read(plan | {"unreadable": "skip"}, tmp_path)
        code, out, err = call(*options)
        assert code == 0, err
        told = json.loads((tmp_path / "s.json").read_text())
        assert told["unreadable"] == ["1/bad.png"]
        by_source = {one["source"]: one for one in told["reading"]}
        assert set(by_source) == {str(photos / "train"), str(photos / "test")}
        test = by_source[str(photos / "test")]
        assert (test["found"], test["read"], test["ignored"]) == (9, 8, {".txt": 1})
        assert [(row["folder"], row["name"], row["images"]) for row in test["classes"]] == [
            ("0", "cat", 4),
            ("1", "dog", 4),
        ]
        assert "9 images found, 8 read, 1 left out" in out.replace("\n", " ")
    # What was left out is asked for now, so the fits do not stand.
    code, _, err = call("--unreadable", "fail")
    assert code == 2
    assert "8 of 9 images" in err
    (photos / "test" / "1" / "bad.png").unlink()
    code, _, err = call("--orientation", "stored")
    assert code == 2
    assert "holds a cache of other data" in err
    code, _, err = call("--json", tmp_path / "names.txt")
    assert code == 2
    assert "names.txt is what the plan" in err


@pytest.mark.parametrize(
    "change, message",
    [
        ({"orientation": "up"}, "orientation must be exif or stored; got 'up'"),
        ({"unreadable": True}, "unreadable must be fail or skip; got True"),
        ({"towers": []}, r"must hold a list of towers; got \[\]"),
        ({"towers": ["bundled"]}, "a tower must be a mapping; got 'bundled'"),
        ({"towers": [{"name": "bundled"}]}, "unknown key 'name'; known are model, pretrained"),
        ({"data": [{"name": "x", "train": "y"}]}, "a data set lacks a key: .*'test'"),
        ({"data": [{"name": "x", "train": "y", "test": "z"}] * 2}, "different names; got x, x"),
        ({"methods": ["fine", "best"]}, "unknown method 'best'; choose from base, fine"),
        ({"epoch": 3}, "unknown key 'epoch'"),
        ({"seeds": 0}, "seeds must be a whole number above 0; got 0"),
        ({"epochs": "many"}, "epochs must be a whole number above 0; got 'many'"),
        ({"rates": [0.1, -1]}, "rates must be numbers above 0"),
        ({"seeds": True}, "seeds must be a whole number above 0; got True"),
        ({"seeds": 10**20}, "seeds must be a whole number above 0; got 1000"),
        ({"rates": [True]}, "rates must be numbers above 0"),
        ({"rates": [float("inf")]}, "rates must be numbers above 0"),
        ({"bases": ["a"]}, r"bases must name images; got \['a'\]"),
        ({"data": [{"name": datetime.date(2020, 1, 1), "train": "y", "test": "z"}]}, "a text, not a date"),
        ({"energy": 2}, r"energy must lie in \(0, 1\]; got 2"),
        ({"dtype": "int8"}, "dtype must be one of .*bfloat16.*; got 'int8'"),
    ],
)
def test_plans_that_cannot_be_run(written, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        read(written | change, tmp_path)


@pytest.mark.parametrize("key", ["train", "val", "class_names"])
def test_an_empty_text_in_a_plan_is_not_the_working_folder(written, tmp_path, key):
    written["data"][0][key] = ""
    with pytest.raises(ValueError, match=rf"plan\.yaml: a data set: {key} is empty"):
        read(written, tmp_path)
    written["data"][0][key] = "x"
    with pytest.raises(ValueError, match=r"plan\.yaml: bases is empty"):
        read(written | {"bases": ""}, tmp_path)


def test_a_plan_that_is_no_plan(tmp_path):
    (tmp_path / "plan.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match=r"plan\.yaml is not readable YAML"):
        SweepPlan.read(tmp_path / "plan.yaml")
    (tmp_path / "plan.yaml").write_text("just words")
    with pytest.raises(ValueError, match="must hold the keys towers, data and methods"):
        SweepPlan.read(tmp_path / "plan.yaml")
