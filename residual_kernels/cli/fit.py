"""fit: weights for a labelled folder of images, kept as an adapter."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table
from torch.utils.data import DataLoader

from residual_kernels import distributed, train
from residual_kernels.adapters.folder import CONFIG, save_adapter
from residual_kernels.adapters.methods import METHODS, Method, build, identity
from residual_kernels.bases.pca import fit_bases
from residual_kernels.bases.spectral_bases import SpectralBases
from residual_kernels.cli.apart import ADAPTER_FILES
from residual_kernels.cli.fit_auto import AUTO, Contest, check_options, kinds_of, run_contest
from residual_kernels.cli.inputs import Reader, prepare, reads_images
from residual_kernels.cli.options import (
    CONTEST,
    ClassNames,
    Device,
    FitMethod,
    Json,
    Model,
    Pretrained,
    Rest,
    Templates,
    Tokens,
)
from residual_kernels.cli.outputs import folder_of, new_file
from residual_kernels.cli.printing import err, out, write_numbers
from residual_kernels.data import models as sources
from residual_kernels.data import prompts
from residual_kernels.data.classes import Relabelled, positions
from residual_kernels.train.inside import StreamImages, fit_stream
from residual_kernels.train.labels import shots_of
from residual_kernels.train.tuning import PROBE
from residual_kernels.units.cache import HELD_OUT, UnitCache, encode
from residual_kernels.zeroshot import ZeroShotHead


@reads_images
def fit_command(
    data: Annotated[
        Path, typer.Option(help="labelled training images (as for `encode`), or a cache of `encode`")
    ],
    out_folder: Annotated[
        Path, typer.Option("--out", callback=folder_of(*ADAPTER_FILES), help="folder for the adapter")
    ],
    reader: Reader,
    val: Annotated[
        Path | None,
        typer.Option(
            help="validation images of the same classes, or some; by default folds of the training images (auto, "
            "probe), or a fifth of them"
        ),
    ] = None,
    method_name: Annotated[
        FitMethod,
        typer.Option(
            "--method",
            help="auto: the best of the untouched model, anchored, fine, full and class vectors; "
            "probe: a linear probe; or one by name, where stream runs the tower every epoch",
        ),
    ] = CONTEST,
    bases_file: Annotated[
        Path | None, typer.Option("--bases", help="file of `bases`; fitted on --data by default")
    ] = None,
    energy: Annotated[
        float | None, typer.Option(help="fine, stream: explained variance kept per head; 0.90 by default")
    ] = None,
    components: Annotated[
        int | None, typer.Option(min=1, help="fine, stream: keep this many instead")
    ] = None,
    max_components: Annotated[int | None, typer.Option(min=1, help="fine, stream: at most this many")] = None,
    tokens: Annotated[
        Tokens | None, typer.Option(help="stream: tokens to adapt; by default those of the bases, or all")
    ] = None,
    rest: Annotated[
        Rest | None, typer.Option(help="what happens to the other units; by default, the method decides")
    ] = None,
    lr: Annotated[
        list[float] | None,
        typer.Option(help="learning rate, the paper's by default; repeat the option to try several at once"),
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="number of random seeds to fit at once; the best fit is kept")
    ] = 1,
    seed: Annotated[int, typer.Option(help="the first random seed")] = 0,
    epochs: Annotated[
        int | None,
        typer.Option(min=1, help="largest number of passes over the training images; by default 30"),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            min=1, help="stop after this many epochs without a better validation accuracy; by default 5"
        ),
    ] = None,
    shots: Annotated[int | None, typer.Option(min=1, help="fit on this many images of each class")] = None,
    balanced: Annotated[
        bool, typer.Option("--balanced", help="every class counts alike, however many images it has")
    ] = False,
    shrink: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="pull of every weight toward 1, like a weight decay: a share of the learning rate at each step",
        ),
    ] = 0.0,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            callback=new_file, help="file to keep the state in; the same command resumes from there"
        ),
    ] = None,
    prototypes: Annotated[
        bool,
        typer.Option(help="class vectors from training images instead of text; from the --shots where given"),
    ] = False,
    model: Model = sources.BUNDLED,
    pretrained: Pretrained = None,
    class_names: ClassNames = None,
    templates: Templates = None,
    batch_size: Annotated[int, typer.Option(min=1, help="images in a step of the fit")] = 64,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """Learn the weights for a labelled folder of images and keep them as an adapter.

    Under torchrun its processes share every batch of a cache.
    """
    distributed.initialise()
    if (out_folder / CONFIG).exists() or (out_folder.exists() and not out_folder.is_dir()):
        raise FileExistsError(f"{out_folder} exists already; name a new folder for the adapter")
    chosen_rest = rest and rest.value
    contest = method_name.value in (AUTO, PROBE)
    if contest:
        check_options(
            method_name.value,
            {
                "--energy": energy is not None, "--components": components is not None,
                "--max-components": max_components is not None, "--tokens": tokens is not None,
                "--rest": rest is not None, "--lr": bool(lr), "--seeds": seeds > 1, "--epochs": epochs is not None,
                "--patience": patience is not None, "--shrink": bool(shrink), "--checkpoint": checkpoint is not None,
            },
        )  # fmt: skip
    else:
        method = METHODS[method_name.value]
        method.check(rest=chosen_rest, energy=energy, components=components, max_components=max_components)
        if method.runs_the_tower:
            _check_runs(method, checkpoint)
        elif tokens is not None:
            raise ValueError(f"--tokens {tokens.value} belongs to stream; {method.name} works at the output")
    clip, preprocess, tokenizer = prepare(model, pretrained, device)
    tower = sources.image_tower(clip)
    source = reader.open(data, preprocess)
    folders = source.class_names
    if folders is None:
        raise ValueError(f"the cache at {data} holds no class names; encode a folder of classes")

    other = None if val is None else reader.open(val, preprocess)
    places = None if other is None else positions(other.class_names, folders, val, str(data))
    names = reader.class_names(class_names, folders, text=not prototypes)
    stream = None
    if not contest and method.runs_the_tower:
        if not isinstance(source, UnitCache):
            source.class_names = names  # what the head calls these folders
        known = other if places is None or isinstance(other, UnitCache) else Relabelled(other, places)
        stream = StreamImages(source, known, seed, batch_size, reader.workers)
        training, validation, count = None, stream.validation, len(stream)
    else:
        training = reader.cached(tower, source, kinds_of(source) if contest else method.kinds, "encoding")
        if other is not None:
            validation = reader.cached(
                tower, other, kinds_of(source) if contest else method.kinds, "encoding validation"
            )
            validation.labels = torch.tensor(places)[validation.labels]
        elif contest and not prototypes:
            validation = None  # folds judge
        else:  # images that class vectors were made of cannot judge them
            training, validation = training.split(HELD_OUT, seed)
        count = len(training)
        for cache in (training, validation):
            if cache is not None:
                cache.class_names = names  # what the head calls these folders

    if prototypes:
        labels = training.labels if stream is None else stream.labels
        if shots is not None:  # no label beyond those that were asked for
            chosen = shots_of(labels, shots, seed, names)
            if stream is None:
                training = training.subset(chosen)
            else:
                stream.keep(chosen)
            shots, count = None, len(chosen)
        seen = training if stream is None else encode(tower, stream.in_order(), kinds=())
        head = ZeroShotHead.from_prototypes(seen.output, seen.labels, names)
    else:
        head = ZeroShotHead.from_text(clip, tokenizer, names, prompts.templates(templates, model))
    if contest:
        run_contest(
            Contest(
                method_name.value, bases_file, shots, seed, balanced, folders, out_folder, json_file, reader
            ),
            tower, head, training, validation,
        )  # fmt: skip
        distributed.finish()
        return
    fitted = None
    if method.needs_bases or rest is Rest.mean:
        fitted = _bases_for(
            bases_file, tower, training if stream is None else stream.in_order(), method, tokens
        )
    chosen_seeds = range(seed, seed + seeds)
    adapters = [
        build(
            method.name, tower, fitted, rest=chosen_rest, energy=energy, components=components,
            max_components=max_components, seed=one,
        )
        for one in chosen_seeds
    ]  # fmt: skip
    adapter, starts = adapters[0], [one.trainable() for one in adapters]
    for other in adapters[1:]:
        other.detach()
    base = train.evaluate(identity(tower), head, validation)
    first = distributed.rank() == 0
    alone = seeds == 1 and len(lr or [0]) == 1
    options = {
        "epochs": epochs or 30, "patience": patience or 5, "class_weight": "balanced" if balanced else None,
        "shrink": shrink, "batch_size": batch_size,
    }  # fmt: skip
    if stream is not None:
        progress = (lambda row: _say(0, row)) if first and alone else None
        fits = fit_stream(
            adapter, head, stream, lrs=lr, seeds=chosen_seeds, shots=shots, progress=progress, **options
        )
    else:
        fits = train.fit_many(
            adapter, head, training, validation, lrs=lr or None, seeds=chosen_seeds,
            starts=starts if seeds > 1 else None, shots=shots, checkpoint=checkpoint,
            progress=_say if first and alone else None, **options,
        )  # fmt: skip
    fits.put(adapter, fits.best())
    if first:
        save_adapter(adapter, out_folder, head=head, class_names=folders)
        _report(
            fits, base, method, count if shots is None else shots * len(names), out_folder, json_file, reader
        )
    distributed.finish()


def _check_runs(method: Method, checkpoint: Path | None) -> None:
    """Raises ValueError for what only a fit on cached units can do."""
    if checkpoint is not None:
        raise ValueError(
            f"--checkpoint would need cached units, and {method.name} runs the tower; leave it out"
        )
    if distributed.world() > 1:
        raise ValueError(
            f"{method.name} is fitted by one process on the command line; run it without torchrun"
        )


def _say(number: int, row: train.Epoch) -> None:
    err.print(f"epoch {row.epoch:2d}  validation accuracy {row.val_accuracy:.4f}  loss {row.val_loss:.4f}")


def _report(
    fits: train.ManyFits,
    base: train.Evaluation,
    method: Method,
    images: int,
    out_folder: Path,
    json_file: Path | None,
    reader: Reader,
) -> None:
    best = fits.best()
    result = fits.results[best]
    seconds = max(one.seconds for one in fits.results)
    row = result.history[result.best_epoch]
    write_numbers(
        json_file,
        {
            "method": method.name, "base_accuracy": base.accuracy, "val_accuracy": result.val_accuracy,
            "base_balanced_accuracy": base.balanced_accuracy,
            "val_balanced_accuracy": row.val_balanced_accuracy, "lr": fits.tasks[best].lr,
            "seed": fits.tasks[best].seed, "parameters": result.parameters, "seconds": seconds,
            "best_epoch": result.best_epoch, "history": [vars(row) for row in result.history],
            "fits": [
                {
                    "lr": task.lr, "seed": task.seed, "val_accuracy": one.val_accuracy,
                    "best_epoch": one.best_epoch, "epochs": len(one.history) - 1, "diverged": one.diverged,
                }
                for task, one in zip(fits.tasks, fits.results, strict=True)
            ],
            **reader.account(),
        },
    )  # fmt: skip
    reader.report()
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
        f"validation accuracy {base.accuracy:.4f} -> {result.val_accuracy:.4f} with {result.parameters:,} numbers "
        f"({method.name}, {images} images, {how}, {seconds:.1f} s); written to {out_folder}",
    )
    if result.val_accuracy < base.accuracy:
        err.print(
            f"This is below the model itself on validation ({result.val_accuracy:.4f} against {base.accuracy:.4f}); "
            "--method auto keeps the model where nothing is better.",
            soft_wrap=True,
        )
    if base.count < train.FEW:
        err.print(
            f"Only {base.count} validation images chose this; a few more may turn it round.", soft_wrap=True
        )


def _bases_for(
    file: Path | None, tower, training: UnitCache | DataLoader, method: Method, tokens: Tokens | None
) -> SpectralBases:
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
