"""The command line's contract with people: options, outputs, accounts of what was read,
and where text goes."""

import csv
import json
import os
import subprocess
import sys
import tarfile
import time
import zipfile

import pytest
import torch
from PIL import Image
from typer.main import get_command

from residual_kernels import __version__, analysis, cli, train
from residual_kernels.cli import inputs, outputs, printing

NAMES = ("cat", "dog")


def put_images(root, names=NAMES, each=3, ending="png"):
    for label, name in enumerate(names):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(each):
            Image.new("RGB", (8, 8), (60 * label, 20 * number, 90)).save(root / name / f"{number}.{ending}")
    return root


@pytest.fixture
def photos(tmp_path):
    return put_images(tmp_path / "photos")


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs the program in this process: (exit code, stdout, stderr)."""
    for console in (printing.out, printing.err):
        monkeypatch.setattr(console, "width", 300)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["residual-kernels", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        seen = capsys.readouterr()
        return stop.value.code or 0, seen.out, seen.err

    return call


@pytest.fixture
def no_work(monkeypatch):
    """Nothing may load a model: what is wrong is said before."""
    monkeypatch.setattr(inputs.sources, "load_model", lambda *_: pytest.fail("work was begun"))


# --- the program --------------------------------------------------------------------------------------------


def test_version_and_help_need_no_heavy_library():
    program = (
        "import sys; from residual_kernels import cli; sys.argv = ['residual-kernels', sys.argv[1]]\n"
        "try: cli.main()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'open_clip', 'numpy', 'PIL', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    for option in ("--version", "--help"):
        done = subprocess.run(
            [sys.executable, "-c", program, option], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    for command in sorted(cli.COMMANDS):
        again = program.replace("sys.argv[1]]", "sys.argv[1], '--help']")
        done = subprocess.run(
            [sys.executable, "-c", again, command], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (command, done.stderr)
    done = subprocess.run(
        [sys.executable, "-m", "residual_kernels", "--version"], capture_output=True, text=True, check=False
    )
    assert done.stdout == f"residual-kernels {__version__}\n"


def test_every_command_and_option_has_help():
    commands = get_command(cli.app).commands
    assert set(commands) == set(cli.COMMANDS)
    for name, command in commands.items():
        assert command.help, name
        for parameter in command.params:
            assert parameter.help or "--help" in parameter.opts, (name, parameter.name)
    reading = {
        "--orientation",
        "--unreadable",
        "--image-column",
        "--label-column",
        "--workers",
        "--encode-batch",
    }
    for name in ("encode", "bases", "fit", "eval", "predict", "report", "analyze"):
        assert reading <= {option for parameter in commands[name].params for option in parameter.opts}, name
    more = {  # what is done only where it is asked for
        "--data",
        "--json",
        "--confusion",
        "--checkpoint",
        "--adapter",
        "--images",
        "--shots",
        "--components",
        "--max-components",
    }
    for name, command in commands.items():
        for parameter in command.params:
            if parameter.param_type_name == "option" and parameter.default is None and not parameter.required:
                assert "default" in parameter.help or more & set(parameter.opts), (name, parameter.opts)
    for name in ("report", "analyze"):
        assert {"--words", "--dictionary"} <= {option for one in commands[name].params for option in one.opts}


def test_doctor_lists_the_extras(run, monkeypatch):
    from residual_kernels.cli import doctor

    code, out, _ = run("doctor", "--json", "-")
    assert code == 0
    data = json.loads(out)["extras"]["data"]
    assert (data["state"], data["missing"]) == ("ready", [])
    requires = ["datasets>=3; extra == 'data'", "torch", 'made-up-library>=1 ; extra == "data"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: requires)
    code, out, _ = run("doctor")
    assert "missing: made-up-library; pip install 'residual-kernels[data]'" in out


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(printing.time, "monotonic", lambda: clock[0])
    with printing.bar("encoding", 1000) as step:
        for _ in range(9):
            clock[0] += 10
            step(50)
    with printing.bar("quiet", 10, quiet=True) as step:
        clock[0] += 100
        step(5)
    with printing.status("drawing") as say:
        say("at once")
        clock[0] += 40
        say("later")
    assert capsys.readouterr().err.splitlines() == [
        "encoding: 150 of 1,000 (15%), 5.0 a second, about 3 min left",
        "encoding: 300 of 1,000 (30%), 5.0 a second, about 2 min left",
        "encoding: 450 of 1,000 (45%), 5.0 a second, about 2 min left",
        "later",
    ]
    assert time.monotonic() == clock[0]


# --- outputs ------------------------------------------------------------------------------------------------


def test_outputs_are_probed_before_work(run, no_work, photos, tmp_path):
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    data = ("--data", photos)
    adapter = ("--adapter", tmp_path / "a")
    folder, below, long = tmp_path, tmp_path / "file" / "x", tmp_path / ("x" * 300)
    cases = [
        (("predict", *adapter, *data, "--out", folder), "it is a folder; name a file"),
        (("predict", *adapter, *data, "--out", below), "file is a file"),
        (("predict", *adapter, *data, "--out", long), "file name too long"),
        (("fit", *data, "--out", below), "file is a file"),
        (("fit", *data, "--out", tmp_path / "file"), "it is a file; name a folder"),
        (("fit", *data, "--out", tmp_path / "o", "--checkpoint", folder), "it is a folder; name a file"),
        (("eval", *adapter, *data, "--json", folder), "it is a folder; name a file"),
        (("eval", *adapter, *data, "--json", tmp_path / "pipe"), "not a regular file"),
        (("eval", *adapter, *data, "--confusion", below), "file is a file"),
        (("encode", *data, "--out", below), "file is a file"),
        (("bases", *data, "--out", folder), "it is a folder; name a file"),
        (("analyze", *data, "--out", below), "file is a file"),
        (("report", tmp_path / "a", *data, "--out", folder), "it is a folder; name a file"),
        (("merge", *adapter, "--out", below / "m.onnx"), "file is a file"),
        (("demo", "--out", tmp_path / "file"), "it is a file; name a folder"),
        (("sweep", tmp_path / "plan.yaml", "--out", below), "file is a file"),
    ]
    for arguments, message in cases:
        code, out, err = run(*arguments)
        assert (code, out) == (2, ""), arguments
        assert len(err.strip().splitlines()) == 1, err
        assert err.startswith("error: cannot write"), err
        assert message.lower() in err.lower(), (arguments, err)
    assert (tmp_path / "file").read_text() == "mine"
    assert outputs.new_file(tmp_path / "new" / "deep" / "x.csv") == tmp_path / "new" / "deep" / "x.csv"
    assert not (tmp_path / "new").exists()


def test_json_on_standard_output_stands_alone(run, photos, tmp_path):
    code, out, err = run("encode", "--data", photos, "--out", tmp_path / "c", "--json", "-")
    assert code == 0, err
    assert json.loads(out)["images"] == 6
    assert "6 images of 2 classes" in err
    # And the next command prints as ever.
    code, out, err = run("encode", "--data", photos, "--out", tmp_path / "c")
    assert "nothing new: 6 images of 2 classes already there" in out


def test_paths_are_expanded(run, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", str(tmp_path))
    code, _, err = run("encode", "--data", "~/photos", "--out", "$PLACE/c", "--json", "${PLACE}/e.json")
    assert code == 0, err
    assert json.loads((tmp_path / "e.json").read_text())["images"] == 6
    assert (tmp_path / "c").is_dir()


def test_text_that_a_terminal_cannot_show_is_escaped(photos, tmp_path):
    photos.rename(tmp_path / "caf\u00e9")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "residual_kernels",
            "encode",
            "--data",
            tmp_path / "caf\u00e9",
            "--out",
            tmp_path / "c",
        ],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0, done.stderr
    assert b"caf\\xe9: 6 images found, 6 read" in done.stdout


# --- reading ------------------------------------------------------------------------------------------------


def in_containers(root, tmp_path):
    """The same images as a folder, a zip and a shard."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as file:
        for path in files:
            file.write(path, path.relative_to(root))
    with tarfile.open(tmp_path / "photos.tar", "w") as file:
        for path in files:
            stem = path.relative_to(root).as_posix().replace("/", "_")
            file.add(path, stem)
            (tmp_path / "label").write_text(str(NAMES.index(path.parent.name)))
            file.add(tmp_path / "label", f"{stem.rpartition('.')[0]}.cls")
    return root, tmp_path / "photos.zip", tmp_path / "photos.tar"


