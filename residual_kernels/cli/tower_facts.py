"""What is a model's image tower, of what name, and do its units sum to its output? Facts for `towers`."""

import importlib
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from residual_kernels import towers
from residual_kernels.data import models as sources
from residual_kernels.towers import agreement
from residual_kernels.towers.transformer import TransformerTower
from residual_kernels.towers.wrappers import inner

TIMM, PYTHON = "timm:", "py:"


def inspect(tower: nn.Module) -> dict[str, Any]:
    """What a tower is made of, and how its units compare with its own forward on one random image.

    Raises UnsupportedTowerError with the reason where the tower has no exact units.
    """
    view = towers.view(tower)
    image = _image(view)
    started = time.perf_counter()
    result = agreement.compare(view, image)
    seconds = time.perf_counter() - started
    layout = view.layout
    blocks = Counter(type(block).__name__ for block in view.blocks)
    return {
        "tower": f"{type(view.module).__module__}.{type(view.module).__name__}",
        "family": view.name,
        "parameters": sum(p.numel() for p in view.module.parameters()),
        "image": " x ".join(map(str, image.shape[2:])) + ("" if view.image_size else ", others too"),
        "blocks": ", ".join(f"{count} {name}" for name, count in blocks.items()),
        "layers x heads": f"{layout.layers} x {layout.heads}",
        "kinds of units": ", ".join(layout.kinds),
        "width": view.width,
        "C": view.head_width,
        "D": view.dim,
        "pooling": view.pooling,
        "class token": view.class_token,
        "tokens before the patches": view.prefix,
        "output apart": result.output,
        "units apart": result.units,
        "parts at": result.place,
        "seconds of the check": seconds,
    }


def _image(view: TransformerTower) -> Tensor:
    """One image of noise of the tower's size, or of 224 pixels, or of what its patches divide nearby."""
    weight = view.stem_weight
    size = view.image_size
    if size is None:
        size = (224 - 224 % weight.shape[-2], 224 - 224 % weight.shape[-1])
    noise = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    return noise.to(weight.device, weight.dtype)


def tower_named(name: str, pretrained: str | None) -> nn.Module:
    import open_clip
    import timm

    if name.startswith(TIMM):
        try:
            return timm.create_model(name.removeprefix(TIMM), num_classes=0)
        except RuntimeError as error:
            raise ValueError(f"timm cannot make {name}: {str(error).splitlines()[0]}") from error
    if name.startswith(PYTHON):
        made = _called(name.removeprefix(PYTHON))
    else:
        known = name == sources.BUNDLED or name.startswith(sources.TRANSFORMERS)
        if not known and name not in open_clip.list_models() and timm.is_model(name):
            raise ValueError(f"{name} is a name of timm's: write {TIMM}{name}")
        made = sources.load_model(name, pretrained if known or pretrained else "none")[0]
    whole = inner(made)
    visual = getattr(whole, "visual", None)
    return visual if isinstance(visual, nn.Module) else whole


def _called(place: str) -> nn.Module:
    """What MODULE:FUNCTION returns; modules are looked for in the working folder too, as by `python -m`."""
    module, _, function = place.partition(":")
    if not module or not function:
        raise ValueError(f"py: needs a module and a function, as in py:package.models:make; got {place!r}")
    sys.path.insert(0, str(Path.cwd()))
    try:
        made = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError, TypeError, RuntimeError, OSError, ValueError, LookupError) as error:
        raise ValueError(f"{place} cannot be called: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(Path.cwd()))
    if not isinstance(made, nn.Module):
        raise ValueError(f"{place} returned {type(made).__name__}, not a model")
    return made
