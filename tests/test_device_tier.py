"""A tower on another device, without one: nothing meets a CPU tensor, and nobody waits where nobody has to.

The device is tests/fake_device.py: its tensors hold CPU values, so that every result is compared with the
CPU's own.
"""

import copy
import math

import fake_cuda
import fake_device
import pytest
import torch
from test_towers import build, images_for
from torch import nn

import residual_kernels as rk
from residual_kernels.towers import checksum

LABELS = torch.arange(60) % 3
KINDS = ("head", "mlp")


@pytest.fixture
def device():
    with fake_cuda.installed() as found:
        yield found


@pytest.fixture(scope="module")
def images():
    return images_for(build(), 60) * 0.5 + (LABELS - 1.0)[:, None, None, None]


def loader(images, size=16):
    return list(zip(images.split(size), LABELS.split(size), strict=True))


def head_of(seed=2):
    vectors = torch.randn(32, 3, generator=torch.Generator().manual_seed(seed))
    return rk.ZeroShotHead(vectors, "abc", math.log(10.0))


@pytest.fixture(scope="module")
def known(images):
    """What the CPU says: bases, cache, and adapters by name."""
    tower = build()
    bases = rk.fit_bases(tower, images.split(20), kinds=KINDS).truncate(energy=0.9)
    cache = rk.encode(tower, loader(images), kinds=KINDS, class_names="abc")
    return tower, bases, cache


def adapters(tower, bases):
    return {
        "fine": rk.ResiDual(tower, bases.of("head"), init="normal"),
        "anchored": rk.ResiDual(tower, bases, "all", init="normal"),
        "coarse": rk.CoarseHeads(tower, init="normal"),
        "output": rk.OutputSpectral(tower, bases, init="normal"),
        "linear": rk.OutputLinear(tower, seed=3),
    }


def same(found, expected, tolerance=1e-5):
    found = found.detach()
    assert found.is_cuda, "the result is not on the device"
    found = fake_device.held(found)
    assert (found - expected).abs().max() <= tolerance * expected.abs().max().clamp_min(1)


# --- the device itself --------------------------------------------------------------------------------------


def test_the_device_refuses_counts_and_delivers_late(device):
    a, b = fake_device.to_device(torch.ones(3)), torch.ones(3)
    with pytest.raises(RuntimeError, match=r"cuda:0 and cpu"):
        a + b
    with pytest.raises(TypeError, match="numpy"):
        a.numpy()
    with device.counted() as seen:
        assert (a + a).sum().item() == 6
        assert (a * 2).tolist() == [2, 2, 2]
        a.cpu()
        b.to(fake_device.CUDA)
    assert seen.launches["add"] == seen.launches["sum"] == 1
    assert seen.waits == {
        "_local_scalar_dense": 1,
        "tolist": 1,
        "copy to the host": 1,
        "copy to the device": 1,
    }
    with device.counted() as seen:
        late, event = a.to("cpu", non_blocking=True), torch.cuda.Event()
        event.record()
        assert late.isnan().all()  # nobody has waited yet
        event.synchronize()
        assert late.tolist() == [1, 1, 1]
        b.to(fake_device.CUDA, non_blocking=True)
    assert seen.waits == {"event": 1}


def test_a_graph_does_again_what_was_captured(device):
    x, graph = fake_device.to_device(torch.ones(2)), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = (x + 1).exp()
    x.copy_(fake_device.to_device(torch.tensor([0.0, 2.0])))
    with device.counted() as seen:
        graph.replay()
    assert seen.launches == {"graph: add": 1, "graph: exp": 1}
    assert seen.replays == 1
    assert torch.equal(fake_device.held(y), torch.tensor([1.0, 3.0]).exp())
    with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.tolist()


# --- units --------------------------------------------------------------------------------------------------


def test_cpu_images_are_moved_by_decompose(device, images, known):
    tower = fake_device.moved(build())
    expected = rk.decompose(known[0], images[:4])
    for given in (images[:4], fake_device.to_device(images[:4])):
        found = rk.decompose(tower, given)
        same(found.output, expected.output)
        same(found.units(), expected.units())
    half = fake_device.to_device(images[:4].half())
    with pytest.raises(ValueError, match="images are torch.float16"):
        rk.decompose(tower, half)


