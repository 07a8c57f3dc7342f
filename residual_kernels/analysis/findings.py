"""What was found of a tower on a data set?

One record, kept as JSON and CSV; analyses fill it and reports read it.
"""

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from residual_kernels import display
from residual_kernels.analysis.selection import SelectionCurves
from residual_kernels.analysis.words import Description
from residual_kernels.files import SCHEMA, read_json, together, write_csv, write_json
from residual_kernels.schema import typed
from residual_kernels.towers import UnitLayout

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

WHAT, FILE = "analysis", "analysis.json"
PLOTTED = (
    "variance",
    "share",
    "participation",
    "two_nn",
    "pearson",
    "spearman",
    "pearson_classes",
    "spearman_classes",
    "accuracy",
)
TOP = 10  # units that a notebook shows, by share of the variance


@dataclass(frozen=True)
class UnitRow:
    """One unit.

    `linear` has one number per energy of the analysis. A NaN or None was not measured, or cannot be.

    variance: summed over its components; share: of the variance of all units of its kind. pearson, spearman:
    with the output, over all coordinates; *_classes: over the span of the class vectors. accuracy: of the
    unit alone.
    """

    index: int
    kind: str
    layer: int | None
    head: int | None
    variance: float
    share: float
    linear: tuple[int, ...]
    participation: float
    two_nn: float
    pearson: float | None
    spearman: float | None
    pearson_classes: float | None
    spearman_classes: float | None
    accuracy: float | None
    words: Description | None


@dataclass(frozen=True)
class ComponentRow:
    """One component: of `unit` (layout index), at `place` (0 for the largest variance). explained: its share
    of its unit's variance; pearson: of its coefficient with the output along it; between_classes: the
    variance between its classes' mean coefficients; words: of the first few components of each unit."""

    unit: int
    place: int
    explained: float
    pearson: float | None
    between_classes: float | None
    words: Description | None


