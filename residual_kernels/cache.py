"""The backbone is frozen, so its work is done once: encoded units on disk or in memory.

A cache on disk is a folder of safetensors shards and a JSON manifest, which is written last: a folder without one is
not a cache.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from residual_kernels import towers
from residual_kernels.decomposition import checked_batches, checked_labels
from residual_kernels.files import SCHEMA, load_tensors, read_json, save_tensors, write_json
from residual_kernels.towers import Terms

MANIFEST = "manifest.json"
WHAT, SHARD = "unit cache", "unit cache shard"
SHARD_BYTES = 256 * 2**20
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class UnitCache:
    """What a fit needs of every image and nothing more.

    Attributes:
        z: kind -> [N, R, C] in the cache's dtype.
        scale, mean: [N], s and m of the final norm; output: [N, D]; at least float32.
        labels: [N] int64, or None; ids: [N] int64, the position of each image in the data it came from.
        class_names: names of the labels, or None.
        checksum: of the tower that made it.
    """

    def __init__(
        self,
        z: dict[str, Tensor],
        scale: Tensor,
        mean: Tensor,
        output: Tensor,
        labels: Tensor | None,
        ids: Tensor,
        checksum: str,
        class_names: Sequence[str] | None = None,
    ):
        self.z, self.scale, self.mean, self.output, self.labels, self.ids = (
            z,
            scale,
            mean,
            output,
            labels,
            ids,
        )
        self.checksum = checksum
        self.class_names = None if class_names is None else tuple(class_names)

    def __len__(self) -> int:
        return len(self.output)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{kind} {tuple(value.shape[1:])} {value.dtype}" for kind, value in self.z.items())
        return f"UnitCache(images={len(self)}, {shapes or 'outputs only'}, labels={self.labels is not None})"

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(self.z)

    def terms(self, rows: Tensor | slice, device: torch.device | str = "cpu") -> Terms:
        """The terms of some rows, for `from_units`; z widened to the outputs' dtype."""
        wide = self.output.dtype  # widened where it arrives, so that the narrow dtype is what travels
        return Terms(
            z={kind: value[rows].to(device).to(wide) for kind, value in self.z.items()},
            scale=self.scale[rows].to(device),
            mean=self.mean[rows].to(device),
            output=self.output[rows].to(device),
        )

    def batches(self, size: int, device: torch.device | str = "cpu") -> Iterator[Terms]:
        """The terms of all rows in order, at most `size` at a time."""
        if size < 1:
            raise ValueError(f"a batch holds at least one row; got size {size}")
        for start in range(0, len(self), size):
            yield self.terms(slice(start, start + size), device)

    def subset(self, rows: Tensor) -> "UnitCache":
        """A cache of some rows, in memory."""
        return UnitCache(
            {kind: value[rows] for kind, value in self.z.items()},
            self.scale[rows], self.mean[rows], self.output[rows],
            None if self.labels is None else self.labels[rows], self.ids[rows], self.checksum, self.class_names,
        )  # fmt: skip

    def check(self, tower: nn.Module, kinds: Iterable[str]) -> None:
        """Raises ValueError unless this cache was made by this very tower and holds these kinds."""
        missing = [kind for kind in kinds if kind not in self.kinds]
        if missing:
            raise ValueError(
                f"this cache holds no terms of kind {', '.join(missing)}; encode with kinds that include it"
            )
        found = towers.checksum(tower)
        if found != self.checksum:
            raise ValueError(
                f"this cache was encoded by a tower with other weights (checksum {self.checksum[:12]}, this tower has "
                f"{found[:12]}); encode again"
            )

    @classmethod
    def load(cls, path: str | os.PathLike) -> "UnitCache":
        """Reads a cache folder; FileNotFoundError or ValueError when it is absent, unfinished, or damaged."""
        path = Path(path)
        if not (path / MANIFEST).is_file():
            raise FileNotFoundError(
                f"no unit cache at {path} ({MANIFEST} is missing: encoding did not finish there)"
            )
        manifest = read_json(path / MANIFEST, WHAT, ("shards", "kinds", "checksum", "class_names"))
        if not manifest["shards"]:
            raise ValueError(f"{path / MANIFEST} names no shards; encode again")
        parts = []
        for shard in manifest["shards"]:
            tensors, header = load_tensors(path / shard["file"], SHARD)
            if header["sha256"] != shard["sha256"]:
                raise ValueError(f"{path / shard['file']} is not the shard its manifest names; encode again")
            parts.append(tensors)
        return cls(
            **_joined(parts, manifest["kinds"]),
            checksum=manifest["checksum"],
            class_names=manifest["class_names"],
        )


def _joined(parts: list[dict[str, Tensor]], kinds: Iterable[str]) -> dict:
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return {
        "z": {kind: joined[f"z.{kind}"] for kind in kinds},
        **{name: joined.get(name) for name in ("scale", "mean", "output", "labels", "ids")},
    }


