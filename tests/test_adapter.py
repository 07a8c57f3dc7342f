"""Adapters on disk: the same numbers back, or one clear error and an untouched tower."""

import copy
import json

import pytest
import torch
from test_towers import build, images_for

import residual_kernels as rk


@pytest.fixture
def tower():
    return build()


MAKE = {
    "fine": lambda tower, bases: rk.ResiDual(tower, bases.of("head").truncate(energy=0.9), init="normal"),
    "full": lambda tower, bases: rk.ResiDual(tower, bases, "sum", init="normal"),
    "mean": lambda tower, bases: rk.ResiDual(tower, bases.of("mlp"), "mean", init="normal"),
    "coarse": lambda tower, bases: rk.CoarseHeads(tower, init="normal"),
    "coarse mean": lambda tower, bases: rk.CoarseHeads(tower, "mean", bases=bases, init="normal"),
    "output": lambda tower, bases: rk.OutputSpectral(tower, bases, init="normal"),
    "linear": lambda tower, bases: rk.OutputLinear(tower, seed=3),
}


@pytest.mark.parametrize("name", MAKE)
def test_round_trip_is_exact(tower, tmp_path, name):
    bases = rk.fit_bases(tower, [images_for(tower, 20)], kinds=("head", "mlp"))
    adapter = MAKE[name](tower, bases)
    images = images_for(tower)
    with torch.no_grad():
        expected = adapter(images)
        rk.save_adapter(adapter, tmp_path / "a")
        again = rk.load_adapter(copy.deepcopy(tower), tmp_path / "a")
        assert type(again) is type(adapter)
        assert torch.equal(again(images), expected)
    config = json.loads((tmp_path / "a" / "adapter.json").read_text())
    assert config["parameters"] == sum(p.numel() for p in adapter.trainable())
    rk.save_adapter(again, tmp_path / "a")  # replaces
    with torch.no_grad():
        assert torch.equal(rk.load_adapter(copy.deepcopy(tower), tmp_path / "a")(images), expected)


def test_what_is_wrong_is_named_before_the_tower_is_touched(tower, tmp_path):
    bases = rk.fit_bases(tower, [images_for(tower, 20)])
    adapter = MAKE["fine"](tower, bases)
    rk.save_adapter(adapter, tmp_path / "a")
    folder, fresh = tmp_path / "a", build()
    flags = [p.requires_grad for p in fresh.parameters()]

    def spoil(file, change):
        path = folder / file
        held = path.read_bytes()
        path.write_bytes(change(held))
        return lambda: path.write_bytes(held)

    def edit(**changes):
        return lambda held: json.dumps(json.loads(held) | changes).encode()

    cases = [
        ("weights.safetensors", lambda b: b[:-10], "truncated"),
        ("weights.safetensors", lambda b: b[:-1] + b"\x01", "corrupted"),
        ("bases.safetensors", lambda b: b[: len(b) // 3], "truncated"),
        ("adapter.json", lambda b: b"[]", "not a adapter|no schema"),
        ("adapter.json", edit(schema=7), "schema 7"),
        ("adapter.json", edit(**{"class": "os.system"}), "names the class 'os.system'"),
        ("adapter.json", edit(checksum="0" * 64), "other weights"),
        ("adapter.json", edit(weights_sha256="0"), "not the file"),
        ("adapter.json", edit(bases_sha256="0"), "other bases than those asked for"),
        ("adapter.json", edit(options={"rest": "zero", "colour": 1}), "unknown options"),
        ("adapter.json", lambda b: b'{"schema": 1, "what": "adapter"}', "lacks class"),
        ("adapter.json", lambda b: b'{"schema": 1, "what": "unit cache", "class": 1}', "lacks options"),
    ]
    for file, change, message in cases:
        restore = spoil(file, change)
        with pytest.raises(ValueError, match=message):
            rk.load_adapter(fresh, folder)
        assert flags == [p.requires_grad for p in fresh.parameters()]
        restore()
    rk.load_adapter(fresh, folder).detach()
    with pytest.raises(ValueError, match="other weights"):
        rk.load_adapter(build(seed=2), folder)
    with pytest.raises(FileNotFoundError, match="no adapter at"):
        rk.load_adapter(fresh, tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file"):
        rk.save_adapter(adapter, tmp_path / "file")


def test_an_old_adapter_is_replaced_whole_or_not_at_all(tower, tmp_path, monkeypatch):
    bases = rk.fit_bases(tower, [images_for(tower, 20)], kinds=("head", "mlp"))
    folder = tmp_path / "a"
    rk.save_adapter(MAKE["fine"](tower, bases), folder)
    (folder / "mine.txt").write_text("keep")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("residual_kernels.adapter.write_json", stop)
        with pytest.raises(KeyboardInterrupt):
            rk.save_adapter(MAKE["linear"](tower, bases), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    rk.save_adapter(MAKE["linear"](tower, bases), folder)
    assert {path.name for path in folder.iterdir()} == {"adapter.json", "weights.safetensors", "mine.txt"}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_trained_tower_is_not_kept_by_halves(tower, tmp_path):
    adapter = MAKE["fine"](tower, rk.fit_bases(tower, [images_for(tower, 20)], kinds=("head", "mlp")))
    with torch.no_grad():
        tower.transformer.resblocks[0].mlp.c_fc.weight.mul_(1.5)
    with pytest.raises(ValueError, match="has been trained since its bases were fitted"):
        rk.save_adapter(adapter, tmp_path / "a")
    assert not (tmp_path / "a").exists()
