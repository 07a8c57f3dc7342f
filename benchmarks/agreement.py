"""What does the check against the model itself cost?

Beside an encode of 1,000 images, and in every later forward.

    python -m benchmarks.agreement [--models bundled ViT-B-32 ...] [--images 1000] [--batch 32] [--json FILE]

The check is timed as `encode` runs it: on the first image of the first batch. The encode is timed over
`--images` and scaled to 1,000. `unchanged` is what each later forward pays: whether modules and hooks are
still those of before.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import residual_kernels as rk
from residual_kernels import towers
from residual_kernels.data.models import image_tower, load_model
from residual_kernels.towers import agreement
from residual_kernels.towers.watch import Watch

REPEATS = 5


def seconds(run, repeats: int = REPEATS) -> float:
    """The median of several runs, after one that does not count."""
    run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]


def measure(name: str, images: int, batch: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    model = load_model(name, None if name == "bundled" else "none")[0].to(device)
    tower = image_tower(model).to(dtype).eval()
    view = towers.view(tower)
    size = view.image_size or (224, 224)
    pictures = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    batches = max(1, images // batch)
    check = seconds(lambda: agreement.compare(view, pictures[:1]))
    watch = Watch(tower)
    unchanged = seconds(lambda: [watch.unchanged() for _ in range(100)]) / 100
    encode = (
        seconds(lambda: rk.encode(tower, [pictures] * batches, check=False), 1) * 1000 / (batches * batch)
    )
    return {
        "model": name,
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "check_s": check,
        "encode_1000_s": encode,
        "share": check / encode,
        "unchanged_us": unchanged * 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["bundled", "ViT-B-32"])
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    rows = []
    for name in chosen.models:
        row = measure(name, chosen.images, chosen.batch, chosen.device, getattr(torch, chosen.dtype))
        rows.append(row)
        print(
            f"{row['model']:12} check {row['check_s'] * 1e3:7.1f} ms, encode of 1,000 images "
            f"{row['encode_1000_s']:7.2f} s: {100 * row['share']:.2f} %; unchanged "
            f"{row['unchanged_us']:.0f} us"
        )
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
