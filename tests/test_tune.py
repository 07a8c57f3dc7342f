"""tune: which candidate wins and why, what it hands out, and that it never goes below the model."""

import math

import pytest
import torch
from test_towers import build, images_for
from three_classes import head_of, images_of, parts_of

import residual_kernels as rk
from residual_kernels.train import contest, tuning
from residual_kernels.train.config import ConvexConfig
from residual_kernels.train.convex import indexed, opened
from residual_kernels.train.problem import ConvexProblem, Form, labels_of
from residual_kernels.train.stacked import _judged, stacked
from residual_kernels.train.unseen import _path, class_folds

CLASSES = "abc"


@pytest.fixture(scope="module")
def tower():
    return build()


@pytest.fixture(scope="module")
def images(tower):
    return images_of(tower, (60, 36, 24))


@pytest.fixture(scope="module")
def cache(tower, images):
    return rk.encode(tower, [images], kinds=("head", "mlp"), class_names=CLASSES)


@pytest.fixture(scope="module")
def bases(tower, cache):
    return rk.fit_bases(tower, cache, kinds=("head", "mlp"))


@pytest.fixture
def head():
    return head_of(CLASSES)


@pytest.mark.parametrize("with_val", [True, False])
def test_the_winner_is_what_the_table_says(tower, cache, bases, head, with_val):
    train, test = parts_of(cache)
    found = rk.tune(tower, bases, head, train, test if with_val else None)
    assert [one.name for one in found.table] == list(tuning.CANDIDATES)
    rows = {one.name: one for one in found.table}
    assert rows["base"].accuracy == found.base_accuracy
    assert found.winner not in ("base", "probe")
    won = rows[found.winner]
    assert won.accuracy == found.accuracy > found.base_accuracy
    assert won.note == "the winner"
    best = min((one for one in found.table if one.name != "probe"), key=lambda one: one.loss)
    assert best is won or best.loss <= won.loss
    # what is handed out is what was judged, and the tower carries nothing else
    shipped = rk.evaluate(found.adapter, found.head, test).accuracy
    assert shipped > rk.evaluate(rk.build("base", tower), head, test).accuracy
    if with_val:
        assert shipped == pytest.approx(found.accuracy, abs=0.03)
        assert (found.judged_by, found.images) == ("validation", 40)
        assert "only 40 validation images judged the candidates" in found.warning
    else:
        assert (found.judged_by, found.images) == ("folds", 80)
        assert found.warning is None
    assert rows["base"].numbers == 0
    assert rows["anchored"].numbers == len(rk.build("anchored", tower, bases).weight)
    assert rows["probe"].numbers == 32 * 3
    assert rows[tuning.VECTORS].numbers == rows["anchored"].numbers + 32 * 3
    text = str(found)
    assert found.why in text
    assert all(one.name in text for one in found.table)


def test_nothing_to_learn_gives_the_model(tower, cache, bases, head):
    train, test = parts_of(cache)
    train.labels = torch.randint(3, (len(train),), generator=torch.Generator().manual_seed(3))
    found = rk.tune(tower, bases, head, train)
    assert found.winner == "base"
    assert found.accuracy == found.base_accuracy
    assert found.why.startswith(
        "Nothing is better than the model by one standard error on 80 held-out training images"
    )
    assert torch.equal(found.adapter.from_units(test.terms(slice(0, 7))), test.output[:7])
    assert torch.equal(found.head.class_vectors, head.class_vectors)


def test_images_of_one_class_leave_the_model(tower, cache, bases, head):
    """Whoever always says that class would be right on all of them."""
    train, test = parts_of(cache)
    train.labels = torch.full_like(train.labels, 1)
    for val in (None, test):
        found = rk.tune(tower, bases, head, train, val)
        assert found.winner == "base"
        assert torch.equal(found.head.class_vectors, head.class_vectors)
        found.adapter.detach()


def test_one_image_leaves_the_model(tower, cache, bases, head):
    found = rk.tune(tower, bases, head, cache.subset(torch.tensor([3])))
    assert found.winner == "base"
    assert "only 1 training images judged the candidates" in found.warning


def test_the_probe_is_told_of_and_can_be_had(tower, cache, bases, head):
    train, test = parts_of(cache)
    found = rk.tune(tower, bases, head, train, candidates=("anchored", "probe"))
    probe = next(one for one in found.table if one.name == "probe")
    asked = rk.tune(tower, bases, head, train, test, candidates=("probe",))
    assert asked.winner == "probe"
    assert asked.probe is None
    assert not torch.equal(asked.head.class_vectors, head.class_vectors)
    assert rk.evaluate(asked.adapter, asked.head, test).accuracy == pytest.approx(asked.accuracy, abs=1e-9)
    assert torch.equal(asked.adapter.from_units(test.terms(slice(0, 7))), test.output[:7])  # the tower itself
    assert probe.accuracy > found.base_accuracy


