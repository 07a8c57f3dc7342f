"""How does a fit go on after it was killed?

Its state between two epochs, in one file, for the very same fit only.
"""

import os
from pathlib import Path
from typing import Any, TypedDict

from torch import Tensor

from residual_kernels.adapters.tower_adapter import TowerAdapter
from residual_kernels.files import Head, digest, load_tensors, save_tensors
from residual_kernels.schema import Count, Measured
from residual_kernels.train.evaluation import Heads

WHAT = "fit checkpoint"


class _Task(TypedDict):
    best_epoch: Count
    best_score: Measured | None
    stopped: bool
    diverged: bool
    history: list[list[Measured | None]]


class State(TypedDict):
    """A fit between two epochs."""

    epoch: Count
    active: list[Count]
    groups: list[dict[str, Measured]]
    tasks: list[_Task]
    seconds: float


class CheckpointHeader(Head):
    """What a checkpoint says beside its tensors."""

    identity: dict[str, Any]
    state: State


def save(
    path: str | os.PathLike, identity: dict[str, Any], state: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    """Writes the state of a fit, atomically."""
    save_tensors(path, tensors, WHAT, {"identity": identity, "state": state})


def load(path: str | os.PathLike, identity: dict[str, Any]) -> tuple[State, dict[str, Tensor]] | None:
    """State and tensors, in memory, of the fit with this identity, or None when there is no file.

    Raises ValueError when the file is damaged, or is of a fit of other data or options, which are named.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; a checkpoint is one file, such as {path / 'fit.safetensors'}")
    if not path.exists():
        return None
    tensors, header = load_tensors(path, WHAT, CheckpointHeader)
    known = header["identity"]
    different = [name for name in identity if known.get(name) != identity[name]]
    if different:
        name = different[0]
        was, now = (str(value)[:60] for value in (known.get(name), identity[name]))
        raise ValueError(
            f"{path} is the checkpoint of another fit: {', '.join(different)} differ ({name} was {was}, "
            f"now {now}); name another file, or remove it to start again"
        )
    # copies: a file that is mapped and then written over in place, by a copying tool for example, changes
    # them
    return header["state"], {key: tensor.clone() for key, tensor in tensors.items()}


def of_adapter(adapter: TowerAdapter, starts: list[Tensor]) -> str:
    """Checksum of the adapter's constants and of the starting weights."""
    trained = {name for name, _ in adapter.named_parameters()}
    constants = {
        name: value
        for name, value in adapter.state_dict().items()
        if not name.startswith("tower.") and name not in trained
    }
    return digest(constants | {f"start.{index}": start for index, start in enumerate(starts)}, {})


def of_heads(heads: Heads) -> str:
    """Checksum of class vectors and scales."""
    return digest({"vectors": heads.vectors, "scale": heads.scale}, {})
