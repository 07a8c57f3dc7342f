"""Unit caches: what they hold, how they are read, how damage is found."""

import pickle
import random
import shutil

import pytest
import torch
from test_towers import build, images_for

import residual_kernels as rk
from residual_kernels.units.cache import MANIFEST, shards

KINDS = ("emb", "head", "mlp")


@pytest.fixture(scope="module")
def tower():
    return build()


@pytest.fixture(scope="module")
def data(tower):
    return images_for(tower, 60), torch.arange(60) % 3


@pytest.fixture(scope="module")
def batches(data):
    return list(zip(data[0].split(11), data[1].split(11), strict=True))


@pytest.fixture(scope="module")
def memory(tower, batches):
    return rk.encode(tower, batches, kinds=KINDS, class_names="abc")


@pytest.fixture(scope="module")
def folder(tower, batches, tmp_path_factory):
    """The same on disk, in six shards of 11 and 5 images."""
    path = tmp_path_factory.mktemp("cache") / "c"
    rk.encode(tower, batches, path, KINDS, class_names="abc", shard_images=11)
    return path


@pytest.fixture
def mapped(folder):
    return rk.UnitCache.load(folder)


def assert_same_terms(a, b):
    assert a.z.keys() == b.z.keys()
    for kind in a.z:
        assert torch.equal(a.z[kind], b.z[kind])
    for name in ("scale", "mean", "output"):
        assert torch.equal(getattr(a, name), getattr(b, name))


def test_a_cache_on_disk_is_the_cache_in_memory(tower, batches, memory, folder, mapped, tmp_path):
    assert len(list(folder.glob("shard-*"))) == 6
    written = rk.encode(tower, batches, tmp_path / "c", KINDS, class_names="abc")  # in one shard
    for cache in (mapped, written):
        assert len(cache) == 60
        assert cache.kinds == memory.kinds == tuple(cache.z) == KINDS
        assert cache.class_names == ("a", "b", "c")
        assert cache.checksum == memory.checksum
        assert cache.nbytes == memory.nbytes
        assert repr(cache) == repr(memory)
        assert torch.equal(cache.labels, memory.labels)
        assert torch.equal(cache.ids, memory.ids)
        assert_same_terms(cache, memory)
        cache.check(tower, ("mlp",))
    with pytest.raises(KeyError):
        mapped.z["pool"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_stored_dtypes(tower, batches, memory, tmp_path, dtype):
    cache = rk.encode(tower, batches, tmp_path / "c", KINDS, dtype)
    for kind in KINDS:
        assert cache.z[kind].dtype == dtype
        assert torch.equal(cache.z[kind], memory.z[kind].to(dtype))
    assert torch.equal(cache.output, memory.output)
    terms = cache.terms(torch.tensor([5, 2]))
    assert terms.z["head"].dtype == torch.float32
    assert torch.equal(terms.z["head"], memory.z["head"][[5, 2]].to(dtype).float())
    small = cache.to("cpu")
    assert small.z["head"].dtype == dtype
    assert_same_terms(small.terms(slice(3, 9)), cache.terms(slice(3, 9)))


def test_outputs_alone_and_images_without_labels(tower, data, tmp_path):
    images = list(data[0].split(16))
    cache = rk.encode(tower, images, tmp_path / "c", kinds=())
    assert cache.labels is None
    assert cache.kinds == ()
    assert repr(cache) == "UnitCache(images=60, outputs only, labels=False)"
    terms = cache.terms(torch.tensor([7, 3]))
    assert terms.z == {}
    assert torch.equal(terms.output, rk.encode(tower, images, kinds=()).output[[7, 3]])
    with pytest.raises(ValueError, match="no terms of kind head"):
        cache.check(tower, ("head",))


@pytest.mark.parametrize("bytes_mapped", [shards.MAPPED_BYTES, 1])
def test_any_rows_in_any_order(memory, folder, monkeypatch, bytes_mapped):
    monkeypatch.setattr(shards, "MAPPED_BYTES", bytes_mapped)
    mapped = rk.UnitCache.load(folder)
    generator = torch.Generator().manual_seed(0)
    cases = [
        slice(None),
        slice(3, 9),
        slice(8, 30),
        slice(11, 22),
        slice(5, 5),
        slice(55, 99),
        slice(None, None, 7),
        torch.tensor([], dtype=torch.int64),
        torch.tensor([59]),
        torch.tensor([4, 4, -1, 0]),
        torch.arange(9, 40),
        memory.labels == 1,
        *(torch.randint(60, (n,), generator=generator) for n in (1, 7, 64)),
        torch.randperm(60, generator=generator),
    ]
    half = torch.randperm(60, generator=generator)[:30]
    for rows in cases:
        assert_same_terms(mapped.terms(rows), memory.terms(rows))
        assert_same_terms(mapped.subset(rows), memory.subset(rows))
    cache, whole = mapped.subset(half), memory.subset(half)
    assert torch.equal(cache.labels, whole.labels)
    assert torch.equal(cache.ids, whole.ids)
    assert cache.nbytes == whole.nbytes
    assert_same_terms(cache, whole)
    assert_same_terms(cache.subset(torch.tensor([3, 1])), whole.subset(torch.tensor([3, 1])))
    assert [len(part.output) for part in cache.batches(8)] == [8, 8, 8, 6]
    assert len(mapped._shards._mapped) == (6 if bytes_mapped > 1 else 1)
    for rows in (torch.tensor([60]), torch.tensor([-61]), torch.zeros(59, dtype=torch.bool)):
        with pytest.raises(IndexError, match="but this cache has 60"):
            mapped.terms(rows)


def test_rows_of_one_shard_are_not_copied(mapped):
    a, b = mapped.terms(slice(12, 20)), mapped.terms(torch.arange(12, 20))
    assert a.z["head"].data_ptr() == b.z["head"].data_ptr()
    part = mapped.subset(torch.arange(22))
    assert part._shards is mapped._shards  # a subset is a list of rows


def test_batches_are_the_rows_in_order(memory, mapped):
    for cache in (memory, mapped):
        for size, sizes in ((25, [25, 25, 10]), (60, [60]), (100, [60])):
            parts = list(cache.batches(size))
            assert [len(part.output) for part in parts] == sizes
            for kind in KINDS:
                assert torch.equal(torch.cat([part.z[kind] for part in parts]), memory.z[kind])
            assert torch.equal(torch.cat([part.scale for part in parts]), memory.scale)
        with pytest.raises(ValueError, match="at least one row"):
            next(cache.batches(0))


def test_a_mapped_cache_travels_to_other_processes_as_its_path(mapped):
    mapped.terms(slice(None))
    sent = pickle.dumps(mapped)
    assert len(sent) < 5000
    assert_same_terms(pickle.loads(sent).terms(slice(None)), mapped.terms(slice(None)))


def test_bases_and_fits_read_mapped_caches(tower, memory, mapped):
    bases = rk.fit_bases(tower, mapped)
    assert torch.equal(bases.mean((1, 2)), rk.fit_bases(tower, memory).mean((1, 2)))
    head = rk.ZeroShotHead.from_prototypes(mapped.output, mapped.labels, "abc")
    weights = []
    for cache in (mapped, memory):
        residual = rk.ResiDual(tower, bases.truncate(energy=0.9))
        rk.fit(residual, head, cache, cache, epochs=2, batch_size=16)
        weights.append(residual.weight.detach())
    assert torch.equal(*weights)


# damage


@pytest.fixture
def copy(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "c")
    return tmp_path / "c"


def test_a_flipped_bit_anywhere_is_found_by_name(copy):
    chance = random.Random(0)
    shard = copy / "shard-00002.safetensors"
    whole = shard.read_bytes()
    header = int.from_bytes(whole[:8], "little") + 8
    places = [0, 9, header - 1, header, len(whole) - 1]
    places += [chance.randrange(header) for _ in range(60)] + [
        chance.randrange(len(whole)) for _ in range(20)
    ]
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << chance.randrange(8)
        shard.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"shard-00002\.safetensors"):
            rk.UnitCache.load(copy)
    shard.write_bytes(whole)
    rk.UnitCache.load(copy)


