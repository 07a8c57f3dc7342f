"""UnitSource: the same units from a cache in memory, a cache on disk, a loader and a tensor of images."""

import pytest
import torch
from test_towers import build, images_for

import residual_kernels as rk
from residual_kernels import towers
from residual_kernels.units import source
from residual_kernels.units.source import cache_of, cached_source, rows_within, unit_source

COUNT = 41
KINDS = ("emb", "head", "mlp")


@pytest.fixture(scope="module")
def tower():
    return build().double()


@pytest.fixture(scope="module")
def images(tower):
    return images_for(tower, COUNT, torch.float64)


@pytest.fixture(scope="module")
def labels():
    return torch.arange(COUNT) % 3


@pytest.fixture(scope="module")
def loader(images, labels):
    return list(zip(images.split(8), labels.split(8), strict=True))


@pytest.fixture(scope="module")
def memory(tower, loader):
    return rk.encode(tower, loader, kinds=KINDS, class_names="abc")


@pytest.fixture(scope="module")
def mapped(tower, loader, tmp_path_factory):
    return rk.encode(tower, loader, tmp_path_factory.mktemp("cache") / "c", KINDS, shard_images=8)


@pytest.fixture(params=["memory", "mapped", "loader", "images"])
def data(request):
    return request.getfixturevalue(request.param)


def joined(batches):
    """(rows, z of heads, scale, mean, output) of all batches, one after another."""
    batches = list(batches)
    terms = [batch.terms for batch in batches]
    columns = [(one.z["head"], one.scale, one.mean, one.output) for one in terms]
    return torch.cat([batch.rows for batch in batches]), *map(torch.cat, zip(*columns, strict=True))


def close(a, b):
    return all((x - y).abs().max() <= 1e-12 for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("ahead", [False, True])
def test_every_kind_of_data_gives_the_same_units(tower, data, memory, ahead):
    whole = memory.terms(slice(None))
    wanted = (torch.arange(COUNT), whole.z["head"], whole.scale, whole.mean, whole.output)
    found = unit_source(data, tower, ("head",))
    assert found.repeatable
    for _ in range(2):
        assert close(joined(found.batches(9, ahead=ahead)), wanted)
    assert not close(joined(found.batches(9)), [*wanted[:-1], wanted[-1].flip(0)])
    cache = cache_of(data, tower, ("head",))
    assert close((cache.z["head"], cache.output), (whole.z["head"], whole.output))


def test_only_the_kinds_asked_for_are_read(tower, data):
    def kinds(*arguments, **options):
        return {
            tuple(sorted(batch.terms.z))
            for batch in unit_source(data, tower, *arguments, **options).batches()
        }

    assert kinds() == {()}
    assert kinds(("mlp",)) == {("mlp",)}
    assert kinds(("head",), also=("head", "emb")) == {("emb", "head")}


def test_more_kinds_are_read_where_a_cache_holds_them(tower, loader):
    heads = rk.encode(tower, loader, kinds=("head",))
    batch = next(unit_source(heads, tower, ("head",), also=("mlp",)).batches())
    assert tuple(batch.terms.z) == ("head",)


@pytest.mark.parametrize("ahead", [False, True])
def test_rows_by_number(tower, memory, mapped, ahead):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, COUNT, (5,), generator=generator) for _ in range(6)]
    asked = [*rows, slice(3, 9), slice(40, 41)]
    whole = memory.terms(slice(None))
    for cache in (memory, mapped):
        found = unit_source(cache, tower, ("head",))
        assert (found.indexed, found.count) == (True, COUNT)
        assert torch.equal(found.ids, memory.ids)
        batches = list(found.along(asked, ahead=ahead))
        for wanted, batch in zip(asked, batches, strict=True):
            assert torch.equal(batch.rows, torch.arange(COUNT)[wanted])
            assert torch.equal(batch.labels, memory.labels[wanted])
            assert torch.equal(batch.terms.z["head"], whole.z["head"][wanted])
            assert len(batch) == len(batch.rows)
        some = torch.tensor([4, 30, 2])
        assert torch.equal(next(found.subset(some).batches()).terms.output, whole.output[some])
        assert torch.equal(found.first(7).output, whole.output[:7])