def test_every_source_gives_the_same_account(run, photos, tmp_path):
    (photos / "dog" / "bad.png").write_bytes(b"no image")
    (photos / "dog" / "half.png").write_bytes((photos / "dog" / "0.png").read_bytes()[:40])
    (photos / "cat" / "notes.txt").write_text("x")
    (photos / "cat" / "new.heic").write_bytes(b"x")
    for source in in_containers(photos, tmp_path):
        cache = tmp_path / f"cache-{source.suffix}"
        code, _, err = run("encode", "--data", source, "--out", cache)
        assert code == 2
        assert "bad is not a readable image" in err or "bad.png is not a readable image" in err
        code, out, err = run(
            "encode", "--data", source, "--out", cache, "--unreadable", "skip", "--json", tmp_path / "e.json"
        )
        assert code == 0, err
        assert "2 of 8 images of" in err
        assert "1 .heic ignored: Pillow does not read them here" in err
        assert "8 images found, 6 read, 2 left out (" in out
        found = json.loads((tmp_path / "e.json").read_text())
        (account,) = found["reading"]
        assert (account["found"], account["read"]) == (8, 6)
        assert account["left_out"].keys() == set(found["unreadable"])
        assert sum(account["reasons"].values()) == 2
        assert account["ignored"][".heic"] == 1
        assert [row["images"] for row in account["classes"]] == [3, 3]