def test_a_much_better_probe_is_said_in_words(tower, cache, bases, head):
    """One component can hardly move: the probe is far ahead, and the user hears of it."""
    train, _ = parts_of(cache)
    small = bases.truncate(components=1)
    found = rk.tune(tower, small, head, train, candidates=None)
    rows = {one.name: one for one in found.table}
    gain = rows["probe"].accuracy - found.accuracy
    if found.probe is None:
        assert gain <= 0.1
    else:
        assert gain > 0
        assert found.probe.startswith("A linear probe labels more images right")
        assert 'ask for the method "probe"' in found.probe


def test_bases_of_heads_alone_and_loaders(tower, images, bases, head):
    pixels, labels = images
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0))
    loader = [(pixels[rows], labels[rows]) for rows in order[:80].split(30)]
    found = rk.tune(tower, bases.of("head"), head, loader, shots=12)
    names = [one.name for one in found.table]
    assert "full" not in names
    assert "fine" in names
    assert found.images == 36


def test_the_stream_form_when_asked(tower, images, bases, head):
    pixels, labels = images
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0))
    train, val = ([(pixels[rows], labels[rows])] for rows in (order[:80], order[80:]))
    inside = rk.fit_bases(tower, [pixels], placement="stream").truncate(components=4)
    found = rk.tune(tower, bases, head, train, val, candidates=("base",), stream_bases=inside)
    assert [one.name for one in found.table] == ["base", "stream"]
    stream = found.table[1]
    assert 6 <= stream.numbers <= 6 * 4
    if found.winner == "stream":
        assert rk.evaluate(found.adapter, head, val).accuracy == pytest.approx(stream.accuracy, abs=1e-9)
    with pytest.raises(ValueError, match="give train and val as loaders"):
        rk.tune(tower, bases, head, train, stream_bases=inside)


def test_refusals_leave_the_tower_free(cache, bases, head):
    tower = build()
    train, _ = parts_of(cache)
    flags = {name: p.requires_grad for name, p in tower.named_parameters()}
    for options, message in (
        ({"candidates": ("finest",)}, "unknown candidate 'finest'; choose from base, anchored, fine"),
        ({"folds": 1}, "folds must be at least 2"),
        ({"shots": 99}, "fewer than shots=99"),
    ):
        with pytest.raises(ValueError, match=message):
            rk.tune(tower, bases, head, train, **options)
        assert {name: p.requires_grad for name, p in tower.named_parameters()} == flags
    with pytest.raises(ValueError, match="full needs bases of MLPs too; these hold head"):
        rk.tune(tower, bases.of("head"), head, train, candidates=("full",))
    found = rk.tune(tower, bases, head, train)
    found.adapter.detach()
    assert {name: p.requires_grad for name, p in tower.named_parameters()} == flags


def test_stacked_uses_what_it_fitted(tower, cache, bases, head):
    """Class vectors first, then components: the adapter and the head say what the fit said of every image."""
    adapter = rk.ResiDual(tower, bases, rest="all")
    config = ConvexConfig()
    source = indexed(adapter, cache, True, CLASSES)
    problem = ConvexProblem.of(config, labels_of(source, None, [3], "labels"), CLASSES, [0], None)
    rows, outside = opened(adapter, source, None, config)
    found = stacked(problem, Form(adapter), head, rows, outside, config.freedoms)
    theta = found.theta[None]
    with torch.no_grad():
        adapter.weight.copy_(1 + found.objective.delta(theta)[0])
        said = found.head(adapter.from_units(cache.terms(slice(None))))
    (block,) = found.objective.rows.blocks()
    assert torch.equal(found.objective.used(block, theta)[:, 0].argmax(1), said.argmax(1))
    assert not torch.equal(found.head.class_vectors, head.class_vectors)
    base = problem.path(Form(adapter), head, rows, outside).base()
    assert found.judged.loss < base.loss
    assert int(found.judged.weight.sum()) == len(cache)
    adapter.detach()


@pytest.mark.parametrize("with_val", [True, False])
def test_stacked_judges_components_too(tower, cache, bases, head, with_val):
    """What is judged are the logits of the adapter with its weights, not those of the class vectors alone."""
    train, test = parts_of(cache)
    adapter = rk.ResiDual(tower, bases, "all")
    source, judges = (indexed(adapter, part, True, head.class_names) for part in (train, test))
    config = ConvexConfig()
    labels, outside = (labels_of(one, None, [3], "labels") for one in (source, judges))
    task = ConvexProblem.of(config, labels, head.class_names, [0], outside if with_val else None)
    rows = opened(adapter, source, judges if with_val else None, config)
    first = task.path(Form(adapter, with_components=False), head, *rows, class_vectors=True)
    second = task.path(Form(adapter), head, *rows)
    theta = torch.randn(second.objective.shape.size, generator=torch.Generator().manual_seed(1)) / 3
    theta[-1] = 0.5
    judged = _judged(first, [(held, second, theta) for held in second.held])
    with torch.no_grad():
        adapter.weight.copy_(1 + second.objective.delta(theta[None])[0])
    expected = rk.evaluate(adapter, head, test if with_val else train).accuracy
    assert judged.accuracy == pytest.approx(expected, abs=1e-9)
    assert abs(expected - first.base().accuracy) > 0.05


