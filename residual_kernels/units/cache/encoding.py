"""How is a cache made?

In one pass of the tower over the data, which can be interrupted, and shared by processes.
"""

import contextlib
import logging
import os
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from residual_kernels import distributed, towers
from residual_kernels.files import SCHEMA, map_tensors, write_json
from residual_kernels.partial_files import remove_partials
from residual_kernels.units.cache.resume import UNFINISHED, check_extent, finish, is_whole, lock, manifest_of
from residual_kernels.units.cache.shards import (
    DTYPES,
    LOCK,
    MANIFEST,
    SHARD,
    SHARD_BYTES,
    STORED,
    WHAT,
    ShardHeader,
    finished_shard,
    mark_of,
    shard_files,
    shard_name,
    write_shard,
)
from residual_kernels.units.cache.unit_cache import UnitCache
from residual_kernels.units.checks import repetition
from residual_kernels.units.loader import (
    ALL,
    FIRST,
    KEPT,
    NONE,
    LoadedUnits,
    Stream,
    UnitBatch,
    data_of,
    preprocessing_of,
    resumable,
)

log = logging.getLogger(__name__)


def encode(
    tower: nn.Module,
    loader: Iterable,
    path: str | os.PathLike | None = None,
    kinds: Iterable[str] = ("head",),
    dtype: torch.dtype | None = None,
    *,
    class_names: Sequence[str] | None = None,
    progress: Callable[[int], None] | None = None,
    preprocessing: str | None = None,
    data: str | None = None,
    shard_images: int | None = None,
    timeout: float = distributed.TIMEOUT,
    check: bool = True,
) -> UnitCache:
    """Runs a tower over a data set once and keeps the units' coordinates.

    Args:
        tower: a supported image tower, or an adapter around one.
        loader: yields images [N, 3, H, W], or (images, labels), in an order that is always the same.
        path: a folder for the cache; None keeps it in memory only (and then every process of several encodes
            all).
        kinds: which units' z to keep; () for the outputs only. A fit with rest="sum" needs just the adapted
            kinds.
        dtype: of the stored z; the tower's own by default. s, m and the output keep at least float32.
        class_names: names of the labels, kept in the manifest. A warning names those that stand more than
            once.
        progress: called with the number of images after every batch; first with those kept from an
            interrupted run.
        preprocessing, data: descriptions that tell one run from another. By default the text of the data
            set's `preprocess` or `transform`, and its `fingerprint()`, where the loader is a DataLoader over
            one with them.
        shard_images: images in a shard; by default as many batches as make about 64 MiB.
        timeout: seconds that one of several processes waits at the end for another that is at work or hangs.
        check: compare the first image with the model's own forward, as :func:`residual_kernels.decompose`
            does.

    Returns:
        The :class:`UnitCache`; with a path, mapped from there.

    Raises:
        FileExistsError: `path` holds other files, or a finished cache and these data have no description.
        BlockingIOError: another process is encoding into `path`.
        ValueError: `path` holds a cache of another tower, preprocessing, data, kinds or dtype (both are
            named); no images, images the tower cannot take, units that are NaN or Inf in `dtype`, labels on
            some batches only or out of range, a loader that shuffles (with a path).
        OSError: the disk is full or cannot be written to.

    An interrupted run is resumed by the same call: finished shards are kept (each is whole on the disk before
    the next is begun to be written), the tower runs for the other images only, and in the end the files are
    byte for byte those of an undisturbed run with the same batches and number of threads. A DataLoader that
    reads a data set in order and joins images in the default way does not open the images of finished shards,
    but for the first of each, which must be the one that the shard was made from; other loaders are read and
    passed over. The same call on a finished cache returns it, after making damaged or missing shards again. A
    failure leaves finished shards, and nothing where there is none.

    In a process group (torchrun) the processes share the shards, which must lie on a file system that all
    see. Each gives the same loader and gets the whole cache. When one dies the others raise RuntimeError; the
    next run resumes.

    Memory, besides the tower, its batch and the loader: two shards, one being filled and one being written,
    and 16 bytes an image for labels and ids when the cache is opened at the end.
    """
    if (repeated := repetition(class_names or ())) is not None:
        warnings.warn(f"{repeated}: these labels are told apart by number alone", stacklevel=2)
    view = towers.view_inside(tower, check)
    view.check_mode()
    kinds = towers.check_kinds(kinds, view.layout) if kinds else ()
    weight = next(view.module.parameters())
    dtype = weight.dtype if dtype is None else dtype
    if dtype not in (DTYPES[name] for name in STORED):
        raise ValueError(f"dtype must be one of {', '.join(STORED)}; got {dtype}")
    if shard_images is not None and shard_images < 1:
        raise ValueError(f"a shard holds at least one image; got shard_images={shard_images}")
    reader = Stream(loader) if path is None else resumable(loader)
    source = LoadedUnits(reader, view, kinds, KEPT, class_names=class_names)
    if path is None:
        return _in_memory(source, dtype, progress)
    run = {
        "tower": view.name,
        "checksum": towers.checksum(view.module),
        "tower_dtype": _dtype_name(weight.dtype),
        "preprocessing": preprocessing_of(loader) if preprocessing is None else preprocessing,
        "data": data_of(loader) if data is None else data,
        "kinds": list(kinds),
        "dtype": _dtype_name(dtype),
        "class_names": None if class_names is None else list(class_names),
    }
    cache = _on_disk(source, Path(path), run, shard_images, progress, timeout)
    log.info("cache of %d images at %s", len(cache), path)
    return cache


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Leaving:
    """What is kept of some images, on its way from the tower's device; :meth:`arrived` waits for it."""

    def __init__(self, batch: UnitBatch, kinds: Iterable[str], dtype: torch.dtype):
        self.batch = batch
        terms = batch.terms
        columns = {f"z.{kind}": terms.z[kind].to(dtype) for kind in kinds}
        columns |= {"scale": terms.scale, "mean": terms.mean, "output": terms.output.to(terms.scale.dtype)}
        sound = torch.stack([value.sum().isfinite() for value in columns.values()])
        self.sound = sound.to("cpu", non_blocking=True)  # into pinned memory, which torch uses again
        self.columns = {name: value.to("cpu", non_blocking=True) for name, value in columns.items()}
        self._there: torch.cuda.Event | None = None
        if sound.device.type == "cuda":
            self._there = torch.cuda.Event()
            self._there.record()
        elif sound.device.type != "cpu":  # other devices have other events
            torch.accelerator.synchronize(sound.device)

    def arrived(self) -> dict[str, Tensor]:
        """The columns, on the CPU; ValueError where the tower gave NaN or Inf."""
        if self._there is not None:
            self._there.synchronize()
        for (name, value), sound in zip(self.columns.items(), self.sound.tolist(), strict=True):
            if sound:  # a sum may overflow, so it only raises suspicion
                continue
            bad = (~value.reshape(len(value), -1).isfinite().all(1)).nonzero()
            if len(bad):
                raise ValueError(
                    f"the tower gives NaN or Inf as {name} of image {int(self.batch.rows[bad[0]])} in "
                    f"{value.dtype}; use a tower or a dtype with more range (bfloat16, float32), or look "
                    "at its weights"
                )
        columns = dict(self.columns)
        if self.batch.labels is not None:
            columns["labels"] = self.batch.labels
        columns["ids"] = self.batch.rows
        return columns


