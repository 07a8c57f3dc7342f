"""Where are fits logged? A callable, or TensorBoard, Weights & Biases, MLflow or a CSV file by name.

A record is a dict with the fields of an :class:`~residual_kernels.train.results.Epoch`, and `fit`, the number
of the fit. A convex fit adds `freedom`, `loss`, `accuracy` and `error` of the strength, as its path has them.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from residual_kernels import distributed
from residual_kernels.extras import need
from residual_kernels.files import csv_text, naming
from residual_kernels.train.results import Epoch, FitResult

Record = dict[str, Any]
Write = Callable[[Record], None]
Log = Write | str | os.PathLike | None

CSV = "fit-log.csv"  # in the working folder
COLUMNS = (
    "run",
    "fit",
    "epoch",
    "train_loss",
    "val_loss",
    "val_accuracy",
    "val_balanced_accuracy",
    "seconds",
    "freedom",
    "loss",
    "accuracy",
    "error",
)


def check(log: Log) -> None:
    """What can be wrong with `log`, before any work.

    Raises:
        ValueError: another name, or a CSV file that is there and is no log of fits.
        ImportError: the library is missing; the message says how to install it.
        OSError: the CSV file cannot be written.
    """
    if log is None or callable(log):
        return
    if not isinstance(log, str | os.PathLike) or (os.fspath(log) not in NAMES and Path(log).suffix != ".csv"):
        raise ValueError(
            f"log must be a callable, one of {', '.join(NAMES)}, or the path of a .csv file; got {log!r}"
        )
    if log in LIBRARIES:
        _library(log)
        return
    path = _path(log)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise PermissionError("permission denied")
        _there(path)


@contextmanager
def opened(log: Log, alone: bool = False) -> Iterator[Write | None]:
    """What records are given to, or None where nothing is logged; closed at the end.

    Args:
        log: a callable that takes a record, one of NAMES, or the path of a CSV file, after :func:`check`.
        alone: this process fits by itself. Otherwise only the first process of a group logs by name or path.
    """
    if log is None or callable(log):
        yield log
    elif distributed.rank() and not alone:
        yield None
    else:
        with LIBRARIES[log]() if log in LIBRARIES else _csv(_path(log)) as write:
            yield write


def _path(log: str | os.PathLike) -> Path:
    return Path(CSV if log == "csv" else log)


def _library(name: str) -> Any:
    return need(name, name, f'log="{name}"')


def of_epoch(fit: int, row: Epoch) -> Record:
    """The record of one epoch."""
    return {"fit": fit, **asdict(row)}


def of_convex(fit: int, result: FitResult) -> Iterator[Record]:
    """The records of a convex fit: the untouched model (epoch 0) and the fit (epoch 1)."""
    chosen = next((one for one in result.path if one.freedom == result.freedom), result.path[0])
    for row, strength in zip(result.history, (result.path[0], chosen), strict=True):
        record = of_epoch(fit, row)
        yield record | {"seconds": result.seconds if row.epoch else 0.0} | asdict(strength)


def _there(path: Path) -> bytes:
    """What the file holds already; a ValueError where that is no log of fits."""
    there = path.read_bytes() if path.exists() else b""
    if there and not there.startswith(csv_text([COLUMNS]).encode()):
        raise ValueError(
            f"{path} exists and is not a log of fits, so nothing is appended to it; move it, or log to "
            "another .csv file"
        )
    return there


@contextmanager
def _csv(path: Path) -> Iterator[Write]:
    """A line per record, at the end of the file; `run` is the time at which this fit began, in UTC."""
    run = datetime.now(timezone.utc).isoformat(timespec="seconds")

    def write(record: Record) -> None:
        cells = {"run": run, **record}
        line = csv_text([["" if cells.get(name) is None else cells[name] for name in COLUMNS]])
        with naming(path):
            there = _there(path)
            if not there:
                line = csv_text([COLUMNS]) + line
            elif not there.endswith(b"\n"):  # a line that a killed process left unfinished
                line = "\r\n" + line
            with open(path, "ab", buffering=0) as file:  # one write, so that lines of two fits do not mix
                file.write(line.encode())

    yield write


@contextmanager
def _tensorboard() -> Iterator[Write]:
    """A run of its own below runs/.

    SummaryWriter would name it by the second, and two quick fits would share one.
    """
    _library("tensorboard")
    summaries = need("torch.utils.tensorboard", "tensorboard", 'log="tensorboard"')
    started = datetime.now().strftime("%Y-%m-%d_%H-%M-%S_%f")
    writer = summaries.SummaryWriter(log_dir=os.path.join("runs", f"{started}_{os.getpid()}"))

    def write(record: Record) -> None:
        for name, value in _numbers(record).items():
            writer.add_scalar(name, value, record["epoch"])

    try:
        yield write
    finally:
        writer.close()


@contextmanager
def _wandb() -> Iterator[Write]:
    """Into the run that is open, or one of our own."""
    wandb = _library("wandb")
    own = wandb.init(project="residual-kernels") if wandb.run is None else None
    run = wandb.run if own is None else own

    def write(record: Record) -> None:  # without step=, which must rise over the whole of somebody's run
        run.log({"fit/epoch": record["epoch"], **_numbers(record)})

    ended = False
    try:
        yield write
        ended = True
    finally:
        if own is not None:
            own.finish(exit_code=int(not ended))


@contextmanager
def _mlflow() -> Iterator[Write]:
    """Into the run that is active, or one of our own."""
    mlflow = _library("mlflow")
    own = mlflow.active_run() is None
    if own:
        mlflow.start_run()

    def write(record: Record) -> None:
        mlflow.log_metrics(_numbers(record), step=record["epoch"])

    ended = False
    try:
        yield write
        ended = True
    finally:
        if own:
            mlflow.end_run("FINISHED" if ended else "FAILED")


def _numbers(record: Record) -> dict[str, float]:
    """The metrics of a record, named "fit/val_loss", or "fit/3/val_loss" of fit 3."""
    place = f"fit/{record['fit']}" if record["fit"] else "fit"
    return {
        f"{place}/{name}": value
        for name, value in record.items()
        if name not in ("fit", "epoch") and value is not None
    }


LIBRARIES = {"mlflow": _mlflow, "tensorboard": _tensorboard, "wandb": _wandb}
NAMES = ("csv", *LIBRARIES)
