"""A small real CLIP inside the package: open_clip's architecture, trained on drawings and photographs.

`load_bundled` needs no network. How the weights were made is in MODEL_CARD.md beside this file. open_clip is
imported where it is used: it takes seconds, and brings transformers along.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

if TYPE_CHECKING:
    from open_clip import CLIP, SimpleTokenizer

FOLDER = Path(__file__).resolve().parent
CONFIG, WEIGHTS, VOCABULARY = FOLDER / "config.json", FOLDER / "clip.safetensors", FOLDER / "bpe_vocab.txt.gz"


def load_bundled() -> tuple[CLIP, Callable, SimpleTokenizer]:
    """The small CLIP inside the package, offline.

    Returns:
        (model, preprocess, tokenizer): the model in eval mode and float32, its image transform (PIL image ->
        [3, 32, 32]) and its tokenizer (texts -> [N, 24] int64).
    """
    config = json.loads(CONFIG.read_text())
    with torch.random.fork_rng(devices=[]):  # the weights drawn at construction are replaced at once
        model = build_model(config)
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(WEIGHTS).items()})
    return model.eval(), build_preprocess(config), build_tokenizer(config)


def build_model(config: dict) -> CLIP:
    """An untrained model of `config`; its tower carries `preprocess_cfg`, as open_clip's factory does it."""
    from open_clip import CLIP
    from open_clip.model import set_model_preprocess_cfg

    model = CLIP(**config["model_cfg"])
    set_model_preprocess_cfg(model, {**config["preprocess_cfg"], "size": model.visual.image_size})
    return model


def build_preprocess(config: dict) -> Callable:
    """PIL image to normalised tensor [3, 32, 32]."""
    from open_clip import image_transform

    cfg = config["preprocess_cfg"]
    return image_transform(
        cfg["size"],
        is_train=False,
        mean=cfg["mean"],
        std=cfg["std"],
        interpolation=cfg["interpolation"],
        resize_mode=cfg["resize_mode"],
    )


def build_tokenizer(config: dict, vocabulary: Path = VOCABULARY) -> SimpleTokenizer:
    """open_clip's tokenizer over the model's own small vocabulary."""
    from open_clip import SimpleTokenizer

    return SimpleTokenizer(
        bpe_path=str(vocabulary), context_length=config["model_cfg"]["text_cfg"]["context_length"]
    )


__all__ = [
    "CONFIG",
    "VOCABULARY",
    "WEIGHTS",
    "build_model",
    "build_preprocess",
    "build_tokenizer",
    "load_bundled",
]
