"""How are files written and read?

Atomically and durably, as safetensors or JSON, with a checksum verified on load.
"""

import contextlib
import csv
import errno
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from residual_kernels import schema
from residual_kernels.partial_files import Partial
from residual_kernels.visible import visible

_GROUP: ContextVar[list | None] = ContextVar("files of `together`", default=None)
SCHEMA = 1  # of every file this library writes; a reader refuses a newer one
METADATA = "residual_kernels"  # the key of our header in a safetensors file
_DTYPES = {  # as safetensors names them, in the order in which it lays tensors out
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


# --- one file -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it when the block ends well and is removed when it does
    not.

    After the block the file is on the disk itself (inside :func:`together`: after that block). A link is
    followed; a device or a pipe is written into. An OSError names `path`.
    """
    path = Path(path)
    with naming(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        if path.exists() and (not path.is_file() or _leads_to_output(path)):
            with tempfile.TemporaryDirectory() as folder:
                temporary = Path(folder) / "written"
                yield temporary
                with temporary.open("rb") as source, path.open("wb") as target:
                    shutil.copyfileobj(source, target)
            return
        part, group = Partial(Path(os.path.realpath(path))), _GROUP.get()
        try:
            yield part.path
            part.flush()
            if group is None:
                part.publish()
            else:
                group.append(part)
        finally:
            if group is None or part not in group:
                part.close()


def _leads_to_output(path: Path) -> bool:
    """Whether it is a link of the system, as /dev/stdout is,
    to what a process has open. /dev/shm holds plain files."""
    steps = Path(os.path.abspath(path)).parts
    return steps[1:2] == ("proc",) or (steps[1:2] == ("dev",) and steps[2:3] != ("shm",))


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Files written in the block take their places at its end, in the order in which they were written.

    When the block fails, or one of them cannot take its place, all is as it was. A kill in the short time
    between the first and the last leaves each file whole, some of them new: what the others follow from is
    written last.
    """
    if _GROUP.get() is not None:
        yield
        return
    group: list[Partial] = []
    token = _GROUP.set(group)
    try:
        yield
        done = []
        try:
            for part in group:
                with naming(part.place):
                    part.keep_old()
                    done.append(part)
                    part.publish()
        except BaseException:
            for part in reversed(done):
                if part.place.exists() and not part.path.exists():
                    with contextlib.suppress(OSError):
                        part.restore()
            raise
    finally:
        _GROUP.reset(token)
        for part in group:
            with contextlib.suppress(OSError):
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


# --- text and tables ----------------------------------------------------------------------------------------


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes text as UTF-8, atomically.

    What no UTF-8 has, of a file name for example, is written as \\udc80.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.encode(errors="backslashreplace"))


