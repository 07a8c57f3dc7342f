"""The peers' benchmark in a tiny version: every method learns something and is measured by one rule."""

import json

import pytest
import torch

from benchmarks import bench_peers, plot_peers
from benchmarks.peers import METHODS, Split, few, on_outputs, on_tower, tasks


@pytest.fixture(scope="module")
def task():
    return tasks.digits(drawings=60)


@pytest.fixture
def small(task, monkeypatch):
    """The task with a tenth of its images, and a few steps of what trains through the tower."""
    monkeypatch.setattr(on_tower, "STEPS", {})
    monkeypatch.setattr(on_tower, "MOST_STEPS", 4)
    rows = torch.arange(60)
    parts = {"train": few(task.train, 6, seed=0), "val": task.val.rows(rows), "test": task.test.rows(rows)}
    made = tasks.PeerTask(**{**vars(task), **parts})
    monkeypatch.setitem(bench_peers._tasks, "digits", made)
    return made


def test_few_takes_as_many_of_every_class(task):
    chosen = few(task.train, 4, seed=0)
    assert torch.bincount(chosen.labels).tolist() == [4] * 10
    other = few(task.train, 4, seed=1)
    assert not torch.equal(chosen.units.ids, other.units.ids)
    assert torch.equal(few(task.train, 4, seed=0).units.ids, chosen.units.ids)
    assert few(task.train, None, seed=0) is task.train
    ids = [set(part.units.ids.tolist()) for part in (task.train, task.val, task.test)]
    assert len(set.union(*ids)) == sum(map(len, ids))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_fits_its_training_images(small, name):
    method = METHODS[name]
    train = few(small.train, 2, seed=0)
    fitted = method.fit(small, train, method.grid[0], 0)
    for split in (train, small.test):
        found = fitted.logits(split)
        assert found.shape == (len(split.labels), 10)
        assert bench_peers.score(found, split)[0] > 0.7
        assert torch.equal(found, small.head(split.units.output)) == (name == "base")


def test_the_task_is_left_as_it_was(small):
    weights = {name: value.clone() for name, value in small.tower.state_dict().items()}
    train = few(small.train, 2, seed=0)
    for name in ("LoRA", "fine-tuning", "ResiDual stream"):
        METHODS[name].fit(small, train, METHODS[name].grid[0], 0)
    assert all(torch.equal(weights[name], value) for name, value in small.tower.state_dict().items())


def test_parameters_are_counted(small):
    train, dim, classes = few(small.train, 2, seed=0), 128, 10
    expected = {
        "base": 0,
        "linear probe": (dim + 1) * classes,
        "CLIP-Adapter": 2 * dim * (dim // 4),
        "Tip-Adapter": 0,
        "Tip-Adapter-F": 20 * dim,
        "ResiDual coarse": 48,
        "fine-tuning": sum(p.numel() for p in small.tower.parameters()),
        "LoRA": 6
        * 4
        * (dim + 3 * dim + dim + dim),  # rank 4: A and B of in_proj and of out_proj, in 6 blocks
    }
    for name, count in expected.items():
        assert METHODS[name].fit(small, train, METHODS[name].grid[0], 0).parameters == count


def test_tip_adapter_without_its_cache_is_the_text(small):
    cache = on_outputs._KeyValueCache(small, small.train)
    cache.alpha = 0.0
    torch.testing.assert_close(cache.logits(small.val.units.output), small.head(small.val.units.output))
    cache.search(small.val)
    accuracy = bench_peers.score(cache.logits(small.val.units.output), small.val)[0]
    assert accuracy >= bench_peers.score(small.head(small.val.units.output), small.val)[0]


def test_a_row_holds_what_the_table_and_the_picture_need(small, tmp_path):
    methods = ["base", "Tip-Adapter", "ResiDual fine"]
    rows = [bench_peers.cell("digits", shots, name, seeds=(0, 1)) for shots in (2, None) for name in methods]
    result = {
        "cpu": "a CPU",
        "torch": "2",
        "workers": 1,
        "seeds": [0, 1],
        "rows": rows,
        "tasks": {"digits": {"train": 599, "val": 60, "test": 60, "encoding_seconds": 1.0}},
        "methods": {name: METHODS[name].source for name in methods},
    }
    fine = rows[2]
    assert fine["settings"] in METHODS["ResiDual fine"].grid
    assert len(fine["tried"]) == len(METHODS["ResiDual fine"].grid)
    assert fine["validation_accuracy"] == max(entry["validation_accuracy"] for entry in fine["tried"])
    assert len(fine["accuracies"]) == 2
    assert fine["memory_mib"] is None or fine["memory_mib"] >= 0
    text = bench_peers.table(json.loads(json.dumps(result)))
    assert "| method | 2 labels per class | all labels | learned numbers | seconds | memory, MiB |" in text
    assert f"{fine['accuracy']:.3f} ± {fine['std']:.3f}" in text
    for column in (0, 1):
        top = max(row["accuracy"] for row in rows[3 * column : 3 * column + 3])
        assert f"**{top:.3f} ±" in text
    plot_peers.draw(json.loads(json.dumps(result)), tmp_path / "peers.png")
    assert (tmp_path / "peers.png").stat().st_size > 10_000


@pytest.fixture
def one_thread():
    """As load_tasks has it: a forked process cannot use its parent's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_a_killed_run_goes_on_after_its_last_whole_row(small, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_peers, "load_tasks", lambda photos: None)
    kept, said = tmp_path / "new" / "peers.rows.jsonl", []
    arguments = (None, ["base", "Tip-Adapter"], [2], [0, 1], 1, kept)
    first = bench_peers.run(*arguments, say=said.append)
    lines = kept.read_text().splitlines(keepends=True)
    assert len(said) == 2
    assert len(lines) == 3
    kept.write_text("".join(lines[:2]) + lines[2][:20])
    again = bench_peers.run(*arguments, say=said.append)
    assert len(said) == 3
    assert "base" in said[2]
    assert [row["accuracies"] for row in again["rows"]] == [row["accuracies"] for row in first["rows"]]
    assert [row["method"] for row in again["rows"]] == ["base", "Tip-Adapter"]
    assert len(kept.read_text().splitlines()) == 3
    with pytest.raises(SystemExit, match="other conditions"):
        bench_peers.run(None, ["base"], [2], [0], 1, kept, say=said.append)


def test_split_rows_go_together(task):
    rows = torch.tensor([3, 1])
    part = task.val.rows(rows)
    assert isinstance(part, Split)
    assert torch.equal(part.images, task.val.images[rows])
    assert torch.equal(part.units.labels, part.labels)


def test_markers_that_would_touch_stand_apart():
    rows = [
        {"parameters": p, "accuracy": a}
        for p, a in ((0, 0.5), (0, 0.501), (900, 0.7), (1000, 0.2), (1000, 0.7))
    ]
    places = plot_peers.apart(rows)
    logs = torch.tensor(places).log10()
    assert float((logs[0] - logs[1]).abs()) >= plot_peers.APART - 1e-6
    assert float((logs[2] - logs[4]).abs()) >= plot_peers.APART - 1e-6
    assert places[3] == pytest.approx(1000)  # nothing near it