def test_bases_are_the_cpu_s(device, images, known):
    found = rk.fit_bases(fake_device.moved(build()), images.split(20), kinds=KINDS).truncate(energy=0.9)
    for kind in KINDS:
        assert found.parts[kind].components.shape == known[1].parts[kind].components.shape
        assert torch.allclose(found.parts[kind].variance, known[1].parts[kind].variance, rtol=1e-4)


def test_stream_bases_are_the_cpu_s(device, images):
    expected = rk.fit_bases(build(), images.split(20), placement="stream")
    found = rk.fit_bases(fake_device.moved(build()), images.split(20), placement="stream")
    assert torch.allclose(found.parts["head"].variance, expected.parts["head"].variance, rtol=1e-4, atol=1e-7)


def test_fit_bases_waits_once_for_all_batches(device, images):
    tower, waits = fake_device.moved(build()), []
    checksum(tower)
    for size in (20, 5):
        with device.counted() as seen:
            rk.fit_bases(tower, images.split(size), kinds=KINDS)
        waits.append(sum(seen.waits.values()))
    assert 0 < waits[1] <= waits[0], waits  # the first pass also compares the tower with its own forward


@pytest.mark.parametrize("on_disk", [False, True])
def test_encode_waits_once_a_batch(device, images, known, tmp_path, on_disk):
    tower, waits = fake_device.moved(build()), []
    checksum(tower)
    for size in (20, 5):
        with device.counted() as seen:
            path = {"path": tmp_path / f"{size}", "shard_images": 20} if on_disk else {}
            cache = rk.encode(tower, loader(images, size), kinds=KINDS, class_names="abc", **path)
        waits.append(sum(seen.waits.values()))
        for kind in KINDS:
            assert torch.allclose(
                cache.terms(slice(None)).z[kind], known[2].terms(slice(None)).z[kind], atol=1e-5
            )
        assert torch.equal(cache.labels, LABELS)
    assert waits[1] - waits[0] <= 12 - 3, waits


def test_encode_names_the_image_that_breaks(device, images):
    tower = fake_device.moved(build())
    broken = images.clone()
    broken[37, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="index 37"):
        rk.encode(tower, broken.split(16))
    with torch.no_grad():
        fake_device.held(tower.proj).mul_(float("inf"))
    with pytest.raises(ValueError, match="NaN or Inf as output of image 0"):
        rk.encode(tower, images.split(16), check=False)


def test_checksum_is_one_copy(device):
    tower = fake_device.moved(build())
    with device.counted() as seen:
        first = checksum(tower)
    assert sum(seen.waits.values()) == 1
    with device.counted() as seen:
        assert checksum(tower) == first == checksum(build())
    assert sum(seen.waits.values()) == 1


# --- adapters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fine", "anchored", "coarse", "output", "linear"])
def test_a_forward_waits_for_nothing(device, images, known, name):
    expected = adapters(known[0], known[1])[name](images[:4]).detach()
    adapter = adapters(fake_device.moved(build()), known[1])[name]
    adapter(images[:1])  # the first image is compared with the tower's own
    for given in (images[:4], fake_device.to_device(images[:4])):
        with device.counted() as seen:
            y = adapter(given)
            y.square().sum().backward()
        assert seen.waits == {}
        same(y, expected)
    assert all(p.grad.is_cuda for p in adapter.trainable())


def test_an_adapter_is_made_with_few_waits(device, known):
    """The watch over the tower's weights travels in one copy, not one for each parameter."""
    with device.counted() as seen:
        rk.ResiDual(fake_device.moved(build()), known[1])
    assert seen.waits["copy to the host"] <= 2 + len(KINDS)  # and where each kind's components begin


def stream_of(tower, images):
    bases = rk.fit_bases(tower, images.split(20), placement="stream").truncate(components=5)
    return rk.ResiDual(tower, bases, placement="stream", layers=[1], init="normal")


