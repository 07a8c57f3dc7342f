"""How are files written and read? Atomically and durably, as safetensors or JSON, with a checksum verified on load."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SCHEMA = 1  # of every file this library writes; a reader refuses a newer one
PARTIAL = ".part"  # the ending of a file that is being written
METADATA = "residual_kernels"  # the key of our header in a safetensors file


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it when the block ends well and is removed when it does not.

    After the block the file is on the disk itself, not only in the system's memory. An OSError names `path`.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())
        _flush(temporary)
        os.replace(temporary, path)
        if os.name == "posix":  # Windows does not open folders
            _flush(path.parent)
    except OSError as error:
        raise type(error)(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def partial_files(folder: Path) -> list[Path]:
    """What a process killed while it wrote left in a folder: our own files and those of safetensors inside its save."""
    found = (*folder.glob(f".*{PARTIAL}"), *folder.glob(".tmp??????"))
    return [path for path in found if path.is_file()]


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


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
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"schema": SCHEMA, "what": what, **header}
    header["sha256"] = digest(stored, header)
    with atomic_path(path) as temporary:
        try:
            save_file(stored, temporary, metadata={METADATA: json.dumps(header)})
        except SafetensorError as error:  # a full disk, a quota
            raise OSError(str(error)) from error
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