def encode(
    tower: nn.Module,
    loader: Iterable,
    path: str | os.PathLike | None = None,
    kinds: Iterable[str] = ("head",),
    dtype: torch.dtype | None = None,
    *,
    class_names: Sequence[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> UnitCache:
    """Runs a tower over a data set once and keeps the units' coordinates.

    Args:
        tower: a supported image tower, or an adapter around one.
        loader: yields images [N, 3, H, W], or (images, labels).
        path: a new or empty folder for the cache; None keeps it in memory only.
        kinds: which units' z to keep; () for the outputs only. A fit with rest="sum" needs just the adapted kinds.
        dtype: of the stored z; the tower's own by default. s, m and the output keep at least float32.
        class_names: names of the labels, kept in the manifest.
        progress: called with the number of images after every batch.

    Returns:
        The :class:`UnitCache`.

    Raises:
        FileExistsError: `path` holds a finished cache or other files.
        ValueError: no images, images the tower cannot take, labels on some batches only, or labels out of range.

    Whatever stops it, what it had written is removed.
    """
    view = towers.view(towers.unwrap(tower))
    view.check_mode()
    kinds = towers.check_kinds(kinds, view.layout) if kinds else ()
    weight = next(view.module.parameters())
    dtype = weight.dtype if dtype is None else dtype
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype}")
    if path is not None:
        path = Path(path)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise FileExistsError(f"{path} exists and is not empty; name a new folder for this cache")

    writer = _Writer(path)
    try:
        checksum = towers.checksum(view.module)
        count = _encode_into(writer, view, loader, kinds, dtype, class_names, progress)
        parts = writer.finish()
        if path is not None:
            manifest = {
                "schema": SCHEMA, "what": WHAT, "tower": view.name, "checksum": checksum, "images": count,
                "kinds": list(kinds), "dtype": str(dtype).removeprefix("torch."),
                "class_names": None if class_names is None else list(class_names), "shards": writer.shards,
            }  # fmt: skip
            write_json(path / MANIFEST, manifest)
    except BaseException:
        writer.discard()
        raise
    return UnitCache(**_joined(parts, kinds), checksum=checksum, class_names=class_names)


def _encode_into(
    writer: "_Writer",
    view: towers.Tower,
    loader: Iterable,
    kinds: tuple[str, ...],
    dtype: torch.dtype,
    class_names: Sequence[str] | None,
    progress: Callable[[int], None] | None,
) -> int:
    """Encodes every batch and returns the number of images."""
    count, labelled = 0, None
    for images, labels in checked_batches(view, loader):
        if labelled is not None and labelled != (labels is not None):
            raise ValueError("some batches have labels and some have none; give labels for all or for none")
        labelled = labels is not None
        with torch.no_grad():
            terms = view.terms(images, kinds)
        row = {f"z.{kind}": terms.z[kind].to(dtype) for kind in kinds}
        row |= {"scale": terms.scale, "mean": terms.mean, "output": terms.output.to(terms.scale.dtype)}
        if labelled:
            row["labels"] = checked_labels(labels, len(images), class_names)
        row["ids"] = torch.arange(count, count + len(images))
        writer.add({name: value.cpu() for name, value in row.items()})
        count += len(images)
        if progress is not None:
            progress(len(images))
    if not count:
        raise ValueError("the loader gave no images to encode")
    return count


class _Writer:
    """Gathers batches into shards of about SHARD_BYTES and, with a path, writes each as it fills."""

    def __init__(self, path: Path | None):
        self.path = path
        self._made = path is not None and not path.exists()
        self.shards: list[dict[str, str]] = []
        self._parts: list[dict[str, Tensor]] = []
        self._open: list[dict[str, Tensor]] = []
        self._bytes = 0

    def add(self, row: dict[str, Tensor]) -> None:
        self._open.append(row)
        self._bytes += sum(value.nbytes for value in row.values())
        if self._bytes >= SHARD_BYTES:
            self._close()

    def _close(self) -> None:
        if not self._open:
            return
        shard = {name: torch.cat([row[name] for row in self._open]) for name in self._open[0]}
        if self.path is not None:
            file = f"shard-{len(self.shards):05d}.safetensors"
            header = save_tensors(self.path / file, shard, SHARD, {})
            self.shards.append({"file": file, "sha256": header["sha256"]})
        self._parts.append(shard)
        self._open, self._bytes = [], 0

    def finish(self) -> list[dict[str, Tensor]]:
        self._close()
        return self._parts

    def discard(self) -> None:
        """Removes what was written, after a failure."""
        for shard in self.shards:
            (self.path / shard["file"]).unlink(missing_ok=True)
        if self.path is not None and self._made:
            shutil.rmtree(self.path, ignore_errors=True)
