"""fit --method auto and probe: candidates compete, and what wins is kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from torch import nn

from residual_kernels import distributed, train
from residual_kernels.adapters.folder import save_adapter
from residual_kernels.bases.pca import fit_bases
from residual_kernels.bases.spectral_bases import SpectralBases
from residual_kernels.cli.inputs import Reader
from residual_kernels.cli.printing import err, out, write_numbers
from residual_kernels.train.contest import PROBE
from residual_kernels.units.cache import UnitCache
from residual_kernels.units.source import is_cache
from residual_kernels.zeroshot import ZeroShotHead

AUTO = "auto"
KINDS = ("head", "mlp")


@dataclass(frozen=True)
class AutoFit:
    """What the command says of a contest; see :func:`residual_kernels.tune`."""

    method: str
    bases: Path | None
    shots: int | None
    seed: int
    balanced: bool
    folders: Sequence[str]
    out_folder: Path
    json_file: Path | None
    reader: Reader


def check_options(method: str, given: dict[str, bool]) -> None:
    """Raises ValueError for options of a single method."""
    names = [name for name, there in given.items() if there]
    if names:
        belong = "belongs" if len(names) == 1 else "belong"
        raise ValueError(
            f"{' and '.join(names)} {belong} to single methods, and --method {method} "
            "does not read such options; name a method, such as --method fine, or leave them out"
        )


def kinds_of(source: object) -> tuple[str, ...]:
    """Kinds of units that are read: heads and MLPs, or heads where a cache holds no more."""
    if is_cache(source) and "mlp" not in source.kinds:
        return ("head",)
    return KINDS


def run_contest(
    contest: AutoFit, tower: nn.Module, head: ZeroShotHead, training: UnitCache, validation: UnitCache | None
) -> None:
    """Tunes, keeps the winner and says why."""
    if contest.bases is None:
        bases = fit_bases(tower, training, kinds_of(training))
    else:
        loaded = SpectralBases.load(contest.bases)
        kinds = [kind for kind in loaded.kinds if kind in kinds_of(training)]
        if not kinds:
            raise ValueError(f"{contest.bases} holds no bases of kind head; fit them with --kinds head")
        bases = loaded.of(*kinds)
    found = train.tune(
        tower,
        bases,
        head,
        training,
        validation,
        candidates=(PROBE,) if contest.method == PROBE else None,
        class_weight="balanced" if contest.balanced else None,
        shots=contest.shots,
        seed=contest.seed,
    )
    if distributed.rank() == 0:
        moved = None if found.head is head else head
        save_adapter(
            found.adapter, contest.out_folder, head=found.head, base_head=moved, class_names=contest.folders
        )
        _report(contest, found)


def _report(contest: AutoFit, found: train.TuneResult) -> None:
    how = "validation images" if found.judged_by == "validation" else "held-out training images"
    numbers = next(one.numbers for one in found.table if one.name == found.winner)
    write_numbers(
        contest.json_file,
        {
            "method": contest.method,
            "winner": found.winner,
            "why": found.why,
            "judged_by": found.judged_by,
            "images": found.images,
            "base_accuracy": found.base_accuracy,
            "accuracy": found.accuracy,
            "val_accuracy": found.accuracy if found.judged_by == "validation" else None,
            "parameters": numbers,
            "seconds": found.seconds,
            "probe": found.probe,
            "warning": found.warning,
            "candidates": [vars(one) for one in found.table],
            **contest.reader.account(),
        },
    )
    contest.reader.report()
    table = Table("candidate", "numbers", "accuracy", "loss", "note", title=f"On {found.images} {how}")
    for one in found.table:
        table.add_row(one.name, f"{one.numbers:,}", f"{one.accuracy:.4f}", f"{one.loss:.4f}", one.note)
    out.print(table)
    out.print(found.why, soft_wrap=True)
    for said in (
        found.probe and found.probe.replace('ask for the method "probe"', "use --method probe"),
        found.warning,
    ):
        if said:
            err.print(said, soft_wrap=True)
    what = "validation accuracy" if found.judged_by == "validation" else "accuracy on held-out folds"
    out.print(
        f"{what} {found.base_accuracy:.4f} -> {found.accuracy:.4f} with {numbers:,} numbers ({found.winner}, "
        f"{found.seconds:.1f} s); written to {contest.out_folder}",
        soft_wrap=True,
    )
