"""How files are written and read: atomically, as safetensors or JSON, with a checksum that is verified on load."""

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


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it when the block ends well and is removed when it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes."""
    total = hashlib.sha256()
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
    header = {"schema": SCHEMA, "what": what, "sha256": digest(stored), **header}
    with atomic_path(path) as temporary:
        save_file(stored, temporary, metadata={"residual_kernels": json.dumps(header)})
    return header


def load_tensors(path: str | os.PathLike, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a file written by :func:`save_tensors`.

    Raises FileNotFoundError when there is none, ValueError when it is another kind of file, of a newer schema,
    truncated, or its bytes do not match its checksum.
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
    if "residual_kernels" not in metadata:
        raise ValueError(f"{path} holds tensors but no {what} of residual_kernels")
    header = json.loads(metadata["residual_kernels"])
    if header["schema"] > SCHEMA:
        raise ValueError(
            f"{path} has schema {header['schema']}; this version reads up to {SCHEMA}, so upgrade it"
        )
    if header["what"] != what:
        raise ValueError(f"{path} holds a {header['what']}, not a {what}")
    if digest(tensors) != header["sha256"]:
        raise ValueError(f"{path} is corrupted: its bytes do not match their checksum; make it again")
    return tensors, header