def test_stream_forward_backward_merge_and_unmerge(device, images):
    expected = stream_of(build(), images)
    adapter = stream_of(fake_device.moved(build()), images)
    adapter(images[:1])
    outcome = []
    for one in (expected, adapter):
        with device.counted() as seen:
            y = one(images[:4])
            y.square().mean().backward()
        outcome.append((y, one.weight.grad))
        assert seen.waits == {}
    same(outcome[1][0], outcome[0][0].detach())
    same(outcome[1][1], outcome[0][1], 1e-4)
    merged = adapter.merge()
    same(merged(fake_device.to_device(images[:4])), outcome[0][0].detach(), 1e-4)
    adapter.unmerge()
    same(adapter(images[:4]), outcome[0][0].detach())


@pytest.mark.parametrize("name", ["fine", "output"])
def test_merge_save_load_and_export(device, images, known, name, tmp_path):
    expected = adapters(known[0], known[1])[name](images[:4]).detach()
    tower = fake_device.moved(build())
    adapter = adapters(tower, known[1])[name]
    merged = adapter.merge()
    same(merged(fake_device.to_device(images[:4])), expected)
    rk.save_adapter(adapter, tmp_path / "a")
    again = rk.load_adapter(fake_device.moved(build()), tmp_path / "a")
    assert all(p.is_cuda for p in again.parameters())
    same(again(images[:4]), expected)
    file = tmp_path / "encoder.pt2"
    assert rk.export.write(merged, file, images[:2]) < 1e-5
    found = rk.export.run(file, images[:4])
    assert (found - expected).abs().max() < 1e-5
    assert all(p.is_cuda for p in merged.parameters())  # a copy went to the CPU, not the module


def test_attach_and_adapter_set(device, images, known):
    class Model(nn.Module):
        def __init__(self, tower):
            super().__init__()
            self.visual = tower

    tower = fake_device.moved(build())
    expected = adapters(known[0], known[1])
    made = adapters(tower, known[1])
    model = Model(tower)
    with rk.attach(model, adapter=made["fine"]):
        same(model.visual(images[:4]), expected["fine"](images[:4]).detach())
    assert model.visual is tower
    together = rk.AdapterSet(tower, {"a": made["fine"], "b": made["anchored"]}, heads={"a": head_of()})
    same(together(images[:4]), expected["fine"](images[:4]).detach())
    rows = together(images[:3], names=["b", None, "a"])
    plain = known[0](images[:3]).detach()
    wanted = torch.stack([expected["anchored"](images[:1])[0], plain[1], expected["fine"](images[2:3])[0]])
    same(rows, wanted.detach())
    together.active = None
    same(together(images[:3]), plain)


# --- fits ---------------------------------------------------------------------------------------------------


def fitted(adapter, head, cache, **options):
    result = rk.fit(adapter, head, cache, solver="adamw", lr=0.05, patience=9, **options)
    return result, [fake_device.held(p.detach()) for p in adapter.trainable()]


@pytest.mark.parametrize("step", ["eager", "compiled", "graph"])
def test_a_fit_is_the_cpu_s_and_its_steps_wait_for_nothing(device, known, step):
    tower, bases, cache = known
    expected, weights = fitted(rk.ResiDual(tower, bases), head_of(), cache, epochs=2, batch_size=15)
    moved, waits = fake_device.moved(build()), []
    for size in (30, 15):
        adapter = rk.ResiDual(moved, bases)
        with device.counted() as seen:
            found, own = fitted(
                adapter, fake_device.moved(head_of()), cache, epochs=2, batch_size=size, step=step
            )
        waits.append(dict(seen.waits))
        assert bool(seen.replays) == (step == "graph")
    assert waits[0] == waits[1]  # twice the steps
    for mine, theirs in zip(own, weights, strict=True):
        assert (mine - theirs).abs().max() < 1e-3
    assert abs(found.history[-1].train_loss - expected.history[-1].train_loss) < 1e-4


def test_a_fit_from_the_cache_waits_for_no_batch(device, known):
    """The features do not fit in memory here: they are read, checked on the CPU,
    and sent while the device works."""
    _, bases, cache = known
    moved, waits = fake_device.moved(build()), []
    checksum(moved)  # kept from here on
    for size in (30, 15):
        with device.counted() as seen:
            fitted(
                rk.ResiDual(moved, bases),
                fake_device.moved(head_of()),
                cache,
                batch_size=size,
                epochs=2,
                memory=0,
            )
        waits.append(dict(seen.waits))
    assert waits[0] == waits[1]


