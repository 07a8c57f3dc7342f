"""Logging of fits: records of a callable, the CSV file, and trackers by name, which are stood in for here."""

import csv
import logging
import math
import sys
import types

import pytest
import torch
from test_towers import build, images_for

import residual_kernels as rk
from residual_kernels.train import logs


@pytest.fixture(scope="module")
def parts():
    tower = build()
    labels = torch.tensor([0] * 30 + [1] * 18 + [2] * 12)
    images = images_for(tower, 60) * 0.5 + (labels - 1.0)[:, None, None, None]
    cache = rk.encode(tower, [(images, labels)], kinds=("head",), class_names="abc")
    vectors = torch.randn(32, 3, generator=torch.Generator().manual_seed(2))
    head = rk.ZeroShotHead(vectors, "abc", math.log(10.0))
    return tower, cache, rk.fit_bases(tower, cache), head


@pytest.fixture(params=["adamw", "convex"])
def fit(request, parts):
    """A fit by either solver, and the adapter that it fits."""
    tower, cache, bases, head = parts
    adapter = rk.ResiDual(tower, bases, rest="all")
    options = {"epochs": 3} if request.param == "adamw" else {}
    yield lambda log, **more: rk.fit(
        adapter, head, cache, cache, solver=request.param, **options, log=log, **more
    )
    adapter.detach()


def test_a_callable_gets_every_epoch(fit):
    records, seen = [], []
    result = fit(records.append, progress=seen.append)
    assert seen == result.history
    assert [record["epoch"] for record in records] == [row.epoch for row in result.history]
    assert {record["fit"] for record in records} == {0}
    for name in ("train_loss", "val_loss", "val_accuracy", "val_balanced_accuracy"):
        assert [record[name] for record in records] == [getattr(row, name) for row in result.history]
    if result.solver == "convex":
        assert records[0]["accuracy"] == result.base_accuracy
        assert [record["freedom"] for record in records] == [0.0, result.freedom]


def test_a_convex_fit_by_folds_logs_what_they_say(parts):
    tower, cache, bases, head = parts
    adapter, records = rk.ResiDual(tower, bases, rest="all"), []
    result = rk.fit(adapter, head, cache, log=records.append)
    adapter.detach()
    assert [record["accuracy"] for record in records] == [result.base_accuracy, result.fold_accuracy]


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_csv_by_name_is_appended_to(fit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = fit("csv")
    rows = rows_of(logs.CSV)
    assert tuple(rows[0]) == logs.COLUMNS
    assert [float(row["val_loss"]) for row in rows] == [row.val_loss for row in result.history]
    assert rows[0]["train_loss"] == ""
    (tmp_path / logs.CSV).open("ab").write(b"2026-01-01,0,1,0.")  # what a killed process left
    fit("csv")
    assert len(rows_of(logs.CSV)) == 2 * len(rows) + 1
    assert rows_of(logs.CSV)[-1]["epoch"] == rows[-1]["epoch"]


def test_a_path_makes_its_folder(fit, tmp_path):
    fit(tmp_path / "runs" / "first.csv")
    assert rows_of(tmp_path / "runs" / "first.csv")


def test_a_file_of_others_is_left_alone(parts, tmp_path):
    tower, cache, bases, head = parts
    adapter = rk.ResiDual(tower, bases)
    theirs = tmp_path / "notes.csv"
    theirs.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"notes\.csv exists and is not a log of fits"):
        rk.fit(adapter, head, cache, epochs=1, log=theirs)
    assert theirs.read_text() == "a,b\n1,2\n"
    assert torch.equal(adapter.weight, torch.ones_like(adapter.weight))
    # Refused for another reason: no file is left.
    with pytest.raises(ValueError, match="no image|no labels|labels"):
        rk.fit(adapter, head, cache, epochs=1, labels=torch.full((60,), 9), log=tmp_path / "new.csv")
    assert not (tmp_path / "new.csv").exists()
    adapter.detach()


