"""The convex fit: its solution against SciPy, scikit-learn and float64; its choice; what it refuses."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from test_towers import build, images_for
from three_classes import cache_of, head_of, parts_of
from torch.nn import functional as F

import residual_kernels as rk
from residual_kernels.ops.onednn import product
from residual_kernels.train import logistic, path
from residual_kernels.train.choice import FACTORS, Judged, best_of, standard_error
from residual_kernels.train.folds import folds_of
from residual_kernels.train.lbfgs import EXACT, Pairs, minimise
from residual_kernels.train.logistic import Objective, Readout, ResidentRows, Targets, Tasks
from residual_kernels.train.problem import moments

CLASSES = "abc"


def problem(dtype=torch.float64, *, n=40, j=12, d=8, k=4, seed=0, block=4096, kinds=2, **options):
    """(objective, tasks, the tensors it is made of) with two label sets, three folds and four tasks."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    c, output, basis, vectors = draw(n, j), 2 + draw(n, d), draw(j, d) / d**0.5, draw(d, k)
    labels = torch.randint(k, (2, n), generator=g)
    soft = draw(2, n, k).softmax(-1) if options.pop("soft", False) else None
    weight = draw(2, n).exp() if options.pop("weighted", False) else None
    smoothing = options.pop("smoothing", 0.0)
    fold = torch.stack([folds_of(labels[0], 3, 0), folds_of(labels[1], 3, 5)])
    fold[1, :5] = -1
    targets = Targets(
        labels if soft is None else soft.to(dtype),
        smoothing,
        None if weight is None else weight.to(dtype),
    )
    tasks = Tasks(
        torch.tensor([0, 0, 1, 1]),
        torch.tensor([0, 0, 1, 1]),
        torch.tensor([-1, 0, 2, -1], dtype=torch.int16),
        torch.tensor([1.0, 0.3, 2.0, 10.0], dtype=dtype),
        fold,
    )
    sd = 0.5 + torch.rand(j, generator=g, dtype=torch.float64)
    size = j // kinds
    parts = [part.to(dtype) for part in c.split(size, 1)]
    rows = ResidentRows(parts, output.to(dtype), block)
    readout = Readout(basis.to(dtype), vectors.to(dtype), 3.0)
    objective = Objective(rows, readout, targets, sd.to(dtype), **options)
    names = ("c", "output", "basis", "vectors", "labels", "soft", "weight", "fold", "sd", "smoothing")
    made = (c, output, basis, vectors, labels, soft, weight, fold, sd, smoothing)
    return objective, tasks, dict(zip(names, made, strict=True))


def by_hand(theta, t, tasks, objective, parts):
    """F of task t, written out; theta [P] float64."""
    p = parts
    j, (d, k) = len(p["sd"]), p["vectors"].shape
    f = p["output"]
    r = 3.0 / f.norm(dim=1, keepdim=True)
    delta = theta[:j] / p["sd"]
    logits = r * (p["c"] @ (delta[:, None] * (p["basis"] @ p["vectors"])))
    free = theta
    s = None
    if objective.shape.scale:
        s, free = theta[-1], theta[:-1]
    base = r * (f @ p["vectors"])
    logits = logits + base * (1 if s is None else 1 + s)
    if objective.shape.class_vectors:
        moved = theta[j : j + d * k].view(d, k) * objective.vector_unit
        logits = logits + r * (f @ moved)
    log_p = logits.log_softmax(1)
    which, held = int(tasks.which[t]), int(tasks.held[t])
    target = F.one_hot(p["labels"][which], k).double() if p["soft"] is None else p["soft"][which]
    target = (1 - p["smoothing"]) * target + p["smoothing"] / k
    keep = (p["fold"][which] >= 0) & (p["fold"][which] != held)
    weight = keep.double() if p["weight"] is None else keep * p["weight"][which]
    value = -(weight[:, None] * target * log_p).sum() + tasks.alpha[t].double() / 2 * free.square().sum()
    return value if s is None else value + objective.kappa[int(s > 0)] * (s - torch.log(1 + s))


