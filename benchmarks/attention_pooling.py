"""What attention pooling costs: bytes and FLOP per image, against the short form that other poolings have.

    python -m benchmarks.attention_pooling --out benchmarks/results/counted/attention_pooling

Nothing is timed. FLOP are counted by torch while the library's own code runs on the meta device, where
tensors have shapes and no values; bytes are of the tensors that it returns or must hold. The short form's
figures are those of the same tower pooled by average behind its norm: C coordinates a head instead of D.
"""

import argparse
import json
from pathlib import Path

import open_clip
import torch
from open_clip.model import _build_vision_tower
from torch.utils.flop_counter import FlopCounterMode

from residual_kernels import towers
from residual_kernels.files import write_json

MODELS = ("ViT-B-16-SigLIP-256", "ViT-SO400M-14-SigLIP-378", "PE-Core-L-14-336", "coca_ViT-L-14")
KEPT = 64  # components a head, for the operator


def counted(run) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        run()
    return counter.get_total_flops()


def measure(name: str, batch: int) -> dict:
    """Per image: the tower plain and with its heads taken apart.

    What is stored, held, and computed after it.
    """
    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        tower = _build_vision_tower(config["embed_dim"], config["vision_cfg"]).eval().requires_grad_(False)
    view = towers.view(tower)
    size = view.image_size
    assert size is not None  # a tower of open_clip has one
    images = torch.empty(batch, 3, *size, device="meta")
    heads, dim = view.layout.layers * view.layout.heads, view.dim
    out = view.out_projection(0)
    width = out.weight.shape[1] // view.layout.heads  # of a head
    with torch.no_grad():
        z = view.terms(images, ("head",)).z["head"]
        plain, apart = counted(lambda: tower(images)), counted(lambda: view.terms(images, ("head",)))
    tokens = view.token_count(images)
    return {
        "model": name,
        "heads": heads,
        "head_width": width,
        "dim": dim,
        "tokens": tokens,
        "batch": batch,
        "tower_flop": plain / batch,
        "apart_flop": apart / batch,
        "z_bytes": z.nbytes / batch,
        "short_z_bytes": heads * width * 4,
        "held_bytes": tokens * heads * width * 4,
        "operator_flop": 2 * heads * KEPT * (dim + dim),
        "short_operator_flop": 2 * heads * KEPT * (width + dim),
        "moment_bytes": 8 * heads * (dim + 2) ** 2,
        "short_moment_bytes": 8 * heads * (width + 2) ** 2,
    }


def table(result: dict) -> str:
    lines = [
        "| model | tower, GFLOP | with heads apart | z of heads | short form | held while it runs | "
        f"operator, K = {KEPT}, MFLOP | short form | moments for bases | short form |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["models"]:
        ratio = row["apart_flop"] / row["tower_flop"]
        lines.append(
            f"| {row['model']} | {row['tower_flop'] / 1e9:.1f} | × {ratio:.2f} | "
            f"{row['z_bytes'] / 1e3:,.0f} kB | {row['short_z_bytes'] / 1e3:.0f} kB | "
            f"{row['held_bytes'] / 1e6:.0f} MB | {row['operator_flop'] / 1e6:.0f} | "
            f"{row['short_operator_flop'] / 1e6:.0f} | {row['moment_bytes'] / 1e9:.2f} GB | "
            f"{row['short_moment_bytes'] / 1e6:.0f} MB |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="path of the results, without ending")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument(
        "--batch", type=int, default=32, help="images; what is folded once a call is shared by them"
    )
    arguments = parser.parse_args()
    result = {
        "torch": torch.__version__,
        "models": [measure(name, arguments.batch) for name in arguments.models],
    }
    write_json(arguments.out.with_suffix(".json"), result)
    text = table(json.loads(arguments.out.with_suffix(".json").read_text()))
    arguments.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