def test_a_loader_is_read_in_its_own_order(tower, loader, images):
    found = unit_source(loader, tower, ("head",))
    assert (found.indexed, found.count, found.first()) == (False, None, None)
    assert [len(batch) for batch in found.batches(3)] == [8] * 5 + [1]
    assert torch.equal(torch.cat([batch.images for batch in found.batches()]), images)
    for refused in (lambda: next(iter(found.along([slice(0, 2)]))), lambda: found.subset(torch.arange(2))):
        with pytest.raises(ValueError, match="encode it"):
            refused()
    assert not unit_source(iter(loader), tower).repeatable
    assert cached_source(loader, tower, ("head",)).indexed


def test_the_tower_runs_only_for_terms(tower, loader, monkeypatch):
    ran = []
    kind = type(towers.view(tower))
    terms = kind.terms
    monkeypatch.setattr(kind, "terms", lambda *args, **kw: ran.append(1) or terms(*args, **kw))
    batches = list(unit_source(loader, tower, ("head",)).batches())
    assert not ran
    assert batches[0].terms is batches[0].terms
    assert len(ran) == 1


def test_labels(tower, memory, loader, images):
    for data in (memory, loader):
        found = unit_source(data, tower, labelled=True, classes=3)
        assert torch.equal(torch.cat([batch.labels for batch in found.batches()]), memory.labels)
        with pytest.raises(ValueError, match="labels run from 0 to 2, but the head has 2 classes"):
            list(unit_source(data, tower, labelled=True, classes=2).batches())
    for data in (rk.encode(tower, [images]), images):
        with pytest.raises(ValueError, match="this needs labels"):
            list(unit_source(data, tower, labelled=True).batches())
        assert next(unit_source(data, tower).batches()).labels is None
    named = [(images[:4], ["a.jpg", "b.jpg", "c.jpg", "d.jpg"])]  # not labels, and nobody asked for any
    assert next(unit_source(named, tower).batches()).labels is None


def test_processes_share_a_cache_and_read_their_own_loaders(tower, memory, loader, monkeypatch):
    monkeypatch.setattr(source.distributed, "share", lambda count: slice(count // 2, count))
    shared = joined(unit_source(memory, tower, ("head",)).batches(10, shared=True))
    assert shared[0].tolist() == list(range(20, COUNT))
    assert len(joined(unit_source(loader, tower, ("head",)).batches(shared=True))[0]) == COUNT


@pytest.mark.parametrize("ahead", [False, True])
def test_nan_is_named_by_the_row_of_the_data_given(tower, memory, ahead):
    spoilt = memory.subset(torch.arange(30))
    spoilt.z["head"][[7, 20], 1, 3] = float("nan")
    found = unit_source(spoilt, tower, ("head",))
    with pytest.raises(ValueError, match="row 7; encode"):
        joined(found.batches(16, ahead=ahead))
    with pytest.raises(ValueError, match="row 20; encode"):
        joined(found.subset(torch.tensor([1, 20])).batches(ahead=ahead))
    assert len(joined(found.along([slice(8, 20)], ahead=ahead))[0]) == 12
    assert len(list(unit_source(spoilt, tower, ("mlp",)).batches())) == 1  # heads are not read


def test_what_a_source_refuses(tower, memory, images):
    with pytest.raises(ValueError, match="no terms of kind pool"):
        unit_source(memory, tower, ("pool",))
    with pytest.raises(ValueError, match="other weights"):
        unit_source(memory, build(seed=1).double())
    spoilt = images.clone()
    spoilt[11] = float("inf")
    with pytest.raises(ValueError, match="index 11"):
        list(unit_source(spoilt.split(4), tower).batches())


def test_rows_within_a_budget():
    assert rows_within(10, 100) == 10
    assert rows_within(1000, 100) == 1
    assert rows_within(1, 10**9) == source.ROWS
    assert rows_within(0, 100, 7) == 7