def test_a_flat_folder_is_encoded_and_analysed(run, tmp_path, monkeypatch):
    flat = tmp_path / "flat"
    flat.mkdir()
    for number in range(6):
        Image.effect_noise((16, 16), 40).convert("RGB").save(flat / f"{number}.jfif", "JPEG")
    code, out, err = run("encode", "--data", flat, "--out", tmp_path / "c")
    assert code == 0, err
    assert "6 images of no classes" in out

    def analysed(tower, cache, head, *rest, **options):
        assert (len(cache), cache.labels, head) == (6, None, None)
        raise ValueError("all of it was read")

    monkeypatch.setattr(analysis, "analyze", analysed)
    code, _, err = run("analyze", "--data", flat, "--out", tmp_path / "a")
    assert (code, err) == (2, "error: all of it was read\n")
    code, _, err = run("fit", "--data", tmp_path / "c", "--out", tmp_path / "o")
    assert code == 2
    assert "holds no class names" in err


def test_an_image_replaced_by_another_of_its_size_is_noticed(run, tmp_path):
    photos = put_images(tmp_path / "photos", ending="bmp")
    cache = tmp_path / "cache"
    assert run("encode", "--data", photos, "--out", cache)[0] == 0
    code, out, _ = run("encode", "--data", photos, "--out", cache, "--json", tmp_path / "e.json")
    assert code == 0
    assert "nothing new: 6 images of 2 classes already there" in out
    assert json.loads((tmp_path / "e.json").read_text())["new"] is False
    for options in (("--orientation", "stored"), ("--identity", "stat")):
        code, _, err = run("encode", "--data", photos, "--out", cache, *options)
        assert code == 2
        assert "holds a cache of other data" in err
    size = (photos / "dog" / "2.bmp").stat().st_size
    Image.new("RGB", (8, 8), (1, 2, 3)).save(photos / "dog" / "2.bmp")
    assert (photos / "dog" / "2.bmp").stat().st_size == size
    code, _, err = run("encode", "--data", photos, "--out", cache)
    assert code == 2
    assert "holds a cache of other data" in err


