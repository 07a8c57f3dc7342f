"""How are files written and read? Atomically and durably, as safetensors or JSON, with a checksum verified on load."""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows: writers of one file are not told apart there
    fcntl = None

SCHEMA = 1  # of every file this library writes; a reader refuses a newer one
PARTIAL = ".part"  # the ending of a file that is being written
METADATA = "residual_kernels"  # the key of our header in a safetensors file
_DTYPES = {  # as safetensors names them, in the order in which it lays tensors out
    torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64", torch.complex64: "C64", torch.float32: "F32",
    torch.uint32: "U32", torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint16: "U16",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


# --- one file -------------------------------------------------------------------------------------------------


class Partial:
    """A file that is being written beside its place, under a name of ours.

    Its writer holds a lock on it, which ends with the process, so an unlocked one was left by a process that was killed
    and the next writer of the same place removes it. It has the mode of the file `like` (by default the one that it
    will replace), or, where there is none, what the umask gives a new file.
    """

    def __init__(self, place: Path, like: Path | None = None):
        self.place = place
        like = place if like is None else like
        made = made_folders(place.parent)
        try:
            remove_partials(place.parent, [place.name])
            while True:
                self.path = place.with_name(f".{_short(place.name)}.{secrets.token_hex(4)}{PARTIAL}")
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
                self._handle = os.open(self.path, flags, 0o666)
                if lock(self._handle) is None or os.fstat(self._handle).st_nlink:
                    break
                os.close(self._handle)  # removed by another writer, before it was locked
            self._mode = stat.S_IMODE(like.stat().st_mode) if like.is_file() else None
            if self._mode is not None:
                os.chmod(self.path, self._mode | stat.S_IWUSR)
        except BaseException:
            remove_empty(made)
            raise
        self._made = made

    def flush(self) -> None:
        """Puts what was written on the disk itself, not only in the system's memory."""
        flush(self.path)

    def publish(self) -> None:
        """Gives the file its place, from one instant to the next."""
        if self._mode is not None:
            os.chmod(self.path, self._mode)
        self.flush()
        os.replace(self.path, self.place)
        self._made = []
        flush(self.place.parent)

    def close(self) -> None:
        """Ends the writing; what was not published is removed, and so are folders that were made for it."""
        self.path.unlink(missing_ok=True)
        os.close(self._handle)
        remove_empty(self._made)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it when the block ends well and is removed when it does not.

    After the block the file is on the disk itself. A link is followed; a device or a pipe is written into. An OSError
    names `path`.
    """
    path = Path(path)
    with naming(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        if path.exists() and (not path.is_file() or Path(os.path.abspath(path)).parts[1:2] == ("dev",)):
            with tempfile.TemporaryDirectory() as folder:
                temporary = Path(folder) / "written"
                yield temporary
                with temporary.open("rb") as source, path.open("wb") as target:
                    shutil.copyfileobj(source, target)
            return
        part = Partial(Path(os.path.realpath(path)))
        try:
            yield part.path
            part.publish()
        finally:
            part.close()


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Makes an OSError of the block say which file could not be written."""
    try:
        yield
    except OSError as error:
        told = type(error)(f"cannot write {path}: {error.strerror or error}")
        told.errno = error.errno
        raise told from error


def partial_files(folder: Path, names: Iterable[str]) -> list[Path]:
    """Unfinished files of these names in a folder; a name may end with `*`."""
    stems = [re.escape(_short(name)) if name[-1] != "*" else f"{re.escape(name[:-1])}.*" for name in names]
    ours = re.compile(rf"\.({'|'.join(stems)})\.[0-9a-z_]{{8}}{re.escape(PARTIAL)}")
    with os.scandir(folder) as entries:
        found = [entry.name for entry in entries if ours.fullmatch(entry.name)]
    return [folder / name for name in sorted(found) if stat.S_ISREG((folder / name).lstat().st_mode)]


def remove_partials(folder: Path, names: Iterable[str]) -> None:
    """Removes the unfinished files of these names that no living process writes."""
    for path in partial_files(folder, names):
        with contextlib.suppress(OSError):  # another writer's, or gone by now
            handle = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
            try:
                if lock(handle, wait=False):
                    path.unlink()
            finally:
                os.close(handle)


def lock(handle: int, wait: bool = True) -> bool | None:
    """Locks an open file for this process until it is closed; False when another holds it, None where there are no
    locks."""
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
    made = []
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


# --- JSON -----------------------------------------------------------------------------------------------------


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """A value as indented JSON in UTF-8."""
    return (json.dumps(value, indent=2) + "\n").encode()


def read_json(path: str | os.PathLike, what: str, required: Iterable[str] = ()) -> dict:
    """The JSON object in `path`; a ValueError names the file when it is another, of a newer schema, or lacks a key."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a readable {what}: {error}") from error
    if not isinstance(value, dict) or not isinstance(value.get("schema"), int):
        raise ValueError(f"{path} is not a {what} written by residual_kernels (no schema number)")
    if value["schema"] > SCHEMA:
        raise ValueError(
            f"{path} has schema {value['schema']}; this version reads up to {SCHEMA}, so upgrade it"
        )
    lacking = [key for key in required if key not in value]
    if value.get("what") != what or lacking:
        reason = f"lacks {', '.join(lacking)}" if lacking else f"is a {value.get('what')}, not a {what}"
        raise ValueError(f"{path} {reason}; make it again")
    return value


def digest(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """SHA-256 of a header without its own checksum, and of the tensors' names, dtypes, shapes and bytes."""
    total = hashlib.sha256()
    rest = {key: value for key, value in header.items() if key != "sha256"}
    total.update(json.dumps(rest, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def save_tensors(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], what: str, header: Mapping[str, Any]
) -> dict:
    """Writes tensors and a JSON header to one safetensors file, atomically; returns the header with its checksum."""
    with atomic_path(path) as temporary:
        return write_tensors(temporary, tensors, what, header)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], what: str, header: Mapping[str, Any]) -> dict:
    """:func:`save_tensors` in place: for a path that is not yet the file's own.

    The bytes are those of safetensors' own writer, which makes a temporary file of its own that nothing removes after a
    kill. One tensor at a time is copied, where it is not contiguous on the CPU.
    """
    header = {"schema": SCHEMA, "what": what, **header}
    header["sha256"] = digest(tensors, header)
    rank = list(_DTYPES)
    order = sorted(tensors, key=lambda name: (rank.index(tensors[name].dtype), name))
    described, end = {"__metadata__": {METADATA: json.dumps(header)}}, 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        described[name] = {
            "dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end],
        }  # fmt: skip
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor = tensors[name].detach().cpu().contiguous()
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return header


def map_tensors(path: str | os.PathLike, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a file written by :func:`save_tensors`, mapped: bytes are read where they are touched.

    Raises FileNotFoundError when there is none, ValueError when it is another kind of file, of a newer schema, or
    truncated. The checksum is not verified.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no {what} at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error}); make it again") from error
    if METADATA not in metadata:
        raise ValueError(f"{path} holds tensors but no {what} of residual_kernels")
    try:
        header = json.loads(metadata[METADATA])
        schema, found = header["schema"], header["what"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is corrupted: its header cannot be read; make it again") from error
    if schema > SCHEMA:
        raise ValueError(f"{path} has schema {schema}; this version reads up to {SCHEMA}, so upgrade it")
    if found != what:
        raise ValueError(f"{path} holds a {found}, not a {what}")
    return tensors, header


def load_tensors(path: str | os.PathLike, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """:func:`map_tensors`, verified: a ValueError too when the bytes do not match their checksum."""
    tensors, header = map_tensors(path, what)
    if digest(tensors, header) != header.get("sha256"):
        raise ValueError(f"{path} is corrupted: its bytes do not match their checksum; make it again")
    return tensors, header
