"""Which view does a tower have? Its family, told by structure."""

from torch import nn

from residual_kernels.towers import open_clip, timm
from residual_kernels.towers.base import Tower, UnsupportedTowerError
from residual_kernels.towers.hugging_face import tower as hugging_face


def unwrap(tower: nn.Module) -> nn.Module:
    """The tower inside an adapter of this library, or the module itself."""
    return tower.tower if getattr(tower, "wraps_tower", False) is True else tower


def view(tower: nn.Module) -> Tower:
    """The :class:`Tower` view of an image tower, chosen by structure.

    Raises UnsupportedTowerError (a ValueError) with the reason when the tower cannot be decomposed exactly, or with
    what was looked for when it is of no known family.
    """
    kind = type(tower).__name__
    if isinstance(getattr(tower, "visual", None), nn.Module):
        raise UnsupportedTowerError(
            f"{kind} is a whole CLIP model; pass its image tower, model.visual, or use attach(model, ...)"
        )
    families = {
        open_clip: open_clip.OpenClipTower,
        timm: timm.TimmTower,
        hugging_face: hugging_face.HuggingFaceTower,
    }
    for family, build in families.items():
        if family.recognises(tower):
            return build(tower)
    raise UnsupportedTowerError(
        f"{kind} is no image tower that this library knows: it has none of "
        f"{'; '.join(family.LOOKED_FOR for family in families)}"
    )