def test_an_option_that_a_cache_disagrees_with_is_named(run, photos, tmp_path):
    (photos / "cat" / "bad.png").write_bytes(b"x")
    read = ("--data", photos, "--unreadable", "skip")
    cache = tmp_path / "c"
    assert run("encode", *read, "--orientation", "stored", "--out", cache)[0] == 0
    fit = ("fit", "--method", "coarse", "--epochs", 1, "--data", cache)
    for command in (fit, ("analyze", "--data", cache)):
        code, _, err = run(*command, "--out", tmp_path / "new", "--orientation", "exif")
        assert code == 2, command
        assert "was made with --orientation stored, so --orientation exif" in err
        code, _, err = run(*command, "--out", tmp_path / "new", "--unreadable", "fail")
        assert code == 2
        assert "made with --unreadable skip, without 1 of 7 images" in err
    code, _, err = run(*fit, "--out", tmp_path / "a", "--orientation", "stored", "--label-column", "x")
    assert code == 0, err
    assert "--label-column changes nothing here" in err
    code, _, err = run(*fit, "--val", photos, "--unreadable", "skip", "--out", tmp_path / "b")
    assert code == 0, err
    assert "is read upright (--orientation exif), and" in err
    for options, ends in (((), 0), (("--orientation", "exif"), 2)):
        code, _, err = run("eval", tmp_path / "a", "--data", cache, *options)
        assert code == ends, err
        assert ("was read" in err, "was made with" in err) == (False, bool(options))


# --- classes ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("default:the class vectors of:UserWarning")  # some numbers are alike to it
def test_names_are_paired_in_number_order_and_shown(run, tmp_path):
    photos = put_images(tmp_path / "d", [str(number) for number in range(11)], each=2)
    names = [f"name {number}" for number in range(11)]
    (tmp_path / "names.txt").write_bytes("\n".join(names).encode("utf-16"))
    fit = ("fit", "--method", "coarse", "--epochs", 1, "--json", tmp_path / "f.json")
    code, _, err = run(
        *fit, "--data", photos, "--class-names", tmp_path / "names.txt", "--out", tmp_path / "a"
    )
    assert code == 0, err
    assert "0 = name 0, 1 = name 1, 2 = name 2" in err
    (account,) = json.loads((tmp_path / "f.json").read_text())["reading"]
    assert [(row["folder"], row["name"]) for row in account["classes"]] == [
        (str(number), names[number]) for number in range(11)
    ]
    code, _, err = run(*fit, "--data", photos, "--out", tmp_path / "b")
    assert code == 0, err
    assert "the classes are called 0, 1, 2 ..., and that is what the text tower reads" in err
    code, _, err = run(*fit, "--data", photos, "--prototypes", "--out", tmp_path / "c")
    assert code == 0
    assert "the text tower reads" not in err


def test_validation_images_may_lack_classes_and_not_add_any(run, tmp_path):
    photos = put_images(tmp_path / "d", ["ant", "cat", "dog"])
    some = put_images(tmp_path / "some", ["cat", "dog"])
    fit = ("fit", "--data", photos, "--method", "coarse", "--epochs", 1)
    code, _, err = run(*fit, "--val", some, "--out", tmp_path / "a", "--json", tmp_path / "f.json")
    assert code == 0, err
    assert [len(one["classes"]) for one in json.loads((tmp_path / "f.json").read_text())["reading"]] == [3, 2]
    code, out, err = run("eval", tmp_path / "a", "--data", some, "--json", tmp_path / "e.json")
    assert code == 0, err
    first = json.loads((tmp_path / "f.json").read_text())["base_accuracy"]
    assert first == pytest.approx(json.loads((tmp_path / "e.json").read_text())["base_accuracy"])
    put_images(tmp_path / "some", ["emu"])
    code, _, err = run(*fit, "--val", some, "--out", tmp_path / "b")
    assert code == 2
    assert "was not fitted to: emu" in err


# --- fit, eval, predict -------------------------------------------------------------------------------------


def test_batches_of_the_fit_and_of_the_tower_have_each_their_option(run, photos, tmp_path, monkeypatch):
    seen = {}
    many, encode = train.fit_many, inputs.encode
    monkeypatch.setattr(train, "fit_many", lambda *a, **k: seen.update(fit=k["batch_size"]) or many(*a, **k))

    def encoding(tower, loader, *rest, **options):
        seen["encode"] = loader.batch_size
        return encode(tower, loader, *rest, **options)

    monkeypatch.setattr(inputs, "encode", encoding)
    fit = ("fit", "--data", photos, "--method", "coarse", "--epochs", 1)
    assert run(*fit, "--batch-size", 7, "--encode-batch", 5, "--out", tmp_path / "a")[0] == 0
    assert seen == {"fit": 7, "encode": 5}
    for option in ("--batch-size", "--encode-batch"):
        assert run("eval", "--adapter", tmp_path / "a", "--data", photos, option, 3)[0] == 0
        assert seen["encode"] == 3


