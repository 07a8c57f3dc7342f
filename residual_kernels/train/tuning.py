"""Which adapter suits these labels?

Candidates, the tower among them, compete on images they were not fitted to.

All are convex fits of the same images in the same folds (or judged by the same validation images), so that
they are compared image by image. The least loss wins, unless a simpler candidate is within one standard error
of it.
"""

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn

from residual_kernels import display
from residual_kernels.adapters.methods import build
from residual_kernels.adapters.tower_adapter import TowerAdapter
from residual_kernels.bases.spectral_bases import SpectralBases
from residual_kernels.train.config import ConvexConfig
from residual_kernels.train.contest import BASE, PROBE, VECTORS, Candidate, Contest
from residual_kernels.train.folds import FOLDS
from residual_kernels.train.path import FREEDOMS
from residual_kernels.units.cache import UnitCache
from residual_kernels.units.source import unit_source
from residual_kernels.zeroshot import ZeroShotHead

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

# Simpler first: nearer to the tower, then fewer numbers. The probe reads no other class names, so it is
# reported, not chosen.
CANDIDATES = (BASE, "anchored", "fine", "full", VECTORS, PROBE)
BY_CLASSES = "classes"  # as folds
FEW = 50  # validation images below which an accuracy says little


@dataclass
class TuneResult:
    """What :func:`tune` found. `print` shows it as a table.

    Attributes:
        winner: name of the candidate that won.
        why: one sentence that says why it won.
        table: one row for each candidate.
        adapter, head: the winner's, ready for use.
        judged_by: "validation" or "folds".
        images: how many images judged.
        base_accuracy: of the untouched model on these images.
        accuracy: of the winner on the same images.
        seconds: of the whole.
        probe: says so when a linear probe is better by more than one standard error; None otherwise.
        warning: what speaks against relying on the result, such as few images; None otherwise.
    """

    winner: str
    why: str
    table: list[Candidate]
    adapter: TowerAdapter = field(repr=False)
    head: ZeroShotHead = field(repr=False)
    judged_by: str
    images: int
    base_accuracy: float
    accuracy: float
    seconds: float
    probe: str | None = None
    warning: str | None = None

    def __str__(self) -> str:
        rows = [("candidate", "numbers", "accuracy", "loss", "note")] + [
            (one.name, f"{one.numbers:,}", f"{one.accuracy:.4f}", f"{one.loss:.4f}", one.note)
            for one in self.table
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = [
            "  ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        said = [one for one in (self.why, self.probe, self.warning) if one]
        return "\n".join([*lines, *said])

    def to_pandas(self) -> "pandas.DataFrame":
        """`table` as a DataFrame, a row per candidate. Raises ImportError where pandas is missing."""
        return display.Table(asdict(one) for one in self.table).to_pandas()

    def plot(self) -> "Figure":
        """Accuracy of every candidate as a matplotlib Figure.

        Raises ImportError where matplotlib is missing.
        """
        return display.drawing().candidates(self)

    def _repr_html_(self) -> str:
        facts = {
            "winner": self.winner,
            "accuracy of the untouched model": self.base_accuracy,
            "accuracy": self.accuracy,
            "images": self.images,
            "judged by": self.judged_by,
        }
        columns = ("candidate", "numbers", "accuracy", "loss", "note")
        rows = [[one.name, one.numbers, one.accuracy, one.loss, one.note] for one in self.table]
        return display.card("TuneResult", facts, columns, rows, notes=(self.why, self.probe, self.warning))


def tune(
    tower: nn.Module,
    bases: SpectralBases,
    head: ZeroShotHead,
    train: UnitCache | Iterable,
    val: UnitCache | Iterable | None = None,
    *,
    candidates: Sequence[str] | None = None,
    stream_bases: SpectralBases | None = None,
    class_weight: str | Tensor | None = None,
    shots: int | None = None,
    seed: int = 0,
    labels: Tensor | None = None,
    val_labels: Tensor | None = None,
    label_smoothing: float = 0.0,
    folds: int | str = FOLDS,
    freedoms: Sequence[float] = FREEDOMS,
    memory: int | None = None,
) -> TuneResult:
    """Fits every candidate, judges them on images they were not fitted to, and returns the one to use.

    Args:
        tower: an image tower, not wrapped.
        bases: of heads and MLPs ("anchored", "full") or of heads alone: then `anchored` changes the heads.
        head: the classifier. A winner that moves class vectors brings its own.
        train: a UnitCache or a loader of (images, labels).
        val: the same; without it, folds of the training images judge.
        candidates: of :data:`CANDIDATES`; all that the bases allow by default. The model itself always
            competes. The probe is only reported, unless it is named here.
        stream_bases: bases with placement="stream": the stream form competes too. It runs the tower at every
            step, so train and val must then be loaders.
        folds: in how many parts the training images are split, without `val`. "classes" holds out classes
            instead: the strength is chosen on classes that the fit had not seen, read among their own names,
            so that classes nobody labelled are read at least as well as by the model. `anchored` alone
            competes then; needs four classes.
        class_weight, shots, seed, labels, val_labels, label_smoothing, freedoms, memory: as in :func:`fit`.

    Returns:
        A :class:`TuneResult`. Where nothing is better than the model by one standard error, or everything
        labels fewer images right, the winner is "base" and the adapter is the model.

    Raises:
        ValueError: as :func:`fit`, and for a candidate that is unknown or that these bases cannot make.
    """
    start = time.perf_counter()
    by_classes = folds == BY_CLASSES
    if isinstance(folds, str) and not by_classes:
        raise ValueError(f'folds must be a number or "{BY_CLASSES}"; got {folds!r}')
    config = ConvexConfig(
        freedoms, FOLDS if by_classes else int(folds), label_smoothing, class_weight, shots, memory
    )
    if by_classes and (val is not None or candidates not in (None, ("anchored",), ["anchored"])):
        raise ValueError(
            f'folds="{BY_CLASSES}" chooses the strength of "anchored" from the training images: give no val, '
            "and no other candidates"
        )
    names = [] if by_classes else _names(candidates, bases)
    if stream_bases is not None and (
        val is None or any(unit_source(data, tower).indexed for data in (train, val))
    ):
        raise ValueError(
            "the stream form runs the tower at every step: give train and val as loaders of images"
        )
    built: list[TowerAdapter] = []
    kept = None
    try:
        base = build(BASE, tower)
        built.append(base)
        contest = Contest(base, bases, head, train, val, config, seed, labels, val_labels, built)
        contest.probe_competes = candidates is not None
        for name in sorted(names, key=lambda name: name == VECTORS):  # after the two that it is held against
            contest.add(name)
        if by_classes:
            contest.add_by_classes()
        contest.entries.sort(key=lambda one: CANDIDATES.index(one.name))
        if stream_bases is not None and val is not None:
            contest.add_stream(stream_bases, train, val, seed)
        winner, why = contest.winner()
        kept, own_head = contest.made(winner)
    finally:  # the tower carries the winner alone, and nothing when this fails
        for adapter in built:
            if adapter is not kept:
                adapter.detach()
    warning = None
    if contest.images < FEW:
        what = "validation" if val is not None else "training"
        warning = f"only {contest.images} {what} images judged the candidates; with more, another may win"
    log.info("tune: %s", why)
    return TuneResult(
        winner=winner.name,
        why=why,
        table=contest.table(winner),
        adapter=kept,
        head=own_head,
        judged_by="folds" if val is None else "validation",
        images=contest.images,
        base_accuracy=contest.entries[0].judged.accuracy,
        accuracy=winner.judged.accuracy,
        seconds=time.perf_counter() - start,
        probe=contest.about_probe(winner),
        warning=warning,
    )


def _names(candidates: Sequence[str] | None, bases: SpectralBases) -> list[str]:
    """The candidates that compete, simpler first, after the base."""
    given = CANDIDATES if candidates is None else tuple(candidates)
    unknown = [name for name in given if name not in CANDIDATES]
    if unknown:
        raise ValueError(f"unknown candidate {unknown[0]!r}; choose from {', '.join(CANDIDATES)}")
    cannot = [name for name in given if name == "full" and "mlp" not in bases.kinds]
    if cannot and candidates is not None:
        raise ValueError(f"full needs bases of MLPs too; these hold {', '.join(bases.kinds)}")
    return [name for name in CANDIDATES[1:] if name in given and name not in cannot]
