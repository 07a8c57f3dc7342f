"""How is a fitted adapter kept? One folder: a JSON config that says what it is and a safetensors file of its weights.

The file holds what the adapter learned and the bases it rests on, not the tower; loading checks that the tower is the
one it was fitted on before anything is touched.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
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

    The new folder is written whole beside the old one and then takes its place; other files in the old one are kept.
    Raises ValueError for a module that is no adapter, or whose tower has been trained since its bases were fitted.
    """
    from residual_kernels import __version__

    if type(adapter).__name__ not in _CLASSES:
        raise ValueError(f"save_adapter keeps {', '.join(_CLASSES)}; got {type(adapter).__name__}")
    checksum = towers.checksum(adapter.tower)
    if adapter.bases is not None and adapter.bases.checksum != checksum:
        raise ValueError(
            "the tower has been trained since its bases were fitted, and an adapter does not hold the tower; "
            "keep the whole module's state_dict instead"
        )
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file; name a folder for the adapter")
    learned = {name: p for name, p in adapter.named_parameters() if not name.startswith("tower.")}
    with _replaced_folder(path) as folder:
        bases = None if adapter.bases is None else adapter.bases.save(folder / BASES, dtype=torch.float64)
        header = save_tensors(folder / WEIGHTS, learned, WHAT, {})
        write_json(
            folder / CONFIG,
            {
                "schema": SCHEMA, "what": WHAT, "version": __version__, "class": type(adapter).__name__,
                "options": _options(adapter), "tower": adapter._view.name, "checksum": checksum,
                "shapes": {name: list(p.shape) for name, p in learned.items()},
                "parameters": sum(p.numel() for p in learned.values()),
                "weights_sha256": header["sha256"], "bases_sha256": bases,
            },
        )  # fmt: skip


@contextlib.contextmanager
def _replaced_folder(path: Path) -> Iterator[Path]:
    """A new folder that takes the place of `path` when the block ends well; files in `path` of other names stay."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield folder
        if path.exists():
            for file in path.iterdir():
                if file.name not in (CONFIG, WEIGHTS, BASES):
                    shutil.move(file, folder / file.name)
            old = path.rename(folder.with_suffix(".old"))
            folder.rename(path)
            shutil.rmtree(old)
        else:
            folder.rename(path)
        path.chmod(0o755)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _options(adapter: TowerAdapter) -> dict:
    if isinstance(adapter, CoarseHeads):
        return {"rest": adapter.rest.rest, "kinds": list(adapter.adapted)}
    if isinstance(adapter, ResiDual):
        return adapter.options()
    return {"rest": adapter.rest.rest} if isinstance(adapter, UnitAdapter) else {}


def load_adapter(tower: nn.Module, path: str | os.PathLike) -> TowerAdapter:
    """The adapter in the folder `path`, around `tower` (its image tower).

    Raises FileNotFoundError when there is none, ValueError when a file is damaged or the tower is another one; the
    tower is then unchanged.
    """
    path = Path(path)
    if not (path / CONFIG).is_file():
        raise FileNotFoundError(f"no adapter at {path} ({CONFIG} is missing)")
    required = ("class", "options", "checksum", "weights_sha256", "bases_sha256")
    config = read_json(path / CONFIG, WHAT, required)
    if config.get("class") not in _CLASSES:
        raise ValueError(
            f"{path / CONFIG} names the class {config.get('class')!r}; known are {', '.join(_CLASSES)}"
        )
    weights, header = load_tensors(path / WEIGHTS, WHAT)
    if header["sha256"] != config["weights_sha256"]:
        raise ValueError(f"{path / WEIGHTS} is not the file that {CONFIG} names; save the adapter again")
    found = towers.checksum(towers.view(tower).module)
    if found != config["checksum"]:
        raise ValueError(
            "this adapter was fitted on a tower with other weights "
            f"(checksum {config['checksum'][:12]}, this tower has {found[:12]})"
        )
    options = dict(config["options"])
    if set(options) - {"rest", "kinds", "placement", "tokens", "layers"}:
        raise ValueError(f"{path / CONFIG} has unknown options {sorted(options)}; save the adapter again")
    if config["bases_sha256"] is not None:
        options["bases"] = SpectralBases.load(path / BASES, sha256=config["bases_sha256"])
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
