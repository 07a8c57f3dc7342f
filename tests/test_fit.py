"""Fits: many at once, resumed, of few images; all on tiny towers."""

import functools
import math

import pytest
import torch
from test_towers import build, images_for
from three_classes import cache_of, head_of, parts_of

import residual_kernels as rk
from residual_kernels.train import labels as labelling

CLASSES = "abc"


@pytest.fixture(scope="module")
def tower():
    return build().double()


@pytest.fixture(scope="module")
def cache(tower):
    return cache_of(tower, (50, 25, 15), CLASSES, torch.float64)


@pytest.fixture(scope="module")
def bases(tower, cache):
    return rk.fit_bases(tower, cache, kinds=("head", "mlp"))


def new_head(classes=CLASSES, seed=2):
    return head_of(classes, seed, torch.float64)


@pytest.fixture
def head():
    return new_head()


ADAPTERS = {
    "fine": lambda tower, bases: rk.ResiDual(tower, bases.of("head").truncate(energy=0.9)),
    "full": lambda tower, bases: rk.ResiDual(tower, bases, "sum"),
    "anchored": lambda tower, bases: rk.ResiDual(tower, bases, "all"),
    "mean": lambda tower, bases: rk.ResiDual(tower, bases.of("head"), "mean", init="normal"),
    "coarse": lambda tower, bases: rk.CoarseHeads(tower, "sum", kinds=("head", "mlp"), init="normal"),
    "output": lambda tower, bases: rk.OutputSpectral(tower, bases),
    "linear": lambda tower, bases: rk.OutputLinear(tower),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_features_give_what_units_give(tower, cache, bases, name):
    """from_features on features is from_units on terms, for one weight, for T,
    and for T with rows of their own."""
    adapter = ADAPTERS[name](tower, bases)
    features = adapter.features(cache.terms(slice(0, 12)))
    weights = [p.detach() for p in adapter.trainable()]
    with torch.no_grad():
        expected = adapter.from_units(cache.terms(slice(0, 12)))
    assert torch.allclose(adapter.from_features(features, weights), expected, atol=1e-11)
    several = [torch.stack([w, w + 0.1, w]) for w in weights]
    found = adapter.from_features(features, several)
    assert found.shape == (3, 12, 32)
    assert torch.allclose(found[2], expected, atol=1e-11)
    assert not torch.allclose(found[1], expected, atol=1e-3)
    apart = {key: value.unflatten(0, (3, 4)) for key, value in features.items()}
    found = adapter.from_features(apart, [torch.stack([w, w, w]) for w in weights])
    assert torch.allclose(found.flatten(0, 1), expected, atol=1e-11)


def assert_same(many, index, adapter, result, tolerance):
    for held, parameter in zip(many.tensors, adapter.trainable(), strict=True):
        assert (held[index] - parameter).abs().max() < tolerance
    seen = many.results[index]
    assert (seen.best_epoch, seen.stopped_early) == (result.best_epoch, result.stopped_early)
    assert seen.val_accuracy == pytest.approx(result.val_accuracy)
    assert len(seen.history) == len(result.history)
    for a, b in zip(seen.history[1:], result.history[1:], strict=True):
        assert a.train_loss == pytest.approx(b.train_loss, rel=100 * tolerance)


@pytest.mark.parametrize("name", ADAPTERS)
def test_many_fits_are_the_fits(tower, cache, bases, head, name):
    """Learning rates and seeds at once, some stopping before others: each as if it were alone."""
    train, val = parts_of(cache, 60)
    lrs, seeds = (0.5, 0.01), (0, 7)
    options = {"epochs": 6, "patience": 2, "batch_size": 16}
    many = rk.fit_many(ADAPTERS[name](tower, bases), head, train, val, lrs=lrs, seeds=seeds, **options)
    assert [(task.lr, task.seed) for task in many.tasks] == [(lr, s) for s in seeds for lr in lrs]
    for index, task in enumerate(many.tasks):
        adapter = ADAPTERS[name](tower, bases)
        result = rk.fit(adapter, head, train, val, lr=task.lr, seed=task.seed, **options)
        assert_same(many, index, adapter, result, 1e-9)
    if name == "fine":
        assert len({len(result.history) for result in many.results}) > 1  # they did stop at different epochs
        assert (many.weight[0] - many.weight[2]).abs().max() > 1e-3  # and seeds do differ
        best = many.results[many.best()].val_accuracy
        assert best == max(result.val_accuracy for result in many.results)
        adapter = ADAPTERS[name](tower, bases)
        assert many.put(adapter, many.best()) is many.results[many.best()]
        assert torch.equal(adapter.weight, many.weight[many.best()])


def test_many_fits_in_float32():
    tower = build()
    labels = torch.arange(60) % 3
    images = images_for(tower, 60) * 0.5 + (labels - 1.0)[:, None, None, None]
    cache = rk.encode(tower, [(images, labels)], class_names=CLASSES)
    bases = rk.fit_bases(tower, cache).truncate(energy=0.9)
    head = rk.ZeroShotHead(new_head().class_vectors.float(), CLASSES, math.log(10.0))
    options = {"epochs": 4, "batch_size": 16}
    many = rk.fit_many(
        rk.ResiDual(tower, bases), head, cache, cache, lrs=(0.3, 0.05), seeds=(0, 1), **options
    )
    for index, task in enumerate(many.tasks):
        residual = rk.ResiDual(tower, bases)
        result = rk.fit(residual, head, cache, cache, lr=task.lr, seed=task.seed, **options)
        assert_same(many, index, residual, result, 1e-4)


def test_label_sets_at_once(tower, cache, bases, head):
    """Two tasks on the same images, of 3 and of 2 classes, each with a head of its own,
    from starts of their own."""
    train, val = parts_of(cache, 60)
    heads = [head, new_head("de", 5)]
    sets = [train.labels, train.ids % 2], [val.labels, val.ids % 2]
    residual = ADAPTERS["fine"](tower, bases)
    starts = [[torch.ones_like(residual.weight)], [torch.full_like(residual.weight, 0.5)]]
    options = {"epochs": 3, "batch_size": 16}
    many = rk.fit_many(
        residual,
        heads,
        train,
        val,
        seeds=(0, 1),
        labels=sets[0],
        val_labels=sets[1],
        starts=starts,
        **options,
    )
    assert [(task.labels, task.seed) for task in many.tasks] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert (residual.weight == 1).all()
    for index, task in enumerate(many.tasks):
        alone, held = train.subset(torch.arange(60)), val.subset(torch.arange(30))
        alone.labels, held.labels = sets[0][task.labels], sets[1][task.labels]
        with torch.no_grad():
            residual.weight.copy_(starts[task.seed][0])
        alone.class_names = held.class_names = heads[task.labels].class_names
        result = rk.fit(residual, heads[task.labels], alone, held, seed=task.seed, **options)
        assert_same(many, index, residual, result, 1e-9)
    assert many.tasks[many.best(1)].labels == 1


def test_a_fit_that_diverges_leaves_the_others_alone(tower, cache, bases, head):
    train, val = parts_of(cache, 60)
    steep = rk.ZeroShotHead(head.class_vectors, CLASSES, 1000.0)
    residual = ADAPTERS["fine"](tower, bases)
    sets = {"labels": [train.labels] * 2, "val_labels": [val.labels] * 2, "epochs": 2}
    many = rk.fit_many(residual, [steep, head], train, val, **sets)
    assert [result.diverged for result in many.results] == [True, False]
    assert (many.weight[0] == 1).all()
    result = rk.fit(residual, head, train, val, epochs=2)
    assert_same(many, 1, residual, result, 1e-9)
    with pytest.raises(ValueError, match="no fit of label set 0"):
        many.best()


def test_tasks_in_blocks_and_compiled(tower, cache, bases, head, monkeypatch):
    """However the tasks are grouped, and whoever compiles the step, the fits are the same."""
    train, val = parts_of(cache, 60)
    residual = ADAPTERS["fine"](tower, bases)
    options = {"lrs": (0.3, 0.1, 0.05), "seeds": (0, 1), "epochs": 2, "batch_size": 25}
    expected = rk.fit_many(residual, head, train, val, **options)
    # Inductor takes a minute.
    whole_graph = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr("residual_kernels.train.steps.torch.compile", whole_graph)
    compiled = rk.fit_many(residual, head, train, val, step="compiled", **options)
    monkeypatch.setattr("residual_kernels.train.batches.BLOCK_BYTES", 25 * 8 * len(residual.weight) * 4)
    found = rk.fit_many(residual, head, train, val, **options)
    for one in (compiled, found):
        assert (one.weight - expected.weight).abs().max() < 1e-9


@pytest.mark.parametrize("name", ["fine", "full", "linear"])
def test_a_cache_too_large_for_memory_is_read_ahead(tower, cache, bases, head, name):
    train, val = parts_of(cache, 60)
    runs = []
    for memory in (None, 0):
        many = rk.fit_many(
            ADAPTERS[name](tower, bases),
            head,
            train,
            val,
            seeds=(0, 1),
            lrs=(0.1, 0.01),
            epochs=2,
            memory=memory,
        )
        runs.append(many)
    for a, b in zip(runs[0].tensors, runs[1].tensors, strict=True):
        assert (a - b).abs().max() < 1e-9
    assert [r.val_accuracy for r in runs[0].results] == [r.val_accuracy for r in runs[1].results]


class Killed(Exception):
    pass


def killed_after(epoch):
    def progress(*seen):
        if seen[-1].epoch == epoch:
            raise Killed

    return progress


@pytest.mark.parametrize("name, every", [("fine", 1), ("fine", 2), ("linear", 1)])
def test_a_resumed_fit_is_the_fit_bit_for_bit(tower, cache, bases, head, tmp_path, name, every):
    train, val = parts_of(cache, 60)
    options = {"epochs": 6, "batch_size": 16, "patience": 3, "shrink": 0.01 if name == "fine" else 0.0}
    whole = ADAPTERS[name](tower, bases)
    expected = rk.fit(whole, head, train, val, **options)
    path = tmp_path / "fit.safetensors"
    residual = ADAPTERS[name](tower, bases)
    for epoch in (2, 4):
        with pytest.raises(Killed):
            rk.fit(
                residual,
                head,
                train,
                val,
                checkpoint=path,
                every=every,
                progress=killed_after(epoch),
                **options,
            )
        assert all(
            torch.equal(a, b)
            for a, b in zip(residual.trainable(), ADAPTERS[name](tower, bases).trainable(), strict=True)
        )
    seen = []
    found = rk.fit(residual, head, train, val, checkpoint=path, every=every, progress=seen.append, **options)
    assert seen[0].epoch == (4 if every == 1 else 3)
    for a, b in zip(residual.trainable(), whole.trainable(), strict=True):
        assert torch.equal(a, b)
    assert [vars(row) | {"seconds": 0} for row in found.history] == [
        vars(row) | {"seconds": 0} for row in expected.history
    ]
    assert (found.best_epoch, found.stopped_early) == (expected.best_epoch, expected.stopped_early)
    again = rk.fit(ADAPTERS[name](tower, bases), head, train, val, checkpoint=path, every=every, **options)
    assert again.history == found.history  # a finished fit is only read


def test_many_resumed_fits(tower, cache, bases, head, tmp_path):
    train, val = parts_of(cache, 60)
    options = {"lrs": (0.5, 0.01), "seeds": (0, 7), "epochs": 6, "patience": 2, "batch_size": 16}
    residual = ADAPTERS["fine"](tower, bases)
    expected = rk.fit_many(residual, head, train, val, **options)
    path = tmp_path / "c"
    with pytest.raises(Killed):
        rk.fit_many(residual, head, train, val, checkpoint=path, progress=killed_after(5), **options)
    found = rk.fit_many(residual, head, train, val, checkpoint=path, **options)
    assert torch.equal(found.weight, expected.weight)
    assert len({len(result.history) for result in found.results}) > 1  # some had stopped before the kill


def test_checkpoints_of_other_fits_are_refused_by_name(tower, cache, bases, head, tmp_path):
    train, val = parts_of(cache, 60)
    path = tmp_path / "fit.safetensors"
    residual = ADAPTERS["fine"](tower, bases)
    rk.fit(residual, head, train, val, epochs=1, checkpoint=path)
    residual = ADAPTERS["fine"](tower, bases)
    other = train.subset(torch.arange(60))
    other.labels = 2 - other.labels
    coarse = ADAPTERS["coarse"](tower, bases)
    fine = ADAPTERS["fine"](tower, bases.truncate(components=3))
    cases = [
        ((residual, head, train, val), {"lr": 0.1}, r"lr differ \(lr was \[0.8\], now \[0.1\]\)"),
        ((residual, head, train, val), {"batch_size": 16}, "batch_size differ"),
        ((residual, head, train, val), {"shrink": 0.1}, "shrink differ"),
        ((residual, head, train, val), {"seed": 3}, "seed differ"),
        ((residual, head, other, val), {}, "train differ"),
        ((residual, head, train, None), {}, "val, in memory differ"),
        ((residual, new_head(seed=3), train, val), {}, "head differ"),
        ((fine, head, train, val), {}, "constants or starting weights differ"),
        ((coarse, head, train, val), {}, "adapter, constants or starting weights differ"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(ValueError, match=message):
            rk.fit(*arguments, epochs=2, checkpoint=path, **options)
    # More epochs: goes on.
    assert rk.fit(residual, head, train, val, epochs=2, checkpoint=path).history[-1].epoch == 2
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="truncated"):
        rk.fit(residual, head, train, val, checkpoint=path)
    with pytest.raises(ValueError, match="is a folder"):
        rk.fit(residual, head, train, val, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="a checkpoint needs UnitCaches"):
        rk.fit(residual, head, [], checkpoint=path)


def test_shots(tower, cache, bases, head):
    residual = ADAPTERS["fine"](tower, bases)
    chosen = labelling.shots_of(cache.labels, 4, 3, CLASSES)
    assert torch.bincount(cache.labels[chosen]).tolist() == [4, 4, 4]
    assert not torch.equal(chosen, labelling.shots_of(cache.labels, 4, 4, CLASSES))
    rk.fit(residual, head, cache, epochs=2, shots=4, seed=3)
    alone = ADAPTERS["fine"](tower, bases)
    rk.fit(alone, head, cache.subset(chosen), epochs=2, seed=3)
    assert torch.equal(residual.weight, alone.weight)
    many = rk.fit_many(ADAPTERS["fine"](tower, bases), head, cache, epochs=2, shots=4, seeds=(0, 3))
    assert (many.weight[1] - residual.weight).abs().max() < 1e-9
    evenly = {"epochs": 2, "shots": 4, "class_weight": "balanced"}
    even = rk.fit_many(ADAPTERS["fine"](tower, bases), head, cache, seeds=(0, 3), **evenly)
    assert torch.equal(even.weight, many.weight)  # so many of each class are balanced as they are
    with pytest.raises(ValueError, match="class c has 15 images, fewer than shots=16"):
        rk.fit(residual, head, cache, shots=16)


def test_balanced_classes(tower, cache, bases, head):
    """The weighted mean of the batch, by hand; and the best epoch by balanced accuracy."""
    residual = ADAPTERS["fine"](tower, bases)
    with torch.no_grad():
        y = residual.from_units(cache.terms(slice(None)))
    counts = torch.tensor([50.0, 25.0, 15.0], dtype=torch.float64)
    for given, weight in (("balanced", 90 / (3 * counts)), (torch.tensor([1.0, 2.0, 4.0]),) * 2):
        result = rk.fit(residual, head, cache, cache, lr=1e-9, batch_size=90, epochs=1, class_weight=given)
        expected = torch.nn.functional.cross_entropy(head(y), cache.labels, weight.double())
        assert result.history[1].train_loss == pytest.approx(float(expected), rel=1e-9)
    residual = ADAPTERS["fine"](tower, bases)
    result = rk.fit(residual, head, cache, cache, epochs=8, patience=8, class_weight="balanced")
    found = rk.evaluate(residual, head, cache)
    assert found.balanced_accuracy == pytest.approx(
        max(row.val_balanced_accuracy for row in result.history), abs=1e-12
    )
    for given, message in (
        ("fair", 'must be "balanced"'),
        (torch.ones(2), r"\[K\] = \(3,\)"),
        (torch.tensor([1.0, 0.0, 1.0]), "above zero"),
    ):
        with pytest.raises(ValueError, match=message):
            rk.fit(residual, head, cache, class_weight=given)


def test_shrink_pulls_to_one(tower, cache, bases, head):
    """Weights that begin far from 1 end nearer to it; those that begin there feel no pull."""
    distances = []
    for shrink in (0.0, 0.3):
        residual = ADAPTERS["fine"](tower, bases)
        with torch.no_grad():
            residual.weight.fill_(3.0)
        rk.fit(residual, head, cache, lr=0.1, epochs=20, shrink=shrink)
        distances.append(float((residual.weight.detach() - 1).abs().mean()))
    assert distances[1] < 0.7 * distances[0]
    untouched = ADAPTERS["fine"](tower, bases)
    rk.fit(untouched, head, cache, lr=1e-9, epochs=2, shrink=1.0)
    assert (untouched.weight - 1).abs().max() < 1e-6  # at 1 there is no pull
    with pytest.raises(ValueError, match="give one of them"):
        rk.fit(residual, head, cache, shrink=0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match="this adapter has none"):
        rk.fit(ADAPTERS["linear"](tower, bases), head, cache, shrink=0.1)


def test_evaluation_against_scikit_learn(tower, cache, bases, head):
    from sklearn.metrics import balanced_accuracy_score, confusion_matrix

    residual = ADAPTERS["fine"](tower, bases)
    found = rk.evaluate(residual, head, cache)
    guess = rk.predict(residual, head, cache).labels
    assert found.confusion.tolist() == confusion_matrix(cache.labels, guess, labels=[0, 1, 2]).tolist()
    assert found.balanced_accuracy == pytest.approx(balanced_accuracy_score(cache.labels, guess))
    assert found.accuracy == pytest.approx(float((guess == cache.labels).double().mean()))
    some = cache.subset((cache.labels != 1).nonzero().flatten())
    part = rk.evaluate(residual, head, some)  # a class without images
    assert part.class_accuracy[1].isnan()
    assert part.balanced_accuracy == pytest.approx(float(part.class_accuracy[[0, 2]].mean()))
    result = rk.fit(residual, head, cache, some, epochs=2)
    assert all(math.isfinite(row.val_balanced_accuracy) for row in result.history)


def test_nan_units_are_named_by_row(tower, cache, bases, head):
    residual = ADAPTERS["fine"](tower, bases)
    spoilt = cache.subset(torch.arange(90))
    spoilt.z["head"][[7, 80], 1, 3] = float("nan")
    for memory in (None, 0):
        with pytest.raises(ValueError, match="units of . cached images hold NaN or Inf: row"):
            rk.fit(residual, head, spoilt, epochs=1, memory=memory)
        with pytest.raises(ValueError, match="row 7, 80; encode"):
            rk.fit(residual, head, cache, spoilt, epochs=1, memory=memory)
    with pytest.raises(ValueError, match="row 7, 80; encode"):
        rk.evaluate(residual, head, spoilt)
    with pytest.raises(ValueError, match="80; encode"):  # not its place among the shots
        rk.fit(residual, head, spoilt, shots=15)
    with pytest.raises(ValueError, match="row 7, 80; encode"):
        rk.fit_bases(tower, spoilt)
    assert (residual.weight == 1).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ADAPTERS)
def test_one_graph_a_step_on_a_gpu(tower, cache, bases, head, name):
    """Captured, eager and on the CPU: the same fits.

    Tasks stop at different epochs, and the last batch is smaller.
    """
    train, val = parts_of(cache, 60)
    options = {"lrs": (0.5, 0.01), "seeds": (0, 7), "epochs": 6, "patience": 2, "batch_size": 16}
    expected = rk.fit_many(ADAPTERS[name](tower, bases), head, train, val, **options)
    there = ADAPTERS[name](build().double().cuda(), bases)
    for step in ("graph", "eager"):
        found = rk.fit_many(there, head, train, val, step=step, **options)
        for a, b in zip(found.tensors, expected.tensors, strict=True):
            assert (a.cpu() - b).abs().max() < 1e-9


def test_refusals(tower, cache, bases, head):
    residual = ADAPTERS["fine"](tower, bases)
    loader = [(torch.zeros(1, 3, 32, 32), torch.zeros(1))]
    high = cache.labels + 1
    cases = [
        (lambda: rk.fit_many(residual, head, cache, lrs=()), "must not be empty"),
        (
            lambda: rk.fit_many(residual, [head, head, head], cache, labels=[high - 1] * 2),
            "one head or 2; got 3",
        ),
        (lambda: rk.fit_many(residual, head, cache, labels=[high]), "labels run from 1 to 3"),
        (lambda: rk.fit_many(residual, head, cache, labels=[high[:5]]), r"labels must be \[N\] = \(90,\)"),
        (lambda: rk.fit_many(residual, head, cache, cache, labels=[high - 1] * 2), "val_labels must hold 2"),
        (lambda: rk.fit_many(residual, head, cache, starts=[[]]), "starts must hold tensors"),
        (lambda: rk.fit_many(residual, head, cache, starts=[]), "one entry for each of 1 seeds"),
        (lambda: rk.fit_many(residual, head, cache, lrs=(0.0,)), "above 0; got 0.0"),
        (lambda: rk.fit_many(tower, head, cache), "expected a ResiDual"),
        (lambda: rk.fit(residual, head, cache.subset(torch.arange(0))), "training data gave no images"),
        (lambda: rk.fit(residual, head, cache, cache.subset(torch.arange(0))), "no images to evaluate on"),
        (lambda: rk.fit(residual, head, cache, step="fast"), "step must be one of"),
        (lambda: rk.fit(residual, head, cache, step="graph"), "needs a CUDA device"),
        (lambda: rk.fit(residual, head, cache, shots=0), "shots must be at least 1"),
        (lambda: rk.fit(residual, head, cache, memory=-1), "memory must be"),
        (lambda: rk.fit(residual, head, loader, shots=1), "shots needs UnitCaches"),
        (
            lambda: rk.fit(residual, rk.ZeroShotHead(torch.ones(31, 3), CLASSES), cache),
            "two different models",
        ),
    ]
    for run, message in cases:
        with pytest.raises(ValueError, match=message):
            run()
    assert (residual.weight == 1).all()
    with pytest.raises(ValueError, match="without val"):
        rk.fit_many(residual, head, cache, epochs=1).best()
