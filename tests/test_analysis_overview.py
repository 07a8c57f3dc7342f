"""All tables at once: they are those of the single analyses, and come back from disk.

The command writes them.
"""

import csv
import json
import math
from dataclasses import replace

import golden
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from typer.testing import CliRunner

import residual_kernels as rk
from residual_kernels import analysis
from residual_kernels.bundled.drawings import drawn_images
from residual_kernels.cli import app


@pytest.fixture(scope="module")
def made():
    tower = golden.model().visual
    inputs = golden.numbers("inputs")
    cache = rk.encode(tower, [(golden.images(), inputs["labels"])], class_names=list("abcde"))
    head = rk.ZeroShotHead(inputs["centroids"].double(), list("abcde"))
    words = analysis.TextDictionary(tuple(map(str, range(200))), inputs["dictionary"])
    steps = []
    found = analysis.analyze(
        tower, cache, head, dictionary=words, seeds=range(3), described=2, progress=steps.append
    )
    return tower, cache, head, words, found, steps


def test_tables_are_those_of_the_single_analyses(made):
    tower, cache, head, words, found, steps = made
    bases = rk.fit_bases(tower, cache)
    assert steps == list(found.seconds)
    assert [(row.layer, row.head) for row in found.units] == [divmod(unit, 3) for unit in range(9)]
    for name, numbers in {
        "participation": analysis.participation_ratio(bases),
        "two_nn": analysis.two_nn_dimension(tower, cache),
        "pearson": analysis.correlations(tower, cache),
        "pearson_classes": analysis.correlations(tower, cache, properties=head),
        "spearman": analysis.rank_correlations(tower, cache),
        "spearman_classes": analysis.rank_correlations(tower, cache, properties=head),
        "accuracy": analysis.own_accuracy(tower, cache, head),
    }.items():
        assert [getattr(row, name) for row in found.units] == numbers.tolist(), name
    for place, energy in enumerate(found.energies):
        assert [row.linear[place] for row in found.units] == analysis.linear_dimension(bases, energy).tolist()
    assert abs(sum(row.share for row in found.units) - 1) < 1e-12
    assert [row.words for row in found.units] == analysis.words_of_units(tower, cache, words)
    matrix = analysis.similarity_matrix(bases, weights="singular")
    assert torch.equal(torch.tensor(found.similarity["singular"], dtype=torch.float64), matrix)
    assert [(c.of, c.rest) for c in found.selections] == [
        ("units", "zero"),
        ("units", "mean"),
        ("components", "zero"),
    ]
    assert set(found.selections[0].accuracy) == {
        "pearson",
        "pearson_classes",
        "spearman",
        "spearman_classes",
        "accuracy",
        "variance",
    }
    assert {len(curves.random) for curves in found.selections} == {3}
    assert len(found.components) == 9 * 18
    assert torch.equal(
        torch.tensor([row.explained for row in found.components if row.unit == 4], dtype=torch.float64),
        bases.explained_variance_ratio(4),
    )
    along = analysis.component_correlations(tower, cache, bases)
    assert [row.pearson for row in found.components] == along.tolist()
    described = [row for row in found.components if row.words is not None]
    assert [row.place for row in described] == [0, 1] * 9
    assert described[3].words == analysis.component_words(bases, words, described[3].unit, 1)
    assert found.output.two_nn == analysis.two_nn(cache.output)
    assert found.output.accuracy == found.selections[0].base


def test_only_the_tables_asked_for_are_made(made, tmp_path):
    tower, cache, head, words, whole, _ = made
    found = analysis.analyze(
        tower,
        cache,
        head,
        dictionary=words,
        tables=("similarity", "selection"),
        rests=("zero",),
        seeds=range(3),
    )
    assert list(found.seconds) == [
        "encoding",
        "bases",
        "linear dimension",
        "similarity",
        "selection of units",
        "output",
    ]
    assert found.similarity == whole.similarity
    (curves,) = found.selections
    assert curves.accuracy == {"variance": whole.selections[0].accuracy["variance"]}
    assert (found.units[0].pearson, found.units[0].spearman, found.units[0].accuracy) == (None, None, None)
    assert found.units[0].linear == whole.units[0].linear
    assert math.isnan(found.units[0].two_nn)
    assert (found.components[0].pearson, found.components[0].between_classes) == (None, None)
    found.save(tmp_path)
    assert analysis.Analysis.load(tmp_path).similarity == found.similarity
    with pytest.raises(ValueError, match="tables must be of dimension, .* got spectra"):
        analysis.analyze(tower, cache, head, tables=("spectra",))


def test_curves_of_a_selection(made):
    found = made[4].selections[0]  # of 9 heads: small shares are the same one head
    named = found.curves({"variance": "by variance"})
    assert [curve.name for curve in named] == ["by variance", "at random (3 times)"]
    kept = named[0].kept
    assert kept == tuple(sorted(set(found.kept)))
    assert len(kept) < len(found.kept)
    at = found.kept.index(kept[1])
    assert named[0].accuracy[1] == found.accuracy["variance"][at]
    several = [curve[at] for curve in found.random]
    assert (named[1].low[1], named[1].high[1]) == (min(several), max(several))
    assert named[1].accuracy[1] == pytest.approx(sum(several) / 3)
    assert {curve.name for curve in found.curves()} == {*found.accuracy, "at random (3 times)"}


