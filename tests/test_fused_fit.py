"""Steps of a fit that a device does alone, without one: launches, results, refusals; and cuda:1.

The device is tests/fake_device.py; Triton's kernels run in its interpreter.
"""

import contextlib
import math

import fake_cuda
import fake_device
import pytest
import torch
from test_device_tier import KINDS, LABELS, fitted, head_of, loader, same
from test_towers import build, images_for

import residual_kernels as rk

pytest.importorskip("triton", reason="the package triton is not installed")
from residual_kernels.ops.triton import backend, launch


@pytest.fixture(scope="module")
def images():
    return images_for(build(), 60) * 0.5 + (LABELS - 1.0)[:, None, None, None]


@pytest.fixture(scope="module")
def known(images):
    """Tower, bases and cache on the CPU."""
    tower = build()
    bases = rk.fit_bases(tower, images.split(20), kinds=KINDS).truncate(energy=0.9)
    return tower, bases, rk.encode(tower, loader(images), kinds=KINDS, class_names="abc")


def fine_and_anchored(tower, bases):
    """A form without a rest, and one of two kinds with the output as rest and weights that count from 1."""
    return {
        "fine": rk.ResiDual(tower, bases.of("head")),
        "anchored": rk.ResiDual(tower, bases, "all"),
        "output": rk.OutputSpectral(tower, bases),
    }


@pytest.mark.parametrize("name", ["fine", "anchored", "output"])
def test_a_fused_step_is_five_launches_and_none_outside_its_graph(known, name):
    """In Triton's interpreter: the fit is the CPU's, and twice the steps cost nothing but replays."""
    tower, bases, cache = known
    options = {"epochs": 2, "class_weight": torch.tensor([1.0, 2.0, 0.5])} | (
        {"shrink": 0.1} if name == "anchored" else {}
    )
    outside, replays = [], []
    for size in (20, 7):
        expected, weights = fitted(
            fine_and_anchored(tower, bases)[name], head_of(), cache, batch_size=size, step="eager", **options
        )
        with fake_cuda.installed(kernels=True) as device:
            adapter = fine_and_anchored(fake_device.moved(build()), bases)[name]
            head = fake_device.moved(head_of())
            with device.counted() as seen:
                found, own = fitted(adapter, head, cache, batch_size=size, step="fused", **options)
        steps = 2 * math.ceil(60 / size)
        graph = {key: count for key, count in seen.launches.items() if key.startswith("graph: ")}
        assert graph == {
            f"graph: fit_{part}_kernel": steps for part in ("forward", "output", "logits", "loss", "update")
        }
        outside.append((seen.count - sum(graph.values()), dict(seen.waits)))
        replays.append(seen.replays)
        for mine, theirs in zip(own, weights, strict=True):
            assert (mine - theirs).abs().max() < 2e-4
        for mine, theirs in zip(found.history[1:], expected.history[1:], strict=True):
            assert mine.train_loss == pytest.approx(theirs.train_loss, rel=1e-5)
    assert outside[0] == outside[1]
    assert replays == [2, 2]  # nine steps are one graph


def test_many_fused_fits_are_the_cpu_s(known, tmp_path):
    """Seeds and label sets side by side, tasks that stop early, and a checkpoint between two epochs."""
    tower, bases, cache = known
    options = {
        "solver": "adamw",
        "lrs": (0.05,),
        "seeds": (0, 1),
        "epochs": 3,
        "patience": 1,
        "batch_size": 16,
        "labels": [LABELS, LABELS % 2],
        "val_labels": [LABELS, LABELS % 2],
    }

    def heads():
        two = rk.ZeroShotHead(torch.randn(32, 2, generator=torch.Generator().manual_seed(5)), "ab", 1.0)
        return [head_of(), two]

    def run(adapter, heads, **more):
        return rk.fit_many(adapter, heads, cache, cache, **{**options, **more})

    expected = run(fine_and_anchored(tower, bases)["anchored"], heads(), step="eager")
    stops = [result.stopped_early for result in expected.results]
    assert True in stops  # tasks leave one after another
    assert False in stops
    with fake_cuda.installed(kernels=True):
        moved = fake_device.moved(build())
        there = [fake_device.moved(head) for head in heads()]
        file = tmp_path / "fit.safetensors"
        for epochs in (2, 3):  # the second call resumes
            found = run(fine_and_anchored(moved, bases)["anchored"], there, epochs=epochs, checkpoint=file)
    for mine, theirs in zip(found.results, expected.results, strict=True):
        assert [row.epoch for row in mine.history] == [row.epoch for row in theirs.history]
        for row, other in zip(mine.history[1:], theirs.history[1:], strict=True):
            assert row.val_accuracy == pytest.approx(other.val_accuracy, abs=0.02)
            assert row.train_loss == pytest.approx(other.train_loss, rel=1e-4)


