"""The options that several commands share, each declared once."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from residual_kernels.adapters.method_names import BASE, NAMES
from residual_kernels.cli import outputs

Model = Annotated[
    str,
    typer.Option(
        help="an open_clip model name, `bundled`, or hf:NAME (transformers: a folder, or a name on the hub)"
    ),
]
Pretrained = Annotated[
    str | None,
    typer.Option(
        help="an open_clip tag, a local checkpoint, or `none` for random weights. An open_clip name needs "
        "it; by default, other models use their own weights"
    ),
]
Data = Annotated[
    Path,
    typer.Option(
        help="a folder of class folders, a zip of one (photos.zip/train works too), WebDataset shards "
        "(shards/{000..099}.tar), torchvision:NAME@PART, hf:NAME@PART, or a cache of `encode`"
    ),
]
Source = Annotated[
    Path,
    typer.Option(
        help="a folder of class folders, a zip of one (photos.zip/train works too), WebDataset shards "
        "(shards/{000..099}.tar), torchvision:NAME@PART, or hf:NAME@PART"
    ),
]
DataRoot = Annotated[
    Path | None,
    typer.Option(
        "--data-root",
        help="folder of data sets that are given by name; by default ~/.cache/residual_kernels/datasets "
        "for torchvision:NAME, and the cache of the library `datasets` for hf:NAME",
    ),
]
Download = Annotated[
    bool,
    typer.Option("--download", help="download a data set that is given by name and is not on this machine"),
]


class OnUnreadable(str, Enum):
    fail = "fail"
    skip = "skip"


Unreadable = Annotated[
    OnUnreadable,
    typer.Option(
        help="what to do with an image that cannot be read: fail, or skip it and list it (reads every "
        "image twice)"
    ),
]


class Orientation(str, Enum):
    exif = "exif"
    stored = "stored"


class Identity(str, Enum):
    auto = "auto"
    stat = "stat"
    digest = "digest"


Oriented = Annotated[
    Orientation,
    typer.Option(
        help="exif: turn photographs upright as their EXIF tag says, as viewers do; stored: leave them as "
        "they are stored, as torchvision and open_clip do"
    ),
]
Identified = Annotated[
    Identity,
    typer.Option(
        help="how images are compared with those of an existing cache: digest (their bytes), stat (size "
        "and time of change), or auto: the digest for data below 4 GiB"
    ),
]
ImageColumn = Annotated[
    str | None, typer.Option(help="hf: the column of images; by default the only such column")
]
LabelColumn = Annotated[
    str | None,
    typer.Option(
        help="hf: the column of labels (classes, strings or integers); by default the only such column"
    ),
]
Json = Annotated[
    Path | None,
    typer.Option(
        "--json",
        callback=outputs.json_file,
        help="also write the numbers to this file; - for standard output",
    ),
]
EncodeBatch = Annotated[
    int,
    typer.Option("--encode-batch", "--batch-size", min=1, help="batch size of the tower"),
]
EncodeBatchOnly = Annotated[int, typer.Option("--encode-batch", min=1, help="batch size of the tower")]
Workers = Annotated[int, typer.Option(min=0, help="processes that read images")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; by default the GPU if there is one")]
ClassNames = Annotated[
    str | None,
    typer.Option(
        help="text file with one class name per line, in the order of the folders (numeric if all are "
        "numbers), or lines of folder<TAB>name, or clip_benchmark:NAME; by default the folders' names"
    ),
]
Templates = Annotated[
    str | None,
    typer.Option(
        help="text file with one template per line, open_clip's `openai` or `simple`, or "
        "clip_benchmark:NAME; by default what suits the model"
    ),
]
Adapter = Annotated[Path | None, typer.Option("--adapter", help="the folder that `fit` wrote")]
Run = Annotated[Path | None, typer.Argument(help="the folder that `fit` wrote, in place of --adapter")]
Words = Annotated[
    Path | None,
    typer.Option(
        "--words",
        "--dictionary",
        help="text file with one word or phrase per line; by default the words of the bundled model",
    ),
]


class Kind(str, Enum):
    head = "head"
    mlp = "mlp"
    emb = "emb"
    pool = "pool"


class Placement(str, Enum):
    output = "output"
    stream = "stream"


class Tokens(str, Enum):
    all = "all"
    class_ = "class"
    patches = "patches"


class RestOption(str, Enum):
    zero = "zero"
    sum = "sum"
    mean = "mean"
    all = "all"


# What `fit` may be asked for: a contest, a probe, or a method that learns something.
FitMethod = Enum(  # type: ignore[misc]  # the table of methods has the names: no checker can list them
    "FitMethod", {name: name for name in ("auto", "probe", *(name for name in NAMES if name != BASE))}
)
CONTEST = FitMethod("auto")


class DType(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def run_folder(run: Path | None, adapter: Path | None) -> Path:
    """The one folder of a fitted adapter that RUN or --adapter names."""
    if run is not None and adapter is None:
        return run
    if adapter is not None and run is None:
        return adapter
    raise ValueError("name the folder that `fit` wrote once: as RUN or with --adapter")
