"""Whose is a cache's folder?

One run's at a time: what the manifest says of it, the lock, and what is left behind.
"""

import contextlib
import os
from pathlib import Path
from typing import Any

import filelock

from residual_kernels import distributed
from residual_kernels.files import SCHEMA, write_json
from residual_kernels.partial_files import partials
from residual_kernels.units.cache.shards import LOCK, MANIFEST, WHAT, Shards, read_manifest, shard_files

COMPARED = {  # key of a run -> what it is called; of descriptions that one side lacks nothing is said
    "tower_dtype": "numbers of the tower",
    "preprocessing": "preprocessing",
    "data": "data",
    "kinds": "kinds of units",
    "dtype": "dtype",
    "class_names": "classes",
    "shard_images": "images in a shard",
}
UNFINISHED = (MANIFEST, "shard-*")  # what a killed process may leave half written
OPTIONAL = ("preprocessing", "data", "shard_images")


def kept_images(path: str | os.PathLike) -> int | None:
    """About how many images an unfinished cache holds already; None where there is no unfinished cache."""
    path = Path(path)
    if not (path / MANIFEST).is_file():
        return None
    manifest = read_manifest(path)
    return None if manifest["complete"] else len(shard_files(path)) * manifest["run"]["shard_images"]


def manifest_of(path: Path, run: dict[str, Any], shard_images: int | None) -> dict | None:
    """The manifest of this run in a folder, None where it may begin.

    Raises for what must not be written over.
    """
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file; name a folder for the cache")
    if not (path / MANIFEST).is_file():
        others = {p for p in path.iterdir() if p.name != LOCK} if path.exists() else set()
        if others:
            others -= set(partials(path, UNFINISHED))
        if others:
            raise FileExistsError(
                f"{path} is not empty and holds no cache ({min(others).name} is there); name a new folder"
            )
        return None
    manifest = read_manifest(path)
    _compare(path, manifest["run"], run, shard_images)
    if manifest["complete"] and run["data"] is None:
        raise FileExistsError(
            f"{path} is not empty: it holds a finished cache, and nothing says whether it holds these data; "
            "read it with UnitCache.load, give encode data=..., or name a new folder"
        )
    return manifest


def is_whole(path: Path, manifest: dict) -> bool:
    """Whether a cache is finished and every byte of it as it was written."""
    if not manifest["complete"]:
        return False
    try:
        Shards(path, manifest["shards"], manifest["run"]).verify("full")
    except (ValueError, FileNotFoundError):  # what is wrong with it is made again
        return False
    return True


def _compare(path: Path, there: dict[str, Any], here: dict[str, Any], shard_images: int | None) -> None:
    """Raises ValueError naming both when a cache is of another run."""
    if there["checksum"] != here["checksum"]:
        raise ValueError(
            f"{path} holds a cache of a tower with other weights ({there['tower']} with checksum "
            f"{there['checksum'][:12]}, this tower is {here['tower']} with {here['checksum'][:12]}); name "
            "a new folder"
        )
    here = {**here, "shard_images": shard_images}
    for key, name in COMPARED.items():
        known = None not in (there[key], here[key])
        if there[key] != here[key] and (known or key not in OPTIONAL):
            raise ValueError(
                f"{path} holds a cache of other {name} ({_short(there[key])} there, {_short(here[key])} "
                "here); name a new folder"
            )


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def lock(stack: contextlib.ExitStack, path: Path) -> None:
    """Holds the folder until the stack closes; it is as before then, where no shard was finished in it."""
    made = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        holder = filelock.FileLock(path / LOCK, timeout=0)
        holder.acquire()  # the system's lock: it ends with its process, however that ends
    except filelock.Timeout as error:
        raise BlockingIOError(
            f"another process is encoding into {path}; wait for it, or name another folder"
        ) from error
    except OSError as error:
        raise type(error)(f"cannot write to {path}: {error.strerror or error}") from error
    stack.callback(_leave, path, holder, made)


def _leave(path: Path, holder: filelock.FileLock, made: bool) -> None:
    alone = distributed.world() == 1  # others may still be at work when this process fails
    try:
        complete = (path / MANIFEST).is_file() and read_manifest(path)["complete"]
        if alone and not complete and not shard_files(path):
            (path / MANIFEST).unlink(missing_ok=True)
        if not (path / MANIFEST).is_file() or complete:
            (path / LOCK).unlink(missing_ok=True)
    finally:
        holder.release()  # or this process would hold the folder against its own next run
    if made and not any(path.iterdir()):
        path.rmdir()


def check_extent(path: Path, done: dict[int, dict], size: int, count: int | None) -> None:
    """Raises ValueError when finished shards hold more or fewer images than the data would give them."""
    for index, row in done.items():
        expected = size if count is None else min(size, count - index * size)
        last = count is None and index == max(done)
        if row["images"] != expected and not (last and row["images"] < size):
            raise ValueError(
                f"{path / row['file']} holds {row['images']} images where the data now have "
                f"{max(0, expected)}: they have changed; name a new folder"
            )


def finish(path: Path, run: dict[str, Any], rows: dict[int, dict], counts: list[int]) -> None:
    """Writes the final manifest."""
    if len(set(counts)) > 1:
        raise ValueError(
            f"the processes' loaders gave {', '.join(map(str, counts))} images; give each the same data"
        )
    count = counts[0]
    if not count:
        raise ValueError("the loader gave no images to encode")
    check_extent(path, rows, run["shard_images"], count)
    shards = [rows[index] for index in sorted(rows)]
    manifest = {
        "schema": SCHEMA,
        "what": WHAT,
        "complete": True,
        "run": run,
        "images": count,
        "shards": shards,
    }
    write_json(path / MANIFEST, manifest)
