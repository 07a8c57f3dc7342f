"""Which method is best on which data? Towers x data sets x methods from one YAML file, as the paper's main table.

Every tower encodes a data set once; every fit leaves one small JSON file. A sweep that was stopped
resumes: finished shards and fits are kept, and a fit whose recipe has changed is made again.
"""

import functools
import hashlib
import json
import os
import reprlib
import statistics
import typing
from collections.abc import Callable, Iterator
from dataclasses import MISSING, asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from torch import nn
from torch.utils.data import DataLoader

from residual_kernels import extras
from residual_kernels import train as training
from residual_kernels.adapters.methods import METHODS as BY_NAME
from residual_kernels.adapters.methods import build, identity
from residual_kernels.adapters.tower_adapter import TowerAdapter
from residual_kernels.bases.pca import fit_bases
from residual_kernels.bases.spectral_bases import SpectralBases
from residual_kernels.data import models as sources
from residual_kernels.data import prompts
from residual_kernels.data.classes import positions
from residual_kernels.data.images import Account, Images, open_images
from residual_kernels.files import SCHEMA, Head, read_json, together, write_csv, write_json, write_text
from residual_kernels.schema import Count, read_bytes, typed
from residual_kernels.towers import KINDS
from residual_kernels.train.inside import StreamImages, fit_stream
from residual_kernels.units.cache import DTYPES, HELD_OUT, UnitCache, encode
from residual_kernels.units.cache.shards import STORED
from residual_kernels.visible import visible
from residual_kernels.zeroshot import ZeroShotHead

BASE, AVERAGE = "base", "average"
METHODS = tuple(BY_NAME)
COLLAPSED = 0.1  # below the model by so much: a seed that went wrong, not one that was unlucky
WHAT = "result of a sweep"


@dataclass(frozen=True)
class TowerSpec:
    """A model by name, as on the command line."""

    model: str
    pretrained: str | None = None

    @property
    def label(self) -> str:
        return self.model if self.pretrained is None else f"{self.model} ({self.pretrained})"


