"""The evidence suite in a small version: its pictures, everybody's fit, what is recorded,
and the table's errors."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import residual_kernels as rk
from benchmarks.suite import ours, peers, pictures, plot, run, table, tasks, through_tower, unseen
from benchmarks.suite.tasks import few
from residual_kernels.train import contest

DRAWN = ("new fonts", "Greek", "textures", "outlines", "counting", "case", "tilt")


@pytest.fixture(scope="module")
def counting():
    """Counting dots: a question whose answer the model's own words do not know."""
    with pytest.MonkeyPatch.context() as patch:
        for name, size in (("DRAWINGS", 300), ("TRAIN", 240), ("TEST", 300), ("FEWEST", 1)):
            patch.setattr(tasks, name, size)
        for cached in (tasks.task, tasks._bases):
            cached.cache_clear()
        task = tasks.task("counting")
    for cached in (tasks.task, tasks._bases):
        cached.cache_clear()
    return task


def test_eight_tasks_need_no_photographs():
    assert tasks.names(None) == ["digits", *DRAWN]
    assert len(tasks.RECIPES) == 12


@pytest.mark.parametrize(
    "draw_some",
    [
        pictures.new_letters,
        pictures.greek,
        pictures.textures,
        pictures.outlines,
        pictures.dots,
        pictures.case,
        pictures.tilt,
    ],
)
def test_drawn_pictures_are_balanced_and_the_same_every_time(draw_some):
    images, labels = draw_some(2, 5)
    again, labels_again = draw_some(2, 5)
    other, _ = draw_some(2, 6)
    assert images.shape == (len(labels), 32, 32, 3)
    assert images.dtype == np.uint8
    assert set(np.bincount(labels)) == {2}
    assert np.array_equal(images, again)
    assert np.array_equal(labels, labels_again)
    assert not np.array_equal(images, other)
    assert all(image.std() > 1 for image in images)


def test_dots_are_as_many_as_the_label_says():
    from scipy.ndimage import label as components

    images, labels = pictures.dots(3, 0)
    for image, label in zip(images.astype(int), labels, strict=True):
        values, counts = np.unique(image.reshape(-1, 3), axis=0, return_counts=True)
        paper = values[counts.argmax()]
        assert components(np.abs(image - paper).sum(2) > 60)[1] == label + 1


def test_turned_photographs_turn_back():
    images = np.random.default_rng(0).integers(0, 255, (8, 32, 32, 3)).astype(np.uint8)
    turned, labels = pictures.turned(images, 0)
    assert set(np.bincount(labels)) == {2}
    for image, other, label in zip(images, turned, labels, strict=True):
        assert np.array_equal(np.rot90(other, -label), image)


def test_every_method_fits_and_leaves_the_tower_alone(counting, monkeypatch):
    monkeypatch.setattr(through_tower, "STEPS", 2)
    before = {name: value.clone() for name, value in counting.tower.state_dict().items()}
    names = []
    for name in run.METHODS:
        for row in run.fitted_rows(counting, 4, 0, name):
            assert 0 <= row["right"] <= row["test"] == 300
            assert row["won"] - row["lost"] == row["right"] - row["base_right"]
            names.append(row["method"])
    assert sorted(names) == sorted(table.ORDER)
    after = counting.tower.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(p.grad is not None for p in counting.tower.parameters())


def test_class_vectors_are_moved_first_where_words_say_nothing(counting, monkeypatch):
    """Fitted together, components and class vectors get into each other's way here.

    One after the other they do not.
    """
    head, name = counting.head(counting.train), "anchored + class vectors"
    found = rk.tune(counting.tower, counting.bases, head, counting.train.units)
    rows = {one.name: one for one in found.table}
    found.adapter.detach()
    assert rows[name].loss < min(rows["anchored"].loss, rows["probe"].loss) + 0.02
    monkeypatch.setattr(contest.Contest, "_outdone", lambda self, joint: False)
    joint = rk.tune(counting.tower, counting.bases, head, counting.train.units, candidates=[name])
    joint.adapter.detach()
    assert joint.table[1].loss > rows[name].loss + 0.1


def test_nobody_reads_test_labels(counting):
    """Labels of the test images in another order change what is counted right, never what is fitted."""
    mixed = tasks.Split(counting.test.images, counting.test.labels.flip(0), counting.test.units)
    other = tasks.SuiteTask(**{**vars(counting), "test": mixed})
    for name in ("LP++", "Tip-Adapter", "GDA", "ProKeR"):
        train = few(counting.train, 4, 0)
        head = counting.head(train)
        first, second = (run.METHODS[name].fit(task, train, head, 0) for task in (counting, other))
        assert torch.equal(first.logits(counting.test), second.logits(counting.test))


def test_proker_without_a_penalty_repeats_its_labels(counting):
    train = few(counting.train, 4, 0)
    head = counting.head(train)
    features = torch.nn.functional.normalize(train.units.output, dim=1)
    kernel = peers._kernel(features, features, 20.0).double()
    text = (features @ torch.nn.functional.normalize(head.class_vectors, dim=0)).double()
    left = torch.nn.functional.one_hot(train.labels, 6) - text
    dual = torch.linalg.solve(kernel / 1e-4 + torch.eye(len(left), dtype=torch.float64), left)
    assert torch.equal((text + kernel @ dual / 1e-4).argmax(1), train.labels)


