"""fit: weights for a labelled folder of images, kept as an adapter."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from residual_kernels.cli.apart import ADAPTER_FILES
from residual_kernels.cli.image_options import reads_images
from residual_kernels.cli.options import (
    CONTEST,
    ClassNames,
    Device,
    FitMethod,
    Json,
    Model,
    Pretrained,
    RestOption,
    Templates,
    Tokens,
)
from residual_kernels.cli.outputs import folder_of, new_file
from residual_kernels.data.model_names import BUNDLED

if TYPE_CHECKING:
    from torch import nn

    from residual_kernels.cli.inputs import Reader
    from residual_kernels.data.classes import Relabelled
    from residual_kernels.data.images.dataset import Images
    from residual_kernels.units.cache import UnitCache


@reads_images
def fit_command(
    data: Annotated[
        Path, typer.Option(help="labelled training images (as for `encode`), or a cache of `encode`")
    ],
    out_folder: Annotated[
        Path, typer.Option("--out", callback=folder_of(*ADAPTER_FILES), help="folder for the adapter")
    ],
    reader: "Reader",
    val: Annotated[
        Path | None,
        typer.Option(
            help="validation images; some classes may be missing. By default, auto and probe use folds of "
            "the training images, and other methods hold out a fifth of them"
        ),
    ] = None,
    method_name: Annotated[
        FitMethod,
        typer.Option(
            "--method",
            help="auto: the best of the untouched model, anchored, fine, full and class vectors; "
            "probe: a linear probe; otherwise the method of that name (stream runs the tower in every epoch)",
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
        RestOption | None,
        typer.Option(help="what happens to the other units; by default, the method decides"),
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
        typer.Option(min=1, help="most passes over the training images; by default 30"),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            min=1, help="stop after this many epochs without a better validation accuracy; by default 5"
        ),
    ] = None,
    shots: Annotated[int | None, typer.Option(min=1, help="fit on this many images of each class")] = None,
    balanced: Annotated[
        bool, typer.Option("--balanced", help="give every class the same weight, however many images it has")
    ] = False,
    shrink: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="pull weights toward 1, as weight decay pulls them toward 0; times the learning rate at "
            "each step",
        ),
    ] = 0.0,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            callback=new_file, help="file for the state of the fit; the same command resumes from it"
        ),
    ] = None,
    prototypes: Annotated[
        bool,
        typer.Option(
            help="make class vectors from training images (with --shots, from those) instead of text"
        ),
    ] = False,
    model: Model = BUNDLED,
    pretrained: Pretrained = None,
    class_names: ClassNames = None,
    templates: Templates = None,
    batch_size: Annotated[int, typer.Option(min=1, help="images in a step of the fit")] = 64,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """Fit an adapter to labelled images, and write it to a folder.

    Under torchrun its processes share every batch of a cache.
    """
    from residual_kernels import distributed
    from residual_kernels.adapters.folder import CONFIG
    from residual_kernels.adapters.methods import METHODS, Method
    from residual_kernels.cli.fit_auto import AUTO, AutoFit, check_options, kinds_of, run_contest
    from residual_kernels.cli.fit_method import MethodFit, check_runs
    from residual_kernels.cli.inputs import prepare
    from residual_kernels.data import models as sources
    from residual_kernels.data import prompts
    from residual_kernels.data.classes import positions
    from residual_kernels.train.contest import PROBE
    from residual_kernels.train.inside import StreamImages
    from residual_kernels.train.labels import shots_of
    from residual_kernels.units.cache import HELD_OUT, UnitCache, encode
    from residual_kernels.zeroshot import ZeroShotHead

    distributed.initialise()
    if (out_folder / CONFIG).exists() or (out_folder.exists() and not out_folder.is_dir()):
        raise FileExistsError(f"{out_folder} exists already; name a new folder for the adapter")
    method = None if method_name.value in (AUTO, PROBE) else METHODS[method_name.value]
    if method is None:
        check_options(
            method_name.value,
            {
                "--energy": energy is not None,
                "--components": components is not None,
                "--max-components": max_components is not None,
                "--tokens": tokens is not None,
                "--rest": rest is not None,
                "--lr": bool(lr),
                "--seeds": seeds > 1,
                "--epochs": epochs is not None,
                "--patience": patience is not None,
                "--shrink": bool(shrink),
                "--checkpoint": checkpoint is not None,
            },
        )
    else:
        given = {"energy": energy, "components": components, "max_components": max_components}
        method.check(rest=rest and rest.value, **given)
        check_runs(method, checkpoint, tokens)
    clip, preprocess, tokenizer = prepare(model, pretrained, device)
    tower = sources.image_tower(clip)
    source = reader.open(data, preprocess)
    folders = source.class_names
    if folders is None:
        raise ValueError(f"the cache at {data} holds no class names; encode a folder of classes")
    judges = None
    if val is not None:
        other = reader.open(val, preprocess)
        judges = _Judges(val, other, positions(other.class_names, folders, val, str(data)))
    names = reader.class_names(class_names, folders, text=not prototypes)
    texts = prompts.for_head(templates, model, prototypes)

    def head_from(seen: Callable[[], UnitCache]) -> ZeroShotHead:
        if texts is None:
            cache = seen()
            return ZeroShotHead.from_prototypes(cache.output, cache.truth, names)
        return ZeroShotHead.from_text(clip, tokenizer, names, texts)

    def fit_of(method: Method, shots: int | None, images: int) -> MethodFit:
        return MethodFit(
            method=method,
            bases_file=bases_file,
            rest=rest,
            energy=energy,
            components=components,
            max_components=max_components,
            tokens=tokens,
            lrs=lr or None,
            seeds=range(seed, seed + seeds),
            epochs=epochs or 30,
            patience=patience or 5,
            shots=shots,
            class_weight="balanced" if balanced else None,
            shrink=shrink,
            checkpoint=checkpoint,
            batch_size=batch_size,
            images=images if shots is None else shots * len(names),
            folders=folders,
            out_folder=out_folder,
            json_file=json_file,
            reader=reader,
        )

    few = shots if prototypes else None  # class vectors use no label beyond the shots
    if few is not None:
        shots = None
    if method is not None and method.runs_the_tower:
        images = reader.only_images(source, data)
        images.class_names = names  # what the head calls these folders
        known = None if judges is None else judges.images(reader)
        stream = StreamImages(images, images.labels, known, seed, batch_size, reader.workers)
        count = len(stream)
        if few is not None:
            stream.keep(shots_of(stream.labels, few, seed, names))
            count = len(stream)
        head = head_from(lambda: encode(tower, stream.in_order(), kinds=()))
        fit_of(method, shots, count).on_images(tower, head, stream)
        distributed.finish()
        return
    kinds = kinds_of(source) if method is None else method.kinds
    training = reader.cached(tower, source, kinds, "encoding")
    validation = None
    if judges is not None:
        validation = judges.cache(reader, tower, kinds)
    elif method is not None or prototypes:  # images that class vectors were made of cannot judge them
        training, validation = training.split(HELD_OUT, seed)
    for cache in (training, validation):
        if cache is not None:
            cache.class_names = names  # what the head calls these folders
    if few is not None:
        training = training.subset(shots_of(training.truth, few, seed, names))
    head = head_from(lambda: training)
    if method is None:  # without validation images, folds judge
        contest = AutoFit(
            method_name.value, bases_file, shots, seed, balanced, folders, out_folder, json_file, reader
        )
        run_contest(contest, tower, head, training, validation)
    elif validation is not None:
        fit_of(method, shots, len(training)).on_units(tower, head, training, validation)
    distributed.finish()


@dataclass(frozen=True)
class _Judges:
    """What `--val` named, and where its classes stand among those of `--data`."""

    path: Path
    source: "UnitCache | Images"
    places: list[int]

    def images(self, reader: "Reader") -> "Relabelled":
        from residual_kernels.data.classes import Relabelled

        return Relabelled(reader.only_images(self.source, self.path), self.places)

    def cache(self, reader: "Reader", tower: "nn.Module", kinds: Iterable[str]) -> "UnitCache":
        import torch

        cache = reader.cached(tower, self.source, kinds, "encoding validation")
        cache.labels = torch.tensor(self.places)[cache.truth]
        return cache
