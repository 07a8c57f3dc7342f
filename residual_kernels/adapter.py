"""How is a fitted adapter kept? One folder: a JSON config that says what it is and a safetensors file of its weights.

The file holds what the adapter learned and the bases it rests on, not the tower; loading checks that the tower is the
one it was fitted on before anything is touched.
"""

import os
from pathlib import Path

import torch
from torch import nn

from residual_kernels import towers
from residual_kernels.files import SCHEMA, load_tensors, read_json, save_tensors, write_json
from residual_kernels.modules import (
    CoarseHeads,
    OutputLinear,
    OutputSpectral,
    ResiDual,
    TowerAdapter,
    UnitAdapter,
)
from residual_kernels.pca import SpectralBases

CONFIG, WEIGHTS, BASES = "adapter.json", "weights.safetensors", "bases.safetensors"
WHAT = "adapter"
_CLASSES = {cls.__name__: cls for cls in (ResiDual, CoarseHeads, OutputSpectral, OutputLinear)}


def save_adapter(adapter: TowerAdapter, path: str | os.PathLike) -> None:
    """Writes an adapter to the folder `path`: config, weights and, where it has them, its bases.

    The config is written last, so an interrupted save is not an adapter. An adapter already there is replaced.
    """
    from residual_kernels import __version__

    if type(adapter).__name__ not in _CLASSES:
        raise ValueError(f"save_adapter keeps {', '.join(_CLASSES)}; got {type(adapter).__name__}")
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file; name a folder for the adapter")
    path.mkdir(parents=True, exist_ok=True)
    (path / CONFIG).unlink(missing_ok=True)
    if adapter.bases is not None:
        adapter.bases.save(path / BASES, dtype=torch.float64)
    learned = {name: p for name, p in adapter.named_parameters() if not name.startswith("tower.")}
    header = save_tensors(path / WEIGHTS, learned, WHAT, {})
    write_json(
        path / CONFIG,
        {
            "schema": SCHEMA, "what": WHAT, "version": __version__, "class": type(adapter).__name__,
            "options": _options(adapter), "tower": adapter._view.name, "checksum": towers.checksum(adapter.tower),
            "shapes": {name: list(p.shape) for name, p in learned.items()},
            "parameters": sum(p.numel() for p in learned.values()),
            "weights_sha256": header["sha256"], "bases": adapter.bases is not None,
        },
    )  # fmt: skip


def _options(adapter: TowerAdapter) -> dict:
    if isinstance(adapter, CoarseHeads):
        return {"rest": adapter.rest.rest, "kinds": list(adapter.adapted)}
    return {"rest": adapter.rest.rest} if isinstance(adapter, UnitAdapter) else {}


def load_adapter(tower: nn.Module, path: str | os.PathLike) -> TowerAdapter:
    """The adapter in the folder `path`, around `tower` (its image tower).

    Raises FileNotFoundError when there is none, ValueError when a file is damaged or the tower is another one; the
    tower is then unchanged.
    """
    path = Path(path)
    if not (path / CONFIG).is_file():
        raise FileNotFoundError(f"no adapter at {path} ({CONFIG} is missing)")
    config = read_json(path / CONFIG, WHAT)
    if config.get("class") not in _CLASSES:
        raise ValueError(
            f"{path / CONFIG} names the class {config.get('class')!r}; known are {', '.join(_CLASSES)}"
        )
    weights, header = load_tensors(path / WEIGHTS, WHAT)
    if header["sha256"] != config["weights_sha256"]:
        raise ValueError(f"{path / WEIGHTS} is not the file that {CONFIG} names; save the adapter again")
    found = towers.checksum(tower)
    if found != config["checksum"]:
        raise ValueError(
            "this adapter was fitted on a tower with other weights "
            f"(checksum {config['checksum'][:12]}, this tower has {found[:12]})"
        )
    options = dict(config["options"])
    if config["bases"]:
        options["bases"] = SpectralBases.load(path / BASES)
    adapter = _CLASSES[config["class"]](tower, **options)
    expected = {
        name: list(p.shape) for name, p in adapter.named_parameters() if not name.startswith("tower.")
    }
    if expected != {name: list(value.shape) for name, value in weights.items()}:
        adapter.detach()
        raise ValueError(
            f"{path / WEIGHTS} holds other shapes than this tower and these bases need: {expected}"
        )
    with torch.no_grad():
        for name, value in weights.items():
            adapter.get_parameter(name).copy_(value)
    return adapter
