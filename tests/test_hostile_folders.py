"""Folders that somebody else has prepared: pipes in place of files, second names of files,
names that lead out."""

import contextlib
import os
import signal

import pytest
import torch
from test_towers import build, images_for

import residual_kernels as rk
from residual_kernels import files
from residual_kernels.adapters import hub
from residual_kernels.analysis import summary
from residual_kernels.experiments.sweep_plan import SweepPlan
from residual_kernels.train import checkpoints

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without pipes that have names")


@contextlib.contextmanager
def at_once():
    """A call that waits for the other end of a pipe would wait for ever: here for 20 seconds."""

    def waited(*_):
        raise AssertionError("it waited for a pipe")

    before = signal.signal(signal.SIGALRM, waited)
    signal.alarm(20)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def made():
    tower = build()
    bases = rk.fit_bases(tower, [images_for(tower, 20)])
    adapters = [rk.ResiDual(tower, bases.truncate(components=k), init="normal") for k in (2, 3)]
    return tower, bases, adapters, rk.ZeroShotHead(torch.randn(bases.dim, 2), ["a", "b"])


READERS = {
    "adapter.json": lambda path: rk.AdapterFolder.open(path.parent),
    "manifest.json": lambda path: rk.UnitCache.load(path.parent),
    "analysis.json": lambda path: summary.Analysis.load(path.parent),
    "bases.safetensors": rk.SpectralBases.load,
    "head.safetensors": rk.ZeroShotHead.load,
    "fit.safetensors": lambda path: checkpoints.load(path, {"a": 1}),
    "plan.yaml": SweepPlan.read,
}


@pytest.mark.parametrize("name", READERS)
def test_a_pipe_in_place_of_a_file_is_refused_at_once(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with at_once(), pytest.raises((ValueError, FileNotFoundError)):
        READERS[name](tmp_path / name)


def test_a_pipe_in_the_place_of_a_result_is_left_alone(made, tmp_path):
    _, _, adapters, head = made
    for name in ("weights.safetensors", "config.json"):
        os.mkfifo(tmp_path / name)
    with at_once():
        rk.save_adapter(adapters[0], tmp_path)
        assert torch.equal(rk.load_adapter(build(), tmp_path).weight, adapters[0].weight)
        with pytest.raises(FileExistsError, match=r"config\.json belongs to another program"):
            hub.HubAdapter(adapters[0], head, {"label": "a"}).save_pretrained(tmp_path)
    assert (tmp_path / "weights.safetensors").is_fifo()
    assert (tmp_path / "config.json").is_fifo()
    (tmp_path / "other").mkdir()
    os.mkfifo(tmp_path / "other" / "adapter.json")
    with at_once(), pytest.raises(FileExistsError, match=r"adapter\.json is there already"):
        rk.save_adapter(adapters[0], tmp_path / "other")


def test_a_second_name_of_a_file_keeps_what_it_had(made, tmp_path):
    """Hard links, as backups by rsync and caches of build tools make them."""
    _, bases, adapters, head = made
    folder, backup = tmp_path / "a", tmp_path / "backup"
    backup.mkdir()

    def write(number):
        rk.save_adapter(adapters[number], folder, head=head)
        (bases if number else bases.truncate(components=2)).save(folder / "mine.safetensors")
        files.write_json(folder / "n.json", {"a": number})
        files.write_csv(folder / "n.csv", [["a", number]])

    write(0)
    before = {}
    for path in folder.iterdir():
        os.link(path, backup / path.name)
        before[path.name] = path.read_bytes()
    write(1)
    assert {path.name: path.read_bytes() for path in backup.iterdir()} == before
    assert torch.equal(rk.load_adapter(build(), folder).weight, adapters[1].weight)


def test_names_of_classes_name_no_files(made, tmp_path):
    _, bases, adapters, _ = made
    names = ["a\nb", "\x1b[2J", "../../up", "/etc/passwd", "CON", "a" * 5000, "\ud800"]
    head = rk.ZeroShotHead(torch.randn(bases.dim, len(names)), names)
    folder = tmp_path / "x" / "a"
    rk.save_adapter(adapters[0], folder, head=head, class_names=names)
    kept = rk.AdapterFolder.open(folder)
    assert list(kept.class_names) == list(kept.head.class_names) == names
    assert {path.name for path in tmp_path.rglob("*")} == {
        "x",
        "a",
        "adapter.json",
        "weights.safetensors",
        "bases.safetensors",
        "head.safetensors",
        "classes.json",
    }