@dataclass(frozen=True)
class Analysis:
    """What was found of one tower on one data set. Made by :func:`analyze`; :meth:`save` writes JSON and CSV.

    Tables that were not asked for, or that need labels or words where there are none, are empty.

    Attributes:
        tower: the name of the tower's family.
        layers, heads, dim: L, H and D.
        kind: of the units.
        images: how many were analysed.
        fitted_images: how many the bases were fitted on.
        energies: explained variances that components were counted for.
        class_names: of the data, or None.
        units: one row per unit.
        components: one row per kept component.
        output: the model's output as one unit.
        similarity: weighting -> [R, R] spectral cosines.
        selections: accuracy against how much is kept.
        seconds: what each step took.
    """

    tower: str
    layers: int
    heads: int
    dim: int
    kind: str
    images: int
    fitted_images: int  # that the bases were fitted on
    energies: tuple[float, ...]
    class_names: tuple[str, ...] | None
    units: tuple[UnitRow, ...]
    components: tuple[ComponentRow, ...]
    output: UnitRow  # the model's output as one unit
    similarity: dict[str, tuple[tuple[float, ...], ...]]  # weighting -> [R, R]
    selections: tuple[SelectionCurves, ...]
    seconds: dict[str, float]

    def to_dict(self) -> dict:
        """The analysis as plain dicts, lists, numbers and strings.

        Returns:
            field -> value; NaN becomes None.
        """
        return _plain(asdict(self))

    def save(self, folder: str | os.PathLike) -> list[Path]:
        """Writes analysis.json, units.csv, components.csv, similarity-*.csv and selection.csv.

        Args:
            folder: made where it is not there.

        Returns:
            The paths of the files.
        """
        folder = Path(folder)
        tables: dict[str, Iterable[list]] = {
            "units.csv": self._unit_table(),
            "components.csv": self._component_table(),
        }
        names = [
            f"{row.kind} {row.index}" if row.head is None else f"L{row.layer}H{row.head}"
            for row in self.units
        ]
        for weights, matrix in self.similarity.items():
            matrix_rows: list[list] = [
                ["", *names],
                *([name, *line] for name, line in zip(names, matrix, strict=True)),
            ]
            tables[f"similarity-{weights}.csv"] = matrix_rows
        if self.selections:
            tables["selection.csv"] = self._selection_table()
        with together():
            for name, rows in tables.items():
                write_csv(folder / name, ([_cell(value) for value in row] for row in rows))
            write_json(folder / FILE, {"schema": SCHEMA, "what": WHAT, **self.to_dict()})
        return [folder / FILE, *(folder / name for name in tables)]

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Analysis":
        """The analysis that :meth:`save` wrote.

        Args:
            folder: that was given to :meth:`save`.

        Returns:
            The analysis.

        Raises:
            FileNotFoundError: there is none.
            ValueError: the file is damaged, or another one.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            raise FileNotFoundError(f"no {WHAT} at {folder} ({FILE} is missing)")
        return typed(read_json(path, WHAT), cls, f"{path}")

    def table(self, of: str = "units") -> display.Table:
        """One of the tables, as rows. What was not measured is None.

        Args:
            of: "units" (the model's output comes last), "components" or "selection".

        Returns:
            One dict per row, with the columns of the CSV file.

        Raises:
            ValueError: another name.
        """
        made = {
            "units": self._unit_table,
            "components": self._component_table,
            "selection": self._selection_table,
        }
        if of not in made:
            raise ValueError(f"an analysis has tables of {', '.join(made)}; got {of!r}")
        columns, *rows = made[of]()
        return display.Table((dict(zip(columns, row, strict=True)) for row in rows), columns)

    def to_pandas(self, of: str = "units") -> "pandas.DataFrame":
        """:meth:`table` as a DataFrame.

        Args:
            of: as in :meth:`table`.

        Returns:
            A pandas DataFrame.

        Raises:
            ValueError: another name.
            ImportError: pandas is missing.
        """
        return self.table(of).to_pandas()

    def plot(self, of: str = "dimension") -> "Figure":
        """One of the analyses as a matplotlib Figure.

        Args:
            of: "dimension", "similarity" or "selection" (of heads), or a column of the units' rows, drawn by
                layer and head: "accuracy", "pearson", "share" ...

        Returns:
            A matplotlib Figure.

        Raises:
            ValueError: another name, or an analysis that holds no numbers of it.
            ImportError: matplotlib is missing.
        """
        columns = [name for name in PLOTTED if any(_known(getattr(row, name)) for row in self.units)]
        heads = self.kind == "head"
        whole = ["dimension"] * heads
        whole += ["similarity"] * bool(heads and self.similarity)
        curves = next((found for found in self.selections if found.of == "units"), None)
        whole += ["selection"] * (heads and curves is not None)
        if self.kind not in ("head", "mlp"):
            columns = []
        if of not in (*whole, *columns):
            raise ValueError(
                f"this analysis can draw {', '.join((*whole, *columns)) or 'nothing'}; got {of!r}"
            )
        figures, layout = display.drawing(), UnitLayout(self.layers, self.heads)
        if of == "similarity":
            import torch

            return figures.similarity(layout, torch.tensor(next(iter(self.similarity.values()))))
        if of == "selection" and curves is not None:
            return figures.selection(curves.curves(), curves.total, curves.base)
        if of == "dimension":
            return figures.dimensions(layout, self._dimensions())
        found = {row.index: getattr(row, of) for row in self.units if _known(getattr(row, of))}
        return figures.unit_map(layout, found, of.replace("_", " "))

    def _dimensions(self) -> dict:
        import torch

        found: dict[str, list[Any]] = {
            f"components for {self.energies[-1]:.0%} of the variance": [row.linear[-1] for row in self.units],
            "participation ratio": [row.participation for row in self.units],
            "TwoNN": [row.two_nn for row in self.units],
        }
        return {name: torch.tensor(x).double() for name, x in found.items() if any(map(_known, x))}

    def _repr_html_(self) -> str:
        facts = {
            "tower": self.tower,
            "units": f"{len(self.units)} of kind {self.kind}",
            "images": self.images,
            "accuracy of the model": self.output.accuracy,
            "similarity": ", ".join(self.similarity) or None,
        }
        names = ("layer", "head", "share", "participation", "pearson", "accuracy")
        rows = [
            [getattr(row, name) for name in names] for row in sorted(self.units, key=lambda row: -row.share)
        ]
        return display.card("Analysis", facts, names, rows[:TOP])

    def _unit_table(self) -> Iterator[list]:
        plain = ["index", "kind", "layer", "head", "variance", "share"]
        scores = [
            "participation",
            "two_nn",
            "pearson",
            "spearman",
            "pearson_classes",
            "spearman_classes",
            "accuracy",
        ]
        yield [*plain, *(f"linear_{energy:g}" for energy in self.energies), *scores, "words"]
        for row in (*self.units, self.output):
            words = "" if row.words is None else "; ".join(row.words.words)
            yield [
                *(getattr(row, name) for name in plain),
                *row.linear,
                *(getattr(row, name) for name in scores),
                words,
            ]

    def _component_table(self) -> Iterator[list]:
        yield ["unit", "layer", "head", "place", "explained", "pearson", "between_classes", "words"]
        unit_of = {row.index: row for row in self.units}
        for row in self.components:
            words = ""
            if row.words is not None:
                words = "; ".join(
                    f"{word} {weight:+.2f}"
                    for word, weight in zip(row.words.words, row.words.weights, strict=True)
                )
            unit = unit_of[row.unit]
            yield [
                row.unit,
                unit.layer,
                unit.head,
                row.place,
                row.explained,
                row.pearson,
                row.between_classes,
                words,
            ]

    def _selection_table(self) -> Iterator[list]:
        yield ["of", "rest", "score", "seed", "fraction", "kept", "accuracy"]
        for curves in self.selections:
            named: list[tuple[str, str | int, tuple[float, ...]]] = [
                (name, "", values) for name, values in curves.accuracy.items()
            ]
            named += [
                ("random", seed, values) for seed, values in zip(curves.seeds, curves.random, strict=True)
            ]
            for name, seed, values in named:
                for fraction, kept, accuracy in zip(curves.fractions, curves.kept, values, strict=True):
                    yield [curves.of, curves.rest, name, seed, fraction, kept, accuracy]


def _known(value) -> bool:
    return value is not None and math.isfinite(value)


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
