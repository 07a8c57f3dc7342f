"""Which view does a tower have? Its family, told by structure."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from residual_kernels.forks import compute_alone_after_a_fork
from residual_kernels.towers import agreement, open_clip, timm
from residual_kernels.towers.hugging_face import tower as hugging_face
from residual_kernels.towers.transformer import TransformerTower
from residual_kernels.towers.view import UnsupportedTowerError
from residual_kernels.towers.wrappers import inner


def unwrap(tower: nn.Module) -> nn.Module:
    """The tower inside an adapter of this library, or inside a wrapper such as torch.compile;
    or the module itself."""
    tower = inner(tower)
    return inner(tower.get_submodule("tower")) if _is_adapter(tower) else tower


def _is_adapter(tower: nn.Module) -> bool:
    return getattr(tower, "wraps_tower", False) is True


def view_inside(tower: nn.Module, check: bool = True) -> TransformerTower:
    """The view of a tower, or of the one inside an adapter or a wrapper.

    With `check` the first image that it runs is compared with the model's own forward, unless the adapter was
    made with check=False.
    """
    outer = inner(tower)
    found = view(unwrap(outer))
    agreement.check_here(found, structure=True)
    found.check = check and (not _is_adapter(outer) or bool(outer.checks_tower))
    return found


def view(tower: nn.Module) -> TransformerTower:
    """The :class:`Tower` view of an image tower, chosen by structure.

    Raises UnsupportedTowerError (a ValueError) with the reason when the tower cannot be decomposed exactly,
    or with what was looked for when it is of no known family.
    """
    compute_alone_after_a_fork()
    tower = inner(tower)
    kind = type(tower).__name__
    if _is_adapter(tower):
        raise ValueError(f"this tower is wrapped in a {kind} already; use its .tower, or detach it first")
    if isinstance(getattr(tower, "visual", None), nn.Module):
        raise UnsupportedTowerError(
            f"{kind} is a whole CLIP model; pass its image tower, model.visual, or use attach(model, ...)"
        )
    if isinstance(tower, torch.jit.ScriptModule):
        raise UnsupportedTowerError(
            f"this tower is a compiled program of torch.jit ({getattr(tower, 'original_name', kind)}), whose "
            "parts cannot be run one by one; give the module that it was made of"
        )
    if isinstance(tower, torch.fx.GraphModule):
        raise UnsupportedTowerError(
            f"this tower is a graph of torch.fx or torch.export ({kind}), which has no blocks to read; give "
            "the module that it was made of"
        )
    families: dict[Any, Callable[[nn.Module], TransformerTower]] = {
        open_clip: open_clip.OpenClipTower,
        timm: timm.TimmTower,
        hugging_face: hugging_face.HuggingFaceTower,
    }
    for family, build in families.items():
        if family.recognises(tower):
            return build(tower)
    raise UnsupportedTowerError(
        f"{kind} is not an image tower that this library supports: it has none of "
        f"{'; '.join(family.LOOKED_FOR for family in families)}"
    )
