"""How does a folder of several files change at once?

Its index file names the others, with checksums, and comes last.

A reader opens the index and from it the files it names. The others are written beside those of the old index,
under names that are free, so at every instant the folder holds the old set whole or the new one whole.
Nothing else in the folder is opened, moved or removed.
"""

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from residual_kernels.files import json_bytes, naming, write_tensors
from residual_kernels.partial_files import (
    Partial,
    flush,
    lock,
    made_folders,
    partials,
    remove_empty,
    remove_partials,
)

WAIT = 60  # seconds for another process that writes into the same folder


class FileSet(contextlib.AbstractContextManager):
    """The next state of a folder: files added one by one, which take effect together.

    Use: ``with FileSet(folder, "index.json", members, read) as files:``, then `add_json` or `add_tensors` for
    each file, then `publish`. Left without `publish`, it changes nothing. Killed, it changes nothing either:
    the next one removes what it left. Two writers of one folder wait for each other.

    A file keeps its plain name (``weights.safetensors``) where that is free, and gets one with a piece of its
    checksum (``weights-0f3c....safetensors``) where a file of the old set, or of somebody else, has it.

    Args:
        folder: made when it is not there.
        index: name of the index file.
        members: plain names that its files may have.
        read: from an index file's path to the files it names, by plain name: {"weights.safetensors": {"name":
            ..., "sha256": ...}}. It raises ValueError for an index of somebody else, which is then not
            written over.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        index: str,
        members: Sequence[str],
        read: Callable[[Path], Mapping[str, Mapping[str, str]]],
    ):
        self.folder, self.index, self.members, self._read = Path(folder), index, tuple(members), read
        self.files: dict[str, dict[str, str]] = {}
        self._parts: dict[str, Partial] = {}
        self._unfinished: list[Path] = []  # what else is removed if the new state does not come about

    def __enter__(self) -> "FileSet":
        with contextlib.ExitStack() as stack:
            with naming(self.folder):
                made = made_folders(self.folder)
                stack.callback(remove_empty, made)
                locked = stack.enter_context(_alone(self.folder))
            self._old = self._named(self.folder / self.index)
            if locked:
                with naming(self.folder):
                    self._recover()
            stack.callback(self._abandon)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def add_tensors(
        self, name: str, tensors: Mapping[str, Tensor], what: str, header: Mapping[str, Any]
    ) -> dict:
        """Adds a safetensors file, as :func:`save_tensors` writes it; returns its header."""
        with naming(self.folder / name):
            part = self._part(name)
            header = write_tensors(part.path, tensors, what, header)
            part.flush()
        self._add(name, header["sha256"])
        return header

    def add_json(self, name: str, value: Any) -> None:
        """Adds a JSON file."""
        with naming(self.folder / name):
            part = self._part(name)
            part.path.write_bytes(json_bytes(value))
            part.flush()
        self._add(name, hashlib.sha256(json_bytes(value)).hexdigest())

    def _part(self, name: str) -> Partial:
        like = self.folder / (self._old[name]["name"] if name in self._old else self.index)
        self._parts[name] = Partial(self.folder.resolve() / name, like)
        return self._parts[name]

    def _add(self, name: str, sha256: str) -> None:
        old = self._old.get(name)
        if old is not None and old["sha256"] == sha256:
            self.files[name] = dict(old)  # the same content takes the same place
            return
        stem, ending = os.path.splitext(name)
        names = [name, f"{stem}-{sha256[:16]}{ending}"]
        names += [f"{stem}-{sha256[:16]}-{number}{ending}" for number in range(2, 10)]
        free = next((one for one in names if not os.path.lexists(self.folder / one)), None)
        if free is None:
            raise FileExistsError(
                f"{self.folder / names[-1]} and others of its kind exist; name another folder"
            )
        self.files[name] = {"name": free, "sha256": sha256}

    def publish(self, config: Mapping[str, Any]) -> None:
        """Makes the new state the folder's: `config` with the key "files" becomes the index."""
        index = self.folder / self.index
        with naming(index):
            part = self._part(self.index)
            part.path.write_bytes(json_bytes({**config, "files": self.files}))
            part.flush()  # from here on it says which files are on their way, should this process be killed
            for name, entry in self.files.items():
                self._place(
                    self._parts[name], self.folder / entry["name"], replace=entry == self._old.get(name)
                )
            flush(self.folder)
            note = self._note(index)  # names the files of the old set until they are removed
            os.replace(part.path, index.parent.resolve() / index.name)
            self._unfinished = []
            flush(self.folder)
        # The new state stands; the next writer removes what this one could not.
        with contextlib.suppress(OSError):
            self._remove(self._old, self.files)
            if note is not None:
                note.unlink()

    def _place(self, part: Partial, place: Path, replace: bool) -> None:
        if replace:
            os.replace(part.path, place)
            return
        try:
            os.link(part.path, place)  # fails where somebody else's file has come to be
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            os.rename(part.path, place)
        self._unfinished.append(place)

    def _note(self, index: Path) -> Path | None:
        """A second name of the old index, which outlives it."""
        if not self._old:
            return None
        with contextlib.closing(Partial(index)) as free:
            note = free.path
        self._unfinished.append(note)
        try:
            os.link(index, note)
        except OSError:
            note.write_bytes(index.read_bytes())
        return note

    def _named(self, index: Path) -> dict[str, dict[str, str]]:
        """What an index names; ValueError when it is no index of ours."""
        if not os.path.lexists(index):
            return {}
        try:
            found = self._read(index)
            return {name: checked_entry(name, entry) for name, entry in found.items()}
        except (ValueError, OSError) as error:
            raise FileExistsError(
                f"{index} is there already and was not written by this library ({error}); name another folder"
            ) from error

    def _recover(self) -> None:
        """Removes what writers that were killed have left: unfinished files,
        and files that none but they name."""
        for note in partials(self.folder, [self.index]):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
                named = json.loads(note.read_bytes())["files"]
                listed = {name: checked_entry(name, named[name]) for name in self.members if name in named}
                self._remove(listed, self._old)
        remove_partials(self.folder, [self.index, *self.members])

    def _remove(self, files: Mapping[str, dict], keep: Mapping[str, dict]) -> None:
        kept = {entry["name"] for entry in keep.values()}
        for entry in files.values():
            if entry["name"] not in kept:
                (self.folder / entry["name"]).unlink(missing_ok=True)

    def _abandon(self) -> None:
        for path in self._unfinished:
            with contextlib.suppress(OSError):
                path.unlink()
        for part in self._parts.values():
            with contextlib.suppress(OSError):
                part.close()


def is_member(plain: str, name: str) -> bool:
    """Whether `name` is one that a FileSet gives the file with this plain name."""
    stem, ending = os.path.splitext(plain)
    ours = re.compile(rf"{re.escape(stem)}(-[0-9a-f]{{16}}(-[2-9])?)?{re.escape(ending)}")
    return ours.fullmatch(name) is not None


def checked_entry(plain: str, entry: Any) -> dict[str, str]:
    """What an index says of one file, {"name", "sha256"}.

    A ValueError unless the name is one a FileSet would give.
    """
    name, digest = (entry.get("name"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
    if not (isinstance(name, str) and isinstance(digest, str) and is_member(plain, name)):
        raise ValueError(f"the file that it names for {plain[:100]!r} is {str(entry)[:100]!r}")
    return {"name": name, "sha256": digest}


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Holds the folder against other writers, where it can be locked; the lock ends with the process."""
    if os.name != "posix":
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        deadline = time.monotonic() + WAIT
        while (locked := lock(handle, wait=False)) is False:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"another process has been writing into {folder} for {WAIT} s; try again later"
                )
            time.sleep(0.02)
        yield bool(locked)
    finally:
        os.close(handle)
