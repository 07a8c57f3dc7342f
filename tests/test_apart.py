"""Two outputs of a command, or an output and an input, never name one place; said before any work."""

import json
import os
import tarfile
import zipfile

from test_command_line import no_work, photos, put_images, run

from residual_kernels.adapters import folder as adapter_folder
from residual_kernels.cli import apart
from residual_kernels.units.cache import resume, shards

__all__ = ["no_work", "photos", "run"]  # fixtures


def refused(run, *arguments):
    code, out, err = run(*arguments)
    assert (code, out) == (2, ""), (arguments, err)
    assert len(err.strip().splitlines()) == 1, err
    assert err.startswith("error: "), err
    return err


def test_two_outputs_of_one_command_have_two_places(run, no_work, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.symlink("x.csv", "dangling.csv")
    os.symlink(tmp_path, "here")
    data, adapter = ("--data", photos), ("--adapter", "a")
    for other in ("x.csv", "./x.csv", tmp_path / "x.csv", "no/../x.csv", "dangling.csv", "here/x.csv"):
        said = refused(run, "predict", *adapter, *data, "--out", "x.csv", "--json", other)
        assert "--out x.csv and --json" in said
        assert "the same place" in said
        assert "same place" in refused(run, "eval", *adapter, *data, "--json", "x.csv", "--confusion", other)
        assert "same place" in refused(
            run, "fit", *data, "--out", "o", "--checkpoint", "x.csv", "--json", other
        )
    for command, options in (
        ("encode", data),
        ("bases", data),
        ("fit", data),
        ("analyze", data),
        ("merge", adapter),
        ("demo", ()),
        ("sweep", ("plan.yaml",)),
    ):
        assert "same place" in refused(run, command, *options, "--out", "x.onnx", "--json", "x.onnx"), command
    assert "same place" in refused(run, "report", "a", *data, "--json", "a/report.html")
    assert "same place" in refused(run, "report", "a", *data, "--out", "p.html", "--json", "p")
    (tmp_path / "h1").write_text("mine")
    os.link("h1", "h2")
    assert "same place" in refused(run, "predict", *adapter, *data, "--out", "h1", "--json", "h2")
    assert (tmp_path / "h1").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling.csv", "h1", "h2", "here", "photos"]


def test_an_output_is_not_inside_another_output_nor_one_of_its_files(run, no_work, photos, tmp_path):
    out = tmp_path / "o"
    data = ("--data", photos)
    assert "lies below --json" in refused(run, "encode", *data, "--out", out / "c", "--json", out)
    for command, name, more in (
        ("encode", "manifest.json", data),
        ("encode", "shard-00000.safetensors", data),
        ("fit", "adapter.json", data),
        ("fit", "classes.json", data),
        ("analyze", "analysis.json", data),
        ("analyze", "similarity-x.csv", data),
        ("demo", "a.png", ()),
        ("sweep", "table.md", ("plan",)),
        ("sweep", "results/x.json", ("plan",)),
    ):
        said = refused(run, command, *more, "--out", out, "--json", out / name)
        assert "writes itself" in said, command
    apart.check(
        [apart.Output("--out", out, apart.CACHE_FILES), apart.Output("--json", out / "numbers.json")], {}
    )


def test_an_output_is_not_an_input(run, no_work, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put_images(tmp_path / "more", ["a"])
    with zipfile.ZipFile("p.zip", "w") as file:
        file.writestr("cat/0.png", b"x")
    for number in range(2):
        tarfile.open(f"s-{number}.tar", "w").close()
    (tmp_path / "run").mkdir()
    for name in (
        "run/adapter.json",
        "names.txt",
        "words.txt",
        "b.safetensors",
        "plan.yaml",
        "w.pt",
        "run/notes.json",
    ):
        (tmp_path / name).write_text("{}")
    os.symlink("names.txt", "link.txt")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    eval_, predict = ("eval", "run"), ("predict", "run", "--out", "o.csv")
    cases = [
        ((*eval_, "--data", "p.zip", "--json", "p.zip"), "is what --data reads"),
        ((*eval_, "--data", "p.zip/cat", "--json", "p.zip"), "is what --data reads"),
        ((*eval_, "--data", "s-{0..1}.tar", "--json", "s-1.tar"), "is a shard that --data reads"),
        ((*eval_, "--data", photos, "--json", photos / "cat" / "0.png"), "is a file that --data"),
        ((*predict, "--data", photos, "--json", "run/adapter.json"), "is a file that RUN run reads"),
        (
            (*predict, "--data", photos, "--pretrained", "w.pt", "--json", "./w.pt"),
            "is what --pretrained reads",
        ),
        (("fit", "--data", photos, "--val", "more", "--out", "more"), "is what --val reads"),
        (
            ("fit", "--data", photos, "--out", "o", "--class-names", "names.txt", "--json", "link.txt"),
            "--class-names",
        ),
        (("fit", "--data", photos, "--bases", "o/bases.safetensors", "--out", "o"), "would replace"),
        (("encode", "--data", photos, "--out", photos), "is what --data reads"),
        (("encode", "--data", photos, "--out", photos / "cache"), "would be read as images"),
        (
            ("analyze", "--data", photos, "--words", "words.txt", "--out", "o", "--json", "words.txt"),
            "is what --words",
        ),
        (("bases", "--merge", "b.safetensors", "--out", "b.safetensors"), "is what FILES reads"),
        (("merge", "run", "--out", "run"), "folder"),
        (("sweep", "plan.yaml", "--out", "o", "--json", "plan.yaml"), "is what PLAN reads"),
        (("report", "run", "--data", photos, "--out", photos / "page.html"), "would be read as images"),
    ]
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "bases.safetensors").write_text("x")
    for arguments, message in cases:
        assert message in refused(run, *arguments), arguments
    assert before.items() <= {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}.items()
    # and what people do: results beside the images, or in the folder of the adapter
    apart.check(
        [
            apart.Output("--out", photos / "labels.csv"),
            apart.Output("--json", tmp_path / "run" / "notes.json"),
        ],
        {"--data": photos, "RUN": tmp_path / "run", "--model": "bundled"},
    )


def test_a_sweep_does_not_write_where_its_plan_reads_images(run, no_work, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("DATA", str(tmp_path))
    for train, bases in ((photos, None), ("$DATA/photos", None), (tmp_path / "gone", photos)):
        plan = {
            "towers": [{"model": "bundled"}],
            "data": [{"name": "x", "train": str(train), "test": str(train)}],
        }
        plan |= {"methods": ["base"], **({} if bases is None else {"bases": str(bases)})}
        (tmp_path / "plan.yaml").write_text(json.dumps(plan))
        said = refused(run, "sweep", tmp_path / "plan.yaml", "--out", photos / "results")
        assert "would be read as images" in said
        assert not (photos / "results").exists()
        said = refused(
            run, "sweep", tmp_path / "plan.yaml", "--out", tmp_path / "o", "--json", photos / "cat/0.png"
        )
        assert "is a file that" in said


def test_the_names_of_own_files_are_those_that_are_written():
    assert set(apart.ADAPTER_FILES) == {adapter_folder.CONFIG, *adapter_folder.MEMBERS}
    assert apart.CACHE_FILES[0] == shards.MANIFEST
    assert shards.shard_name(12).startswith("shard-")
    assert resume.UNFINISHED[1].startswith("shard-")


def test_an_empty_value_is_refused(run, no_work, photos, tmp_path):
    for arguments in (
        ("encode", "--data", "", "--out", tmp_path / "c"),
        ("encode", "--data=", "--out", tmp_path / "c"),
        ("encode", "--data", photos, "--out", ""),
        ("predict", "a", "--data", photos, "--out", "o", "--model", ""),
    ):
        assert "is empty; write a value after it" in refused(run, *arguments)
    assert "an argument is empty" in refused(run, "report", "", "--data", photos)
