"""fit: weights for a labelled folder of images, kept as an adapter."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from residual_kernels import prompts, sources, train
from residual_kernels.adapter import CONFIG, save_adapter
from residual_kernels.cache import UnitCache
from residual_kernels.cli.inputs import (
    BUNDLED_TEMPLATES,
    CLASSES,
    CLASSES_WHAT,
    DEFAULT_TEMPLATES,
    HEAD,
    cached,
    labelled,
    prepare,
)
from residual_kernels.cli.options import (
    Batch,
    ClassNames,
    Device,
    Json,
    Model,
    Pretrained,
    Rest,
    Templates,
    Workers,
)
from residual_kernels.cli.printing import err, out, write_numbers
from residual_kernels.files import SCHEMA, write_json
from residual_kernels.methods import Method, build, check_options, identity
from residual_kernels.pca import SpectralBases, fit_bases
from residual_kernels.zeroshot import ZeroShotHead


def _split(count: int, part: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held = max(1, round(part * count))
    if count < 2:
        raise ValueError(f"{count} image is too few to hold some out for validation; give --val")
    return order[held:], order[:held]


def fit_command(
    data: Annotated[
        Path, typer.Option(help="training images: ImageFolder, a zip of one, or a cache of `encode`")
    ],
    out_folder: Annotated[Path, typer.Option("--out", help="folder for the adapter")],
    val: Annotated[
        Path | None, typer.Option(help="validation images; a fifth of the training ones by default")
    ] = None,
    method: Annotated[Method, typer.Option(help="the paper's variant")] = Method.fine,
    bases_file: Annotated[
        Path | None, typer.Option("--bases", help="file of `bases`; fitted on --data by default")
    ] = None,
    energy: Annotated[
        float | None, typer.Option(help="fine: explained variance kept per head; 0.90 by default")
    ] = None,
    components: Annotated[int | None, typer.Option(min=1, help="fine: keep this many instead")] = None,
    max_components: Annotated[int | None, typer.Option(min=1, help="fine: at most this many")] = None,
    rest: Annotated[
        Rest | None, typer.Option(help="what becomes of other units; the variant's own by default")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="learning rate; the paper's by default")] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 30,
    patience: Annotated[int, typer.Option(min=1, help="epochs without a better validation accuracy")] = 5,
    seed: int = 0,
    prototypes: Annotated[
        bool, typer.Option(help="class vectors from training images instead of text")
    ] = False,
    model: Model = sources.BUNDLED,
    pretrained: Pretrained = None,
    class_names: ClassNames = None,
    templates: Templates = None,
    batch_size: Batch = 64,
    workers: Workers = 0,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """Learn the weights for a labelled folder of images and keep them as an adapter."""
    if (out_folder / CONFIG).exists() or (out_folder.exists() and not out_folder.is_dir()):
        raise FileExistsError(f"{out_folder} exists already; name a new folder for the adapter")
    chosen_rest = rest and rest.value
    check_options(
        method, rest=chosen_rest, energy=energy, components=components, max_components=max_components
    )
    clip, preprocess, tokenizer = prepare(model, pretrained, device)
    tower = sources.image_tower(clip)
    kinds = method.kinds
    source = labelled(data, preprocess)
    folders = source.class_names
    if folders is None:
        raise ValueError(f"the cache at {data} holds no class names; encode a folder of classes")
    names = prompts.class_names(class_names, folders)

    training = cached(tower, source, kinds, "encoding", batch_size, workers)
    if val is None:
        chosen, held = _split(len(training), 0.2, seed)
        training, validation = training.subset(chosen), training.subset(held)
    else:
        other = labelled(val, preprocess)
        if other.class_names != folders:
            raise ValueError(
                f"{val} has other classes than {data}: {_difference(other.class_names or (), folders)}"
            )
        validation = cached(tower, other, kinds, "encoding validation", batch_size, workers)

    if prototypes:
        head = ZeroShotHead.from_prototypes(training.output, training.labels, names)
    else:
        default = BUNDLED_TEMPLATES if model == sources.BUNDLED else DEFAULT_TEMPLATES
        head = ZeroShotHead.from_text(clip, tokenizer, names, prompts.templates(templates, default))
    fitted = None
    if method.needs_bases or rest is Rest.mean:
        fitted = _bases_for(bases_file, tower, training, kinds)
    adapter = build(
        method, tower, fitted, rest=chosen_rest, energy=energy, components=components,
        max_components=max_components, seed=seed,
    )  # fmt: skip
    base = train.evaluate(identity(tower), head, validation)
    result = train.fit(
        adapter, head, training, validation, lr=lr, epochs=epochs, patience=patience, seed=seed,
        progress=lambda row: err.print(
            f"epoch {row.epoch:2d}  validation accuracy {row.val_accuracy:.4f}  loss {row.val_loss:.4f}",
        ),
    )  # fmt: skip
    head.save(out_folder / HEAD)
    write_json(out_folder / CLASSES, {"schema": SCHEMA, "what": CLASSES_WHAT, "folders": folders})
    save_adapter(adapter, out_folder)  # last: a folder with an adapter is whole
    out.print(
        f"validation accuracy {base.accuracy:.4f} -> {result.val_accuracy:.4f} with {result.parameters:,} numbers "
        f"({method.value}, {len(training)} images, best of {len(result.history) - 1} epochs: {result.best_epoch}, "
        f"{result.seconds:.1f} s); written to {out_folder}",
    )
    write_numbers(
        json_file,
        {
            "method": method.value, "base_accuracy": base.accuracy, "val_accuracy": result.val_accuracy,
            "parameters": result.parameters, "seconds": result.seconds, "best_epoch": result.best_epoch,
            "history": [vars(row) for row in result.history],
        },
    )  # fmt: skip


def _difference(a: tuple[str, ...], b: tuple[str, ...]) -> str:
    only = sorted(set(a) ^ set(b))
    return ", ".join(only[:5]) if only else "the same names in another order"


def _bases_for(file: Path | None, tower, training: UnitCache, kinds: tuple[str, ...]) -> SpectralBases:
    if file is None:
        return fit_bases(tower, training, kinds)
    loaded = SpectralBases.load(file)
    missing = [kind for kind in kinds if kind not in loaded.kinds]
    if missing:
        raise ValueError(
            f"{file} holds no bases of kind {', '.join(missing)}; fit them with --kinds {missing[0]}"
        )
    return loaded
