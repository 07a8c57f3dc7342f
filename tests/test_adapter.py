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
    "anchored": lambda tower, bases: rk.ResiDual(tower, bases, "all", init="normal"),
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


def test_bases_by_reference(tower, tmp_path):
    bases = rk.fit_bases(tower, [images_for(tower, 20)], kinds=("head", "mlp"))
    file = tmp_path / "shared.safetensors"
    bases.save(file)
    in_stream = rk.fit_bases(tower, [images_for(tower, 20)], placement="stream")
    in_stream.save(tmp_path / "stream.safetensors")
    cases = [
        (MAKE[name](tower, bases), bases, file) for name in ("fine", "full", "mean", "coarse mean", "output")
    ]
    stream = rk.ResiDual(
        tower, in_stream.truncate(components=5), placement="stream", layers=[1], init="normal"
    )
    cases.append((stream, in_stream, tmp_path / "stream.safetensors"))
    images = images_for(tower)
    for adapter, whole, where in cases:
        rk.save_adapter(adapter, tmp_path / "a", bases=False)
        rk.save_adapter(adapter, tmp_path / "b", bases=where)
        rk.save_adapter(adapter, tmp_path / "whole")
        assert not (tmp_path / "a" / "bases.safetensors").exists()
        with torch.no_grad():
            expected = adapter(images)
            for again in (
                rk.load_adapter(copy.deepcopy(tower), tmp_path / "a", bases=whole),
                rk.load_adapter(copy.deepcopy(tower), tmp_path / "a", bases=where),
                rk.load_adapter(copy.deepcopy(tower), tmp_path / "b"),
                rk.load_adapter(copy.deepcopy(tower), tmp_path / "whole"),
            ):
                assert torch.equal(again(images), expected)
            rk.save_adapter(again, tmp_path / "c", bases=False)  # one loaded refers to the same bases
            again = rk.load_adapter(copy.deepcopy(tower), tmp_path / "c", bases=whole)
            assert torch.equal(again(images), expected)

    rk.save_adapter(cases[0][0], tmp_path / "b", bases=file)
    fine = MAKE["fine"](tower, bases)
    rk.save_adapter(fine, tmp_path / "a", bases=False)
    rk.save_adapter(fine, tmp_path / "whole")
    other = rk.fit_bases(tower, [images_for(tower, 20, seed=7)])
    other.save(tmp_path / "other.safetensors")
    flags = [p.requires_grad for p in fine.detach().parameters()]
    cases = [
        (lambda: rk.load_adapter(tower, tmp_path / "a"), FileNotFoundError, "fitted on 20 images"),
        (lambda: rk.load_adapter(tower, tmp_path / "a", bases=other), ValueError, "other bases"),
        (
            lambda: rk.load_adapter(tower, tmp_path / "a", bases=bases.truncate(components=2)),
            ValueError,
            "up to 2",
        ),
        (
            lambda: rk.load_adapter(tower, tmp_path / "a", bases=bases.of("mlp")),
            ValueError,
            "hold mlp, not head",
        ),
        (
            lambda: rk.load_adapter(tower, tmp_path / "a", bases="no.safetensors"),
            FileNotFoundError,
            "no file at",
        ),
        (
            lambda: rk.load_adapter(tower, tmp_path / "whole", bases=bases),
            ValueError,
            "omit the argument bases",
        ),
        (
            lambda: rk.save_adapter(fine, tmp_path / "a", bases=tmp_path / "other.safetensors"),
            ValueError,
            "other base",
        ),
        (
            lambda: rk.save_adapter(fine, tmp_path / "a", bases=tmp_path / "none"),
            FileNotFoundError,
            "no spectral",
        ),
        (
            lambda: rk.save_adapter(fine, tmp_path / "whole", bases=tmp_path / "whole" / "bases.safetensors"),
            ValueError,
            "outside of",
        ),
        (
            lambda: rk.save_adapter(MAKE["linear"](tower, bases), tmp_path / "a", bases=False),
            ValueError,
            "no bases",
        ),
    ]
    tower.requires_grad_(True)
    for run, error, message in cases:
        with pytest.raises(error, match=message):
            run()
    MAKE["linear"](tower, bases).detach()
    assert flags == [p.requires_grad for p in tower.parameters()]
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("b", "shared.safetensors"):  # a folder and its bases travel together
        (tmp_path / name).rename(moved / name)
    rk.load_adapter(tower, moved / "b")