def test_tables_come_back_from_disk(made, tmp_path):
    found = made[4]
    nothing = replace(found.units[2], two_nn=float("nan"), words=None)
    found = replace(found, units=(*found.units[:2], nothing, *found.units[3:]))
    paths = found.save(tmp_path / "tables")
    assert sorted(path.name for path in paths) == sorted(
        path.name for path in (tmp_path / "tables").iterdir()
    )
    again = analysis.Analysis.load(tmp_path / "tables")
    assert math.isnan(again.units[2].two_nn)
    back = replace(again.units[2], two_nn=0.0)
    again = replace(again, units=(*again.units[:2], back, *again.units[3:]))
    assert again == replace(found, units=(*found.units[:2], replace(nothing, two_nn=0.0), *found.units[3:]))
    # No NaN in it.
    json.loads((tmp_path / "tables" / "analysis.json").read_text(), parse_constant=pytest.fail)
    with (tmp_path / "tables" / "units.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10
    assert rows[2]["two_nn"] == rows[2]["words"] == ""
    assert float(rows[4]["pearson"]) == pytest.approx(found.units[4].pearson, rel=1e-5)
    with (tmp_path / "tables" / "selection.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["seed"] for row in rows if row["score"] == "random"} == {"0", "1", "2"}
    with pytest.raises(FileNotFoundError, match="no analysis"):
        analysis.Analysis.load(tmp_path)
    (tmp_path / "analysis.json").write_text('{"schema": 1, "what": "analysis"}')
    with pytest.raises(ValueError, match="lacks"):
        analysis.Analysis.load(tmp_path)


def test_without_labels_and_words_and_with_a_loader(made):
    tower, cache, head = made[:3]
    found = analysis.analyze(tower, golden.images().split(32), similarities=())
    assert found.selections == ()
    assert {row.accuracy for row in found.units} == {None}
    assert [row.pearson for row in found.units] == pytest.approx([row.pearson for row in made[4].units])
    assert found.images == found.fitted_images == 64
    with pytest.raises(ValueError, match="needs labels"):
        analysis.analyze(tower, golden.images().split(32), head)
    bases = rk.fit_bases(tower, cache)
    with pytest.raises(ValueError, match="truncated"):
        analysis.analyze(tower, cache, bases=bases.truncate(components=2))
    with pytest.raises(ValueError, match="not head"):
        analysis.analyze(tower, cache, bases=rk.fit_bases(tower, golden.images().split(32), kinds=("mlp",)))
    with pytest.raises(ValueError, match="which this tower has"):
        analysis.analyze(tower, cache, kind="pool")


@pytest.mark.parametrize("kind", ["head", "pool"])
def test_attention_pooling(kind):
    """Its units have no short form: z is x_u itself, C = D and one map for all."""
    torch.manual_seed(0)
    tower = (
        timm.models.VisionTransformer(
            img_size=32,
            patch_size=16,
            embed_dim=24,
            depth=2,
            num_heads=2,
            num_classes=0,
            class_token=False,
            global_pool="map",
        )
        .double()
        .eval()
    )
    images = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(40) % 3
    cache = rk.encode(tower, [(images, labels)], kinds=(kind,), class_names=list("abc"))
    head = rk.ZeroShotHead.from_prototypes(cache)
    vectors = torch.randn(30, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    words = analysis.TextDictionary(tuple(map(str, range(30))), vectors)
    found = analysis.analyze(tower, cache, head, dictionary=words, kind=kind, seeds=range(1))
    with torch.no_grad():
        parts = rk.decompose(tower, images)
    assert parts.terms.z[kind].shape[2] == parts.output.shape[1] == 24
    for row in found.units:
        x = parts.units()[:, row.index]
        assert row.two_nn == pytest.approx(analysis.two_nn(x), rel=1e-6)
        assert row.accuracy == float((head(x).argmax(1) == labels).double().mean())
        pairs = [torch.corrcoef(torch.stack([x[:, d], parts.output[:, d]]))[0, 1] for d in range(24)]
        assert row.pearson == pytest.approx(float(torch.stack(pairs).mean()), abs=1e-9)
        assert row.participation == pytest.approx(
            float(x.T.cov().trace().square() / x.T.cov().square().sum()), rel=1e-6
        )
        assert len(row.words.words) == 5
    kept = analysis.ablate(tower, cache, [row.index for row in found.units])
    assert (kept - parts.units()[:, [row.index for row in found.units]].sum(1)).abs().max() < 1e-10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """24 drawings in two folders."""
    path = tmp_path_factory.mktemp("drawings")
    for index, image in enumerate(drawn_images(24, seed=3)):
        place = path / ("ab"[index % 2]) / f"{index}.png"
        place.parent.mkdir(exist_ok=True)
        image = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
        image.save(place)
    return path


def test_command(folder, tmp_path):
    run = CliRunner()
    words = tmp_path / "words.txt"
    words.write_text("red\nblue\nthe number three\n")
    done = run.invoke(
        app,
        [
            "analyze",
            "--data",
            str(folder),
            "--out",
            str(tmp_path / "out"),
            "--words",
            str(words),
            "--seeds",
            "2",
            "--json",
            str(tmp_path / "all.json"),
        ],
    )
    assert done.exit_code == 0, done.output
    assert "highest accuracy" in done.output
    found = analysis.Analysis.load(tmp_path / "out")
    assert len(found.units) == 48
    assert found.class_names == ("a", "b")
    assert set(found.units[0].words.words) <= {"red", "blue", "the number three"}
    assert json.loads((tmp_path / "all.json").read_text())["images"] == 24
    again = run.invoke(app, ["analyze", "--data", str(folder), "--out", str(tmp_path / "out")])
    assert isinstance(again.exception, FileExistsError)
