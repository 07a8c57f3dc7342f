"""Writes docs/TOWERS.md: every open_clip configuration and lists of other towers, supported or not and why.

    python tests/towers_table.py

Towers are built on the meta device, without values, and asked for their view; nothing in the table is typed
by hand.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import open_clip
import timm
import torch
import transformers
from open_clip.model import _build_vision_tower
from torch import nn
from torch.overrides import TorchFunctionMode

import residual_kernels as rk
from residual_kernels import towers

PAGE = Path(__file__).parent.parent / "docs" / "TOWERS.md"

# One name at least for every structure among timm's transformers, and the well-known towers that are none.
TIMM = (
    "vit_tiny_patch16_224",
    "vit_base_patch16_224",
    "vit_base_patch32_384",
    "vit_large_patch16_224",
    "vit_huge_patch14_224",
    "vit_base_patch16_clip_224",
    "vit_large_patch14_clip_336",
    "vit_base_patch16_siglip_256",
    "vit_base_patch16_siglip_gap_256",
    "vit_base_patch14_dinov2",
    "vit_large_patch14_dinov2",
    "vit_base_patch14_reg4_dinov2",
    "vit_giant_patch14_reg4_dinov2",
    "vit_base_patch16_dinov3",
    "vit_large_patch16_dinov3",
    "vit_huge_plus_patch16_dinov3",
    "vit_7b_patch16_dinov3",
    "deit_base_patch16_224",
    "deit_base_distilled_patch16_224",
    "deit3_base_patch16_224",
    "deit3_huge_patch14_224",
    "beit_base_patch16_224",
    "beitv2_base_patch16_224",
    "beitv2_large_patch16_224",
    "beit3_base_patch16_224",
    "eva_giant_patch14_336",
    "eva_large_patch14_196",
    "eva02_base_patch14_448",
    "eva02_large_patch14_448",
    "vit_base_r50_s16_224",
    "vit_base_mci_224",
    "vitamin_base_224",
    "flexivit_base",
    "vit_base_patch16_rpn_224",
    "vit_relpos_base_patch16_224",
    "vit_relpos_base_patch16_rpn_224",
    "vit_srelpos_medium_patch16_224",
    "vit_base_patch16_gap_224",
    "vit_medium_patch16_reg4_gap_256",
    "vit_so150m_patch16_reg4_map_256",
    "vit_base_patch16_rope_224",
    "vit_base_patch16_rope_mixed_224",
    "vit_betwixt_patch16_rope_reg4_gap_256",
    "vit_pe_core_base_patch16_224",
    "vit_pe_spatial_base_patch16_512",
    "vit_pe_lang_large_patch14_448",
    "vit_base_patch14_reg1_tipsv2",
    "vit_base_patch16_radio_v3",
    "vit_intern300m_patch14_448",
    "vit_base_patch16_sapiens2",
    "aimv2_large_patch14_224",
    "vit_base_patch16_lingbot",
    "vit_base_patch16_xp_224",
    "vit_base_patch16_18x2_224",
    "vit_dwee_patch16_reg1_gap_256",
    "naflexvit_base_patch16_gap",
    "samvit_base_patch16",
    "cait_s24_224",
    "xcit_small_12_p16_224",
    "hiera_base_224",
    "mvitv2_base",
    "swin_base_patch4_window7_224",
    "swinv2_base_window8_256",
    "convnext_base",
    "resnet50",
    "fastvit_mci2",
    "efficientnet_b0",
    "mobilenetv4_conv_small",
)

# Sizes that a transformers model is known with; its configuration's own are those of a B-16 or B-32.
_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
_GIANT = {"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24, "use_swiglu_ffn": True}
TRANSFORMERS = {
    ("CLIPModel", "ViT-B-32"): {},
    ("CLIPModel", "ViT-L-14"): {"vision_config": _LARGE | {"patch_size": 14}, "projection_dim": 768},
    ("CLIPVisionModelWithProjection", "ViT-B-32"): {},
    ("MetaClip2Model", "ViT-B-32"): {},
    ("ChineseCLIPModel", "ViT-B-32"): {},
    ("AltCLIPModel", "ViT-B-32"): {},
    ("SiglipModel", "ViT-B-16"): {},
    ("SiglipModel", "so400m-14"): {"vision_config": _SO400M | {"patch_size": 14}},
    ("BlipForImageTextRetrieval", "base"): {},
    ("BlipForImageTextRetrieval", "large"): {"vision_config": _LARGE},
    ("ViTModel", "B-16"): {},
    ("ViTModel", "L-16"): _LARGE,
    ("ViTForImageClassification", "L-16"): _LARGE,
    ("ViTMSNModel", "B-16"): {},
    ("FlavaImageModel", "B-16"): {},
    ("OwlViTModel", "B-32"): {},
    ("DeiTModel", "B-16"): {},
    ("Dinov2Model", "B-14"): {"patch_size": 14},
    ("Dinov2Model", "L-14"): {"patch_size": 14, **_LARGE},
    ("Dinov2Model", "g-14"): {"patch_size": 14, **_GIANT},
    ("Dinov2ForImageClassification", "L-14"): {"patch_size": 14, **_LARGE},
    ("Dinov2WithRegistersModel", "L-14"): {"patch_size": 14, **_LARGE},
    ("BlipModel", "base"): {},
    ("CLIPForImageClassification", "ViT-B-32"): {},
    ("Siglip2Model", "B-16"): {},
    ("PixioModel", "B-16"): {},
    ("ASTModel", "B-16"): {},
    ("DINOv3ViTModel", "S-16"): {},
    ("BeitModel", "B-16"): {},
    ("ViTMAEModel", "B-16"): {},
    ("SwinModel", "T"): {},
    ("ConvNextModel", "T"): {},
    ("ResNetModel", "50"): {},
}


@dataclass(frozen=True)
class TowerRow:
    """One tower: what its view says, or why it has none."""

    name: str
    family: str
    pooling: str = ""
    layers: int = 0
    heads: int = 0
    coordinates: int = 0
    dim: int = 0
    reason: str = ""

    @property
    def supported(self) -> bool:
        return not self.reason

    def line(self) -> str:
        if not self.supported:
            return f"| `{self.name}` | {self.family} | {self.reason} |"
        floats = self.layers * self.heads * self.coordinates
        return (
            f"| `{self.name}` | {self.family} | {self.pooling} | {self.layers} × {self.heads} | "
            f"{self.coordinates} | {self.dim} | {floats * 4 / 1000:,.0f} kB |"
        )


_RANDOM = {"uniform_", "normal_", "erfinv_", "clamp_", "trunc_normal_", "kaiming_uniform_", "xavier_uniform_"}


class _NoInitialisation(TorchFunctionMode):
    """Leaves out the random filling of tensors, which means nothing on the meta device and takes most of the
    time."""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        if function.__name__ in _RANDOM and arguments:
            return arguments[0]
        return function(*arguments, **(keywords or {}))


def row(name: str, build: Callable[[], nn.Module]) -> TowerRow:
    """The row of the tower that `build` makes."""
    with torch.device("meta"), _NoInitialisation():
        tower = build()
    try:
        view = towers.view(tower)
    except rk.UnsupportedTowerError as error:
        reason = str(error).partition("here: ")[2].partition("; supported are")[0]
        return TowerRow(
            name,
            type(getattr(tower, "trunk", tower)).__name__,
            reason=reason or str(error).partition(": it has")[0],
        )
    layout = view.layout
    return TowerRow(name, view.name, view.pooling, layout.layers, layout.heads, view.head_width, view.dim)


@cache
def open_clip_rows() -> list[TowerRow]:
    """Every configuration; those that differ in resolution alone are built once."""
    made: dict[str, TowerRow] = {}
    rows = []
    for name in sorted(open_clip.list_models(), key=str.lower):
        config = open_clip.get_model_config(name)
        vision, dim, quick_gelu = config["vision_cfg"], config["embed_dim"], config.get("quick_gelu", False)
        trunk = re.sub(r"_\d+$", "", vision.get("timm_model_name", ""))
        key = json.dumps([trunk or name, dim, vision.get("timm_pool"), vision.get("timm_proj")])
        if key not in made:
            made[key] = row(name, partial(_build_vision_tower, dim, vision, quick_gelu))
        rows.append(replace(made[key], name=name))
    return rows


def timm_rows() -> list[TowerRow]:
    """The towers named above, as embeddings (without their classifiers)."""
    return [row(name, partial(timm.create_model, name, num_classes=0)) for name in TIMM]


def _transformers_model(kind: str, settings: dict) -> nn.Module:
    model = getattr(transformers, kind)
    return model(model.config_class(**settings))


def transformers_rows() -> list[TowerRow]:
    """The models named above; they are given whole."""
    return [
        row(f"{kind} {size}", partial(_transformers_model, kind, settings))
        for (kind, size), settings in TRANSFORMERS.items()
    ]


# Title and rows of every list; another family is one more line.
SECTIONS: dict[str, Callable[[], list[TowerRow]]] = {
    "open_clip": open_clip_rows,
    "timm": timm_rows,
    "transformers": transformers_rows,
}

INTRODUCTION = """\
# Towers