def _encoded(
    batches: Iterable[UnitBatch], kinds: Iterable[str], dtype: torch.dtype
) -> Iterator[tuple[UnitBatch, dict[str, Tensor]]]:
    """Batches with their columns.

    A device computes the next batch while the host has the last one in hand.
    """
    waiting: _Leaving | None = None
    for batch in batches:
        leaving = _Leaving(batch, kinds, dtype)
        if waiting is not None:
            yield waiting.batch, waiting.arrived()
        waiting = leaving
        if batch.pixels.device.type == "cpu":  # nothing to overlap: what is made is kept at once
            yield batch, waiting.arrived()
            waiting = None
    if waiting is not None:
        yield waiting.batch, waiting.arrived()


def _in_memory(source: LoadedUnits, dtype: torch.dtype, progress: Callable[[int], None] | None) -> UnitCache:
    kept = []
    for batch, columns in _encoded(source.batches(), source.kinds, dtype):
        kept.append(columns)
        if progress is not None:
            progress(len(batch))
    if not kept:
        raise ValueError("the loader gave no images to encode")
    joined = {name: torch.cat([one[name] for one in kept]) for name in kept[0]}
    return UnitCache(
        {kind: joined[f"z.{kind}"] for kind in source.kinds},
        joined["scale"],
        joined["mean"],
        joined["output"],
        joined.get("labels"),
        joined["ids"],
        towers.checksum(source.view.module),
        source.class_names,
    )


