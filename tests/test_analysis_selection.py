"""Keeping some units or components: the authors' ablations, and curves against embeddings written out."""

import golden
import pytest
import torch

import residual_kernels as rk
from residual_kernels.analysis import (
    ablate,
    component_correlations,
    selection_curves,
    variance_between_classes,
)

KINDS = ("emb", "head", "mlp")


@pytest.fixture(scope="module")
def made():
    tower = golden.model().visual
    inputs = golden.numbers("inputs")
    cache = rk.encode(tower, [(golden.images(), inputs["labels"])], kinds=KINDS, class_names=list("abcde"))
    bases = rk.fit_bases(tower, cache, kinds=KINDS)
    head = rk.ZeroShotHead(inputs["centroids"].double(), list("abcde"))
    return tower, cache, bases, head


TAGS = ("heads_zero", "heads_mean", "mlp_emb_zero", "mlp_emb_mean", "all", "idx_4_7_11_mean")


@pytest.mark.parametrize("tag", TAGS)
def test_authors_ablations(made, tag):
    """What their code really kept (`__kept`), whatever was asked."""
    tower, cache, bases, _ = made
    expected = golden.numbers("ablate")
    keep = [golden.THEIRS.index(int(unit)) for unit in expected[f"{tag}__kept"]]
    rest = "mean" if tag.endswith("mean") else "zero"
    y = ablate(tower, cache, keep, rest, bases=bases)
    assert (y - expected[f"{tag}__output"]).abs().max() < 1e-6
    assert (ablate(tower, cache, keep[1:], rest, bases=bases) - expected[f"{tag}__output"]).abs().max() > 1e-3


def test_one_image_never_depends_on_its_neighbours(made):
    tower, cache, bases, _ = made
    y = ablate(tower, cache, [(0, 1)], "mean", bases=bases)
    alone = ablate(tower, cache.subset(torch.tensor([5])), [(0, 1)], "mean", bases=bases)
    assert (y[5] - alone[0]).abs().max() < 1e-12
    loaded = ablate(tower, golden.images().split(10), [(0, 1)], "mean", bases=bases)
    assert (loaded - y).abs().max() < 1e-9
    assert (ablate(tower, cache, [], "mean", bases=bases) - cache.output.mean(0)).abs().max() < 1e-9


@pytest.mark.parametrize("rest", ["zero", "mean"])
def test_curves_of_heads(made, rest):
    tower, cache, bases, head = made
    score = torch.tensor([0.1, 0.9, 0.3, 0.3, -1.0, 0.0, 0.8, 0.2, 0.5])
    order = [1, 6, 8, 2, 3, 7, 0, 5, 4]  # equals in layout order
    curves = selection_curves(
        tower,
        cache,
        head,
        {"mine": score, "other": -score},
        rest=rest,
        bases=bases,
        fractions=(0.01, 0.3, 0.5, 1.0),
        seeds=[3, 4],
    )
    assert curves.kept == (1, 3, 4, 9)
    for place, count in enumerate(curves.kept):
        y = ablate(tower, cache, [1 + head_ for head_ in order[:count]], rest, bases=bases)
        truth = float((head(y).argmax(1) == cache.labels).double().mean())
        assert abs(curves.accuracy["mine"][place] - truth) < 1e-9
    assert curves.base == float((head(cache.output).argmax(1) == cache.labels).double().mean())
    assert len(curves.random) == 2
    assert curves.seeds == (3, 4)
    ends = {curve[-1] for curve in (*curves.accuracy.values(), *curves.random)}
    assert len(ends) == 1  # all heads are all heads
    assert len(set(curves.accuracy["mine"])) > 1
    again = selection_curves(
        tower, cache, head, {}, rest=rest, bases=bases, fractions=(0.01, 0.3, 0.5, 1.0), seeds=[4]
    )
    assert again.random == curves.random[1:]