def test_many_fits_loaders_and_the_convex_solver(device, images, known):
    tower, bases, cache = known
    moved, head = fake_device.moved(build()), fake_device.moved(head_of())
    options = {"solver": "adamw", "lrs": (0.05, 0.1), "seeds": (0, 1), "epochs": 2}
    many = rk.fit_many(rk.ResiDual(moved, bases), head, cache, cache, **options)
    expected = rk.fit_many(rk.ResiDual(tower, bases), head_of(), cache, cache, **options)
    for mine, theirs in zip(many.results, expected.results, strict=True):
        assert mine.val_accuracy == pytest.approx(theirs.val_accuracy, abs=0.05)
    rk.fit(rk.ResiDual(moved, bases), head, loader(images), solver="adamw", epochs=1)
    convex = rk.ResiDual(moved, bases)
    rk.fit(convex, head, cache, solver="convex", folds=2, freedoms=(4.0,))
    reference = rk.ResiDual(tower, bases)
    rk.fit(reference, head_of(), cache, solver="convex", folds=2, freedoms=(4.0,))
    same(convex.weight, reference.weight.detach(), 1e-3)


def test_evaluate_and_predict(device, images, known):
    expected = adapters(known[0], known[1])["fine"]
    adapter = adapters(fake_device.moved(build()), known[1])["fine"]
    head = fake_device.moved(head_of())
    for data in (known[2], loader(images)):
        found = rk.evaluate(adapter, head, data)
        truth = rk.evaluate(expected, head_of(), data)
        assert found.accuracy == truth.accuracy
        assert found.loss == pytest.approx(truth.loss, rel=1e-4)
    found, truth = rk.predict(adapter, head, images), rk.predict(expected, head_of(), images)
    assert torch.equal(found.labels.cpu(), truth.labels)


def test_analyze(device, known):
    tower, bases, cache = known
    options = {"seeds": range(1), "points": 50, "bases": None}
    expected = rk.analysis.analyze(tower, cache, head_of(), **options)
    found = rk.analysis.analyze(fake_device.moved(build()), cache, fake_device.moved(head_of()), **options)
    assert type(found) is type(expected)


def test_copies_stay_on_the_device(device, images, known):
    adapter = adapters(fake_device.moved(build()), known[1])["fine"]
    again = copy.deepcopy(adapter)
    same(again(images[:4]), fake_device.held(adapter(images[:4]).detach()), 0)


def test_a_fit_on_a_device_takes_the_kernels(known):
    """The Triton backend on the device, in Triton's interpreter:
    spectral_sum's kernels are in the captured step."""
    pytest.importorskip("triton", reason="the package triton is not installed")
    tower, bases, cache = known
    expected, weights = fitted(rk.ResiDual(tower, bases), head_of(), cache, epochs=1, batch_size=30)
    with fake_cuda.installed(kernels=True) as device:
        adapter = rk.ResiDual(fake_device.moved(build()), bases)
        with device.counted() as seen:
            found, own = fitted(
                adapter, fake_device.moved(head_of()), cache, epochs=1, batch_size=30, step="graph"
            )
    for name in ("spectral_sum_fwd_kernel", "spectral_sum_bwd_kernel"):
        assert seen.launches[f"graph: {name}"] >= seen.replays > 0, seen.launches
    for mine, theirs in zip(own, weights, strict=True):
        assert (mine - theirs).abs().max() < 1e-3
    assert abs(found.history[-1].train_loss - expected.history[-1].train_loss) < 1e-4


def test_a_forward_and_a_step_on_a_device_take_few_launches(images, known):
    pytest.importorskip("triton", reason="the package triton is not installed")
    bases = known[1].of("head")
    expected = rk.ResiDual(known[0], bases, init="normal")(images[:4]).detach()
    with fake_cuda.installed(kernels=True) as device:
        adapter = rk.ResiDual(fake_device.moved(build()), bases, init="normal")
        terms = adapter.collect(fake_device.to_device(images[:4]))
        adapter.from_units(terms)
        with device.counted() as seen:
            y = adapter.from_units(terms)
        kernels = {name: count for name, count in seen.launches.items() if name.endswith("kernel")}
        assert 1 <= sum(kernels.values()) <= 2, seen.launches
        assert seen.waits == {}
        same(y, expected)