def test_classes_as_folds(tower):
    """The strength is judged on classes that the fit had not seen, read among their own names."""
    names = "abcdef"
    labels = torch.arange(120) % 6
    images = images_for(tower, 120) * 0.5 + (labels - 2.5)[:, None, None, None] * 0.4
    cache = rk.encode(tower, [(images, labels)], kinds=("head", "mlp"), class_names=names)
    bases = rk.fit_bases(tower, cache, kinds=("head", "mlp"))
    vectors = torch.randn(32, 6, generator=torch.Generator().manual_seed(2))
    head = rk.ZeroShotHead(vectors, names, math.log(10.0))
    found = rk.tune(tower, bases, head, cache, folds="classes")
    found.adapter.detach()
    assert [one.name for one in found.table] == ["base", "anchored"]
    assert found.head is head
    fold = class_folds(6, 5, 0)
    right = torch.zeros(120, dtype=torch.bool)
    logits = head(cache.output)
    for k in range(3):
        held = fold[labels] == k
        assert int((fold == k).sum()) == 2
        among = logits[held].masked_fill(fold != k, -torch.inf)
        right[held] = among.argmax(1) == labels[held]
    assert found.base_accuracy == pytest.approx(float(right.double().mean()))
    if found.winner == "anchored":
        assert found.accuracy > found.base_accuracy
    # labels among the held-out classes do not move a fit: those of one fold swapped, its fits are the same
    swapped = labels.clone()
    first, second = (fold == 0).nonzero().flatten().tolist()
    swapped[labels == first], swapped[labels == second] = second, first
    adapter = rk.ResiDual(tower, bases, rest="all")
    rows, _ = opened(adapter, indexed(adapter, cache, True, names), None, ConvexConfig())
    form = Form(adapter)
    coefficients, output = form.rows(rows.resident)
    thetas = []
    for given in (labels, swapped):
        path = _path(coefficients, output, form.readout(head), given, fold[given], fold != 0, 0)
        zero = path.like.new_zeros(1, path.objective.shape.size)
        thetas.append(path._fit([(0, -1, 30.0)], zero, 1e-4).theta)
    assert torch.equal(*thetas)
    adapter.detach()


def test_classes_as_folds_are_refused_where_they_say_nothing(tower, cache, bases, head):
    with pytest.raises(ValueError, match="needs at least 4; there are 3"):
        rk.tune(tower, bases, head, cache, folds="classes")
    with pytest.raises(ValueError, match="give no val"):
        rk.tune(tower, bases, head, cache, cache, folds="classes")
    with pytest.raises(ValueError, match="no other candidates"):
        rk.tune(tower, bases, head, cache, folds="classes", candidates=["full"])
    with pytest.raises(ValueError, match='number or "classes"'):
        rk.tune(tower, bases, head, cache, folds="images")


def test_few_images_choose_nothing(tower, cache, bases, head):
    few = parts_of(cache, contest.LEAST - 1)[0]
    found = rk.tune(tower, bases, head, few)
    assert found.winner == "base"
    assert f"{contest.LEAST - 1} held-out training images are too few" in found.why
    assert torch.equal(found.adapter(images_for(tower, 2)), tower(images_for(tower, 2)))


@pytest.mark.parametrize(
    "options",
    [
        {"reg_tokens": 4, "global_pool": "token"},
        {"class_token": False, "global_pool": "avg", "reg_tokens": 2},
        {"class_token": False, "global_pool": "map"},
    ],
    ids=["registers", "average pooling", "attention pooling"],
)
def test_nothing_hangs_on_one_shape_of_tower(options):
    """Random towers of other shapes: only that the contest works there, not how good a model it makes."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 0}
    tower = VisionTransformer(**sizes, **options).eval()
    labels = torch.arange(160) % 4
    noise = torch.randn(160, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    images = noise + 0.6 * (labels - 1.5)[:, None, None, None]
    cache = rk.encode(tower, [(images, labels)], kinds=("head", "mlp"), class_names="abcd")
    train, test = parts_of(cache, 100)
    bases = rk.fit_bases(tower, train, kinds=("head", "mlp"))
    vectors = torch.randn(48, 4, generator=torch.Generator().manual_seed(2))
    head = rk.ZeroShotHead(vectors, "abcd", math.log(10.0))
    found = rk.tune(tower, bases, head, train)
    assert found.winner != "base"
    before = float((head(test.output).argmax(1) == test.labels).double().mean())
    after = rk.evaluate(found.adapter, found.head, test).accuracy
    assert after > before + 0.15
    found.adapter.detach()