def write_csv(path: str | os.PathLike, rows: Iterable[Iterable[Any]]) -> None:
    """Writes rows as CSV, atomically; a spreadsheet takes no cell of it for a formula."""
    with (
        atomic_path(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        csv.writer(file).writerows(map(_harmless, row) for row in rows)


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    """What :func:`write_csv` writes."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(map(_harmless, row) for row in rows)
    return text.getvalue()


def _harmless(cell: Any) -> Any:
    """The cell with an apostrophe before it where a spreadsheet would take its text for a formula."""
    if not isinstance(cell, str) or cell.lstrip()[:1] not in tuple("=+-@\uff1d\uff0b\uff0d\uff20"):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


# --- JSON ---------------------------------------------------------------------------------------------------


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """A value as indented JSON in UTF-8."""
    return (json.dumps(value, indent=2) + "\n").encode()


class Head(TypedDict):
    """What every file of this library begins with."""

    schema: int
    what: str


def read_json(path: str | os.PathLike, what: str, form: type = Head) -> Any:
    """What the JSON file at `path` holds, as `form` says (:mod:`residual_kernels.schema`).

    Raises FileNotFoundError when there is none, and ValueError naming the file when it is damaged, of another
    kind, of a newer schema, or of another form.
    """
    value = schema.read(Path(path), f"{path} is not a readable {what}")
    return _checked(value, what, form, f"{path}")


def _checked(value: Any, what: str, form: type, where: str) -> Any:
    if not isinstance(value, dict) or type(value.get("schema")) is not int:
        raise ValueError(f"{where} is not a {what} written by residual_kernels (no schema number)")
    if value["schema"] > SCHEMA:
        raise ValueError(
            f"{where} has schema {value['schema']}; this version reads up to {SCHEMA}, so upgrade it"
        )
    if value.get("what") != what:
        raise ValueError(f"{where} holds a {repr(str(value.get('what'))[:60])[1:-1]}, not a {what}")
    return schema.typed(value, form, where)


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
    """Writes tensors and a JSON header to one safetensors file, atomically.

    Returns the header with its checksum.
    """
    with atomic_path(path) as temporary:
        return write_tensors(temporary, tensors, what, header)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], what: str, header: Mapping[str, Any]) -> dict:
    """:func:`save_tensors` in place: for a path that is not yet the file's own."""
    header = {"schema": SCHEMA, "what": what, **header}
    header["sha256"] = digest(tensors, header)
    write_safetensors(path, tensors, {METADATA: json.dumps(header)})
    return header


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file in place, byte for byte as its library does.

    That one makes a temporary file of its own, which nothing removes after a kill, and wants all tensors on
    the CPU at once. Here one at a time is copied, where it does not lie there already.
    """
    rank = list(_DTYPES)
    order = sorted(tensors, key=lambda name: (rank.index(tensors[name].dtype), name))
    described: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        described[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor = tensors[name].detach().cpu().contiguous()
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


@contextlib.contextmanager
def utf8_name(path: Path) -> Iterator[Path]:
    """A name of this file in UTF-8, which safetensors wants; the file may have another."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:  # bytes that are no text
        handle = os.open(path, os.O_RDONLY)
        try:
            yield Path(f"/proc/self/fd/{handle}")
        finally:
            os.close(handle)
    else:
        yield path


def map_tensors(path: str | os.PathLike, what: str, form: type = Head) -> tuple[dict[str, Tensor], Any]:
    """Tensors and header of a file written by :func:`save_tensors`, mapped:
    bytes are read where they are touched.

    Raises FileNotFoundError when there is none, ValueError when it is another kind of file, of a newer
    schema, of another form, or truncated. The checksum is not verified.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no {what} at {path}")
    try:
        with utf8_name(path) as named, safe_open(named, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = visible(str(error).partition("\n")[0][:200])
        raise ValueError(
            f"{path} is truncated or not a safetensors file ({reason}); make it again"
        ) from error
    if METADATA not in metadata:
        raise ValueError(f"{path} holds tensors but no {what} of residual_kernels")
    header = schema.parse(metadata[METADATA], f"{path} is corrupted: its header cannot be read")
    if not isinstance(header, dict) or not isinstance(header.get("sha256"), str):
        raise ValueError(f"{path} is corrupted: its header names no checksum; make it again")
    return tensors, _checked(header, what, form, f"{path}")


def load_tensors(path: str | os.PathLike, what: str, form: type = Head) -> tuple[dict[str, Tensor], Any]:
    """:func:`map_tensors`, verified: a ValueError too when the bytes do not match their checksum."""
    tensors, header = map_tensors(path, what)
    if digest(tensors, header) != header["sha256"]:
        raise ValueError(f"{path} is corrupted: its bytes do not match their checksum; make it again")
    return tensors, schema.typed(header, form, f"{path}")


def check_shapes(path: str | os.PathLike, tensors: Mapping[str, Tensor], forms: Mapping[str, tuple]) -> None:
    """Raises ValueError unless there are tensors of these names with these (dtypes, *sizes);
    None is any size."""
    for name, (dtypes, *sizes) in forms.items():
        found = tensors.get(name)
        if found is None:
            raise ValueError(f"{path} lacks the tensor {name}; make it again")
        fits = found.ndim == len(sizes) and all(
            want is None or want == have for want, have in zip(sizes, found.shape, strict=True)
        )
        if not fits or found.dtype not in dtypes:
            raise ValueError(
                f"{path} holds {name} as {tuple(found.shape)} {found.dtype}, where {tuple(sizes)} of "
                f"{' or '.join(map(str, dtypes))} belongs; make it again"
            )