def test_what_a_fused_step_cannot_serve_is_told(known):
    tower, bases, cache = known
    with pytest.raises(ValueError, match="needs a CUDA device"):
        fitted(rk.ResiDual(tower, bases), head_of(), cache, step="fused")
    refusals = {
        "OutputLinear is no sum over components": (lambda t: rk.OutputLinear(t), {}),
        "CoarseHeads is no sum": (lambda t: rk.CoarseHeads(t), {}),
        "SharedResiDual is no sum": (lambda t: rk.build("shared", t, bases), {}),
        "the backend is torch": (lambda t: rk.ResiDual(t, bases, backend="torch"), {}),
        "at most 20 rows": (lambda t: rk.ResiDual(t, bases), {"batch_size": 30}),
        "a cache that fits in its memory": (lambda t: rk.ResiDual(t, bases), {"memory": 0}),
    }
    with fake_cuda.installed(kernels=True) as device, pytest.MonkeyPatch.context() as patch:
        patch.setattr("residual_kernels.train.fused.MOST_ROWS", 20)
        moved, head = fake_device.moved(build()), fake_device.moved(head_of())
        for reason, (make, options) in refusals.items():
            with pytest.raises(ValueError, match=f"cannot serve this fit: .*{reason}"):
                fitted(make(moved), head, cache, step="fused", **{"batch_size": 16, **options})
        with device.counted() as seen:  # "auto" goes the other way
            fitted(rk.OutputLinear(moved), head, cache, epochs=1)
        assert seen.replays
        assert not any("fit_" in name for name in seen.launches)


def test_launches_go_to_the_tensors_own_device(images, known):
    """cuda:1 while cuda:0 is current: kernels, streams and graphs are cuda:1's, and so is what is kept."""
    tower, bases, cache = known
    expected = rk.ResiDual(tower, bases.of("head"), init="normal")
    wanted = expected(images[:4])
    wanted.square().sum().backward()
    keys = []
    for index in (0, 1):
        launch.forget()
        with fake_cuda.installed(kernels=True, index=index) as device:
            moved = fake_device.moved(build())
            adapter = rk.ResiDual(moved, bases.of("head"), init="normal")
            assert str(adapter.device) == f"cuda:{index}"
            y = adapter(images[:4])
            y.square().sum().backward()
            same(y, wanted.detach())
            same(adapter.weight.grad, expected.weight.grad, 1e-4)
            rk.fit_bases(moved, images[:20].split(20))
            for step in ("graph", "fused"):
                with device.counted() as seen:
                    fitted(adapter, fake_device.moved(head_of()), cache, epochs=1, step=step)
                assert seen.replays
        keys.append(set(launch._kept))
    assert len(keys[0]) == len(keys[1])
    assert not keys[0] & keys[1]


def test_a_launch_on_another_device_is_noticed(images, known):
    """The negative case: without the guard, tensors of cuda:1 meet kernels of cuda:0."""
    with fake_cuda.installed(kernels=True, index=1), pytest.MonkeyPatch.context() as patch:
        adapter = rk.ResiDual(fake_device.moved(build()), known[1].of("head"))
        patch.setattr(backend, "on", lambda device: contextlib.nullcontext())
        with pytest.raises(RuntimeError, match="launched on cuda:0"):
            adapter(images[:4])
