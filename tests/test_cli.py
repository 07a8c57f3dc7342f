"""The command line, as its users meet it: output, files, exit codes."""

import csv
import json
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from residual_kernels import cli
from residual_kernels.cli import printing
from residual_kernels.demo import story as demo


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """Real digits as ImageFolders: train 20 and test 8 of each class."""
    root = tmp_path_factory.mktemp("digits")
    images, labels = demo.digit_images()
    seen = [0] * 10
    for image, label in zip(images, labels.tolist(), strict=True):
        part = "train" if seen[label] < 20 else "test" if seen[label] < 28 else None
        if part:
            folder = root / part / demo.DIGITS[label]
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{seen[label]:03d}.png")
        seen[label] += 1
    return root


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs the program in this process: (exit code, stdout, stderr)."""
    for console in (printing.out, printing.err):
        monkeypatch.setattr(console, "width", 200)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["residual-kernels", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        seen = capsys.readouterr()
        return stop.value.code or 0, seen.out, seen.err

    return call


def test_doctor(run, tmp_path):
    code, out, _ = run("doctor", "--json", tmp_path / "d.json")
    assert code == 0
    for word in ("torch", "triton", "cpp", "used by auto"):
        assert word in out
    found = json.loads((tmp_path / "d.json").read_text())
    assert found["devices"][0]["device"] == "cpu"
    assert set(found["devices"][0]["backends"]) == {"triton", "cpp", "torch"}


def test_the_whole_way(run, digits, tmp_path):
    """encode, bases, fit on the cache, eval, predict: what a user does with a folder of images."""
    code, out, err = run(
        "encode", "--data", digits / "train", "--out", tmp_path / "cache", "--json", tmp_path / "e.json"
    )
    assert code == 0, err
    assert "200 images of 10 classes" in out
    code, out, err = run("bases", "--data", digits / "train", "--out", tmp_path / "b.safetensors")
    assert code == 0, err
    assert "hold 90 % of the variance" in out
    code, out, err = run(
        "fit",
        "--data",
        tmp_path / "cache",
        "--bases",
        tmp_path / "b.safetensors",
        "--out",
        tmp_path / "adapter",
        "--method",
        "fine",
        "--epochs",
        12,
        "--json",
        tmp_path / "f.json",
    )
    assert code == 0, err
    fitted = json.loads((tmp_path / "f.json").read_text())
    assert fitted["val_accuracy"] > fitted["base_accuracy"]
    assert f"{fitted['parameters']:,} numbers" in out
    code, out, err = run(
        "eval", "--adapter", tmp_path / "adapter", "--data", digits / "test", "--json", tmp_path / "v.json"
    )
    assert code == 0, err
    seen = json.loads((tmp_path / "v.json").read_text())
    assert seen["images"] == 80
    assert seen["accuracy"] > max(seen["base_accuracy"], 0.8)
    assert list(seen["class_accuracy"]) == sorted(demo.DIGITS)

    flat = tmp_path / "new"
    flat.mkdir()
    for path in (digits / "test").rglob("*.png"):
        Image.open(path).save(flat / f"{path.parent.name}-{path.name}")
    code, out, err = run(
        "predict", "--adapter", tmp_path / "adapter", "--data", flat, "--out", tmp_path / "p.csv"
    )
    assert code == 0, err
    with (tmp_path / "p.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 80
    assert all(0 < float(row["probability"]) <= 1 for row in rows)
    right = sum(row["image"].split("-")[0] == row["label"] for row in rows)
    assert right / 80 == pytest.approx(seen["accuracy"])


@pytest.mark.parametrize("method", ["coarse", "full", "output", "linear"])
def test_every_method_fits_from_a_folder(run, digits, tmp_path, method):
    code, out, err = run(
        "fit",
        "--data",
        digits / "train",
        "--val",
        digits / "test",
        "--method",
        method,
        "--epochs",
        2,
        "--out",
        tmp_path / "a",
    )
    assert code == 0, err
    assert f"({method}, 200 images" in out
    assert run("eval", "--adapter", tmp_path / "a", "--data", digits / "test")[0] == 0


def test_prototypes(run, digits, tmp_path):
    code, out, err = run(
        "fit",
        "--data",
        digits / "train",
        "--prototypes",
        "--method",
        "fine",
        "--epochs",
        2,
        "--out",
        tmp_path / "a",
    )
    assert code == 0, err


def bad_inputs(digits, tmp):
    (tmp / "names.txt").write_text("a\nb\n")
    (tmp / "there").mkdir()
    (tmp / "there" / "x").write_text("")
    (tmp / "bad.safetensors").write_bytes(b"nothing")
    train = digits / "train"
    fit = ("fit", "--data", train, "--out", tmp / "o")
    return [
        (("encode", "--data", tmp / "nowhere", "--out", tmp / "o"), "no folder or zip"),
        (("encode", "--data", digits, "--out", tmp / "o"), "hold folders, not images"),
        (("encode", "--data", train, "--out", tmp / "there"), "not empty"),
        (("encode", "--data", train, "--out", tmp / "o", "--model", "ViT-B-23"), "nearest are ViT-B-32"),
        (
            ("encode", "--data", train, "--out", tmp / "o", "--model", "RN50", "--pretrained", "none"),
            "convolutional",
        ),
        (("encode", "--data", train, "--out", tmp / "o", "--device", "cuda:9"), "cannot be used here"),
        (("encode", "--data", train, "--out", tmp / "o", "--device", "gpu"), "cannot be used here"),
        (("encode", "--data", train, "--out", tmp / "o", "--kinds", "neck"), "neck"),
        ((*fit, "--class-names", tmp / "names.txt"), "2 class names, but there are 10"),
        ((*fit, "--templates", tmp / "nothing.txt"), "no file of templates"),
        ((*fit, "--bases", tmp / "bad.safetensors"), "truncated or not a safetensors"),
        ((*fit, "--method", "fine", "--energy", "1.5"), "energy must lie"),
        ((*fit, "--method", "linear", "--energy", "0.9"), "energy belongs to fine"),
        ((*fit, "--method", "output", "--rest", "mean"), "adapts the output as a whole"),
        ((*fit, "--model", "ViT-S-32-alt", "--pretrained", tmp / "bad.safetensors"), "does not hold weights"),
        ((*fit, "--method", "best"), "best"),
        (("eval", "--adapter", tmp / "nowhere", "--data", train), "no adapter"),
        (("predict", "--adapter", tmp / "nowhere", "--data", train, "--out", tmp / "p.csv"), "no adapter"),
        (("fit", "--out", tmp / "o"), "--data"),
        (("fly",), "fly"),
    ]


@pytest.mark.parametrize("case", range(20))
def test_bad_input_is_one_line_and_exit_code_2(run, digits, tmp_path, case):
    arguments, message = bad_inputs(digits, tmp_path)[case]
    code, out, err = run(*arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1 or "Usage:" in err
    assert not (tmp_path / "o").exists()
    assert not (tmp_path / "p.csv").exists()


def test_help_of_every_command(run):
    code, out, _ = run("--help")
    assert code == 0
    for command in ("doctor", "demo", "encode", "bases", "fit", "eval", "predict"):
        assert command in out
        code, text, _ = run(command, "--help")
        assert code == 0
        assert "--help" in text


def test_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "residual_kernels.cli", "eval"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "Missing option" in done.stderr


def test_eval_knows_classes_by_name(run, digits, tmp_path):
    """A part of the classes is scored under their own names; classes it was not fitted to are refused."""
    run("fit", "--data", digits / "train", "--method", "coarse", "--epochs", 1, "--out", tmp_path / "a")
    some = tmp_path / "some"
    for name in ("seven", "two"):
        (some / name).mkdir(parents=True)
        for path in (digits / "test" / name).iterdir():
            (some / name / path.name).write_bytes(path.read_bytes())
    code, out, err = run("eval", "--adapter", tmp_path / "a", "--data", some, "--json", tmp_path / "s.json")
    assert code == 0, err
    run("eval", "--adapter", tmp_path / "a", "--data", digits / "test", "--json", tmp_path / "w.json")
    part, whole = (
        json.loads((tmp_path / name).read_text())["class_accuracy"] for name in ("s.json", "w.json")
    )
    assert part["seven"] == whole["seven"]
    assert part["two"] == whole["two"]
    (some / "seven").rename(some / "ant [x]")
    code, out, err = run("eval", "--adapter", tmp_path / "a", "--data", some)
    assert code == 2
    assert "not fitted to: ant [x]" in err


def test_a_bad_image_is_one_line_from_other_processes_too(run, digits, tmp_path):
    folder = tmp_path / "d" / "cat"
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(b"no image")
    for workers in (0, 1):
        code, out, err = run(
            "encode", "--data", tmp_path / "d", "--out", tmp_path / "o", "--workers", workers
        )
        assert code == 2
        assert err.strip().startswith("error: ")
        assert "cat/a.png is not a readable image" in err
        assert len(err.strip().splitlines()) == 1


def test_unreadable_images_are_an_error_or_left_out_and_named(run, digits, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(digits / "test" / name, tmp_path / "data" / name)
    bad = tmp_path / "data" / "two" / "020.png"
    bad.write_bytes(b"no image")
    code, _, err = run("encode", "--data", tmp_path / "data", "--out", tmp_path / "cache")
    assert code == 2
    assert f"{bad} is not a readable image" in err
    options = ("--unreadable", "skip", "--json", tmp_path / "e.json")
    code, out, err = run("encode", "--data", tmp_path / "data", "--out", tmp_path / "cache", *options)
    assert code == 0, err
    assert "1 of 16 images" in err
    assert f"{bad} is not a readable image" in err
    assert "15 images of 2 classes" in out
    assert json.loads((tmp_path / "e.json").read_text())["unreadable"] == ["two/020.png"]


def test_inside_the_tower(run, digits, tmp_path):
    """--method stream: bases over tokens, a fit that runs the tower, eval and predict;
    and what it cannot do."""
    bases, kept = tmp_path / "stream.safetensors", tmp_path / "stream"
    code, out, err = run(
        "bases", "--data", digits / "test", "--out", bases, "--placement", "stream", "--tokens", "class"
    )
    assert code == 0, err
    assert "components of 80 tokens" in out
    code, out, err = run(
        "fit",
        "--data",
        digits / "train",
        "--val",
        digits / "test",
        "--method",
        "stream",
        "--bases",
        bases,
        "--components",
        3,
        "--epochs",
        2,
        "--out",
        kept,
        "--json",
        tmp_path / "fit.json",
    )
    assert code == 0, err
    assert "with 144 numbers (stream, 200 images" in out
    assert json.loads((kept / "adapter.json").read_text())["options"]["tokens"] == "class"
    code, _, err = run("eval", "--adapter", kept, "--data", digits / "test", "--json", tmp_path / "eval.json")
    assert code == 0, err
    found, fitted = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("eval", "fit"))
    assert found["accuracy"] == pytest.approx(fitted["val_accuracy"])
    assert found["base_accuracy"] == pytest.approx(fitted["base_accuracy"])
    assert fitted["val_accuracy"] >= fitted["base_accuracy"]
    code, _, err = run(
        "predict", "--adapter", kept, "--data", digits / "test", "--out", tmp_path / "labels.csv"
    )
    assert code == 0, err
    for options, message in (
        (
            ("--method", "stream", "--checkpoint", tmp_path / "state"),
            "--checkpoint would need cached units",
        ),
        (("--method", "fine", "--tokens", "class"), "belongs to stream"),
        (("--method", "stream", "--rest", "sum"), "stream leaves them all"),
        (("--method", "stream", "--bases", bases, "--tokens", "all"), "over tokens class, not all"),
    ):
        code, _, err = run("fit", "--data", digits / "train", "--out", tmp_path / "no", *options)
        assert code == 2
        assert message in err
        assert not (tmp_path / "no").exists()
