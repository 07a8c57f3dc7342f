"""Unit caches: what they hold, how they are read."""

import pytest
import torch
from test_towers import build, images_for

import residual_kernels as rk
from residual_kernels.cache import MANIFEST


@pytest.fixture(scope="module")
def tower():
    return build()


@pytest.fixture(scope="module")
def data(tower):
    return images_for(tower, 60), torch.arange(60) % 3


def test_batches_are_the_rows_in_order(tower, data):
    cache = rk.encode(tower, [data], kinds=("head", "mlp"))
    for size, sizes in ((25, [25, 25, 10]), (60, [60]), (100, [60])):
        parts = list(cache.batches(size))
        assert [len(part.output) for part in parts] == sizes
        for kind in ("head", "mlp"):
            assert torch.equal(torch.cat([part.z[kind] for part in parts]), cache.z[kind])
        assert torch.equal(torch.cat([part.scale for part in parts]), cache.scale)
    with pytest.raises(ValueError, match="at least one row"):
        next(cache.batches(0))


def test_cache_on_disk_is_the_cache_in_memory(tower, data, tmp_path, monkeypatch):
    monkeypatch.setattr("residual_kernels.cache.encoding.SHARD_BYTES", 30_000)
    batches = list(zip(data[0].split(16), data[1].split(16), strict=True))
    cache = rk.encode(tower, batches, kinds=("head", "mlp"))
    written = rk.encode(tower, batches, tmp_path / "c", kinds=("head", "mlp"), class_names="abc")
    again = rk.UnitCache.load(tmp_path / "c")
    assert len(list((tmp_path / "c").glob("shard-*"))) > 1
    assert again.class_names == ("a", "b", "c")
    for one in (written, again):
        for kind in ("head", "mlp"):
            assert torch.equal(one.z[kind], cache.z[kind])
        for name in ("scale", "mean", "output", "labels", "ids"):
            assert torch.equal(getattr(one, name), getattr(cache, name))
    half = rk.encode(tower, batches, dtype=torch.bfloat16)
    assert half.z["head"].dtype == torch.bfloat16
    assert half.output.dtype == half.scale.dtype == torch.float32
    assert (half.z["head"].float() - cache.z["head"]).abs().max() < 0.01 * cache.z["head"].abs().max()


def test_encode_refuses_and_leaves_nothing_behind(tower, data, tmp_path):
    folder = tmp_path / "c"
    nan = data[0].clone()
    nan[33] = float("nan")

    def interrupted():
        yield data[0][:20], data[1][:20]
        raise KeyboardInterrupt

    cases = [
        ([(nan[:30], data[1][:30]), (nan[30:], data[1][30:])], {}, ValueError, "index 33"),
        ([], {}, ValueError, "no images"),
        ([(data[0], data[1][:-1])], {}, ValueError, "60 images but labels"),
        ([(data[0], data[1] - 1)], {}, ValueError, "from -1 to 1"),
        ([data], {"class_names": "ab"}, ValueError, "there are 2 classes"),
        ([data, data[0]], {}, ValueError, "for all or for none"),
        ([data], {"dtype": torch.int8}, ValueError, "dtype must be"),
        (interrupted(), {}, KeyboardInterrupt, "^$"),
    ]
    for batches, options, error, message in cases:
        with pytest.raises(error, match=message):
            rk.encode(tower, batches, folder, **options)
        assert not folder.exists()
    folder.mkdir()
    (folder / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="not empty"):
        rk.encode(tower, [data], folder)
    assert (folder / "mine.txt").read_text() == "keep"


def test_damaged_caches_are_refused_by_name(tower, data, tmp_path):
    folder = tmp_path / "c"
    rk.encode(tower, [data], folder)
    shard = folder / "shard-00000.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="shard-00000.safetensors is truncated"):
        rk.UnitCache.load(folder)
    shard.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    with pytest.raises(ValueError, match="corrupted"):
        rk.UnitCache.load(folder)
    other = tmp_path / "d"
    rk.encode(tower, [(data[0] * 2, data[1])], other)
    shard.write_bytes((other / "shard-00000.safetensors").read_bytes())
    with pytest.raises(ValueError, match="not the shard its manifest names"):
        rk.UnitCache.load(folder)
    (folder / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match="not a readable unit cache"):
        rk.UnitCache.load(folder)
    (folder / MANIFEST).write_text('{"schema": 1, "what": "unit cache"}')
    with pytest.raises(ValueError, match="lacks complete, run"):
        rk.UnitCache.load(folder)
    (folder / MANIFEST).write_text('{"schema": 1, "what": "adapter"}')
    with pytest.raises(ValueError, match="lacks|is a adapter"):
        rk.UnitCache.load(folder)
    (folder / MANIFEST).write_text('{"schema": 99}')
    with pytest.raises(ValueError, match="schema 99; this version reads up to"):
        rk.UnitCache.load(folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(FileNotFoundError, match="manifest.json is missing"):
        rk.UnitCache.load(folder)


def test_an_interrupt_at_the_very_end_leaves_nothing(tower, data, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("residual_kernels.cache.encoding.write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        rk.encode(tower, [data], tmp_path / "c")
    assert not (tmp_path / "c").exists()
