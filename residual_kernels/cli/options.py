"""The options that several commands share, each declared once."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from residual_kernels.adapters.method_names import BASE, NAMES

Model = Annotated[
    str,
    typer.Option(
        help="an open_clip model name, `bundled`, or hf:NAME (transformers: a folder, or a name on the hub)"
    ),
]
Pretrained = Annotated[
    str | None, typer.Option(help="an open_clip tag, a local checkpoint, or `none` for random weights")
]
Data = Annotated[
    Path,
    typer.Option(
        help="an ImageFolder directory, a zip of one (photos.zip/train works too), WebDataset shards "
        "(shards/{000..099}.tar), torchvision:NAME@PART or hf:NAME@PART"
    ),
]
DataRoot = Annotated[
    Path | None,
    typer.Option("--data-root", help="where data sets by name are kept (torchvision:..., hf:...)"),
]
Download = Annotated[bool, typer.Option("--download", help="fetch a data set by name that is not there")]


class OnUnreadable(str, Enum):
    fail = "fail"
    skip = "skip"


Unreadable = Annotated[
    OnUnreadable,
    typer.Option(
        help="an image that cannot be read: an error, or left out and named (reads every image once more)"
    ),
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
Adapter = Annotated[Path, typer.Option(help="the folder that `fit` wrote")]


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


class Rest(str, Enum):
    zero = "zero"
    sum = "sum"
    mean = "mean"
    all = "all"


FitMethod = Enum(  # what `fit` may be asked for: a contest, a probe, or a method that learns something
    "FitMethod", {name: name for name in ("auto", "probe", *(name for name in NAMES if name != BASE))}
)


class DType(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
