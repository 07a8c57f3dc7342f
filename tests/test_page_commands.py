"""Every command of the pages runs, in the order in which a page gives them.

The bundled model stands in for the models that they name, and small folders of digits for the images.
"""

import re
import shutil
import sys
from itertools import count
from pathlib import Path

import pytest
from test_readme import COMMANDS, DOCS, README

from residual_kernels import cli
from residual_kernels.cli import printing
from residual_kernels.demo import DIGITS, digit_images

CLASSES, TRAIN, REST = 3, 24, 8  # classes; images of each for training, and for every other part
# Run by tests of their own: the demo, and what needs a cluster or a model that must be downloaded.
ELSEWHERE = re.compile(r"residual-kernels demo|torchrun|towers hf:|towers ViT-B-16-SigLIP")
PLAN = """
towers: [{model: bundled}]
data: [{name: pets, train: pets/train, val: pets/val, test: pets/test}]
methods: [base, fine]
"""
MODEL = re.compile(r"--model (?:ViT-B-32|ViT-B-16|ViT-L-14) --pretrained \w+")


def lines():
    """The commands of each page, as they stand, once each."""
    found = {}
    for page, line, program, _, whole in COMMANDS:
        if whole and program == "residual-kernels" and not ELSEWHERE.search(line):
            found.setdefault(page, []).append(line)
    return found


PAGES = lines()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder with the images that the pages name, under each of their names."""
    root = tmp_path_factory.mktemp("images")
    pictures, labels = digit_images()
    of_class = [[p for p, label in zip(pictures, labels, strict=True) if label == k] for k in range(CLASSES)]
    starts = {"train": 0, "val": TRAIN, "test": TRAIN + REST}
    for part, start in starts.items():
        for name, own in zip(DIGITS, of_class, strict=False):
            folder = root / "classes" / part / name
            folder.mkdir(parents=True)
            for number, picture in zip(
                count(start), own[start : start + (TRAIN if part == "train" else REST)], strict=False
            ):
                picture.save(folder / f"{number:03d}.png")
    for name in ("pets", "digits", "my-photos"):
        shutil.copytree(root / "classes", root / name)
    shutil.copytree(root / "classes" / "train", root / "photos")
    shutil.copytree(root / "classes" / "test" / DIGITS[0], root / "new-photos")
    shutil.make_archive(str(root / "cifar10"), "zip", root / "classes")
    (root / "plan.yaml").write_text(PLAN)
    (root / "words.txt").write_text("a ring\na line\nthe number two\nthe letter x\n")
    return root


def run(line, monkeypatch, capsys):
    """Runs one line of a page in this process, with the bundled model: its exit code and errors."""
    own = MODEL.sub("", line.partition("residual-kernels ")[2])
    monkeypatch.setattr(sys, "argv", ["residual-kernels", *own.split()])
    for console in (printing.out, printing.err):
        monkeypatch.setattr(console, "width", 200)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0, capsys.readouterr().err


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_the_commands_of_a_page_run(page, images, tmp_path, monkeypatch, capsys):
    work = tmp_path / "work"
    shutil.copytree(images, work)
    monkeypatch.chdir(work)
    if page.stem == "GALLERY":  # which writes its caches into photos/
        shutil.rmtree(work / "photos")
    if page.stem == "GUIDE":  # it names the adapter that another page fits
        fit = "residual-kernels fit --method stream --data pets/train --out pets-stream --epochs 1"
        assert run(fit, monkeypatch, capsys)[0] == 0
    for line in PAGES[page]:
        code, err = run(line, monkeypatch, capsys)
        assert code == 0, f"{line}\n{err}"


def test_the_pages_have_commands():
    assert {"COMMANDS", "GALLERY", "GUIDE", "FEW_LABELS", "STORY", "SCALE"} <= {page.stem for page in PAGES}
    assert sum(map(len, PAGES.values())) > 25


def test_the_command_of_the_readme_runs(images, tmp_path, monkeypatch, capsys):
    """The one that stands in a sentence."""
    (line,) = re.findall(r"`(residual-kernels fit [^`]+)`", README.read_text())
    work = tmp_path / "work"
    shutil.copytree(images, work)
    shutil.copytree(work / "classes" / "train", work / "photos" / "train")
    monkeypatch.chdir(work)
    assert run(line, monkeypatch, capsys)[0] == 0
    assert Path("photos-adapter", "adapter.json").is_file()


def test_a_command_that_fails_is_noticed(images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, err = run("residual-kernels fit --data nowhere --out run", monkeypatch, capsys)
    assert code == 2
    assert "nowhere" in err
    assert (DOCS / "COMMANDS.md") in PAGES
