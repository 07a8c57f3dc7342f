"""Which method is best on which data?

Towers x data sets x methods from one YAML file, as the paper's main table.

Every tower encodes a data set once; every fit leaves one small JSON file. A sweep that was stopped
resumes: finished shards and fits are kept, and a fit whose recipe has changed is made again.
"""

import functools
import hashlib
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

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
from residual_kernels.data.images import Images, find_unreadable, open_images, without
from residual_kernels.data.images.account import Told
from residual_kernels.experiments.kept import READING, Accounts, Identities, keep, kept
from residual_kernels.experiments.sweep_plan import DataSpec, SweepPlan, TowerSpec
from residual_kernels.files import SCHEMA, read_json, together, write_csv, write_json, write_text
from residual_kernels.towers import KINDS
from residual_kernels.train.inside import StreamImages, fit_stream
from residual_kernels.units.cache import DTYPES, HELD_OUT, MANIFEST, UnitCache, encode
from residual_kernels.units.cache.shards import read_manifest
from residual_kernels.visible import visible
from residual_kernels.zeroshot import ZeroShotHead

BASE, AVERAGE = "base", "average"
LONGEST_NAME = 160  # bytes of a label that is a folder's name as it stands; systems take 255
COLLAPSED = 0.1  # below the model by so much: a seed that went wrong, not one that was unlucky


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
    encode_batch: int | None = (
        None  # images that go through the tower together; the plan's batch size by default
    )
    opened: Callable[..., Images] | None = None  # in place of `open`, with its arguments
    accounts: dict[str, Told] = field(default_factory=dict)  # source -> what became of what it holds
    notes: list[str] = field(default_factory=list)  # sentences that a user should read

    def open(self, source: str, preprocess: Callable, labelled: bool, **columns: str) -> Images:
        """The images of a data set, without those that cannot be read where the plan skips them."""
        skip = self.plan.unreadable == "skip"
        images = open_images(
            source,
            preprocess,
            labelled=labelled,
            root=self.root,
            download=self.download,
            skip=skip,
            exif=self.plan.orientation == "exif",
            **columns,
        )
        return without(images, find_unreadable(images, self.workers)) if skip else images

    def run(self) -> list[dict]:
        """Runs what is not there yet and returns a row for every fit: tower, data, method, seed,
        accuracy and more."""
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
        self._opened: dict[tuple, Images] = {}
        kinds = {kind for name in self.plan.methods for kind in BY_NAME[name].kinds}
        self.kinds = tuple(kind for kind in KINDS if kind in kinds)
        self.needs_bases = any(BY_NAME[name].needs_bases for name in self.plan.methods)

    @functools.cached_property
    def model(self) -> tuple[nn.Module, Callable, Callable]:
        self.sweep.say(f"{self.spec.label}: loading")
        clip, preprocess, tokenizer = sources.load_model(self.spec.model, self.spec.pretrained)
        # Without one the head raises.
        return (
            clip.to(self.sweep.device),
            preprocess,
            cast(Callable, tokenizer),
        )

    @property
    def tower(self) -> nn.Module:
        return sources.image_tower(self.model[0])

    def found(self, source: str, labelled: bool, **columns: str) -> Images:
        """The images of a data set, each looked through once; which they are is told without a model."""
        key = (source, labelled, tuple(columns.items()))
        if key not in self._opened:
            self._opened[key] = (self.sweep.opened or self.sweep.open)(source, _unused, labelled, **columns)
        return self._opened[key]

    def images(self, source: str, labelled: bool, **columns: str) -> Images:
        """The images of a data set as this tower sees them."""
        images = self.found(source, labelled, **columns)
        images.preprocess = self.model[1]
        return images

    def identities(self, data: DataSpec) -> Identities:
        """What tells the images of a data set, and those of the bases, from others."""
        parts = {"train": data.train, "val": data.val, "test": data.test}
        images = {
            part: self.found(source, True, **data.columns)
            for part, source in parts.items()
            if source is not None
        }
        if self.plan.bases is not None and self.needs_bases:
            images["bases"] = self.found(self.plan.bases, False)
        return {part: one.fingerprint() for part, one in images.items()}

    def place_of(self, data: DataSpec, part: str) -> Path:
        """The folder of a cache."""
        inside = Path("bases") if part == "bases" else Path(_file_name(data.name)) / part
        return self.sweep.folder / "cache" / self.place / inside

    def _check_cache(self, source: str, images: Images, folder: Path) -> None:
        """Raises ValueError where a cache of this sweep is of other images than `source` holds now."""
        if not (folder / MANIFEST).is_file():
            return
        there, here = read_manifest(folder)["run"]["data"], images.fingerprint()
        if there is not None and there != here:
            raise ValueError(
                f"{folder} holds a cache of other data than {source} is now ({there} there, {here} here); "
                "remove that folder to encode the images again, or name another --out"
            )

    def encoded(self, source: str, folder: Path, labelled: bool, **columns: str) -> UnitCache:
        """The cache of a data set in `folder`: made, resumed, or read."""
        images = self.images(source, labelled, **columns)
        if labelled or source not in self.sweep.accounts:  # images for bases alone have no classes
            self.sweep.accounts[source] = images.account.to_dict()
        self._check_cache(source, images, folder)
        batch = self.sweep.encode_batch or self.plan.batch_size
        loader = DataLoader(images, batch_size=batch, num_workers=self.sweep.workers)
        self.sweep.say(f"{self.spec.label}: encoding {source}")
        return encode(
            self.tower,
            loader,
            folder,
            self.kinds,
            DTYPES[self.plan.dtype],
            class_names=images.class_names,
        )

    @functools.cached_property
    def general_bases(self) -> SpectralBases | None:
        if self.plan.bases is None:
            return None
        images = self.encoded(self.plan.bases, self.place_of(self.plan.data[0], "bases"), labelled=False)
        return fit_bases(self.tower, images, self.kinds)

    def rows(self, data: DataSpec) -> Iterator[dict]:
        work = _DataWork(self, data)
        folder = self.sweep.folder / "results" / self.place / _file_name(data.name)
        account = folder / "reading.json"
        stays = self._may_stay(account)
        images = self._told_apart(data, account) if stays else None
        caches = {part: self.place_of(data, part) for part in ("train", "val", "test", "bases")}
        for method in self.plan.methods:
            for seed in range(1 if method == BASE else self.plan.seeds):
                recipe = self._recipe(data, method, seed)
                file = folder / f"{method}-{seed}.json"
                row = kept(file, recipe, _read_by(method, images), caches) if stays else None
                if row is None:
                    self.sweep.say(f"{self.spec.label}, {data.name}: {method}, seed {seed}")
                    images = self.identities(data) if images is None else images
                    row = work.fit(method, seed)
                    read = {
                        one: self.sweep.accounts[one]
                        for one in self._sources(data)
                        if one in self.sweep.accounts
                    }
                    write_json(account, {"schema": SCHEMA, "what": READING, "sources": read})
                    keep(file, recipe, _read_by(method, images), row)
                yield row

    def _sources(self, data: DataSpec) -> tuple[str, ...]:
        """What the fits of a data set read."""
        return data.sources if self.plan.bases is None else (*data.sources, self.plan.bases)

    def _may_stay(self, file: Path) -> bool:
        """Whether fits that are there stay.

        What they read, which `file` says, is entered into the account.
        """
        if not file.is_file():
            return True
        found = read_json(file, READING, Accounts)["sources"]
        if self.plan.unreadable == "fail" and any(one["left_out"] for one in found.values()):
            return False
        self.sweep.accounts = {**found, **self.sweep.accounts}
        return True

    def _told_apart(self, data: DataSpec, account: Path) -> Identities | None:
        """Which images are there; None, with a note, where fits are there and their images are not."""
        try:
            return self.identities(data)
        except (FileNotFoundError, ValueError, ImportError) as error:
            if account.is_file():
                self.sweep.notes.append(
                    f"{data.name}: the fits that are there were not compared with their images: {error}"
                )
            return None  # what has to be fitted says so again

    def _recipe(self, data: DataSpec, method: str, seed: int) -> str:
        """A checksum of everything in the plan that this fit depends on."""
        plan, read = asdict(self.plan), asdict(data)
        shared = {key: value for key, value in plan.items() if key not in _NOT_OF_ONE_FIT}
        for found, key, usual in ((shared, "orientation", "exif"), *((read, key, None) for key in _COLUMNS)):
            if found[key] == usual:  # fits from before there was a choice are those of today
                del found[key]
        text = json.dumps([asdict(self.spec), read, method, seed, shared], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


_NOT_OF_ONE_FIT = ("towers", "data", "methods", "seeds", "unreadable")
_COLUMNS = ("image_column", "label_column")


class _DataWork:
    """One tower on one data set; nothing is encoded before the first fit that is not there yet."""

    def __init__(self, tower: _TowerWork, data: DataSpec):
        self.tower, self.plan, self.data = tower, tower.plan, data

    @functools.cached_property
    def texts(self) -> tuple[tuple[str, ...], tuple]:
        """Class names and templates, which are read before the tower runs."""
        folders = self.tower.found(self.data.train, True, **self.data.columns).class_names or ()
        names = prompts.class_names(self.data.class_names, folders)
        return names, prompts.templates(self.data.templates, self.tower.spec.model)

    @functools.cached_property
    def splits(self) -> tuple[UnitCache, UnitCache, UnitCache]:
        """Caches of training, validation and test images."""
        columns, _ = self.data.columns, self.texts

        def encoded(source: str, part: str) -> UnitCache:
            return self.tower.encoded(source, self.tower.place_of(self.data, part), labelled=True, **columns)

        train, test = encoded(self.data.train, "train"), encoded(self.data.test, "test")
        if self.data.val is None:
            train, val = train.split(HELD_OUT, seed=0)
        else:
            val = encoded(self.data.val, "val")
        for name, part in (("val", val), ("test", test)):
            places = positions(
                part.class_names, train.class_names or (), f"{self.data.name}: {name}", "train"
            )
            part.labels = torch.tensor(places)[part.labels]
        return train, val, test

    @functools.cached_property
    def head(self) -> ZeroShotHead:
        clip, _, tokenizer = self.tower.model
        folders = self.splits[0].class_names or ()
        names, templates = self.texts
        called = dict(zip(folders, names, strict=True))
        for source in self.data.sources:
            for row in self.tower.sweep.accounts[source]["classes"]:
                row["name"] = called.get(row["folder"])
        for part in self.splits:  # what the head calls these folders
            part.class_names = names
        if tokenizer is None:  # a tower without a text side
            return ZeroShotHead.from_prototypes(self.splits[0].output, self.splits[0].labels, names)
        return ZeroShotHead.from_text(clip, tokenizer, names, templates)

    @functools.cached_property
    def bases(self) -> SpectralBases | None:
        if not self.tower.needs_bases:
            return None
        own = self.tower.general_bases is None
        return (
            fit_bases(self.tower.tower, self.splits[0], self.tower.kinds) if own else self.tower.general_bases
        )

    @functools.cached_property
    def base(self) -> training.Evaluation:
        """The untouched model on the test images."""
        adapter = identity(self.tower.tower)
        found = training.evaluate(adapter, self.head, self.splits[2])
        adapter.detach()
        return found

    @functools.cached_property
    def stream(self) -> tuple[StreamImages, SpectralBases]:
        """Images and bases for the form inside the tower, which no cache can serve.

        The same split as the caches'.
        """
        columns = self.data.columns
        train = self.tower.images(self.data.train, True, **columns)
        val = None if self.data.val is None else self.tower.images(self.data.val, True, **columns)
        images = StreamImages(train, train.labels, val, 0, self.plan.batch_size, self.tower.sweep.workers)
        return images, fit_bases(self.tower.tower, images.in_order(), placement="stream")

    def _fit_stream(
        self, method: str, seed: int
    ) -> tuple[TowerAdapter, training.ManyFits, training.Evaluation]:
        images, bases = self.stream
        adapter = build(method, self.tower.tower, bases, seed=seed)
        fits = fit_stream(
            adapter,
            self.head,
            images,
            lrs=[rate * adapter.default_lr for rate in self.plan.rates],
            seeds=(seed,),
            shots=self.plan.shots,
            epochs=self.plan.epochs,
        )
        fits.put(adapter, fits.best())
        test = images.loader(self.tower.images(self.data.test, True, **self.data.columns))
        return adapter, fits, training.evaluate(adapter, self.head, test)

    def fit(self, method: str, seed: int) -> dict:
        """Fits one method and reads the test images once, with the weights that were best on validation."""
        tower = self.tower.tower
        train, val, test = self.splits
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
                adapter,
                self.head,
                train,
                val,
                seeds=(seed,),
                epochs=self.plan.epochs,
                shots=self.plan.shots,
                lrs=[rate * adapter.default_lr for rate in self.plan.rates],
                batch_size=self.plan.batch_size,
            )
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


