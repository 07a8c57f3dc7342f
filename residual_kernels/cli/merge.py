"""merge: an adapter folded away, as a file that runs where this package is absent."""

from pathlib import Path
from typing import Annotated

import typer

from residual_kernels.cli.options import Adapter, Json, Model, Pretrained, Run, run_folder
from residual_kernels.cli.outputs import new_file
from residual_kernels.cli.printing import out, write_numbers
from residual_kernels.data.model_names import BUNDLED

WEIGHTS = ".safetensors"
PICTURES = 8  # that the file is checked with


def merge_command(
    out_file: Annotated[
        Path,
        typer.Option(
            "--out",
            callback=new_file,
            help=".onnx, .pt2 (torch.export), or .safetensors for an adapter in the stream",
        ),
    ],
    run: Run = None,
    adapter: Adapter = None,
    model: Model = BUNDLED,
    pretrained: Pretrained = None,
    json_file: Json = None,
) -> None:
    """Fold an adapter's weights away and write the image encoder
    (.onnx, .pt2) or the whole model's weights."""
    import copy

    import torch

    from residual_kernels.adapters import export
    from residual_kernels.adapters.folder import load_adapter
    from residual_kernels.bundled.drawings import drawn_images
    from residual_kernels.cli.inputs import prepare
    from residual_kernels.cli.merged import embedding, write_weights
    from residual_kernels.data import models as sources

    adapter = run_folder(run, adapter)
    if out_file.suffix not in (*export.ENDINGS, WEIGHTS):
        raise ValueError(f"--out must end with {', '.join((*export.ENDINGS, WEIGHTS))}; got {out_file.name}")
    clip, preprocess, _ = prepare(model, pretrained, "cpu")
    module = load_adapter(sources.image_tower(clip), adapter)
    stream = module.placement == "stream"
    if out_file.suffix == WEIGHTS and not stream:
        raise ValueError(
            f"{adapter} works at the output of the tower, so it does not fold into the weights of the "
            "tower; name a file that "
            "ends with .onnx or .pt2"
        )
    images = torch.stack([preprocess(picture) for picture in drawn_images(PICTURES, seed=0)])
    with torch.no_grad():
        expected = embedding(module(images))
    untouched = copy.deepcopy(clip) if out_file.suffix == WEIGHTS else None
    merged = module.merge()
    error: float | None
    if untouched is not None:
        error = write_weights(clip, untouched, out_file, images, expected)
        what = f"all weights of {model}, under the keys they always had"
    else:
        error = export.write(merged, out_file, images)
        what = f"an image encoder for any number of images {list(images.shape[1:])}"
    size = out_file.stat().st_size
    write_numbers(json_file, {"file": str(out_file), "bytes": size, "relative_error": error})
    out.print(
        f"{out_file}: {what}, {size / 1e6:.1f} MB. On {PICTURES} drawn images its embeddings are within "
        f"{error:.1e} of the adapter's (relative error)."
    )
