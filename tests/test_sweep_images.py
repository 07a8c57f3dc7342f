"""Sweeps and what they read: images that change, names that no file system takes, plans from any editor."""

import json
import shutil
import sys
import warnings

import pytest
import yaml
from PIL import Image

from residual_kernels import cli
from residual_kernels.experiments import sweep
from residual_kernels.experiments.sweep import Sweep, SweepPlan, SweepTable


@pytest.fixture
def photos(tmp_path):
    for part, shift in (("train", 0), ("test", 7), ("bases", 3)):
        for label, name in enumerate(("cat", "dog")):
            folder = tmp_path / "photos" / part / name
            folder.mkdir(parents=True)
            for number in range(5):
                Image.new("RGB", (8, 8), (60 * label + 20 * number, shift, 90)).save(folder / f"{number}.bmp")
    return tmp_path / "photos"


@pytest.fixture
def plan(photos):
    return {
        "towers": [{"model": "bundled"}],
        "methods": ["base", "fine"],
        "epochs": 1,
        "bases": str(photos / "bases"),
        "data": [{"name": "p", "train": str(photos / "train"), "test": str(photos / "test")}],
    }


def read(plan, tmp_path):
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    return SweepPlan.read(tmp_path / "plan.yaml")


def results(folder):
    return {path.name: json.loads(path.read_text()) for path in folder.glob("results/*/*/*-*.json")}


@pytest.mark.parametrize("part", ["train", "test", "bases"])
@pytest.mark.parametrize("old", [False, True])
def test_an_image_replaced_after_a_sweep_is_noticed(plan, photos, tmp_path, monkeypatch, part, old):
    """Also in a sweep from before its files knew the images: their caches tell them."""
    made = read(plan, tmp_path)
    rows = Sweep(made, tmp_path / "out").run()
    if old:
        for file in (tmp_path / "out").glob("results/*/*/*-*.json"):
            found = json.loads(file.read_text())
            del found["images"]
            file.write_text(json.dumps(found))
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "encode", lambda *_, **__: pytest.fail("done before"))
        patch.setattr(sweep.sources, "load_model", lambda *_: pytest.fail("no model is needed"))
        assert Sweep(made, tmp_path / "out").run() == rows
    before = results(tmp_path / "out")
    picture = photos / part / "cat" / "1.bmp"
    size = picture.stat().st_size
    Image.new("RGB", (8, 8), (1, 2, 3)).save(picture)
    assert picture.stat().st_size == size
    cache = next((tmp_path / "out" / "cache").glob("*/bases" if part == "bases" else f"*/p/{part}"))
    with pytest.raises(ValueError, match=f"{part} holds a cache of other data than .* remove that folder"):
        Sweep(made, tmp_path / "out").run()
    shutil.rmtree(cache)
    Sweep(made, tmp_path / "out").run()
    for name, found in results(tmp_path / "out").items():
        if part == "bases" and name == "base-0.json":  # the model alone reads none, so it stays
            assert found == before[name]
            continue
        assert found["images"][part] != before[name].get("images", {}).get(part)
        assert found["recipe"] == before[name]["recipe"]