def test_a_cache_without_a_kind_says_which_flag_to_give(run, photos, tmp_path):
    assert run("encode", "--data", photos, "--out", tmp_path / "c")[0] == 0
    code, _, err = run("fit", "--data", tmp_path / "c", "--method", "full", "--out", tmp_path / "a")
    assert code == 2
    assert "encode the images with --kinds head --kinds mlp" in err


def test_a_run_is_named_as_argument_or_option(run, photos, tmp_path):
    fit = ("fit", "--data", photos, "--method", "coarse", "--epochs", 1, "--out", tmp_path / "a")
    assert run(*fit)[0] == 0
    names = ((tmp_path / "a",), ("--adapter", tmp_path / "a"))
    seen = [run("eval", *name, "--data", photos)[:2] for name in names]
    assert seen[0] == seen[1]
    assert seen[0][0] == 0
    for name in ((), (*names[0], *names[1])):
        code, _, err = run("eval", *name, "--data", photos)
        assert code == 2
        assert "as RUN or with --adapter" in err


def test_predictions_name_files_whose_names_are_no_text(run, photos, tmp_path):
    fit = ("fit", "--data", photos, "--method", "coarse", "--epochs", 1, "--out", tmp_path / "a")
    assert run(*fit)[0] == 0
    new = tmp_path / "new"
    new.mkdir()
    name = os.fsdecode(b"caf\xe9.png")
    Image.new("RGB", (8, 8)).save(new / "plain.png")
    (new / "plain.png").rename(new / name)
    code, _, err = run(
        "predict", tmp_path / "a", "--data", new, "--out", tmp_path / "p.csv", "--json", tmp_path / "p.json"
    )
    assert code == 0, err
    with (tmp_path / "p.csv").open(encoding="utf-8") as file:
        assert [row["image"] for row in csv.DictReader(file)] == ["caf\\udce9.png"]
    assert torch.tensor(list(json.loads((tmp_path / "p.json").read_text())["counts"].values())).sum() == 1


@pytest.mark.parametrize("source", ["photos", "cache"])
def test_an_analysis_of_two_images_is_refused_before_work(run, tmp_path, monkeypatch, source):
    photos = put_images(tmp_path / "photos", each=1)
    assert run("encode", "--data", photos, "--out", tmp_path / "cache")[0] == 0
    monkeypatch.setattr(inputs, "encode", lambda *_, **__: pytest.fail("work was begun"))
    code, _, err = run("analyze", "--data", tmp_path / source, "--out", tmp_path / "out")
    assert (code, (tmp_path / "out").exists()) == (2, False)
    assert f"{source} has 2 images to analyse, and 3 are needed" in err


# --- what cannot be used is said ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option", [("--class-names", "names.txt"), ("--prototypes",), ("--templates", "t.txt")]
)
def test_an_analysis_without_labels_takes_no_option_for_them(run, tmp_path, monkeypatch, option):
    (tmp_path / "flat").mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "flat" / f"{number}.png")
    for name in ("names.txt", "t.txt"):
        (tmp_path / name).write_text("a\n")
    monkeypatch.chdir(tmp_path)
    assert run("encode", "--data", "flat", "--out", "cache")[0] == 0
    monkeypatch.setattr(inputs, "encode", lambda *_, **__: pytest.fail("work was begun"))
    for source in ("flat", "cache"):
        code, _, err = run("analyze", "--data", source, "--out", "out", *option)
        assert (code, err) == (
            2,
            f"error: {option[0]} is for labelled images, and {source} has no class folders; leave it out\n",
        )