def _read_by(method: str, images: Identities | None) -> Any:
    """The images that a fit of this method depends on."""
    if images is None or BY_NAME[method].needs_bases:
        return images
    return {part: told for part, told in images.items() if part != "bases"}


def _unused(picture: object) -> torch.Tensor:
    raise AssertionError("images are read by a tower's own preprocessing")


def _file_name(label: str) -> str:
    """A name that any file system takes, still telling labels apart."""
    plain = "".join(c if c.isalnum() or c in "-_." else "-" for c in label)
    if plain == label and not label.startswith(".") and len(label.encode()) <= LONGEST_NAME:
        return label
    mark = hashlib.sha256(label.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    short = plain if len(plain.encode("utf-8", "replace")) <= LONGEST_NAME else plain[: LONGEST_NAME // 4]
    return f"{short.lstrip('.')}-{mark}"


# --- the table ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SweepTable:
    """Accuracies as the paper lays them out: a line for every tower and method, a column for every data set,
    and the average; each the mean over seeds, with the standard deviation where there are several."""

    columns: tuple[str, ...]
    # Tower, method, numbers learned, cells.
    lines: tuple[tuple[str, str, int, tuple[tuple[float, float], ...]], ...]
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
    """Whether the mean of a cell's seeds is below the model, how many of them collapsed,
    and how many there are."""
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
