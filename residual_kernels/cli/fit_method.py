"""fit --method NAME: weights of one method, from cached units or, inside the tower, from images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from residual_kernels import distributed, train
from residual_kernels.adapters.folder import save_adapter
from residual_kernels.adapters.methods import Method, build, identity
from residual_kernels.adapters.tower_adapter import TowerAdapter
from residual_kernels.bases.pca import fit_bases
from residual_kernels.bases.spectral_bases import SpectralBases
from residual_kernels.cli.inputs import Reader
from residual_kernels.cli.options import RestOption, Tokens
from residual_kernels.cli.printing import err, out, write_numbers
from residual_kernels.train.inside import StreamImages, fit_stream
from residual_kernels.units.cache import UnitCache
from residual_kernels.zeroshot import ZeroShotHead


def check_runs(method: Method, checkpoint: Path | None, tokens: Tokens | None) -> None:
    """Raises ValueError for what only a fit on cached units, or only one inside the tower, can do."""
    if not method.runs_the_tower:
        if tokens is not None:
            raise ValueError(f"--tokens {tokens.value} belongs to stream; {method.name} works at the output")
        return
    if checkpoint is not None:
        raise ValueError(
            f"--checkpoint would need cached units, and {method.name} runs the tower; leave it out"
        )
    if distributed.world() > 1:
        raise ValueError(
            f"{method.name} is fitted by one process on the command line; run it without torchrun"
        )


@dataclass(frozen=True)
class MethodFit:
    """What the command says of a fit by one method; see :func:`residual_kernels.fit_many`."""

    method: Method
    bases_file: Path | None
    rest: RestOption | None
    energy: float | None
    components: int | None
    max_components: int | None
    tokens: Tokens | None
    lrs: Sequence[float] | None
    seeds: Sequence[int]
    epochs: int
    patience: int
    shots: int | None
    class_weight: str | None
    shrink: float
    checkpoint: Path | None
    batch_size: int
    images: int
    folders: Sequence[str]
    out_folder: Path
    json_file: Path | None
    reader: Reader

    @property
    def _alone(self) -> bool:
        """Whether there is a single fit, whose epochs are printed."""
        return len(self.seeds) * len(self.lrs or [0]) == 1 and distributed.rank() == 0

    def on_units(
        self, tower: nn.Module, head: ZeroShotHead, training: UnitCache, validation: UnitCache
    ) -> None:
        """Fits on cached units, keeps the best and reports it."""
        adapter, starts = self._built(tower, training)
        base = train.evaluate(identity(tower), head, validation)
        fits = train.fit_many(
            adapter,
            head,
            training,
            validation,
            lrs=self.lrs,
            seeds=self.seeds,
            starts=starts if len(self.seeds) > 1 else None,
            epochs=self.epochs,
            batch_size=self.batch_size,
            patience=self.patience,
            shrink=self.shrink,
            class_weight=self.class_weight,
            shots=self.shots,
            checkpoint=self.checkpoint,
            progress=_say if self._alone else None,
        )
        self._keep(adapter, head, fits, base)

    def on_images(self, tower: nn.Module, head: ZeroShotHead, images: StreamImages) -> None:
        """The same with a tower that runs at every step."""
        adapter, _ = self._built(tower, images.in_order())
        base = train.evaluate(identity(tower), head, images.validation)
        fits = fit_stream(
            adapter,
            head,
            images,
            lrs=self.lrs,
            seeds=self.seeds,
            shots=self.shots,
            epochs=self.epochs,
            batch_size=self.batch_size,
            patience=self.patience,
            shrink=self.shrink,
            class_weight=self.class_weight,
            progress=(lambda row: _say(0, row)) if self._alone else None,
        )
        self._keep(adapter, head, fits, base)

    def _built(
        self, tower: nn.Module, training: UnitCache | DataLoader
    ) -> tuple[TowerAdapter, list[list[Tensor]]]:
        """The adapter, and the starting weights of every seed."""
        bases = None
        if self.method.needs_bases or self.rest is RestOption.mean:
            bases = self._bases(tower, training)
        adapters = [
            build(
                self.method.name,
                tower,
                bases,
                rest=self.rest and self.rest.value,
                energy=self.energy,
                components=self.components,
                max_components=self.max_components,
                seed=seed,
            )
            for seed in self.seeds
        ]
        for other in adapters[1:]:
            other.detach()
        return adapters[0], [list(one.trainable()) for one in adapters]

    def _bases(self, tower: nn.Module, training: UnitCache | DataLoader) -> SpectralBases:
        file, method, tokens = self.bases_file, self.method, self.tokens
        if file is None and method.runs_the_tower:
            return fit_bases(tower, training, placement="stream", tokens=tokens and tokens.value)
        if file is None:
            return fit_bases(tower, training, method.kinds)
        loaded = SpectralBases.load(file)
        if tokens is not None and loaded.tokens != tokens.value:
            raise ValueError(f"{file} holds bases over tokens {loaded.tokens}, not {tokens.value}")
        missing = [kind for kind in method.kinds if kind not in loaded.kinds]
        if missing:
            raise ValueError(
                f"{file} holds no bases of kind {', '.join(missing)}; fit them with --kinds {missing[0]}"
            )
        return loaded

    def _keep(
        self, adapter: TowerAdapter, head: ZeroShotHead, fits: train.ManyFits, base: train.Evaluation
    ) -> None:
        fits.put(adapter, fits.best())
        if distributed.rank() == 0:
            save_adapter(adapter, self.out_folder, head=head, class_names=self.folders)
            self._report(fits, base)

    def _report(self, fits: train.ManyFits, base: train.Evaluation) -> None:
        best = fits.best()
        result = fits.results[best]
        seconds = max(one.seconds for one in fits.results)
        row = result.history[result.best_epoch]
        write_numbers(
            self.json_file,
            {
                "method": self.method.name,
                "base_accuracy": base.accuracy,
                "val_accuracy": result.val_accuracy,
                "base_balanced_accuracy": base.balanced_accuracy,
                "val_balanced_accuracy": row.val_balanced_accuracy,
                "lr": fits.tasks[best].lr,
                "seed": fits.tasks[best].seed,
                "parameters": result.parameters,
                "seconds": seconds,
                "best_epoch": result.best_epoch,
                "history": [vars(row) for row in result.history],
                "fits": [
                    {
                        "lr": task.lr,
                        "seed": task.seed,
                        "val_accuracy": one.val_accuracy,
                        "best_epoch": one.best_epoch,
                        "epochs": len(one.history) - 1,
                        "diverged": one.diverged,
                    }
                    for task, one in zip(fits.tasks, fits.results, strict=True)
                ],
                **self.reader.account(),
            },
        )
        self.reader.report()
        if len(fits.tasks) > 1:
            columns = ("lr", "seed", "epochs", "best", "accuracy", "balanced", "loss")
            table = Table(*columns, title="All fits on validation; * is kept")
            for index, (task, one) in enumerate(zip(fits.tasks, fits.results, strict=True)):
                row = one.history[one.best_epoch]
                seen = (row.val_accuracy, row.val_balanced_accuracy, row.val_loss)
                table.add_row(
                    "-" if task.lr is None else f"{task.lr:g}",
                    str(task.seed),
                    "diverged" if one.diverged else str(len(one.history) - 1),
                    f"{one.best_epoch}{' *' if index == best else ''}",
                    *("-" if value is None else f"{value:.4f}" for value in seen),
                )
            out.print(table)
        how = f"best of {len(result.history) - 1} epochs: {result.best_epoch}"
        if result.solver == "convex":
            how = f"convex, about {result.freedom:g} numbers left free"
        out.print(
            f"validation accuracy {base.accuracy:.4f} -> {result.val_accuracy:.4f} with "
            f"{result.parameters:,} numbers ({self.method.name}, {self.images} images, {how}, "
            f"{seconds:.1f} s); written to {self.out_folder}",
        )
        if result.val_accuracy is not None and result.val_accuracy < base.accuracy:
            err.print(
                f"This is below the model itself on validation ({result.val_accuracy:.4f} against "
                f"{base.accuracy:.4f}); --method auto keeps the model where nothing is better.",
                soft_wrap=True,
            )
        if base.count < train.FEW:
            err.print(
                f"Only {base.count} validation images chose this; with more, another fit may win.",
                soft_wrap=True,
            )


def _say(number: int, row: train.Epoch) -> None:
    err.print(f"epoch {row.epoch:2d}  validation accuracy {row.val_accuracy:.4f}  loss {row.val_loss:.4f}")
