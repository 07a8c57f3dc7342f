"""How does a file come about beside its place?

Unfinished, locked by its writer, and removed when that was killed.
"""

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: writers of one file are not told apart there
    fcntl = None  # type: ignore[assignment]  # a module elsewhere

PARTIAL = ".part"  # the ending of a file that is being written


class Partial:
    """A file (or a folder of files) that is being written beside its place, under a name of ours.

    Its writer holds a lock on it, which ends with the process, so an unlocked one was left by a process that
    was killed and the next writer of the same place removes it. It has the mode of the file `like` (by
    default the one that it will replace), or, where there is none, what the umask gives a new file.
    """

    def __init__(self, place: Path, like: Path | None = None, *, folder: bool = False):
        self.place = place
        self.old: Path | None = None
        like = place if like is None else like
        made = made_folders(place.parent)
        try:
            remove_partials(place.parent, [place.name])
            while True:
                self.path = self._free()
                if folder:
                    self.path.mkdir()
                    self._handle = os.open(self.path, os.O_RDONLY)
                else:
                    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
                    self._handle = os.open(self.path, flags, 0o666)
                if lock(self._handle) is None or self.path.exists():
                    break
                os.close(self._handle)  # removed by another writer, before it was locked
        except BaseException:
            remove_empty(made)
            raise
        self._made = made
        try:
            self._mode = stat.S_IMODE(like.stat().st_mode) if like.is_file() and not folder else None
            if self._mode is not None:
                os.chmod(self.path, self._mode | stat.S_IWUSR)
        except BaseException:
            self.close()
            raise

    def _free(self) -> Path:
        return self.place.with_name(f".{_short(self.place.name)}.{secrets.token_hex(4)}{PARTIAL}")

    def flush(self) -> None:
        """Gives the file its mode, and puts it on the disk itself, not only in the system's memory."""
        if self._mode is not None:
            os.chmod(self.path, self._mode)
        flush(self.path)

    def publish(self) -> None:
        """Gives the file, flushed before, its place from one instant to the next."""
        os.replace(self.path, self.place)
        self._made = []
        flush(self.place.parent)

    def keep_old(self) -> None:
        """Keeps what is in the place under a second name, for :meth:`restore`."""
        if os.path.lexists(self.place):
            self.old = self._free()
            try:
                os.link(self.place, self.old)
            except OSError:  # a file system without hard links
                shutil.copy2(self.place, self.old)

    def restore(self) -> None:
        """Undoes :meth:`publish`."""
        if self.old is not None:
            os.replace(self.old, self.place)
        else:
            self.place.unlink()

    def close(self) -> None:
        """Ends the writing; what was not published is removed, and so are folders that were made for it."""
        try:
            if self.path.is_dir():
                shutil.rmtree(self.path)
            for path in (self.path, self.old):
                if path is not None:
                    path.unlink(missing_ok=True)
        finally:
            # And with it the lock: what could not be removed now, the next writer removes.
            os.close(self._handle)
            remove_empty(self._made)


def partials(folder: Path, names: Iterable[str]) -> list[Path]:
    """Unfinished files of these names in a folder, and unfinished folders; a name may end with `*`."""
    stems = [re.escape(_short(name)) if name[-1] != "*" else f"{re.escape(name[:-1])}.*" for name in names]
    ours = re.compile(rf"\.({'|'.join(stems)})\.[0-9a-z_]{{8}}{re.escape(PARTIAL)}")
    with os.scandir(folder) as entries:
        return sorted(
            Path(entry.path) for entry in entries if ours.fullmatch(entry.name) and not entry.is_symlink()
        )


def remove_partials(folder: Path, names: Iterable[str]) -> None:
    """Removes the unfinished files of these names that no living process writes."""
    for path in partials(folder, names):
        with contextlib.suppress(OSError):  # another writer's, or gone by now
            whole = path.is_dir()
            if not whole and not path.is_file():
                continue
            handle = os.open(path, (os.O_RDONLY if whole else os.O_RDWR) | getattr(os, "O_NOFOLLOW", 0))
            try:
                if lock(handle, wait=False):
                    shutil.rmtree(path) if whole else path.unlink()
            finally:
                os.close(handle)


def lock(handle: int, wait: bool = True) -> bool | None:
    """Locks an open file for this process until it is closed; False when another holds it, None where there
    are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


def made_folders(folder: Path) -> list[Path]:
    """Makes a folder and what is missing above it; returns those made, the deepest first."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    made: list[Path] = []
    for one in reversed(missing):
        one.mkdir(exist_ok=True)
        made.insert(0, one)
    return made


def remove_empty(folders: list[Path]) -> None:
    """Removes folders, unless something came into them."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def flush(path: Path) -> None:
    """Puts a file, or the names in a folder, on the disk itself."""
    if path.is_dir() and os.name != "posix":  # Windows does not open folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that does not flush folders
            raise
    finally:
        os.close(handle)


def _short(name: str) -> str:
    """A name that leaves room for what a partial file's name adds."""
    return os.fsencode(name)[:200].decode(errors="ignore")
