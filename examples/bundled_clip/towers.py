"""Which image towers can be trained here? The bundled one, and others of its size but of another shape.

Each takes the same pictures, and the text tower and the training are the same. They show that nothing in
this library hangs on one shape of tower; none of them is shipped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from residual_kernels import bundled

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 8}
# What timm's VisionTransformer is told besides.
TIMM = {
    "registers": {"reg_tokens": 4, "global_pool": "token", "init_values": 1.0},
    "average": {"class_token": False, "global_pool": "avg"},
    "map": {"class_token": False, "global_pool": "map"},  # attention pooling, as SigLIP's
}
BUNDLED = "class token"
NAMES = (BUNDLED, *TIMM)


def build(config: dict, name: str) -> torch.nn.Module:
    """An untrained model of `config` whose image tower has the shape `name`; the text tower is the same."""
    from open_clip.model import set_model_preprocess_cfg
    from timm.models.vision_transformer import VisionTransformer

    model = bundled.build_model(config)
    if name == BUNDLED:
        return model
    preprocess = model.visual.preprocess_cfg
    options: dict[str, Any] = {**SIZES, **TIMM[name]}
    model.visual = VisionTransformer(num_classes=config["model_cfg"]["embed_dim"], **options)
    set_model_preprocess_cfg(model, preprocess)
    return model


def load(folder: Path) -> tuple[torch.nn.Module, object]:
    """What train.py wrote to a folder: the model in eval mode and float32, and its tokenizer."""
    config = json.loads((folder / "config.json").read_text())
    model = build(config, config.get("tower", BUNDLED))
    weights = load_file(folder / bundled.WEIGHTS.name)
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return model.eval(), bundled.build_tokenizer(config, folder / bundled.VOCABULARY.name)