def test_fits_stay_when_their_images_are_gone(plan, photos, tmp_path, monkeypatch, capsys):
    made = read(plan, tmp_path)
    rows = Sweep(made, tmp_path / "out").run()
    shutil.rmtree(photos)
    work = Sweep(made, tmp_path / "out")
    assert work.run() == rows
    (note,) = work.notes
    assert "the fits that are there were not compared with their images: there is no folder or zip" in note
    monkeypatch.setattr(
        sys,
        "argv",
        ["residual-kernels", "sweep", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out")],
    )
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    assert "were not compared with their images" in " ".join(capsys.readouterr().err.split())
    next((tmp_path / "out").glob("results/*/*/fine-0.json")).unlink()
    with pytest.raises(FileNotFoundError, match="no folder or zip"):
        Sweep(made, tmp_path / "out").run()


@pytest.mark.parametrize("name", ["x" * 300, "é" * 200, "..", ".", ".hidden", "a/b", "字" * 90, "\U0001f600"])
def test_any_name_of_a_data_set_gives_a_folder_of_its_own(plan, tmp_path, name):
    plan["data"][0]["name"] = name
    plan["methods"] = ["base"]
    (row,) = Sweep(read(plan, tmp_path), tmp_path / "out").run()
    assert row["data"] == name
    (file,) = (tmp_path / "out").rglob("base-0.json")
    assert file.relative_to(tmp_path / "out" / "results" / "bundled").parts[1:] == ("base-0.json",)
    assert len({sweep._file_name(one) for one in (name, name + "x", name + "y")}) == 3
    assert sweep._file_name("ViT-B-16") == "ViT-B-16"


def test_names_and_templates_are_read_before_the_tower_runs(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "encode", lambda *_, **__: pytest.fail("work was begun"))
    for key in ("class_names", "templates"):
        wrong = {**plan, "data": [{**plan["data"][0], key: str(tmp_path / "nowhere.txt")}]}
        with pytest.raises(FileNotFoundError, match=r"there is no file of .* at .*nowhere\.txt"):
            Sweep(read(wrong, tmp_path), tmp_path / "out").run()
    for key in ("test", "val"):
        wrong = {**plan, "data": [{**plan["data"][0], key: str(tmp_path / "nowhere")}]}
        with pytest.raises(FileNotFoundError, match="there is no folder or zip at"):
            Sweep(read(wrong, tmp_path), tmp_path / "out").run()
    assert not (tmp_path / "out").exists()


def test_a_name_that_no_font_has_is_drawn_escaped(plan, tmp_path):
    plan["data"][0]["name"] = "a\x00\x1b\ud800$|b"
    plan["methods"] = ["base"]
    (tmp_path / "plan.yaml").write_text(json.dumps(plan))  # JSON is YAML too, and has half characters
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a sign that is missing from the font
        rows = Sweep(SweepPlan.read(tmp_path / "plan.yaml"), tmp_path / "out").run()
        SweepTable.of(rows).write(tmp_path / "out")
    assert r"a\x00\x1b\ud800$\|b" in (tmp_path / "out" / "table.md").read_text()


# --- the plan's file ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_plan_from_any_editor(plan, tmp_path, encoding):
    plan["data"][0]["name"] = "café"
    text = yaml.safe_dump(plan, allow_unicode=True)
    (tmp_path / "plan.yaml").write_bytes(text.replace("\n", "\r\n").encode(encoding))
    assert SweepPlan.read(tmp_path / "plan.yaml").data[0].name == "café"
    (tmp_path / "plan.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"plan\.yaml is not UTF-8 text: byte 0xe9 in line \d"):
        SweepPlan.read(tmp_path / "plan.yaml")


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("epochs: 1", "epochs: 1\nepochs: 2", r"has the key 'epochs' twice, in lines 2 and 3"),
        ("{model: bundled}", "{model: bundled, model: x}", r"the key 'model' twice, in lines 4 and 4"),
        ("test: b}", 'test: b, "test": c}', r"the key 'test' twice"),
        ("test: b}", "? test\n: b, test: c}", r"the key 'test' twice, in lines 3 and 4"),
    ],
)
def test_a_key_that_comes_twice_is_named(tmp_path, old, new, message):
    text = "methods: [base]\nepochs: 1\ndata: [{name: d, train: a, test: b}]\ntowers: [{model: bundled}]\n"
    (tmp_path / "plan.yaml").write_text(text)
    assert SweepPlan.read(tmp_path / "plan.yaml").epochs == 1
    assert old in text
    (tmp_path / "plan.yaml").write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=message):
        SweepPlan.read(tmp_path / "plan.yaml")


def test_a_part_that_is_referred_to_may_come_often(tmp_path):
    (tmp_path / "plan.yaml").write_text(
        "methods: [base]\ntowers: [{model: bundled}]\n"
        "data: [&one {name: d, train: a, test: b}, {<<: *one, name: e}, {<<: *one, name: f, test: c}]\n"
    )
    plan = SweepPlan.read(tmp_path / "plan.yaml")
    assert [(one.name, one.test) for one in plan.data] == [("d", "b"), ("e", "b"), ("f", "c")]