@pytest.mark.parametrize("log", ["tensorbord", 3, "log.txt"])
def test_other_names_are_refused_before_any_work(parts, log):
    tower, cache, bases, head = parts
    adapter = rk.ResiDual(tower, bases)
    with pytest.raises(ValueError, match=f"log must be a callable, one of csv, mlflow, .*; got {log!r}"):
        rk.fit(adapter, head, cache, epochs=1, log=log)
    adapter.detach()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_tracker_is_named_before_any_work(parts, name, monkeypatch):
    tower, cache, bases, head = parts
    adapter = rk.ResiDual(tower, bases)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"needs the library `{name}`; .*residual-kernels\[{name}\]"):
        rk.fit(adapter, head, cache, epochs=1, log=name)
    assert torch.equal(adapter.weight, torch.ones_like(adapter.weight))
    adapter.detach()


def module(monkeypatch, name, **members):
    found = types.ModuleType(name)
    vars(found).update(members)
    monkeypatch.setitem(sys.modules, name, found)
    return found


def test_tensorboard(fit, monkeypatch):
    calls, folders = [], []

    class SummaryWriter:
        def __init__(self, log_dir):
            folders.append(log_dir)

        def add_scalar(self, tag, value, step):
            calls.append((tag, value, step))

        def close(self):
            calls.append("closed")

    module(monkeypatch, "tensorboard")
    module(monkeypatch, "torch.utils.tensorboard", SummaryWriter=SummaryWriter)
    result = fit("tensorboard")
    losses = [call for call in calls if call[0] == "fit/val_loss"]
    assert losses == [("fit/val_loss", row.val_loss, row.epoch) for row in result.history]
    assert calls[-1] == "closed"
    fit("tensorboard")
    assert len(set(folders)) == 2  # two quick fits are two runs
    assert all(folder.startswith("runs") for folder in folders)


@pytest.mark.parametrize("there", [False, True])
def test_wandb_takes_the_open_run_or_ends_its_own(fit, monkeypatch, there):
    calls = []
    run = types.SimpleNamespace(log=calls.append, finish=lambda exit_code: calls.append(exit_code))
    module(monkeypatch, "wandb", run=run if there else None, init=lambda project: run)
    result = fit("wandb")
    logged = [call for call in calls if isinstance(call, dict)]
    assert [call["fit/epoch"] for call in logged] == [row.epoch for row in result.history]
    assert [call["fit/val_accuracy"] for call in logged] == [row.val_accuracy for row in result.history]
    assert (calls[-1] == 0) is not there


@pytest.mark.parametrize("there", [False, True])
def test_mlflow_takes_the_active_run_or_ends_its_own(fit, monkeypatch, there):
    calls = []
    module(
        monkeypatch,
        "mlflow",
        active_run=lambda: object() if there else None,
        start_run=lambda: calls.append("started"),
        log_metrics=lambda metrics, step: calls.append((step, metrics["fit/val_loss"])),
        end_run=calls.append,
    )
    result = fit("mlflow")
    wanted = [(row.epoch, row.val_loss) for row in result.history]
    assert calls == (wanted if there else ["started", *wanted, "FINISHED"])


def test_a_tracker_hears_of_a_fit_that_failed(parts, monkeypatch):
    tower, cache, bases, head = parts
    adapter, ended = rk.ResiDual(tower, bases), []
    module(
        monkeypatch,
        "mlflow",
        active_run=lambda: None,
        start_run=lambda: None,
        log_metrics=lambda metrics, step: 1 / 0,
        end_run=ended.append,
    )
    with pytest.raises(ZeroDivisionError):
        rk.fit(adapter, head, cache, cache, epochs=1, log="mlflow")
    assert ended == ["FAILED"]
    assert torch.equal(adapter.weight, torch.ones_like(adapter.weight))
    adapter.detach()


def test_fits_at_once_are_told_apart(parts):
    tower, cache, bases, head = parts
    adapter, records = rk.ResiDual(tower, bases), []
    fits = rk.fit_many(adapter, head, cache, cache, lrs=[0.1, 0.5], epochs=2, log=records.append)
    adapter.detach()
    for number, result in enumerate(fits.results):
        own = [record["val_loss"] for record in records if record["fit"] == number]
        assert own == [row.val_loss for row in result.history]


def test_the_librarys_logger_tells_of_fits(fit, caplog):
    with caplog.at_level(logging.INFO, "residual_kernels"):
        fit(None)
    assert [record.name for record in caplog.records] == ["residual_kernels.train"]
    assert "fit 1 of 1: FitResult(" in caplog.text


def test_fits_print_nothing(fit, capsys, tmp_path):
    fit(tmp_path / "log.csv")
    assert capsys.readouterr() == ("", "")
