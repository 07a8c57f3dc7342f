"""How do units lie on disk?

Shards of safetensors, each whole and verified by itself, and a manifest that names them.

A shard holds `shard_images` images (the last one the rest) as tensors z.<kind>, scale, mean, output, labels
and ids, and a header: its index, the run it belongs to, the digest of its first image, and a checksum over
all of it. The manifest is written twice: before the first shard with `"complete": false`, and after the last
one with the shards' names, sizes and checksums and `"complete": true`. Nothing in either depends on when,
where or by how many processes they were made.
"""

import hashlib
import json
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from residual_kernels.files import Head, load_tensors, map_tensors, read_json, save_tensors
from residual_kernels.schema import Count
from residual_kernels.towers import KINDS

MANIFEST, LOCK = "manifest.json", ".lock"
WHAT, SHARD = "unit cache", "unit cache shard"
SHARD_BYTES = 64 * 2**20  # of a shard, about
MAPPED_BYTES = 2**30  # of shards that one cache keeps mapped at a time
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int64": torch.int64,
}
STORED = tuple(name for name in DTYPES if name != "int64")

LARGEST = 2**40  # bytes of a row that a manifest may claim


class Column(TypedDict):
    """One tensor of every shard, without its rows."""

    dtype: str
    shape: list[Count]


class Run(TypedDict):
    """What tells one run from another, and what its first image told."""

    tower: str
    checksum: str
    tower_dtype: str
    preprocessing: str | None
    data: str | None
    kinds: list[str]
    dtype: str
    class_names: list[str] | None
    shard_images: Count
    columns: dict[str, Column]


class ShardRow(TypedDict):
    """A finished shard."""

    file: str
    images: Count
    bytes: Count
    sha256: str


class Manifest(Head):
    """What every manifest holds."""

    complete: bool
    run: Run


class Finished(Manifest):
    """What the manifest of a finished cache holds."""

    images: Count
    shards: list[ShardRow]


class ShardHeader(Head):
    """What a shard says of itself."""

    index: Count
    run: str
    first_image: str


def mark_of(run: dict[str, Any]) -> str:
    """What the shards of a run call it: a checksum of all that tells it from others."""
    return hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()


def shard_name(index: int) -> str:
    return f"shard-{index:05d}.safetensors"


def shard_files(folder: Path) -> dict[int, Path]:
    """The files in a folder that are named as shards are, by index."""
    found = {}
    for path in folder.glob("shard-*.safetensors"):
        number = path.name.removeprefix("shard-").removesuffix(".safetensors")
        if number.isdigit() and path.name == shard_name(int(number)):
            found[int(number)] = path
    return dict(sorted(found.items()))


def write_shard(folder: Path, index: int, tensors: dict[str, Tensor], header: dict[str, Any]) -> dict:
    """Writes one shard and returns its row of the manifest."""
    path = folder / shard_name(index)
    header = save_tensors(path, tensors, SHARD, {"index": index, **header})
    return _row(path, tensors, header)