def test_a_float64_tower_keeps_float64(tmp_path):
    tower = build().double()
    bases = rk.fit_bases(tower, [images_for(tower, 20, torch.float64)])
    adapter = rk.ResiDual(tower, bases.truncate(energy=0.9), init="normal")
    images = images_for(tower, dtype=torch.float64)
    rk.save_adapter(adapter, tmp_path / "whole")
    bases.save(tmp_path / "single.safetensors")
    rk.save_adapter(adapter, tmp_path / "reference", bases=tmp_path / "single.safetensors")
    with torch.no_grad():
        expected = adapter(images)
        assert torch.equal(rk.load_adapter(copy.deepcopy(tower), tmp_path / "whole")(images), expected)
        rounded = rk.load_adapter(copy.deepcopy(tower), tmp_path / "reference")(images)
        assert 0 < (rounded - expected).norm() / expected.norm() < 1e-6  # components of the file are float32


def test_the_size_on_vit_l_14(tmp_path):
    """About 60 kB by reference, whatever the bases weigh: all 384 heads, 36 components each, D = 768."""
    import open_clip
    from open_clip.model import _build_vision_tower

    config = open_clip.get_model_config("ViT-L-14")
    torch.manual_seed(0)
    tower = _build_vision_tower(config["embed_dim"], config["vision_cfg"] | {"layers": 1}).eval()
    shallow = rk.fit_bases(tower, [images_for(tower, 4)])
    adapter = rk.ResiDual(tower, shallow.truncate(components=36))
    rk.save_adapter(adapter, tmp_path / "a", bases=False)
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "a").iterdir()}
    heads, depth = 16, 24  # of the one layer here, and layers of the real one
    per_head = 36 * 4 + 4  # weights, and how many there are
    assert len(adapter.weight) == heads * 36
    overhead = sum(sizes.values()) - heads * per_head
    assert overhead < 2500  # the config and the file's header do not grow with depth
    assert 55_000 < overhead + depth * heads * per_head < 62_000


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
        ("adapter.json", edit(options={"rest": "zero", "seed": 3}), "other options or shapes"),
        ("adapter.json", edit(options={"rest": "none"}), "rest must be one of"),
        ("adapter.json", edit(options=5), "options must be a mapping"),
        ("adapter.json", edit(bases_sha256=None), "rests on bases"),
        ("adapter.json", edit(bases_reference={}), "lacks .*fingerprint"),
        ("adapter.json", lambda b: b'{"schema": 1, "what": "adapter"}', "lacks (class|options)"),
        (
            "adapter.json",
            lambda b: b'{"schema": 1, "what": "unit cache", "class": 1}',
            "holds a unit cache, not a adapter",
        ),
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

    for step in ("os.link", "os.replace", "os.fsync", "os.open", "residual_kernels.file_sets.write_tensors"):
        with monkeypatch.context() as patch:
            patch.setattr(step, stop)
            with pytest.raises(KeyboardInterrupt):
                rk.save_adapter(MAKE["linear"](tower, bases), folder)
        for path in folder.glob(".*.part"):  # what it could not even open or remove, the next one does
            assert step in ("os.open",), path
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    rk.save_adapter(MAKE["linear"](tower, bases), folder)
    config = json.loads((folder / "adapter.json").read_text())
    names = {entry["name"] for entry in config["files"].values()}
    assert {path.name for path in folder.iterdir()} == {"adapter.json", "mine.txt", *names}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    rk.save_adapter(rk.load_adapter(copy.deepcopy(tower), folder), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_trained_tower_is_not_kept_by_halves(tower, tmp_path):
    adapter = MAKE["fine"](tower, rk.fit_bases(tower, [images_for(tower, 20)], kinds=("head", "mlp")))
    with torch.no_grad():
        tower.transformer.resblocks[0].mlp.c_fc.weight.mul_(1.5)
    with pytest.raises(ValueError, match="has been trained since its bases were fitted"):
        rk.save_adapter(adapter, tmp_path / "a")
    assert not (tmp_path / "a").exists()