This page lists the image towers whose units the library computes exactly. `python tests/towers_table.py`
writes it: it builds every tower without values and asks for its view. A test keeps this page current. Other
tests check that the units of every structure sum to the tower's output.

* *pooling*: how the tokens of the last layer become one embedding. With an average, the norm may come before
  or after it; both are exact.
* *L × H*: layers and heads of each. *C*: coordinates of a head. *D*: the embedding.
* *z*: the bytes that a cache holds for all heads of one image, in float32. With attention pooling a head has
  no short form, so the cache holds the heads' outputs themselves (C = D); "Your own tower" says what that
  costs.
* Towers that are refused stand below each list, with the reason that the library gives.
* Wrapped, cast, averaged and quantised towers, the check against the model itself, and a recipe for a tower
  that nobody has seen: [TOWERS_IN_USE.md](TOWERS_IN_USE.md).
"""


def page() -> str:
    parts = [INTRODUCTION]
    for title, make in SECTIONS.items():
        rows = make()
        there, refused = ([r for r in rows if r.supported is yes] for yes in (True, False))
        parts.append(f"## {title}: {len(there)} of {len(rows)}\n")
        parts.append("| tower | family | pooling | L × H | C | D | z |\n|---|---|---|---|---|---|---|")
        parts.append("\n".join(r.line() for r in there) + "\n")
        parts.append("| refused | family | because |\n|---|---|---|")
        parts.append("\n".join(r.line() for r in refused) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