def _row(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> dict:
    images = len(tensors["ids"])
    return {
        "file": path.name,
        "images": images,
        "bytes": path.stat().st_size,
        "sha256": header["sha256"],
    }


def finished_shard(path: Path, index: int, run: str) -> tuple[dict, dict] | None:
    """(row of the manifest, header) of a shard of this run that is whole, or None."""
    try:
        tensors, header = load_tensors(path, SHARD, ShardHeader)
    except ValueError:
        return None
    if (header["index"], header["run"]) != (index, run) or "ids" not in tensors:
        return None
    return _row(path, tensors, header), header


def read_manifest(folder: Path) -> dict:
    """The manifest of a folder, finished or not; a ValueError names what in it cannot be right."""
    path = folder / MANIFEST
    manifest = read_json(path, WHAT, Manifest)
    if manifest["complete"]:
        manifest = read_json(path, WHAT, Finished)
    wrong = _wrong(manifest)
    if wrong is not None:
        raise ValueError(f"{path}: {wrong}; make it again")
    return manifest


def _wrong(manifest: dict) -> str | None:
    """What in a manifest of the right form cannot be; None where all can."""
    run = manifest["run"]
    columns, kinds = run["columns"], run["kinds"]
    needed = {"scale", "mean", "output", "ids", *(f"z.{kind}" for kind in kinds)}
    if set(kinds) - set(KINDS) or len(set(kinds)) < len(kinds):
        return f"kinds are {', '.join(KINDS)}, not {', '.join(kinds)[:60]}"
    if set(columns) - {"labels"} != needed:
        return f"its columns are {', '.join(columns)[:100]}, where {', '.join(sorted(needed))} belong"
    for name, column in columns.items():
        if column["dtype"] not in DTYPES or math.prod(column["shape"], start=8) > LARGEST:
            return f"the column {name} cannot be {str(column)[:60]}"
        small = name in ("ids", "labels")
        if small != (column["dtype"] == "int64") or (small and column["shape"]):
            return f"the column {name} cannot be {str(column)[:60]}"
    if run["dtype"] not in STORED or run["shard_images"] < 1:
        return f"units cannot be {run['dtype'][:20]}, {run['shard_images']} in a shard"
    if not manifest["complete"]:
        return None
    rows = manifest["shards"]
    for index, row in enumerate(rows):
        if row["file"] != shard_name(index):
            return f"shard {index} is called {row['file'][:60]!r}, where {shard_name(index)} belongs"
    images = [row["images"] for row in rows]
    if not rows or sum(images) != manifest["images"]:
        return f"it counts {manifest['images']} images, and its shards {sum(images)}"
    if (
        any(count != run["shard_images"] for count in images[:-1])
        or not 0 < images[-1] <= run["shard_images"]
    ):
        return f"a shard does not hold {run['shard_images']} images"
    return None


class Shards:
    """The rows of a finished cache, read from mapped shards.

    At most MAPPED_BYTES of shards are mapped at a time, the most recently used ones; what was handed out
    stays valid.
    """

    def __init__(self, folder: Path, rows: Sequence[dict], run: dict[str, Any]):
        self.folder, self.rows = folder, list(rows)
        self.columns, self.mark = run["columns"], mark_of(run)
        counts = torch.tensor([row["images"] for row in self.rows])
        self._ends = counts.cumsum(0)
        self._starts = self._ends - counts
        self._forget()

    def _forget(self) -> None:
        self._mapped: OrderedDict[int, dict[str, Tensor]] = OrderedDict()
        self._bytes = 0
        self._guard = threading.Lock()

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("_mapped", "_bytes", "_guard")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._forget()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def path(self, shard: int) -> Path:
        return self.folder / self.rows[shard]["file"]

    def nbytes(self, names: Iterable[str]) -> int:
        sizes = (self.empty(name, 1).nbytes for name in names)
        return len(self) * sum(sizes)

    def empty(self, name: str, count: int) -> Tensor:
        column = self.columns[name]
        return torch.empty(count, *column["shape"], dtype=DTYPES[column["dtype"]])

    def verify(self, how: str) -> None:
        """Raises FileNotFoundError or ValueError naming a shard that is missing,
        damaged or not the manifest's.

        "full" reads every byte (several shards at a time, in threads); "size" compares the files' sizes only.
        """
        for shard, row in enumerate(self.rows):
            path = self.path(shard)
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing; encode again")
            if path.stat().st_size != row["bytes"] and how == "size":
                raise ValueError(
                    f"{path} is truncated or another file: it has {path.stat().st_size} bytes and its "
                    f"manifest says {row['bytes']}; encode again"
                )
        if how == "full":
            with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
                list(threads.map(self._verify, range(len(self.rows))))

    def _verify(self, shard: int) -> None:
        tensors, header = load_tensors(self.path(shard), SHARD, ShardHeader)
        self._check(shard, tensors, header)

    def _check(self, shard: int, tensors: dict[str, Tensor], header: dict) -> None:
        row, path = self.rows[shard], self.path(shard)
        if (header["sha256"], header["index"], header["run"]) != (row["sha256"], shard, self.mark):
            raise ValueError(f"{path} is not the shard its manifest names; encode again")
        if set(tensors) != set(self.columns):
            odd = sorted(set(tensors) ^ set(self.columns))[0]
            raise ValueError(f"{path} and its manifest do not hold the same columns ({odd}); encode again")
        for name in self.columns:
            expected = self.empty(name, 0)
            found = tensors.get(name)
            shape = (row["images"], *expected.shape[1:])
            if found is None or found.shape != shape or found.dtype != expected.dtype:
                seen = "nothing" if found is None else f"{tuple(found.shape)} {found.dtype}"
                raise ValueError(
                    f"{path} holds {seen} as {name}, but its manifest says {shape} {expected.dtype}"
                )

    def _open(self, shard: int) -> dict[str, Tensor]:
        with self._guard:
            if shard in self._mapped:
                self._mapped.move_to_end(shard)
                return self._mapped[shard]
            tensors, header = map_tensors(self.path(shard), SHARD, ShardHeader)
            self._check(shard, tensors, header)
            self._mapped[shard] = tensors
            self._bytes += self.rows[shard]["bytes"]
            while self._bytes > MAPPED_BYTES and len(self._mapped) > 1:
                oldest, _ = self._mapped.popitem(last=False)
                self._bytes -= self.rows[oldest]["bytes"]
            return tensors

    def run(self, names: Sequence[str], start: int, stop: int) -> dict[str, Tensor]:
        """Rows start ... stop of some columns: views of the mapping where one shard has them all,
        else one copy."""
        first = int(torch.searchsorted(self._ends, start, right=True))
        if start < stop and stop <= self._ends[first]:
            part = slice(start - int(self._starts[first]), stop - int(self._starts[first]))
            tensors = self._open(first)
            return {name: tensors[name][part] for name in names}
        out = {name: self.empty(name, max(0, stop - start)) for name in names}
        for shard in range(first, len(self.rows)):
            low, high = int(self._starts[shard]), int(self._ends[shard])
            if low >= stop:
                break
            begin, end = max(start, low), min(stop, high)
            tensors = self._open(shard)
            for name in names:
                out[name][begin - start : end - start] = tensors[name][begin - low : end - low]
        return out

    def gather(self, names: Sequence[str], rows: Tensor) -> dict[str, Tensor]:
        """Rows by number, in the order asked; each shard is visited once, in the order of its rows."""
        out = {name: self.empty(name, len(rows)) for name in names}
        ordered, places = rows.sort()
        shards, counts = torch.searchsorted(self._ends, ordered, right=True).unique_consecutive(
            return_counts=True
        )
        at = 0
        for shard, count in zip(shards.tolist(), counts.tolist(), strict=True):
            part = slice(at, at + count)
            local = ordered[part] - self._starts[shard]
            tensors = self._open(shard)
            for name in names:
                out[name][places[part]] = tensors[name][local]
            at += count
        return out