@pytest.mark.parametrize("rest", ["zero", "mean"])
@pytest.mark.parametrize("kind", ["head", "mlp"])
def test_curves_of_components(made, rest, kind):
    """The same embeddings as a ResiDual whose weights are 1 and 0."""
    tower, cache, bases, head = made
    kept_bases = bases.of(kind).truncate(energy=0.9)
    residual = rk.ResiDual(tower, kept_bases, rest="zero")
    total = len(residual.weight)
    score = torch.rand(total, generator=torch.Generator().manual_seed(0))
    curves = selection_curves(
        tower,
        cache,
        head,
        {"mine": score},
        kind=kind,
        of="components",
        rest=rest,
        bases=kept_bases,
        fractions=(0.1, 0.5),
        seeds=(),
    )
    assert curves.total == total
    for place, count in enumerate(curves.kept):
        with torch.no_grad():
            residual.weight.zero_()
            residual.weight[score.argsort(descending=True)[:count]] = 1
            y = residual.from_units(cache.terms(slice(None)))
        y = y + (cache.output.mean(0) if rest == "mean" else 0)
        truth = float((head(y).argmax(1) == cache.labels).double().mean())
        assert abs(curves.accuracy["mine"][place] - truth) < 1e-9
    residual.detach()


@pytest.mark.parametrize("kind", ["head", "mlp"])
def test_component_scores(made, kind):
    tower, cache, bases, _ = made
    pearson = component_correlations(tower, cache, bases, kind)
    apart = variance_between_classes(tower, cache, bases, 5, kind)
    part = bases.parts[kind]
    first = bases.layout.span(kind).start
    units = golden.numbers("units")["encodings"]
    for place in range(len(part.mean)):
        c = (units[:, golden.THEIRS[first + place]] - part.mean[place]) @ part.components[part.run(place)].T
        o = cache.output @ part.components[part.run(place)].T
        truth = torch.stack(
            [torch.corrcoef(torch.stack([c[:, j], o[:, j]]))[0, 1] for j in range(c.shape[1])]
        )
        assert (pearson[part.run(place)] - truth).abs().max() < 1e-8
        share = torch.bincount(cache.labels, minlength=5).double() / len(c)
        means = torch.stack([c[cache.labels == k].mean(0) for k in range(5)])
        between = (share[:, None] * (means - c.mean(0)).square()).sum(0)
        assert (apart[part.run(place)] - between).abs().max() < 1e-9 * between.max()
    assert pearson.shape == apart.shape == part.variance.shape


def test_what_cannot_be_selected(made):
    tower, cache, bases, head = made
    good = torch.rand(9)
    for changes, match in (
        ({"scores": {"a": good[:5]}}, "must be 9 numbers"),
        ({"scores": {"a": good.where(good > 2, torch.nan)}}, "without NaN"),
        ({"rest": "sum"}, "rest must be one of"),
        ({"rest": "mean"}, "needs bases"),
        ({"of": "components"}, "needs bases"),
        ({"of": "layers"}, "units.*components"),
        ({"fractions": (0.5, 0.1)}, "rise within"),
        ({"fractions": ()}, "rise within"),
        ({"fractions": (0.5, 1.5)}, "rise within"),
        ({"kind": "tail"}, "kinds must name"),
        ({"rest": "mean", "bases": bases.of("mlp")}, "not head"),
        ({"head": rk.ZeroShotHead(head.class_vectors[:, :3], range(3))}, "3 classes"),
    ):
        arguments = {"scores": {"a": good}, "head": head} | changes
        with pytest.raises(ValueError, match=match):
            selection_curves(tower, cache, **arguments)
    with pytest.raises(ValueError, match="named twice"):
        ablate(tower, cache, [1, (0, 0)])
    unlabelled = rk.encode(tower, golden.images().split(32))
    with pytest.raises(ValueError, match="labels"):
        selection_curves(tower, unlabelled, head, {"a": good})
