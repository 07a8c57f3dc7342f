"""What encoding once and reading again cost: encode to disk against the plain tower,
and a cache's rows per second.

    python -m benchmarks.bench_scale --out benchmarks/results/<device>/scale --folder <folder on the disk to
    measure>

The tower has random weights at its true width and its images are in memory, so that nothing is decoded;
variants take turns in every round, and ratios are of medians of one run. The cache that is read holds random
numbers in a tower's true shapes. `cold` reads follow a request to the system to forget the files; `warm` ones
find them in its memory.
"""

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import open_clip
import torch

import residual_kernels as rk
from benchmarks.cpu_clock import cpu_name, interleaved
from residual_kernels.files import write_json
from residual_kernels.units.cache import shards
from residual_kernels.units.cache.resume import finish

READ_ROWS = 64  # at a time, as a fit reads


def encoding(name: str, batch: int, batches: int, rounds: int, folder: Path) -> dict:
    """Images per second of a tower plain, and encoding to disk."""
    torch.manual_seed(0)
    tower = open_clip.create_model(name).visual.eval()
    images = [torch.randn(batch, 3, *tower.image_size) for _ in range(batches)]
    runs = iter(range(10**6))

    def plain():
        with torch.no_grad():
            for part in images:
                tower(part)

    def encode(kinds: tuple[str, ...], dtype: torch.dtype) -> Callable[[], object]:
        return lambda: rk.encode(tower, images, folder / f"encoded-{next(runs)}", kinds, dtype)

    variants = {
        "plain": plain,
        "encode, heads, bfloat16": encode(("head",), torch.bfloat16),
        "encode, heads and MLPs, float32": encode(("head", "mlp"), torch.float32),
    }
    times = interleaved(variants, rounds)
    size = {
        path.name: sum(file.stat().st_size for file in path.iterdir()) for path in folder.glob("encoded-*")
    }
    for path in size:
        shutil.rmtree(folder / path)
    plain_median = statistics.median(times["plain"])
    rows = {
        variant: {
            "images_per_second": batch * batches / statistics.median(seconds),
            "times_plain": plain_median / statistics.median(seconds),
            "seconds": seconds,
        }
        for variant, seconds in times.items()
    }
    return {"model": name, "batch": batch, "images": batch * batches, "rows": rows}


def synthetic(path: Path, images: int, units: int, width: int, dim: int, dtype: str) -> None:
    """A cache of random heads in these shapes."""
    kinds = {"z.head": (dtype, (units, width)), "scale": ("float32", ()), "mean": ("float32", ())}
    kinds |= {"output": ("float32", (dim,)), "labels": ("int64", ()), "ids": ("int64", ())}
    columns = {name: {"dtype": of, "shape": list(shape)} for name, (of, shape) in kinds.items()}
    one = {name: torch.zeros(1, *shape, dtype=shards.DTYPES[of]) for name, (of, shape) in kinds.items()}
    size = shards.SHARD_BYTES // sum(value.nbytes for value in one.values())
    generator = torch.Generator().manual_seed(0)
    path.mkdir(parents=True)
    rows = {}
    for start in range(0, images, size):
        count = min(size, images - start)
        tensors = {
            name: torch.randn(count, *value.shape[1:], generator=generator).to(value.dtype)
            for name, value in one.items()
        }
        tensors["ids"] = torch.arange(start, start + count)
        rows[start // size] = shards.write_shard(path, start // size, tensors, {"run": "", "first_image": ""})
    run = {
        "tower": "random",
        "checksum": "",
        "tower_dtype": "float32",
        "preprocessing": None,
        "data": None,
        "kinds": ["head"],
        "dtype": dtype,
        "class_names": None,
        "shard_images": size,
        "columns": columns,
    }
    finish(path, run, rows, [images])


def forget(path: Path) -> None:
    """Asks the system to drop a folder's files from its memory."""
    for file in path.iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def reading(images: int, units: int, width: int, dim: int, rounds: int, folder: Path) -> dict:
    """Rates of a pass over a bfloat16 cache, in order and shuffled, and of opening it."""
    path = folder / "read"
    synthetic(path, images, units, width, dim, "bfloat16")
    size = sum(file.stat().st_size for file in path.iterdir())
    order = torch.randperm(images, generator=torch.Generator().manual_seed(1))
    passes = {
        "verified in full": lambda: rk.UnitCache.load(path),
        "sizes compared": lambda: rk.UnitCache.load(path, verify="size"),
        "read in order": lambda: [None for _ in rk.UnitCache.load(path, verify="size").batches(READ_ROWS)],
        "read shuffled": lambda: _shuffled(rk.UnitCache.load(path, verify="size"), order),
    }
    rows = {}
    for name, run in passes.items():
        for state in ("cold", "warm"):
            seconds = []
            for _ in range(rounds):
                if state == "cold":
                    forget(path)
                start = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - start)
            median = statistics.median(seconds)
            rows[f"{name}, {state}"] = {
                "seconds": seconds,
                "gigabytes_per_second": size / median / 1e9,
                "images_per_second": images / median,
            }
    shutil.rmtree(path)
    return {"images": images, "units": units, "width": width, "bytes": size, "rows": rows}


def _shuffled(cache: rk.UnitCache, order: torch.Tensor) -> None:
    for rows in order.split(READ_ROWS):
        cache.terms(rows)


def table(result: dict) -> str:
    """The same numbers as Markdown."""
    lines = [f"CPU: {result['cpu']}, {result['threads']} threads, torch {result['torch']}", ""]
    for tower in result.get("encoding", []):
        lines += [f"{tower['model']}, {tower['images']} images in batches of {tower['batch']}", ""]
        lines += ["| variant | images/s | times plain |", "|---|---|---|"]
        for name, row in tower["rows"].items():
            lines.append(f"| {name} | {row['images_per_second']:.1f} | {row['times_plain']:.2f} |")
        lines.append("")
    if "reading" in result:
        read = result["reading"]
        lines += [
            f"A cache of {read['images']:,} images, {read['units']} heads of {read['width']} in bfloat16, "
            f"{read['bytes'] / 1e9:.2f} GB",
            "",
            "| pass | GB/s | images/s |",
            "|---|---|---|",
        ]
        for name, row in read["rows"].items():
            lines.append(f"| {name} | {row['gigabytes_per_second']:.2f} | {row['images_per_second']:,.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="path of the results, without ending")
    parser.add_argument("--folder", type=Path, required=True, help="an empty folder on the disk to measure")
    parser.add_argument(
        "--parts", nargs="+", choices=["encoding", "reading"], default=["encoding", "reading"]
    )
    parser.add_argument("--models", nargs="+", default=["ViT-B-32", "ViT-B-16"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=40_000, help="in the cache that is read")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    result = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    if "encoding" in arguments.parts:
        result["encoding"] = [
            encoding(name, arguments.batch, arguments.batches, arguments.rounds, arguments.folder)
            for name in arguments.models
        ]
    if "reading" in arguments.parts:  # the heads of ViT-L-14
        result["reading"] = reading(arguments.images, 384, 64, 768, arguments.rounds, arguments.folder)
    write_json(arguments.out.with_suffix(".json"), result)
    text = table(json.loads(arguments.out.with_suffix(".json").read_text()))
    arguments.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
