"""The command line: one program whose commands are the library's main steps, each usable on its own."""

import csv
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch.utils.data import DataLoader

from residual_kernels import sources, train
from residual_kernels.adapter import CONFIG, load_adapter, save_adapter
from residual_kernels.cache import DTYPES, MANIFEST, UnitCache, encode
from residual_kernels.doctor import facts
from residual_kernels.files import SCHEMA, atomic_path, read_json, write_json
from residual_kernels.methods import Method, build, check_options, identity
from residual_kernels.pca import SpectralBases, fit_bases
from residual_kernels.zeroshot import ZeroShotHead

HEAD, CLASSES = "head.safetensors", "classes.json"  # beside an adapter that `fit` wrote
CLASSES_WHAT = "list of class folders"
DEFAULT_TEMPLATES = ("a photo of a {}.",)
BUNDLED_TEMPLATES = ("a {}",)  # what its captions say of anything, drawn or photographed
app = typer.Typer(
    help=__doc__,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
out = Console(markup=False)  # what is printed may hold brackets: class names, paths
err = Console(stderr=True, markup=False)

Model = Annotated[str, typer.Option(help="an open_clip model name, or `bundled`")]
Pretrained = Annotated[
    str | None, typer.Option(help="an open_clip tag, a local checkpoint, or `none` for random weights")
]
Data = Annotated[
    Path, typer.Option(help="an ImageFolder directory, or a zip of one (photos.zip/train works too)")
]
Json = Annotated[Path | None, typer.Option("--json", help="also write the numbers to this file")]
Batch = Annotated[int, typer.Option(min=1, help="images per batch while encoding")]
Workers = Annotated[int, typer.Option(min=0, help="processes that read images")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; the GPU when there is one")]
ClassNames = Annotated[
    str | None, typer.Option(help="file with a class name a line, in the folders' sorted order")
]
Templates = Annotated[
    str | None, typer.Option(help="file with a template a line, or open_clip's `openai` or `simple`")
]


class Kind(str, Enum):
    head = "head"
    mlp = "mlp"
    emb = "emb"


class Rest(str, Enum):
    zero = "zero"
    sum = "sum"
    mean = "mean"


class DType(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@contextmanager
def _bar(title: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr; yields what to call with the number of images done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done: progress.advance(task, done)


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def _loader(data: Any, batch_size: int, workers: int) -> DataLoader:
    return DataLoader(data, batch_size=batch_size, num_workers=workers)


def _prepare(model: str, pretrained: str | None, device: str | None):
    clip, preprocess, tokenizer = sources.load_model(model, pretrained)
    return clip.to(_device(device)), preprocess, tokenizer


def _cached(tower, images, kinds, title: str, batch_size: int, workers: int) -> UnitCache:
    """The images' cache: read before where `--data` named one, made now otherwise."""
    if isinstance(images, UnitCache):
        images.check(tower, kinds)
        return images
    with _bar(title, len(images)) as step:
        return encode(
            tower, _loader(images, batch_size, workers), None, kinds, class_names=images.class_names, progress=step
        )  # fmt: skip


def _write_numbers(path: Path | None, numbers: dict) -> None:
    if path is not None:
        write_json(path, numbers)


@app.command()
def doctor(json_file: Json = None) -> None:
    """What is here: versions, devices, backends, what is missing and how to get it."""
    found = facts()
    table = Table("package", "version", title="Versions")
    for name, version in found["versions"].items():
        table.add_row(name, version)
    out.print(table)
    table = Table("device", "backend", "state", title="Backends (`auto` takes the first that is ready)")
    for device in found["devices"]:
        for name, state in device["backends"].items():
            table.add_row(f"{device['device']} ({device['detail']})", name, state)
    out.print(table)
    _write_numbers(json_file, found)


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--out", help="folder for the pictures")] = Path("demo"),
    json_file: Json = None,
) -> None:
    """The whole story, offline: a small CLIP misreads real handwritten digits, then learns to read them."""
    from residual_kernels import demo as story

    with err.status("starting") as status:
        result = story.run(folder, say=lambda text: status.update(text))
    table = Table(
        "method",
        "accuracy",
        "parameters",
        "seconds",
        title=f"Handwritten digits, {result.test_images} test images",
    )
    for row in result.rows:
        table.add_row(
            row["method"], f"{row['accuracy']:.3f}", f"{row['parameters']:,}", f"{row['seconds']:.1f}"
        )
    out.print(table)
    out.print(result.summary)
    for path in result.pictures:
        out.print(f"  {path}")
    _write_numbers(
        json_file,
        {"rows": result.rows, "seconds": result.seconds, "pictures": [str(p) for p in result.pictures]},
    )


@app.command(name="encode")
def encode_command(
    data: Data,
    out_folder: Annotated[Path, typer.Option("--out", help="a new folder for the cache")],
    model: Model = sources.BUNDLED,
    pretrained: Pretrained = None,
    kinds: Annotated[
        list[Kind] | None, typer.Option(help="units to keep; repeat the option for several")
    ] = None,
    dtype: Annotated[DType, typer.Option(help="of the stored units")] = DType.float32,
    batch_size: Batch = 64,
    workers: Workers = 0,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """Run the tower over a folder of images once and keep its units."""
    clip, preprocess, _ = _prepare(model, pretrained, device)
    images = sources.ImageFiles(data, preprocess)
    chosen = tuple(kind.value for kind in kinds or [Kind.head])
    start = time.perf_counter()
    with _bar("encoding", len(images)) as step:
        cache = encode(
            clip.visual, _loader(images, batch_size, workers), out_folder, chosen, DTYPES[dtype.value],
            class_names=images.class_names, progress=step,
        )  # fmt: skip
    seconds = time.perf_counter() - start
    size = sum(p.stat().st_size for p in out_folder.iterdir())
    out.print(
        f"{len(cache)} images of {len(images.class_names)} classes in {seconds:.1f} s "
        f"({len(cache) / seconds:.0f} a second), {size / 1e6:.1f} MB in {out_folder}"
    )
    _write_numbers(json_file, {"images": len(cache), "seconds": seconds, "bytes": size})


@app.command()
def bases(
    data: Data,
    out_file: Annotated[Path, typer.Option("--out", help="the bases file to write (.safetensors)")],
    model: Model = sources.BUNDLED,
    pretrained: Pretrained = None,
    kinds: Annotated[list[Kind] | None, typer.Option(help="units; repeat the option for several")] = None,
    moments: Annotated[bool, typer.Option(help="keep the moments too, so that files can be merged")] = False,
    batch_size: Batch = 64,
    workers: Workers = 0,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """Fit the principal components of every unit on a folder of images (labels are not used)."""
    clip, preprocess, _ = _prepare(model, pretrained, device)
    images = sources.ImageFiles(data, preprocess, labelled=False)
    chosen = tuple(kind.value for kind in kinds or [Kind.head])
    start = time.perf_counter()
    with _bar("fitting bases", len(images)) as step:
        fitted = fit_bases(clip.visual, _loader(images, batch_size, workers), chosen, progress=step)
    fitted.save(out_file, moments=moments)
    seconds = time.perf_counter() - start
    kept = fitted.truncate(energy=0.90)
    total = {kind: len(fitted.parts[kind].components) for kind in fitted.kinds}
    used = {kind: len(kept.parts[kind].components) for kind in fitted.kinds}
    text = ", ".join(f"{kind}: {total[kind]:,} ({used[kind]:,} hold 90 % of the variance)" for kind in total)
    out.print(f"components of {fitted.count} images in {seconds:.1f} s: {text}; written to {out_file}")
    _write_numbers(
        json_file, {"images": fitted.count, "seconds": seconds, "components": total, "energy_0.90": used}
    )


def _labelled(path: Path, preprocess: Callable) -> "UnitCache | sources.ImageFiles":
    return UnitCache.load(path) if (path / MANIFEST).is_file() else sources.ImageFiles(path, preprocess)


def _split(count: int, part: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held = max(1, round(part * count))
    if count < 2:
        raise ValueError(f"{count} image is too few to hold some out for validation; give --val")
    return order[held:], order[:held]


@app.command(name="fit")
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
    clip, preprocess, tokenizer = _prepare(model, pretrained, device)
    tower = clip.visual
    kinds = method.kinds
    source = _labelled(data, preprocess)
    folders = source.class_names
    if folders is None:
        raise ValueError(f"the cache at {data} holds no class names; encode a folder of classes")
    names = sources.class_names(class_names, folders)

    training = _cached(tower, source, kinds, "encoding", batch_size, workers)
    if val is None:
        chosen, held = _split(len(training), 0.2, seed)
        training, validation = training.subset(chosen), training.subset(held)
    else:
        other = _labelled(val, preprocess)
        if other.class_names != folders:
            raise ValueError(
                f"{val} has other classes than {data}: {_difference(other.class_names or (), folders)}"
            )
        validation = _cached(tower, other, kinds, "encoding validation", batch_size, workers)

    if prototypes:
        head = ZeroShotHead.from_prototypes(training.output, training.labels, names)
    else:
        default = BUNDLED_TEMPLATES if model == sources.BUNDLED else DEFAULT_TEMPLATES
        head = ZeroShotHead.from_text(clip, tokenizer, names, sources.templates(templates, default))
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
    _write_numbers(
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


def _fitted(model, pretrained, device, adapter_folder: Path):
    """The model with a kept adapter, and its head."""
    clip, preprocess, _ = _prepare(model, pretrained, device)
    adapter = load_adapter(clip.visual, adapter_folder)
    for name in (HEAD, CLASSES):
        if not (adapter_folder / name).is_file():
            raise FileNotFoundError(
                f"{adapter_folder} holds no {name}; it was not written by `residual-kernels fit`"
            )
    return adapter, ZeroShotHead.load(adapter_folder / HEAD), preprocess


def _aligned(cache: UnitCache, folders: tuple[str, ...], data: Path) -> UnitCache:
    """The cache with its labels renumbered to the folders that the adapter was fitted to; some may be absent."""
    if cache.class_names is None:
        raise ValueError(f"the cache at {data} holds no class names; encode a folder of classes")
    foreign = [name for name in cache.class_names if name not in folders]
    if foreign:
        raise ValueError(
            f"{data} has classes that the adapter was not fitted to: {', '.join(foreign[:5])}; it knows "
            f"{', '.join(folders[:5])}{' ...' if len(folders) > 5 else ''}"
        )
    cache.labels = torch.tensor([folders.index(name) for name in cache.class_names])[cache.labels]
    return cache


Adapter = Annotated[Path, typer.Option(help="the folder that `fit` wrote")]


@app.command(name="eval")
def eval_command(
    adapter: Adapter,
    data: Data,
    model: Model = sources.BUNDLED,
    pretrained: Pretrained = None,
    batch_size: Batch = 64,
    workers: Workers = 0,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """Accuracy of an adapter, and of the model without it, on a labelled folder of images."""
    module, head, preprocess = _fitted(model, pretrained, device, adapter)
    folders = tuple(read_json(adapter / CLASSES, CLASSES_WHAT, ("folders",))["folders"])
    kinds = getattr(module, "adapted", ())
    cache = _cached(module.tower, _labelled(data, preprocess), kinds, "encoding", batch_size, workers)
    cache = _aligned(cache, folders, data)
    before, after = train.evaluate(identity(module.tower), head, cache), train.evaluate(module, head, cache)
    table = Table("class", "images", "without", "with", title=f"{data}")
    counts = torch.bincount(cache.labels, minlength=len(head.class_names)).tolist()
    for index, name in enumerate(head.class_names):
        table.add_row(
            name,
            str(counts[index]),
            f"{before.class_accuracy[index]:.3f}",
            f"{after.class_accuracy[index]:.3f}",
        )
    table.add_section()
    table.add_row("all", str(after.count), f"{before.accuracy:.3f}", f"{after.accuracy:.3f}")
    out.print(table)
    _write_numbers(
        json_file,
        {
            "images": after.count, "base_accuracy": before.accuracy, "accuracy": after.accuracy, "loss": after.loss,
            "class_accuracy": dict(zip(head.class_names, after.class_accuracy.tolist(), strict=True)),
        },
    )  # fmt: skip


@app.command()
def predict(
    adapter: Adapter,
    data: Annotated[Path, typer.Option(help="a folder of images, flat or nested, or a zip of one")],
    out_file: Annotated[Path, typer.Option("--out", help="the CSV to write: image, label, probability")],
    model: Model = sources.BUNDLED,
    pretrained: Pretrained = None,
    batch_size: Batch = 64,
    workers: Workers = 0,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """Label new images: a CSV of image, label and probability."""
    module, head, preprocess = _fitted(model, pretrained, device, adapter)
    images = sources.ImageFiles(data, preprocess, labelled=False)
    with _bar("reading", len(images)) as step:
        loader = _loader(images, batch_size, workers)
        place = next(module.tower.parameters()).device

        def batches():
            for batch, _ in loader:
                yield batch.to(place)
                step(len(batch))

        found = train.predict(module, head, batches())
    with atomic_path(out_file) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "label", "probability"])
        for name, label, row in zip(images.names, found.labels.tolist(), found.probabilities, strict=True):
            writer.writerow([name, found.class_names[label], f"{row[label]:.6f}"])
    counts = torch.bincount(found.labels, minlength=len(head.class_names)).tolist()
    common = ", ".join(
        f"{n} {name}" for n, name in sorted(zip(counts, head.class_names, strict=True), reverse=True)[:5]
    )
    out.print(f"{len(images)} images labelled ({common}); written to {out_file}")
    _write_numbers(
        json_file, {"images": len(images), "counts": dict(zip(head.class_names, counts, strict=True))}
    )


def main() -> None:
    """Entry point: bad input ends with exit code 2 and one clear line."""
    try:
        app()
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        text = str(error)
        if (
            "Original Traceback" in text
        ):  # from a process that reads images: its last line says what went wrong
            text = text.strip().splitlines()[-1].partition(": ")[2]
        text = " ".join(text.split())
        err.print(f"error: {text}", style="red", soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