@dataclass(frozen=True)
class DataSpec:
    """A data set by its parts; without `val`, a fifth of the training images is held out."""

    name: str
    train: str
    test: str
    val: str | None = None
    class_names: str | None = None
    templates: str | None = None


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep runs. `bases` names images for the bases of every tower; without, each data set's training images.

    `rates` are learning rates tried for a method, in units of its default; the best on validation is kept.
    """

    towers: tuple[TowerSpec, ...]
    data: tuple[DataSpec, ...]
    methods: tuple[str, ...]
    bases: str | None = None
    seeds: int = 1
    rates: tuple[float, ...] = (1.0,)
    epochs: int = 30
    energy: float = 0.90
    shots: int | None = None
    batch_size: int = 64
    dtype: str = "float32"

    @classmethod
    def read(cls, path: str | os.PathLike) -> "SweepPlan":
        """The plan in a YAML file; a ValueError names what is wrong with it and what is allowed."""
        yaml = extras.need("yaml", "sweep", "reading a plan")
        try:
            text = read_bytes(Path(path), LONGEST_PLAN).decode()
            if sum(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)) > MOST_ALIASES:
                raise ValueError(f"{path} refers more than {MOST_ALIASES} times to parts of itself (*name)")
            found = yaml.safe_load(text)
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from error
        if not isinstance(found, dict):
            raise ValueError(
                f"{path} must hold the keys towers, data and methods; docs/COMMANDS.md shows one"
            )
        _only_known(found, cls, str(path))
        towers = tuple(_made(TowerSpec, row, f"{path}: a tower") for row in _list(found, "towers", path))
        data = tuple(_made(DataSpec, row, f"{path}: a data set") for row in _list(found, "data", path))
        names = [spec.name for spec in data]
        if len(set(names)) < len(names):
            raise ValueError(f"{path}: data sets must have different names; got {', '.join(names)}")
        methods = tuple(_list(found, "methods", path))
        unknown = [str(method) for method in methods if method not in METHODS]
        if unknown:
            raise ValueError(f"{path}: unknown method {unknown[0]!r}; choose from {', '.join(METHODS)}")
        rest = {key: value for key, value in found.items() if key not in ("towers", "data", "methods")}
        return cls(towers, data, methods, **rest)._checked(path)

    def _checked(self, path: str | os.PathLike) -> "SweepPlan":
        for name in ("seeds", "epochs", "batch_size", "shots"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value > 0) and not (name == "shots" and value is None):
                raise ValueError(f"{path}: {name} must be a whole number above 0; got {reprlib.repr(value)}")
        rates = self.rates if isinstance(self.rates, list | tuple) else ()
        if not rates or not all(isinstance(rate, int | float) and rate > 0 for rate in rates):
            raise ValueError(f"{path}: rates must be numbers above 0; got {reprlib.repr(self.rates)}")
        if not (isinstance(self.energy, int | float) and 0 < self.energy <= 1):
            raise ValueError(f"{path}: energy must lie in (0, 1]; got {reprlib.repr(self.energy)}")
        if self.dtype not in STORED:
            raise ValueError(
                f"{path}: dtype must be one of {', '.join(STORED)}; got {reprlib.repr(self.dtype)}"
            )
        return replace(self, rates=tuple(rates))


LONGEST_PLAN = 2**20  # bytes
MOST_ALIASES = 32  # a few more could stand for more than fits into memory


def _list(found: dict, key: str, path: str | os.PathLike) -> list:
    value = found.get(key)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{path} must hold a list of {key}; got {reprlib.repr(value)}")
    return value


def _only_known(found: dict, made: Any, where: str) -> None:
    known = made.__dataclass_fields__
    unknown = [str(key) for key in found if key not in known]
    if unknown:
        raise ValueError(f"{where} has an unknown key {unknown[0]!r}; known are {', '.join(known)}")


def _made(made: Any, row: Any, where: str) -> Any:
    if not isinstance(row, dict):
        raise ValueError(f"{where} must be a mapping; got {reprlib.repr(row)}")
    _only_known(row, made, where)
    needed = [name for name, one in made.__dataclass_fields__.items() if one.default is MISSING]
    lacking = [name for name in needed if name not in row]
    if lacking:
        raise ValueError(f"{where} lacks a key: {', '.join(map(repr, lacking))}")
    forms = typing.get_type_hints(made)
    return made(**{name: typed(value, forms[name], where, name) for name, value in row.items()})


@dataclass
class Sweep:
    """A plan and the folder its results, caches and bases are kept in."""

    plan: SweepPlan
    folder: Path
    say: Callable[[str], None] = field(default=lambda text: None, repr=False)
    workers: int = 0
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    root: Path | None = None  # of data sets by name
    download: bool = False
    accounts: list[Account] = field(default_factory=list)  # of every source that was read

    def run(self) -> list[dict]:
        """Runs what is not there yet and returns a row for every fit: tower, data, method, seed, accuracy and more."""
        rows: list[dict] = []
        for tower in self.plan.towers:
            work = _TowerWork(self, tower)
            for data in self.plan.data:
                rows += work.rows(data)
        return rows


class _TowerWork:
    """One tower's share of a sweep; the model is loaded at the first need."""

    def __init__(self, sweep: Sweep, spec: TowerSpec):
        self.sweep, self.plan, self.spec = sweep, sweep.plan, spec
        self.place = _file_name(spec.label)
        kinds = {kind for name in self.plan.methods for kind in BY_NAME[name].kinds}
        self.kinds = tuple(kind for kind in KINDS if kind in kinds)
        self.needs_bases = any(BY_NAME[name].needs_bases for name in self.plan.methods)

    @functools.cached_property
    def model(self) -> tuple[nn.Module, Callable, Callable]:
        self.sweep.say(f"{self.spec.label}: loading")
        clip, preprocess, tokenizer = sources.load_model(self.spec.model, self.spec.pretrained)
        return (
            clip.to(self.sweep.device),
            preprocess,
            cast(Callable, tokenizer),
        )  # without one the head raises

    @property
    def tower(self) -> nn.Module:
        return sources.image_tower(self.model[0])

    def images(self, source: str, labelled: bool = True) -> Images:
        """The images of a data set as this tower sees them."""
        return open_images(
            source, self.model[1], labelled=labelled, root=self.sweep.root, download=self.sweep.download
        )

    def encoded(self, source: str, folder: Path, labelled: bool) -> UnitCache:
        """The cache of a data set, in `folder` of this sweep: made, resumed, or read."""
        images = self.images(source, labelled)
        self.sweep.accounts.append(images.account)
        loader = DataLoader(images, batch_size=self.plan.batch_size, num_workers=self.sweep.workers)
        self.sweep.say(f"{self.spec.label}: encoding {source}")
        return encode(
            self.tower, loader, self.sweep.folder / "cache" / self.place / folder, self.kinds,
            DTYPES[self.plan.dtype], class_names=images.class_names,
        )  # fmt: skip

    @functools.cached_property
    def general_bases(self) -> SpectralBases | None:
        if self.plan.bases is None:
            return None
        images = self.encoded(self.plan.bases, Path("bases"), labelled=False)
        return fit_bases(self.tower, images, self.kinds)

    def rows(self, data: DataSpec) -> Iterator[dict]:
        work = _DataWork(self, data)
        for method in self.plan.methods:
            for seed in range(1 if method == BASE else self.plan.seeds):
                recipe = self._recipe(data, method, seed)
                folder = self.sweep.folder / "results" / self.place / _file_name(data.name)
                file = folder / f"{method}-{seed}.json"
                row = _kept(file, recipe)
                if row is None:
                    self.sweep.say(f"{self.spec.label}, {data.name}: {method}, seed {seed}")
                    row = work.fit(method, seed)
                    write_json(file, {"schema": SCHEMA, "what": WHAT, "recipe": recipe, "row": row})
                yield row

    def _recipe(self, data: DataSpec, method: str, seed: int) -> str:
        """A checksum of everything in the plan that this fit depends on."""
        plan = asdict(self.plan)
        shared = {key: value for key, value in plan.items() if key not in _NOT_OF_ONE_FIT}
        text = json.dumps([asdict(self.spec), asdict(data), method, seed, shared], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


class Row(TypedDict):
    """What is known of one fit; there may be more."""

    tower: str
    data: str
    method: str
    seed: int
    accuracy: float
    parameters: Count


class Result(Head):
    """The file of one fit."""

    recipe: str
    row: Row


_NOT_OF_ONE_FIT = ("towers", "data", "methods", "seeds")


class _DataWork:
    """One tower on one data set; nothing is encoded before the first fit that is not there yet."""

    def __init__(self, tower: _TowerWork, data: DataSpec):
        self.tower, self.plan, self.data = tower, tower.plan, data

    @functools.cached_property
    def parts(self) -> tuple[UnitCache, UnitCache, UnitCache]:
        """Caches of training, validation and test images."""
        place = Path(_file_name(self.data.name))
        train = self.tower.encoded(self.data.train, place / "train", labelled=True)
        test = self.tower.encoded(self.data.test, place / "test", labelled=True)
        if self.data.val is None:
            train, val = train.split(HELD_OUT, seed=0)
        else:
            val = self.tower.encoded(self.data.val, place / "val", labelled=True)
        for name, part in (("val", val), ("test", test)):
            places = positions(
                part.class_names, train.class_names or (), f"{self.data.name}: {name}", "train"
            )
            part.labels = torch.tensor(places)[part.labels]
        return train, val, test

    @functools.cached_property
    def head(self) -> ZeroShotHead:
        clip, _, tokenizer = self.tower.model
        names = prompts.class_names(self.data.class_names, self.parts[0].class_names or ())
        for part in self.parts:  # what the head calls these folders
            part.class_names = names
        if tokenizer is None:  # a tower without a text side
            return ZeroShotHead.from_prototypes(self.parts[0].output, self.parts[0].labels, names)
        templates = prompts.templates(self.data.templates, self.tower.spec.model)
        return ZeroShotHead.from_text(clip, tokenizer, names, templates)

    @functools.cached_property
    def bases(self) -> SpectralBases | None:
        if not self.tower.needs_bases:
            return None
        own = self.tower.general_bases is None
        return (
            fit_bases(self.tower.tower, self.parts[0], self.tower.kinds) if own else self.tower.general_bases
        )

    @functools.cached_property
    def base(self) -> training.Evaluation:
        """The untouched model on the test images."""
        adapter = identity(self.tower.tower)
        found = training.evaluate(adapter, self.head, self.parts[2])
        adapter.detach()
        return found

    @functools.cached_property
    def stream(self) -> tuple[StreamImages, SpectralBases]:
        """Images and bases for the form inside the tower, which no cache can serve; the same split as the caches'."""
        train = self.tower.images(self.data.train)
        val = None if self.data.val is None else self.tower.images(self.data.val)
        images = StreamImages(train, val, 0, self.plan.batch_size, self.tower.sweep.workers)
        return images, fit_bases(self.tower.tower, images.in_order(), placement="stream")

    def _fit_stream(
        self, method: str, seed: int
    ) -> tuple[TowerAdapter, training.ManyFits, training.Evaluation]:
        images, bases = self.stream
        adapter = build(method, self.tower.tower, bases, seed=seed)
        fits = fit_stream(
            adapter, self.head, images, lrs=[rate * adapter.default_lr for rate in self.plan.rates], seeds=(seed,),
            shots=self.plan.shots, epochs=self.plan.epochs,
        )  # fmt: skip
        fits.put(adapter, fits.best())
        test = images.loader(self.tower.images(self.data.test))
        return adapter, fits, training.evaluate(adapter, self.head, test)

    def fit(self, method: str, seed: int) -> dict:
        """Fits one method and reads the test images once, with the weights that were best on validation."""
        tower = self.tower.tower
        train, val, test = self.parts
        row = {"tower": self.tower.spec.label, "data": self.data.name, "method": method, "seed": seed}
        if method == BASE:
            found = self.base
            fitted = {"parameters": 0, "seconds": 0.0}
        elif BY_NAME[method].runs_the_tower:
            adapter, fits, found = self._fit_stream(method, seed)
            fitted = _of_best(fits)
            adapter.detach()
        else:
            options: dict[str, Any] = {"energy": self.plan.energy} if method == "fine" else {}
            adapter = build(method, tower, self.bases, seed=seed, **options)
            fits = training.fit_many(
                adapter, self.head, train, val, seeds=(seed,), epochs=self.plan.epochs, shots=self.plan.shots,
                lrs=[rate * adapter.default_lr for rate in self.plan.rates], batch_size=self.plan.batch_size,
            )  # fmt: skip
            fits.put(adapter, fits.best())
            found = training.evaluate(adapter, self.head, test)
            fitted = _of_best(fits)
            adapter.detach()
        accuracies = {"accuracy": found.accuracy, "balanced_accuracy": found.balanced_accuracy}
        return row | accuracies | {"base_accuracy": self.base.accuracy, "images": found.count} | fitted


def _of_best(fits: training.ManyFits) -> dict:
    """What a row says of the fit that was best on validation."""
    best = fits.best()
    return {
        "parameters": fits.results[best].parameters,
        "seconds": max(one.seconds for one in fits.results),
        "val_accuracy": fits.results[best].val_accuracy,
        "lr": fits.tasks[best].lr,
    }


def _file_name(label: str) -> str:
    """A name that any file system takes, still telling labels apart."""
    plain = "".join(c if c.isalnum() or c in "-_." else "-" for c in label)
    return plain if plain == label else f"{plain}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"


def _kept(file: Path, recipe: str) -> dict | None:
    """The row in `file`, when it is there and was made by this recipe."""
    if not file.is_file():
        return None
    found = read_json(file, WHAT, Result)
    return found["row"] if found["recipe"] == recipe else None


# --- the table ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SweepTable:
    """Accuracies as the paper lays them out: a line for every tower and method, a column for every data set, and the
    average; each the mean over seeds, with the standard deviation where there are several."""

    columns: tuple[str, ...]
    lines: tuple[
        tuple[str, str, int, tuple[tuple[float, float], ...]], ...
    ]  # tower, method, numbers learned, cells
    marks: tuple[
        tuple[tuple[bool, int, int], ...], ...
    ] = ()  # a cell: below the model; seeds that collapsed; of how many

    @classmethod
    def of(cls, rows: list[dict]) -> "SweepTable":
        columns = tuple(dict.fromkeys(row["data"] for row in rows))
        lines, marks = [], []
        for tower, method in dict.fromkeys((row["tower"], row["method"]) for row in rows):
            mine = [row for row in rows if (row["tower"], row["method"]) == (tower, method)]
            by_seed: dict[int, dict[str, float]] = {}
            for row in mine:
                by_seed.setdefault(row["seed"], {})[row["data"]] = row["accuracy"]
            cells = [_mean_and_deviation([found[name] for found in by_seed.values()]) for name in columns]
            cells.append(
                _mean_and_deviation([statistics.fmean(found.values()) for found in by_seed.values()])
            )
            numbers = max(row["parameters"] for row in mine)
            lines.append((tower, method, numbers, tuple(cells)))
            marks.append(tuple(_marked([row for row in mine if row["data"] == name]) for name in columns))
        return cls((*columns, AVERAGE), tuple(lines), tuple(marks))

    def write(self, folder: Path) -> list[Path]:
        """table.csv, table.md and table.png."""
        paths = [folder / "table.csv", folder / "table.md", folder / "table.png"]
        extras.need("matplotlib", "sweep", "drawing a sweep's table")
        from residual_kernels import figures

        deviations = [f"{name} (deviation)" for name in self.columns]
        flags = [f"{name} (below the model)" for name in self.columns[:-1]]
        flags += [f"{name} (collapsed seeds)" for name in self.columns[:-1]]
        rows: list[list[object]] = [
            ["tower", "method", "learned numbers", *self.columns, *deviations, *flags]
        ]
        for place, (tower, method, numbers, cells) in enumerate(self.lines):
            means, spread = zip(*cells, strict=True)
            marks = self.marks[place] if self.marks else [(False, 0, 0)] * len(self.columns[:-1])
            told = [*(int(below) for below, _, _ in marks), *(collapsed for _, collapsed, _ in marks)]
            rows.append([tower, method, numbers, *(f"{value:.6f}" for value in (*means, *spread)), *told])
        with together():
            figures.save(figures.accuracy_table(self.columns, self.lines), folder, "table", ("png",))
            write_text(paths[1], self.markdown())
            write_csv(paths[0], rows)
        return paths

    def markdown(self) -> str:
        """A Markdown table; the best method of each tower and column is bold."""
        head = ["tower", "method", "learned numbers", *self.columns]
        text = [_markdown_row(head), "|---|---|---:|" + "---:|" * len(self.columns)]
        marked = False
        for place, (tower, method, numbers, cells) in enumerate(self.lines):
            rivals = [line[3] for line in self.lines if line[0] == tower]
            best = [max(cells[i][0] for cells in rivals) for i in range(len(self.columns))]
            texts = []
            for (mean, spread), top in zip(cells, best, strict=True):
                value = f"{mean:.3f}" + (f" ± {spread:.3f}" if spread > 0 else "")
                texts.append(f"**{value}**" if mean == top and len(rivals) > 1 else value)
            for column, (below, collapsed, seeds) in enumerate(self.marks[place] if self.marks else ()):
                marked |= below or collapsed > 0
                texts[column] += " ↓" if below else ""
                texts[column] += f" ({collapsed} of {seeds} collapsed)" if collapsed else ""
            text.append(_markdown_row([tower, method, f"{numbers:,}", *texts]))
        if marked:
            text += ["", f"↓ below the model itself; collapsed: a seed more than {COLLAPSED:g} below it."]
        return "\n".join(text) + "\n"


def _marked(rows: list[dict]) -> tuple[bool, int, int]:
    """Whether the mean of a cell's seeds is below the model, how many of them collapsed, and how many there are."""
    known = [row for row in rows if row.get("base_accuracy") is not None]
    if not known or known[0]["method"] == BASE:
        return False, 0, len(rows)
    below = statistics.fmean(row["accuracy"] for row in known) < known[0]["base_accuracy"]
    collapsed = sum(row["accuracy"] < row["base_accuracy"] - COLLAPSED for row in known)
    return below, collapsed, len(rows)


def _markdown_row(cells: list[str]) -> str:
    return "| " + " | ".join(visible(" ".join(cell.split())).replace("|", "\\|") for cell in cells) + " |"


def _mean_and_deviation(values: list[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