def test_discriminants_are_those_of_one_shrunk_covariance():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    features = torch.randn(90, 5, generator=generator) + labels[:, None]
    weight, offset = peers._discriminant(features, labels, 3)
    means = torch.stack([features[labels == k].mean(0) for k in range(3)])
    covariance = (features - means[labels]).T.cov()
    inverse = 5 * torch.linalg.inv(89 * covariance + covariance.trace() * torch.eye(5))
    distance = ((features[:, None] - means) @ inverse * (features[:, None] - means)).sum(-1)
    found = features @ weight + offset
    assert torch.allclose(
        found - found[:, :1], (distance[:, :1] - distance) / 2, rtol=1e-4, atol=1e-5 * found.abs().max()
    )


def _row(task="a", shots=4, seed=0, method="base", right=50, base_right=50, won=0, lost=0):
    return {
        "task": task,
        "shots": shots,
        "seed": seed,
        "method": method,
        "test": 100,
        "right": right,
        "base_right": base_right,
        "won": won,
        "lost": lost,
        "parameters": 3,
        "seconds": 0.5,
    }


def test_a_cell_is_below_by_more_than_its_error():
    same = table.Cell.of([_row(won=5, lost=5)])
    assert same.gain == 0
    assert same.error == pytest.approx((10 / 100**2) ** 0.5)
    assert not same.below
    worse = table.Cell.of([_row(seed=seed, right=40, won=2, lost=12) for seed in range(3)])
    assert worse.gain == pytest.approx(-0.10)
    assert worse.error == pytest.approx(((14 - 1) / 100**2) ** 0.5)
    assert worse.below
    seeds = table.Cell.of([_row(won=10), _row(won=0, lost=10)])
    assert seeds.error > table.Cell.of([_row(won=10)]).error


def test_ranks_share_places():
    rows = [_row(method=name, right=right) for name, right in (("x", 60), ("y", 60), ("z", 70))]
    assert table.ranks(table.cells(rows), ["a"], 4, ["x", "y", "z"]) == {"x": 2.5, "y": 2.5, "z": 1.0}


def test_a_run_resumes_and_drops_a_cut_line(tmp_path, counting, monkeypatch):
    said = []
    monkeypatch.setattr(run.tasks, "task", lambda name, archive: counting)
    record = run.Record(tmp_path / "rows.jsonl", {"torch": "x"})
    assert not run.run(record, None, ["base", "LP++"], ["counting"], budget=-1.0, say=said.append)
    monkeypatch.setattr(
        run,
        "METHODS",
        {
            "base": run.Contender(peers.base, "", (4,), (0, 1)),
            "LP++": run.Contender(peers.lp_plus_plus, "", (4,), (0,)),
        },
    )
    assert run.run(record, None, ["base", "LP++"], ["counting"], say=said.append)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"key": ["cut')
    again = run.Record(tmp_path / "rows.jsonl", {"torch": "x"})
    assert again.rows() == record.rows()
    assert len(again.rows()) == 3
    said.clear()
    assert run.run(again, None, ["base", "LP++"], ["counting"], say=said.append)
    assert not said
    with pytest.raises(SystemExit, match="other conditions"):
        run.Record(tmp_path / "rows.jsonl", {"torch": "y"})


def test_table_and_picture_of_what_was_recorded():
    rows = [
        _row(task, shots, seed, name, right=right, won=max(0, right - 50), lost=max(0, 50 - right))
        for task in ("counting", "case")
        for shots in (4, None)
        for seed in range(2)
        for name, right in (("base", 50), (ours.AUTO, 60), ("GDA", 30))
    ]
    result = table.about({"cpu": "c", "torch": "t"}, rows, ["counting", "case"])
    text = table.markdown(json.loads(json.dumps(result)))
    assert "| GDA | 0.300 | 0.300 | 3.0 / 3.0 |" in text
    assert "-20.0 points (counting, 4) | 4 of 4 |" in text
    assert "**0.600**" in text
    figure = plot.draw(result)
    assert [panel.get_title(loc="left") for panel in figure.axes] == [
        "4 labels per class",
        "all labels",
    ]


def test_committed_tables_are_those_of_the_committed_rows():
    """The pages show lines of suite.md and unseen.md, which come from the rows beside them."""
    root = Path(__file__).resolve().parents[1]
    results = root / "benchmarks" / "results" / "amd-zen5-avx512bf16"
    suite, novel = (json.loads((results / f"{name}.json").read_text()) for name in ("suite", "unseen"))
    made = {"suite": table.markdown(suite), "unseen": unseen.markdown(novel)}
    for name, text in made.items():
        assert (results / f"{name}.md").read_text() == text
    pages = {"COMPARISON": ("suite", "| method | 1 label per class")}
    pages["GUIDE"] = ("suite", "| task | the model |")
    pages["FEW_LABELS"] = ("unseen", "| method | labelled classes |")
    for page, (name, start) in pages.items():
        lines = (root / "docs" / f"{page}.md").read_text().splitlines()
        first = next(place for place, line in enumerate(lines) if line.startswith(start))
        shown = list(itertools.takewhile(lambda line: line.startswith("|"), lines[first:]))
        assert len(shown) > 5
        assert "\n".join(shown) in made[name]


def test_the_default_is_never_below_the_model():
    """Of the committed cells, none by more than one error: what `tune` promises."""
    root = Path(__file__).resolve().parents[1]
    suite = json.loads((root / "benchmarks/results/amd-zen5-avx512bf16/suite.json").read_text())
    own = {key: cell for key, cell in table.cells(suite["rows"]).items() if key[2] == table.AUTO}
    assert len(own) == 4 * 12
    assert not [key for key, cell in own.items() if cell.below]