VARIANTS = {
    "plain": {},
    "no scale": {"kappa": None},
    "a scale held as much both ways": {"kappa": (1.0, 1.0)},
    "class vectors": {"vector_variance": 0.7},
    "more classes than coordinates": {"k": 11, "vector_variance": 0.7},
    "smoothed and weighted": {"smoothing": 0.1, "weighted": True},
    "soft labels": {"soft": True, "smoothing": 0.05},
    "in blocks": {"block": 7},
    "no components": {},
}


def numbers(objective, tasks, seed=3):
    g = torch.Generator().manual_seed(seed)
    return 0.3 * torch.randn(len(tasks), objective.shape.size, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("name", VARIANTS)
def test_value_and_gradient(name, monkeypatch):
    objective, tasks, parts = _empty() if name == "no components" else problem(**VARIANTS[name])
    theta = numbers(objective, tasks)
    value, grad = objective.evaluate(theta, tasks)
    for t in range(len(tasks)):
        own = theta[t].clone().requires_grad_()
        expected = by_hand(own, t, tasks, objective, parts)
        expected.backward()
        assert float(value[t]) == pytest.approx(float(expected.detach()), rel=1e-12)
        assert torch.allclose(grad[t], own.grad, rtol=1e-10, atol=1e-10)
    monkeypatch.setattr("residual_kernels.train.logistic.BLOCK_BYTES", 1)  # a task at a time
    again, grad_again = objective.evaluate(theta, tasks)
    assert torch.allclose(again, value, rtol=1e-13)
    assert torch.allclose(grad_again, grad, rtol=1e-11, atol=1e-12)
    objective.sd = objective.sd * 1.001  # what must fail
    objective.right = objective.right / 1.001
    if objective.shape.components:
        assert not torch.allclose(objective.evaluate(theta, tasks)[1], grad, rtol=1e-6, atol=1e-8)


def _empty():
    """A problem without components: a probe."""
    objective, tasks, parts = problem(vector_variance=0.7)
    none = torch.zeros(40, 0, dtype=torch.float64)
    readout = Readout(objective.readout.basis[:0], objective.readout.vectors, 3.0)
    rows = ResidentRows([none], objective.rows.output)
    probe = Objective(rows, readout, objective.targets, objective.sd[:0], vector_variance=0.7)
    return probe, tasks, parts | {"c": none, "basis": parts["basis"][:0], "sd": parts["sd"][:0]}


def solved(objective, tasks, tolerance=1e-9, start=None, limit=2000, rough=False, pairs=None):
    start = (
        torch.zeros(len(tasks), objective.shape.size, dtype=objective.right.dtype) if start is None else start
    )
    mass = tasks.counted(objective.targets, slice(None)).sum(0)
    return minimise(
        lambda theta, index: objective.evaluate(theta, tasks.pick(index), rough=rough),
        lambda theta, grad, index: objective.gap(theta, grad, tasks.pick(index)),
        start,
        objective.curvature(tasks, mass),
        torch.full((len(tasks),), tolerance, dtype=torch.float64),
        longest=objective.longest,
        limit=limit,
        rounding=path.ROUNDING if rough else EXACT,
        pairs=pairs,
    )


@pytest.mark.parametrize(
    "name", ["plain", "no scale", "class vectors", "smoothed and weighted", "soft labels"]
)
def test_the_optimum_is_scipys(name):
    objective, tasks, parts = problem(**VARIANTS[name])
    found = solved(objective, tasks)
    assert (found.gap <= 1e-9).all()
    for t in range(len(tasks)):

        def value_and_grad(x, t=t):
            own = torch.tensor(x, requires_grad=True)
            value = by_hand(own, t, tasks, objective, parts)
            value.backward()
            return float(value.detach()), own.grad.numpy()

        bounds = [(None, None)] * objective.shape.size
        if objective.shape.scale:
            bounds[-1] = (-1 + 1e-9, None)
        oracle = minimize(
            value_and_grad,
            np.zeros(objective.shape.size),
            jac=True,
            bounds=bounds,
            method="L-BFGS-B",
            options={"maxiter": 5000, "ftol": 1e-15, "gtol": 1e-10},
        )
        assert float(found.value[t]) == pytest.approx(oracle.fun, rel=1e-9)
        assert torch.allclose(found.theta[t], torch.from_numpy(oracle.x), atol=2e-4)
        # the certificate holds: nothing is lower than value - gap
        assert oracle.fun >= float(found.value[t] - found.gap[t]) - 1e-9


def test_a_probe_is_scikit_learns():
    """Class vectors alone, from vectors of zero: multinomial logistic regression with a ridge."""
    objective, tasks, parts = _empty()
    zero = Readout(objective.readout.basis, torch.zeros_like(objective.readout.vectors), 3.0)
    objective = Objective(
        objective.rows, zero, objective.targets, objective.sd, vector_variance=0.7, kappa=None
    )
    tasks = tasks.pick(torch.tensor([0]))
    found = solved(objective, tasks)
    f = parts["output"]
    x = (3.0 / f.norm(dim=1, keepdim=True)) * f * objective.vector_unit
    oracle = LogisticRegression(C=1 / float(tasks.alpha[0]), fit_intercept=False, tol=1e-10, max_iter=10000)
    oracle.fit(x.numpy(), parts["labels"][0].numpy())
    theta = found.theta[0].view(-1, 4)
    assert torch.allclose(theta, torch.from_numpy(oracle.coef_.T.copy()), atol=1e-5)


def test_the_gap_bounds_what_is_left():
    """At any theta, also far from the optimum, value - gap is at most the least value; and it is not idle."""
    objective, tasks, _ = problem()
    least = solved(objective, tasks).value
    for size in (0.0, 0.01, 0.3):
        theta = size * numbers(objective, tasks)
        value, grad = objective.evaluate(theta, tasks)
        gap = objective.gap(theta, grad, tasks)
        assert (value - gap <= least + 1e-9).all()
        assert (gap >= value - least - 1e-9).all()
    near = solved(objective, tasks, tolerance=1e-3)
    assert (near.value - least <= 1e-3).all()
    assert (near.evaluations < solved(objective, tasks).evaluations).all()


def test_tasks_side_by_side_are_the_tasks():
    objective, tasks, _ = problem()
    together = solved(objective, tasks)
    for t in range(len(tasks)):
        alone = solved(objective, tasks.pick(torch.tensor([t])))
        assert torch.allclose(alone.theta[0], together.theta[t], atol=1e-4)
        assert float(alone.value[0]) == pytest.approx(float(together.value[t]), abs=2e-9)


def test_float32_repeats_bit_for_bit_and_is_near_float64():
    objective, tasks, _ = problem(torch.float32)
    first, second = (solved(objective, tasks, tolerance=1e-3) for _ in range(2))
    assert torch.equal(first.theta, second.theta)
    assert torch.equal(first.value, second.value)
    exact = solved(*problem()[:2])
    assert torch.allclose(first.value, exact.value, rtol=1e-3)
    assert (first.value - exact.value <= 1e-3 + 1e-5 * exact.value.abs()).all()


def test_a_rough_evaluation_reads_bfloat16_and_is_near():
    objective, tasks, _ = problem(torch.float32, n=200, j=64)
    kept = objective.rows
    theta = numbers(objective, tasks).float()
    value, grad = objective.evaluate(theta, tasks, rough=True)  # no copy to read: the exact one
    assert torch.equal(value, objective.evaluate(theta, tasks)[0])
    assert not objective.is_narrow
    objective.rows = ResidentRows(kept.coefficients, kept.output, narrow=True)
    assert objective.is_narrow
    assert torch.equal(value, objective.evaluate(theta, tasks)[0])
    near, near_grad = objective.evaluate(theta, tasks, rough=True)
    assert not torch.equal(near, value)
    assert ((near - value).abs() < path.ROUNDING * value).all()
    assert ((near_grad - grad).norm(dim=1) < 2**-7 * grad.norm(dim=1)).all()
    rough = solved(objective, tasks, tolerance=2.0, rough=True)
    exact = solved(objective, tasks, tolerance=1e-3)
    assert (rough.value - exact.value < 2.0 + path.ROUNDING * exact.value).all()


def test_curvature_is_carried_to_the_next_strength():
    objective, tasks, _ = problem(n=200, j=64)
    before = solved(objective, tasks, tolerance=1e-6)
    weaker = replace(tasks, alpha=tasks.alpha / 3)
    changes = before.pairs.changes.clone()
    objective.penalised(changes).add_(
        (weaker.alpha - tasks.alpha)[:, None, None] * objective.penalised(before.pairs.steps)
    )
    pairs = Pairs(before.pairs.steps, changes)
    # a pair's change is the gradient's along its step, under the new penalty
    step = before.pairs.steps[:, -1]
    there = objective.evaluate(before.theta, weaker)[1] - objective.evaluate(before.theta - step, weaker)[1]
    assert torch.allclose(there, changes[:, -1], rtol=1e-6, atol=1e-9)
    exact = solved(objective, weaker, start=before.theta)
    warm = solved(objective, weaker, tolerance=1e-6, start=before.theta, pairs=pairs)
    assert (warm.value - exact.value <= 1e-6).all()


@pytest.mark.parametrize(
    "name", ["plain", "class vectors", "smoothed and weighted", "soft labels", "no components"]
)
def test_rows_of_a_fold_together_give_the_same_and_spare_products(name, monkeypatch):
    """Five blocks of a fold each, the rows left out among them; a fit reads no row that it holds out."""
    objective, tasks, parts = _empty() if name == "no components" else problem(block=9, **VARIANTS[name])
    fold = parts["fold"][1:2]
    numbered = torch.tensor([0, 1, 0, 1])
    tasks = Tasks(numbered, 0 * numbered, torch.tensor([0, 2, -1, 1]).to(fold), tasks.alpha, fold)
    theta = numbers(objective, tasks)
    value, grad = objective.evaluate(theta, tasks)
    multiplied = []

    def counted(a, b):
        multiplied.append(a.numel() * b.shape[1])
        return a @ b

    monkeypatch.setattr(logistic, "product", counted)
    apart = objective.rows
    together = ResidentRows(apart.coefficients, apart.output, 9, fold=fold[0])
    objective.rows = together
    objective._bases.clear()
    again, grad_again = objective.evaluate(theta, tasks)
    assert torch.allclose(again, value, rtol=1e-12)
    assert torch.allclose(grad_again, grad, rtol=1e-10, atol=1e-11)
    fitted = sum(int(((fold[0] >= 0) & (fold[0] != held)).sum()) for held in tasks.held.tolist())
    components = objective.shape.components
    assert sum(multiplied) == 2 * fitted * 4 * components  # both ways, four classes
    wrong = replace(tasks, held=torch.zeros_like(tasks.held))
    assert not torch.allclose(objective.evaluate(theta, wrong)[0], value, rtol=1e-6)
    judged = []
    for objective.rows in (apart, together):
        objective._bases.clear()
        search = path.Path(objective, [path.FitGroup(0, 0)], fold, 3, freedoms=(5.0, 50.0))
        judged.append(search.run()[0].candidates)
    for (_, a), (_, b) in zip(*judged, strict=True):
        assert a.loss == pytest.approx(b.loss, abs=1e-9)
        assert torch.equal(a.hits, b.hits)


def test_products_are_those_of_torch(monkeypatch):
    g = torch.Generator().manual_seed(0)
    for m, k, n in ((1, 1, 1), (7, 33, 5), (200, 300, 40), (0, 3, 2), (3, 0, 2)):
        a, b = torch.randn(m, k, generator=g), torch.randn(n, k, generator=g).T
        bound = 8 * torch.finfo(torch.float32).eps * (a.abs().double() @ b.abs().double())
        for left, right in ((a, b), (a.T.contiguous().T, b.contiguous())):
            assert ((product(left, right).double() - a.double() @ b.double()).abs() <= bound).all()
        assert torch.equal(product(a.double(), b.double()), a.double() @ b.double())
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert torch.equal(product(a, b), a @ b)


@pytest.mark.parametrize("vectors", [None, 0.7])
def test_every_row_is_judged_by_the_fit_that_held_it_out(vectors):
    objective, _, parts = problem(n=60, vector_variance=vectors, weighted=True)
    fold = parts["fold"][:1]
    search = path.Path(objective, [path.FitGroup(0, 0)], fold, 3, freedoms=(5.0, 50.0))
    found = search.run()[0]
    for freedom, judged in found.candidates:
        logits = torch.empty(60, 4, dtype=torch.float64)
        for held in range(3):
            tasks, _ = search._tasks([(0, held, freedom)])
            theta = solved(objective, tasks, tolerance=1e-9).theta
            rows = fold[0] == held
            logits[rows] = objective.used(next(objective.rows.blocks()), theta)[rows, 0]
        weight, labels = parts["weight"][0], parts["labels"][0]
        losses = [
            float((F.cross_entropy(factor * logits, labels, reduction="none") * weight).sum() / weight.sum())
            for factor in FACTORS
        ]
        assert judged.loss == pytest.approx(min(losses), abs=2e-2)
        hits = (logits.argmax(1) == labels).double()
        assert judged.accuracy == pytest.approx(float((hits * weight).sum() / weight.sum()), abs=0.06)


def test_a_penalty_so_strong_that_nothing_moves_does_not_end_the_path():
    objective, _, parts = problem(n=60, kappa=None)
    fold = parts["fold"][:1]
    strong = (1e-9, 1e-8, 1e-7, 1e-6)
    found = path.Path(objective, [path.FitGroup(0, 0)], fold, 3, freedoms=(*strong, 5.0)).run()[0]
    assert [freedom for freedom, _ in found.candidates] == [*strong, 5.0]


def test_what_is_used_is_what_head_and_adapter_give():
    """Logits as the fitted numbers are shipped: of y, by moved class vectors, up to |y| and the scale."""
    objective, tasks, parts = problem(vector_variance=0.7)
    theta = numbers(objective, tasks)
    rows = objective.rows
    found = objective.used(next(rows.blocks()), theta)
    delta, moved = objective.delta(theta), objective.vectors(theta)
    for t in range(len(tasks)):
        y = parts["output"] + parts["c"] @ (delta[t][:, None] * parts["basis"])
        expected = y @ (parts["vectors"] + moved[t])
        scale = 3.0 * (1 + theta[t, -1]) / parts["output"].norm(dim=1, keepdim=True)
        assert torch.allclose(found[:, t], scale * expected, atol=1e-10)


def test_folds_are_even_and_seeded():
    labels = torch.tensor([0] * 23 + [1] * 10 + [2] * 3)
    fold = folds_of(labels, 5, 0)
    assert torch.bincount(fold.long()).tolist() == [8, 7, 7, 7, 7]
    for label in range(3):
        counts = torch.bincount(fold[labels == label].long(), minlength=5)
        assert int(counts.max() - counts.min()) <= 1
    assert torch.equal(fold, folds_of(labels, 5, 0))
    assert not torch.equal(fold, folds_of(labels, 5, 1))


def judged(losses, hits):
    losses = torch.tensor(losses)
    return Judged.of(losses[None].expand(16, -1), torch.tensor(hits), torch.ones(len(losses)))


def test_one_standard_error_in_the_towers_favour():
    base = judged([1.0, 1.0, 1.0, 1.0], [True, True, False, False])
    better = judged([0.5, 0.6, 0.5, 0.6], [True, True, True, False])
    unsure = judged([0.0, 1.9, 0.1, 1.9], [True, True, True, True])
    wrong = judged([0.5, 0.6, 0.5, 0.6], [True, False, False, False])
    assert standard_error(base, better) == pytest.approx(0.025, rel=1e-6)
    assert best_of(base, [better]) == 0
    assert best_of(base, [unsure]) is None  # better by less than its standard error
    assert best_of(base, [wrong]) is None  # surer, but labels fewer right
    assert best_of(base, [unsure, better]) == 1
    assert best_of(base, []) is None


# --- through fit --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tower():
    return build()


@pytest.fixture(scope="module")
def cache(tower):
    return cache_of(tower, (60, 36, 24), CLASSES)


@pytest.fixture(scope="module")
def bases(tower, cache):
    return rk.fit_bases(tower, cache, kinds=("head", "mlp"))


@pytest.fixture
def head():
    return head_of(CLASSES)


def alike(a, b):
    """Two solutions of one problem, each as near its optimum as its certificate says."""
    return float((a - b).norm()) < 0.02 * float((a - 1).norm())


@pytest.mark.parametrize("with_val", [True, False])
def test_fit_by_default(tower, cache, bases, head, with_val):
    train, test = parts_of(cache)
    anchored = rk.ResiDual(tower, bases, "all")
    before = rk.evaluate(anchored, head, test).accuracy
    result = rk.fit(anchored, head, train, test if with_val else None)
    after = rk.evaluate(anchored, head, test)
    assert result.solver == "convex"
    assert after.accuracy > before + 0.2
    assert result.certificate.gap < 1e-4 * len(train)
    assert [one.freedom for one in result.path] == sorted(one.freedom for one in result.path)
    assert result.path[0].freedom == 0
    if with_val:
        assert result.base_accuracy == before
        assert result.val_accuracy == after.accuracy == result.history[result.best_epoch].val_accuracy
        assert result.fold_accuracy is None
    else:
        assert result.val_accuracy is None
        assert result.base_accuracy == rk.evaluate(rk.ResiDual(tower, bases, "all"), head, train).accuracy
        assert result.fold_accuracy > result.base_accuracy
    weight = anchored.weight.detach().clone()
    with torch.no_grad():
        anchored.weight.fill_(7.0)  # where it starts does not matter
    again = rk.fit(anchored, head, train, test if with_val else None)
    assert torch.equal(anchored.weight, weight)
    assert again.path == result.path


def test_nothing_to_learn_leaves_the_model_to_the_bit(tower, cache, bases, head):
    train, test = parts_of(cache)
    train.labels = torch.randint(3, (len(train),), generator=torch.Generator().manual_seed(3))
    anchored = rk.ResiDual(tower, bases, "all", init="normal")
    result = rk.fit(anchored, head, train)
    assert (anchored.weight == 1).all()
    assert result.freedom == 0
    assert result.certificate is None
    assert result.best_epoch == 0
    assert torch.equal(anchored.from_units(test.terms(slice(0, 9))), test.output[:9])


def test_other_forms_by_request(tower, cache, bases, head):
    train, test = parts_of(cache)
    for rest in ("zero", "sum", "mean"):
        adapter = rk.ResiDual(tower, bases.of("head").truncate(energy=0.9), rest)
        assert rk.fit(adapter, head, train, test, epochs=1).solver == "adamw"
        result = rk.fit(adapter, head, train, test, solver="convex")
        assert result.solver == "convex"
        assert result.val_accuracy == rk.evaluate(adapter, head, test).accuracy


def test_a_cache_larger_than_memory_gives_the_same(tower, cache, bases, head, tmp_path):
    train, test = parts_of(cache)
    found = []
    for memory in (None, 0):
        anchored = rk.ResiDual(tower, bases, "all")
        result = rk.fit(anchored, head, train, test, memory=memory, freedoms=(3, 30, 300))
        found.append((result, anchored.weight.detach().clone()))
    (a, wa), (b, wb) = found
    assert a.freedom == b.freedom
    assert alike(wa, wb)
    assert (
        abs(a.certificate.objective - b.certificate.objective) <= a.certificate.gap + b.certificate.gap + 1e-4
    )


def test_a_loader_is_encoded_once(tower, cache, bases, head):
    labels = torch.arange(48) % 3
    images = images_for(tower, 48) * 0.5 + (labels - 1.0)[:, None, None, None]
    calls = []

    class Loader:
        def __iter__(self):
            calls.append(1)
            return iter([(images[:20], labels[:20]), (images[20:], labels[20:])])

    anchored = rk.ResiDual(tower, bases, "all")
    result = rk.fit(anchored, head, Loader())
    assert len(calls) == 1
    own = rk.encode(tower, [(images[:20], labels[:20]), (images[20:], labels[20:])], kinds=("head", "mlp"))
    weight = anchored.weight.detach().clone()
    assert rk.fit(anchored, head, own).path == result.path
    assert torch.equal(anchored.weight, weight)


def test_many_label_sets_and_seeds_side_by_side(tower, cache, bases, head, monkeypatch):
    train, test = parts_of(cache)
    spread = []

    def recorded(rows, readout):
        found = moments(rows, readout)
        spread.append(found[0])
        return found

    monkeypatch.setattr("residual_kernels.train.problem.moments", recorded)
    other = (train.labels + 1) % 3
    anchored = rk.ResiDual(tower, bases, "all")
    fits = rk.fit_many(anchored, head, train, labels=[train.labels, other], seeds=(0, 1), shots=10)
    assert [(task.labels, task.seed, task.lr) for task in fits.tasks] == [
        (0, 0, None),
        (0, 1, None),
        (1, 0, None),
        (1, 1, None),
    ]
    for number, (task, result) in enumerate(zip(fits.tasks, fits.results, strict=True)):
        alone = rk.fit(
            anchored, head, train, labels=(train.labels, other)[task.labels], seed=task.seed, shots=10
        )
        assert alone.freedom == result.freedom
        # Both objectives are at most their gap above the optimum. The length of weights - 1 is over the
        # share of the tower that is kept, near zero for renamed classes: compare whitened directions.
        ours, theirs = alone.certificate, result.certificate
        assert abs(ours.objective - theirs.objective) < max(ours.gap, theirs.gap)
        moved = (torch.cat([anchored.weight.detach()[None], fits.weight]) - 1) * spread[-1].sqrt()
        apart = (F.normalize(moved[1:], dim=1) - F.normalize(moved[:1], dim=1)).norm(dim=1)
        assert apart[number] < 0.02
        assert 10 * apart[number] < min(apart[k] for k in range(4) if k != number)
    flipped = rk.ZeroShotHead(head.class_vectors[:, [2, 0, 1]], "abc", math.log(10.0))
    two = rk.fit_many(anchored, [head, flipped], train, labels=[train.labels, other])
    assert alike(two.weight[0], two.weight[1])  # the same task under other names


def test_soft_labels_of_one_class_are_labels(tower, cache, bases, head):
    train, _ = parts_of(cache)
    anchored = rk.ResiDual(tower, bases, "all")
    rk.fit(anchored, head, train)
    hard = anchored.weight.detach().clone()
    rk.fit(anchored, head, train, labels=3.0 * F.one_hot(train.labels, 3))
    assert alike(anchored.weight.detach(), hard)
    both = F.one_hot(train.labels, 3) + F.one_hot((train.labels + 1) % 3, 3)
    result = rk.fit(anchored, head, train, labels=both)
    assert result.base_accuracy > 0.4  # either label is right
    rk.fit(anchored, head, train, label_smoothing=0.3)
    assert not alike(anchored.weight.detach(), hard)


def test_an_image_without_an_embedding_spoils_nothing(tower, cache, bases, head):
    train, _ = parts_of(cache)
    train.output[0] = 0
    assert not train.output[0].any()
    anchored = rk.ResiDual(tower, bases, "all")
    result = rk.fit(anchored, head, train)
    assert result.fold_accuracy > result.base_accuracy + 0.2
    assert anchored.weight.isfinite().all()


def test_a_fit_without_an_optimum_is_told_of(tower, cache, bases, head, caplog):
    """Almost no penalty: three classes that can be told apart have no finite optimum."""
    train, _ = parts_of(cache)
    anchored = rk.ResiDual(tower, bases, "all")
    with caplog.at_level("WARNING", logger="residual_kernels"):
        result = rk.fit(anchored, head, train, freedoms=(1e30,))
    assert result.certificate.gap > 1e-5 * len(train)
    assert "a smaller freedom than 1e+30" in caplog.text
    caplog.clear()
    rk.fit(anchored, head, train)
    assert not caplog.text


def test_moments_are_those_of_all_rows():
    """Of blocks, with a mean a thousand times the spread; a component that never moves has a floor."""
    g = torch.Generator().manual_seed(0)
    c, output = 1000 + torch.randn(50, 6, generator=g), torch.randn(50, 4, generator=g)
    c[:, 5] = 1000
    output[0] = 0
    readout = Readout(torch.zeros(6, 4), torch.zeros(4, 3), 2.0)
    variance, of_outputs = moments(ResidentRows([c[:, :2], c[:, 2:]], output, 7), readout)
    r = 2 / output.double().norm(dim=1, keepdim=True)
    r[0] = 0
    own = (r * c.double()).var(0)
    assert torch.allclose(variance.double(), own.clamp_min(1e-3 * own.mean()), rtol=1e-5)
    assert of_outputs == pytest.approx(float((r * output.double()).var(0).mean()), rel=1e-5)
    still = torch.full((50, 6), 3.0)
    variance, _ = moments(ResidentRows([still], torch.ones(50, 4), 7), readout)
    assert torch.allclose(variance, torch.full((6,), 1e-4 * 9.0), rtol=1e-5)


def test_balanced_classes_count_alike(tower, cache, bases, head):
    """Ten copies of a class's images weigh what the images weigh when classes are balanced."""
    train, test = parts_of(cache)
    anchored = rk.ResiDual(tower, bases, "all")
    rows = torch.cat([torch.arange(len(train))] + [(train.labels == 2).nonzero().flatten()] * 2)
    weights = []
    for data in (train, train.subset(rows)):
        result = rk.fit(anchored, head, data, test, class_weight="balanced", freedoms=(30,))
        weights.append(anchored.weight.detach().clone())
        assert result.freedom == 30
    assert torch.nn.functional.cosine_similarity(weights[0] - 1, weights[1] - 1, dim=0) > 0.98
    rk.fit(anchored, head, train, test, class_weight=torch.tensor([1.0, 1.0, 30.0]), freedoms=(30,))
    assert torch.nn.functional.cosine_similarity(weights[0] - 1, anchored.weight.detach() - 1, dim=0) < 0.98


def test_one_image_or_one_class_leaves_the_model(tower, cache, bases, head):
    anchored = rk.ResiDual(tower, bases, "all", init="normal")
    for count in (1, 2, 30):
        result = rk.fit(anchored, head, cache.subset(torch.arange(count)))
        assert result.freedom == 0
        assert (anchored.weight == 1).all()


def test_refusals(tower, cache, bases, head):
    anchored, coarse = rk.ResiDual(tower, bases, "all"), rk.CoarseHeads(tower)
    train, test = parts_of(cache)
    shares = torch.ones(len(train), 3)
    for adapter, options, message in (
        (anchored, {"solver": "newton"}, "solver must be one of auto, convex, adamw; got 'newton'"),
        (coarse, {"solver": "convex"}, 'CoarseHeads here is none: use solver="adamw"'),
        (anchored, {"solver": "convex", "lr": 0.1, "epochs": 3}, 'lr and epochs belongs to solver="adamw"'),
        (coarse, {"folds": 3}, 'folds belongs to solver="convex", but this fit is by solver="adamw"'),
        (anchored, {"folds": 1}, "folds must be at least 2; got 1"),
        (anchored, {"freedoms": (1, -1)}, "freedoms must be numbers above 0"),
        (anchored, {"label_smoothing": 1.0}, "label_smoothing must be at least 0 and below 1; got 1.0"),
        (anchored, {"shots": 0}, "shots must be at least 1; got 0"),
        (anchored, {"shots": 99}, "has .* images, fewer than shots=99"),
        (anchored, {"labels": shares[:3]}, r"labels must be shares \[N, K\] = \(80, 3\); got \(3, 3\)"),
        (anchored, {"labels": 0 * shares}, "above zero for at least one class of every image"),
        (anchored, {"labels": -shares}, "not below zero"),
        (anchored, {"labels": torch.full((80,), 3)}, "labels run from 3 to 3, but the head has 3 classes"),
    ):
        weight = [p.detach().clone() for p in adapter.trainable()]
        with pytest.raises(ValueError, match=message):
            rk.fit(adapter, head, train, test, **options)
        assert all(torch.equal(a, b) for a, b in zip(weight, adapter.trainable(), strict=True))
    with pytest.raises(ValueError, match="the data gave no images|no images"):
        rk.fit(anchored, head, cache.subset(torch.arange(0)))
    with pytest.raises(ValueError, match="two different models"):
        rk.fit(anchored, rk.ZeroShotHead(torch.randn(31, 3), CLASSES), train)