def _on_disk(
    source: LoadedUnits,
    path: Path,
    run: dict[str, Any],
    shard_images: int | None,
    progress: Callable[[int], None] | None,
    timeout: float,
) -> UnitCache:
    rank, world = distributed.rank(), distributed.world()
    with contextlib.ExitStack() as stack:
        run, finished = distributed.from_first(lambda: _begin(stack, source, path, run, shard_images))
        if finished:
            return UnitCache.load(path, verify="size")
        size = run["shard_images"]
        mark = mark_of(run)
        source.labelled = "labels" in run["columns"]

        mine = {}  # what each process has verified of the finished shards
        for index, file in shard_files(path).items():
            if index % world == rank:
                found = finished_shard(file, index, mark)
                if found is not None:
                    mine[index] = found
        done = dict(sorted(pair for part in distributed.gather(list(_rows(mine).items())) for pair in part))
        check_extent(path, done, size, source.reader.count)
        if progress is not None and mine:
            progress(sum(row["images"] for row in _rows(mine).values()))
        before = list(done)

        def need(shard: int) -> str:
            if shard in done:
                return FIRST if shard in mine else NONE
            turn = shard - bisect_left(before, shard)  # its number among those to make
            return ALL if turn % world == rank else NONE

        writer = stack.enter_context(_Writer(path, size, run["columns"], mark))
        dtype = DTYPES[run["dtype"]]

        def unchanged(batch: UnitBatch) -> bool:
            """Whether a piece is the first image of a finished shard,
            which must be the one that it was made from."""
            first = int(batch.rows[0])
            found = mine.get(first // size)
            if found is not None and found[1]["first_image"] != batch.first_image:
                raise _changed(path / found[0]["file"], first)
            return found is not None

        pieces = (batch for batch in source.pieces(size, need) if not unchanged(batch))
        for batch, columns in _encoded(pieces, source.kinds, dtype):
            writer.add(int(batch.rows[0]), columns, batch)
            if progress is not None:
                progress(len(batch))
        writer.finish()
        made = distributed.gather((list(writer.rows.items()), source.reader.count), timeout)
        rows = done | dict(pair for part, _ in made for pair in part)
        distributed.from_first(lambda: finish(path, run, rows, [count for _, count in made]))
    return UnitCache.load(path, verify="size")  # written and read back by this very run


def _rows(found: dict[int, tuple[dict, dict]]) -> dict[int, dict]:
    return {index: row for index, (row, _) in found.items()}


def _begin(
    stack: contextlib.ExitStack,
    source: LoadedUnits,
    path: Path,
    run: dict[str, Any],
    shard_images: int | None,
) -> tuple[dict, bool]:
    """Takes the folder for this run: (the run as it is written there, whether it is finished already)."""
    for locked in (False, True):  # looked at again under the lock: another process may just have ended
        if locked:
            lock(stack, path)
        manifest = manifest_of(path, run, shard_images)
        if manifest is not None and is_whole(path, manifest):
            _check_first(path, source)
            if not locked and (path / LOCK).exists():  # left by a process that was killed at its very end
                # or held by one that is just ending, or beside a cache that is only read
                with contextlib.suppress(OSError):
                    lock(stack, path)
            return run, True
    remove_partials(path, UNFINISHED)
    if manifest is None:
        run = _planned(source, run, shard_images)
    else:
        run = manifest["run"]
    if manifest is None or manifest["complete"]:
        write_json(path / MANIFEST, {"schema": SCHEMA, "what": WHAT, "complete": False, "run": run})
    return run, False


def _check_first(path: Path, source: LoadedUnits) -> None:
    """Raises ValueError unless a finished cache begins with the image that the data begin with."""
    first = source.sample()
    _, header = map_tensors(path / shard_name(0), SHARD, ShardHeader)
    if first is None or header["first_image"] != first[0].first_image:
        raise _changed(path / shard_name(0), 0)


def _changed(shard: Path, first: int) -> ValueError:
    return ValueError(
        f"{shard} was made from another image {first} than the loader gives now: the data, their order or "
        "their preprocessing have changed; name a new folder"
    )


def _planned(source: LoadedUnits, run: dict[str, Any], shard_images: int | None) -> dict[str, Any]:
    """The run with what its first image tells: the columns, and how many images make a shard."""
    first = source.sample()
    if first is None:
        raise ValueError("the loader gave no images to encode")
    batch, batch_size = first
    columns = _Leaving(batch, source.kinds, DTYPES[run["dtype"]]).arrived()
    if shard_images is None:
        fit = max(1, SHARD_BYTES // sum(value.nbytes for value in columns.values()))
        shard_images = fit // batch_size * batch_size or fit
    described = {
        name: {"dtype": _dtype_name(value.dtype), "shape": list(value.shape[1:])}
        for name, value in columns.items()
    }
    return {**run, "shard_images": shard_images, "columns": described}


class _Writer:
    """Fills shards and writes each when it is full, one in the background."""

    def __init__(self, path: Path, size: int, columns: dict[str, dict], mark: str):
        self.path, self.size, self.columns, self.mark = path, size, columns, mark
        self.rows: dict[int, dict] = {}
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future | None = None
        self._tensors: dict[str, Tensor] = {}
        self._index, self._filled, self._first_image = 0, 0, ""

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_) -> None:
        self._thread.shutdown()

    def add(self, first: int, columns: dict[str, Tensor], batch: UnitBatch) -> None:
        """Rows of one shard, in order."""
        if first % self.size == 0:
            self._flush()
            self._index, self._first_image = first // self.size, batch.first_image
            self._tensors = {
                name: value.new_empty(self.size, *value.shape[1:]) for name, value in columns.items()
            }
        for name, value in columns.items():
            self._tensors[name][self._filled : self._filled + len(value)] = value
        self._filled += len(batch)
        if self._filled == self.size:
            self._flush()

    def _flush(self) -> None:
        self._wait()
        if self._filled:
            tensors = {name: value[: self._filled] for name, value in self._tensors.items()}
            header = {"run": self.mark, "first_image": self._first_image}
            self._writing = self._thread.submit(write_shard, self.path, self._index, tensors, header)
            self._written = self._index
        self._tensors, self._filled = {}, 0

    def _wait(self) -> None:
        if self._writing is not None:
            row, self._writing = self._writing.result(), None
            self.rows[self._written] = row

    def finish(self) -> None:
        self._flush()
        self._wait()