@pytest.mark.parametrize("command", ["fit", "analyze"])
def test_texts_are_read_before_work_and_templates_not_beside_prototypes(
    run, photos, tmp_path, monkeypatch, command
):
    monkeypatch.setattr(inputs, "encode", lambda *_, **__: pytest.fail("work was begun"))
    made = (command, "--data", photos, "--out", tmp_path / "out")
    cases = [
        (("--templates", tmp_path / "no.txt"), "there is no file of templates at"),
        (("--templates", photos), f"{photos} is a folder; name a text file of templates, one per line"),
        (("--class-names", photos), f"{photos} is a folder; name a text file of class names, one per line"),
        (("--templates", "openai", "--prototypes"), "--prototypes makes them of images; leave one out"),
    ]
    if command == "analyze":
        cases += [
            (("--words", photos), f"{photos} is a folder; name a text file of words, one per line"),
            (("--words", tmp_path / "no.txt"), "there is no file of words at"),
        ]
    for options, message in cases:
        code, _, err = run(*made, *options)
        assert code == 2, options
        assert message in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--data", "y" * 300), "File name too long: yyy"),
        (("--data", "hf:"), "hf: names no data set"),
        (("--data", "photos", "--model", "hf:"), "hf: names no model"),
        (("--data", "photos", "--device", "meta"), "device 'meta' holds no numbers"),
        (("--data", "photos.zip/Cats"), "there is no folder Cats in photos.zip; it holds cat, dog"),
        (("--data", "hf:/nowhere"), "cannot be read here"),
    ],
)
def test_names_that_name_nothing(run, photos, tmp_path, monkeypatch, arguments, message):
    in_containers(photos, tmp_path)
    monkeypatch.chdir(tmp_path)
    code, _, err = run("encode", *arguments, "--out", "out")
    assert (code, len(err.splitlines())) == (2, 1)
    assert message in err
    assert "[Errno" not in err
    assert "--download" not in err
    assert not (tmp_path / "out").exists()


def test_outputs_may_have_names_that_are_no_text(run, photos, tmp_path):
    """Written and read back: caches, adapters, bases and pages."""
    place = tmp_path / os.fsdecode(b"caf\xe9")
    cache, adapter = place / os.fsdecode(b"\xff"), place / "a"
    for command in (
        ("encode", "--data", photos, "--out", cache, "--json", place / "e.json"),
        ("bases", "--data", cache, "--out", place / os.fsdecode(b"\xfe.safetensors")),
        ("fit", "--data", cache, "--method", "coarse", "--epochs", 1, "--out", adapter),
        ("eval", adapter, "--data", cache, "--confusion", place / os.fsdecode(b"\xfd.csv")),
        ("report", adapter, "--data", cache, "--out", place / os.fsdecode(b"\xfc.html")),
        ("encode", "--data", photos, "--out", cache),
    ):
        code, out, err = run(*command)
        assert code == 0, (command, err)
    assert "nothing new: 6 images" in out
    code, _, err = run("merge", adapter, "--out", place / "m.onnx")
    assert code == 2
    assert "PyTorch and ONNX take names in UTF-8 alone" in err


def test_a_class_that_skipping_empties_is_said(run, photos, tmp_path):
    (photos / "emu").mkdir()
    (photos / "emu" / "0.png").write_bytes(b"x")
    code, _, err = run("encode", "--data", photos, "--unreadable", "skip", "--out", tmp_path / "c")
    assert code == 0
    assert "no image is left of the classes emu" in err


def test_a_report_shows_the_images_of_its_cache_alone(run, tmp_path):
    """Others of the same number and names are refused; the same ones elsewhere are taken."""
    photos = put_images(tmp_path / "photos", each=4, ending="bmp")
    (photos / "cat" / "bad.bmp").write_bytes(b"x")
    skip = ("--unreadable", "skip")
    cache = tmp_path / "cache"
    assert run("encode", "--data", photos, *skip, "--orientation", "stored", "--out", cache)[0] == 0
    assert run("fit", "--data", cache, "--method", "coarse", "--epochs", 1, "--out", tmp_path / "a")[0] == 0
    made = ("report", tmp_path / "a", "--data", cache, "--out", tmp_path / "r.html", "--images")
    photos.rename(tmp_path / "moved")
    code, _, err = run(*made, tmp_path / "moved")
    assert code == 0, err
    assert "data:image" in (tmp_path / "r.html").read_text(encoding="utf-8")
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "moved" / "dog" / "2.bmp")
    before = (tmp_path / "r.html").read_bytes()
    code, _, err = run(*made, tmp_path / "moved")
    assert code == 2
    assert "moved does not hold the images that the cache at" in err
    assert (tmp_path / "r.html").read_bytes() == before
