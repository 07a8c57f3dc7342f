"""Bases and fits by several processes, as torchrun starts them: the same as by one."""

import math
import os

import processes
import pytest
import torch
from test_towers import build, images_for

import residual_kernels as rk
from residual_kernels import distributed

CLASSES = "abc"


@pytest.fixture(autouse=True)
def _one_thread():
    """As the processes have: a tower rounds otherwise with another number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def a_tower(dtype):
    return build().to(dtype)


def a_cache(tower, dtype):
    """70 images of 3 classes that differ in brightness."""
    labels = torch.arange(70) % 3
    images = images_for(tower, 70, dtype) * 0.5 + (labels - 1.0)[:, None, None, None]
    return rk.encode(tower, [(images, labels)], kinds=("head", "mlp"), class_names=CLASSES)


def a_head(dtype):
    vectors = torch.randn(32, 3, generator=torch.Generator().manual_seed(2), dtype=dtype)
    return rk.ZeroShotHead(vectors, CLASSES, math.log(10.0))


def _bases(folder, cache_of_all):
    """In one of several processes: bases from the shared cache,
    and from a loader of the own share of images."""
    distributed.initialise()
    tower = a_tower(cache_of_all.output.dtype)
    images = images_for(tower, 41, cache_of_all.output.dtype)
    mine = images[distributed.share(41)] if distributed.world() < 41 else images[:0]
    found = {
        "cache": rk.fit_bases(tower, cache_of_all, kinds=("head", "mlp")),
        "loader": rk.fit_bases(tower, mine.split(7), kinds=("head", "mlp")),
        "stream": rk.fit_bases(tower, mine.split(7), placement="stream"),
        "one has none": rk.fit_bases(tower, images.split(9) if distributed.rank() == 0 else []),
    }
    for name, bases in found.items():
        bases.save(folder / f"{name} {distributed.rank()}", moments=True, dtype=torch.float64)
    distributed.finish()


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_bases_of_several_processes(tmp_path, monkeypatch, world, dtype):
    monkeypatch.setattr("residual_kernels.bases.pca.MOMENT_ROWS", 16)
    tower = a_tower(dtype)
    cache = a_cache(tower, dtype)
    images = images_for(tower, 41, dtype)
    expected = {
        "cache": rk.fit_bases(tower, cache, kinds=("head", "mlp")),
        "loader": rk.fit_bases(tower, images.split(7), kinds=("head", "mlp")),
        "stream": rk.fit_bases(tower, images.split(7), placement="stream"),
        "one has none": rk.fit_bases(tower, images.split(9)),
    }
    assert (
        processes.exit_codes(processes.start_ranks(world, _small_chunks, _bases, tmp_path, cache))
        == [0] * world
    )
    for name, one in expected.items():
        exact = dtype == torch.float64 or name in ("cache", "one has none")  # elsewhere the batches differ
        many = [rk.SpectralBases.load(tmp_path / f"{name} {rank}") for rank in range(world)]
        for bases in many:
            assert bases.count == one.count
            for kind, held in one.moments.items():
                for what in ("mean", "scatter"):
                    a, b = getattr(bases.moments[kind], what), getattr(held, what)
                    assert (a - b).abs().max() <= (1e-10 if exact else 1e-5) * b.abs().max(), (
                        name,
                        kind,
                        what,
                    )
                    # The same bits in all processes.
                    assert torch.equal(a, getattr(many[0].moments[kind], what))
                wanted = one.parts[kind].variance
                limit = (1e-10 if exact else 1e-5) * wanted.max()
                assert (bases.parts[kind].variance - wanted).abs().max() <= limit


def _small_chunks(function, *arguments):
    import residual_kernels.bases.pca

    residual_kernels.bases.pca.MOMENT_ROWS = 16
    function(*arguments)


def a_fit(cache, folder=None, **options):
    """Weights and results of one fit and of several at once."""
    dtype = cache.output.dtype
    tower, head = a_tower(dtype), a_head(dtype)
    train, val = cache.subset(torch.arange(49)), cache.subset(torch.arange(49, 70))
    bases = rk.fit_bases(tower, cache, kinds=("head", "mlp"))
    options = {"epochs": 5, "patience": 2, "batch_size": 12} | options
    full = rk.ResiDual(tower, bases.truncate(energy=0.9), "sum")
    checkpoint = None if folder is None else folder / "fit.safetensors"
    rk.fit(full, head, train, lr=0.1, class_weight="balanced", checkpoint=checkpoint, **options)
    options.pop("progress", None)
    linear = rk.fit_many(rk.OutputLinear(tower), head, train, val, lrs=(1e-2, 1e-3), seeds=(0, 1), **options)
    rows = [row for result in linear.results for row in result.history[1:]]
    history = torch.tensor([[row.train_loss, row.val_loss, row.val_accuracy] for row in rows])
    return full.weight.detach(), linear.tensors, history


def _fit(folder, cache, options):
    distributed.initialise()
    torch.save(a_fit(cache, folder, **options), folder / str(distributed.rank()))
    distributed.finish()


@pytest.mark.parametrize(
    "world, dtype, options",
    [
        (2, torch.float64, {}),
        (3, torch.float64, {"memory": 0}),
        (3, torch.float32, {}),
    ],
)
def test_the_fit_of_several_processes(tmp_path, world, dtype, options):
    cache = a_cache(a_tower(dtype), dtype)
    weight, linear, history = a_fit(cache)
    assert processes.exit_codes(processes.start_ranks(world, _fit, tmp_path, cache, options)) == [0] * world
    limit = 1e-9 if dtype == torch.float64 else 1e-4
    first = torch.load(tmp_path / "0", weights_only=True)
    for rank in range(world):
        found = torch.load(tmp_path / str(rank), weights_only=True)
        assert torch.equal(found[0], first[0])  # the same bits in all processes
        assert (found[0] - weight).abs().max() < limit
        for a, b in zip(found[1], linear, strict=True):
            assert (a - b).abs().max() < limit
        assert (found[2] - history).abs().max() < 10 * limit
    assert (weight - 1).abs().max() > 0.1


class Dies(Exception):
    pass


def _one_dies(folder, cache, how):
    distributed.initialise()
    (folder / f"began {distributed.rank()}").touch()

    def progress(row):
        if row.epoch == 2 and distributed.rank() == 1:
            if how == "killed":
                os.kill(os.getpid(), 9)
            raise Dies

    try:
        a_fit(cache, folder, progress=progress)
    except RuntimeError as error:
        (folder / "said").write_text(str(error))
        raise


@pytest.mark.parametrize("how", ["killed", "raises"])
def test_a_process_that_dies_ends_the_others_and_the_fit_goes_on(tmp_path, how):
    cache = a_cache(a_tower(torch.float64), torch.float64)
    codes = processes.exit_codes(processes.start_ranks(2, _one_dies, tmp_path, cache, how), seconds=40)
    assert all(code not in (0, None) for code in codes)
    assert "process 0 of 2 waited for the others, and one has died" in (tmp_path / "said").read_text()
    assert processes.exit_codes(processes.start_ranks(2, _fit, tmp_path, cache, {})) == [0, 0]
    found = torch.load(tmp_path / "0", weights_only=True)
    assert (found[0] - a_fit(cache)[0]).abs().max() < 1e-9


def _differ(cache):
    distributed.initialise()
    tower, head = a_tower(torch.float64), a_head(torch.float64)
    residual = rk.ResiDual(tower, rk.fit_bases(tower, cache))
    with pytest.raises(ValueError, match="seed of process 1 differ from process 0's"):
        rk.fit(residual, head, cache, epochs=1, seed=distributed.rank())
    result = rk.fit(residual, head, cache, epochs=1, seed=distributed.rank(), alone=True)
    assert math.isfinite(result.history[1].train_loss)
    with pytest.raises(ValueError, match="a fit by several processes needs UnitCaches"):
        rk.fit(residual, head, [])
    rows = torch.arange(len(cache) - distributed.rank())
    with pytest.raises(ValueError, match="bases of the same cache; they differ"):
        rk.fit_bases(tower, cache.subset(rows))
    with pytest.raises(ValueError, match="at least 2 images .* gave 0"):
        rk.fit_bases(tower, [])
    distributed.finish()


def test_processes_that_differ_are_told_so():
    cache = a_cache(a_tower(torch.float64), torch.float64)
    assert processes.exit_codes(processes.start_ranks(2, _differ, cache)) == [0, 0]


def a_convex_fit(cache, **options):
    """Weights and the accuracies seen of two convex fits at once, by folds, and of one by validation."""
    dtype = cache.output.dtype
    tower, head = a_tower(dtype), a_head(dtype)
    train, val = cache.subset(torch.arange(49)), cache.subset(torch.arange(49, 70))
    anchored = rk.ResiDual(tower, rk.fit_bases(tower, cache, kinds=("head", "mlp")), "all")
    folds = rk.fit_many(anchored, head, train, seeds=(0, 1), shots=12, **options)
    one = rk.fit(anchored, head, train, val, class_weight="balanced", **options)
    seen = [result.fold_accuracy for result in folds.results] + [one.val_accuracy, one.base_accuracy]
    return folds.weight, anchored.weight.detach(), torch.tensor(seen), one.certificate.objective


def _convex(folder, cache, options):
    distributed.initialise()
    torch.save(a_convex_fit(cache, **options), folder / str(distributed.rank()))
    with distributed.apart():
        assert (distributed.rank(), distributed.world()) == (0, 1)
    distributed.finish()


@pytest.mark.parametrize(
    "world, options", [(2, {}), (3, {"memory": 0, "freedoms": (10.0, 100.0)}), (2, {"alone": True})]
)
def test_the_convex_fit_of_several_processes(tmp_path, world, options):
    cache = a_cache(a_tower(torch.float64), torch.float64)
    expected = a_convex_fit(cache, **options)
    assert (
        processes.exit_codes(processes.start_ranks(world, _convex, tmp_path, cache, options)) == [0] * world
    )
    first = torch.load(tmp_path / "0", weights_only=True)
    for rank in range(world):
        found = torch.load(tmp_path / str(rank), weights_only=True)
        for a, b, c in zip(found[:3], first[:3], expected[:3], strict=True):
            assert torch.equal(a, b)  # the same bits in all processes
            assert (a - c).norm() <= 1e-3 * c.norm()
        assert found[3] == pytest.approx(expected[3], rel=1e-5)
    assert (expected[1] - 1).abs().max() > 0.1