@pytest.mark.parametrize("verify", ["full", "size"])
def test_truncated_missing_and_exchanged_shards_are_named(tower, data, copy, tmp_path, verify):
    first, second = (copy / shards.shard_name(index) for index in (0, 1))
    whole = first.read_bytes()
    for kept in (0, 7, 100, len(whole) - 1):
        first.write_bytes(whole[:kept])
        with pytest.raises(ValueError, match=r"shard-00000\.safetensors is truncated"):
            rk.UnitCache.load(copy, verify=verify)
    first.write_bytes(second.read_bytes())
    with pytest.raises(ValueError, match=r"shard-00000\.safetensors is not the shard its manifest names"):
        rk.UnitCache.load(copy, verify=verify)
    rk.encode(tower, [(data[0] * 2, data[1])], tmp_path / "d", KINDS, class_names="abc", shard_images=11)
    first.write_bytes((tmp_path / "d" / first.name).read_bytes())
    with pytest.raises(ValueError, match=r"shard-00000\.safetensors is not the shard its manifest names"):
        rk.UnitCache.load(copy, verify=verify)
    first.unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-00000\.safetensors is missing"):
        rk.UnitCache.load(copy, verify=verify)


def test_a_shard_exchanged_after_loading_is_refused_when_it_is_read(copy):
    cache = rk.UnitCache.load(copy, verify="size")
    shutil.copy(copy / shards.shard_name(4), copy / shards.shard_name(3))
    cache.terms(slice(44, 55))
    cache = pickle.loads(pickle.dumps(cache))
    with pytest.raises(ValueError, match=r"shard-00003\.safetensors is not the shard"):
        cache.terms(slice(33, 34))


def test_manifests_that_cannot_be_used(copy, tmp_path):
    cases = [
        ("{", "not a readable unit cache"),
        ('{"schema": 1, "what": "unit cache"}', "lacks complete"),
        (
            '{"schema": 1, "what": "unit cache", "complete": true, "run": {}}',
            "lacks run.tower",
        ),
        ('{"schema": 1, "what": "adapter"}', "holds a adapter, not a unit cache"),
        ('{"schema": 99}', "schema 99; this version reads up to"),
    ]
    for text, message in cases:
        (copy / MANIFEST).write_text(text)
        with pytest.raises(ValueError, match=message):
            rk.UnitCache.load(copy)
    (copy / MANIFEST).unlink()
    with pytest.raises(FileNotFoundError, match="no unit cache at .*manifest.json is missing"):
        rk.UnitCache.load(copy)
    with pytest.raises(ValueError, match='"full" or "size"; got \'none\''):
        rk.UnitCache.load(copy, verify="none")
