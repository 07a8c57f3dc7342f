"""Numbers of the paper's released code on a tiny random CLIP (tests/data/golden, see its README),
and that CLIP."""

import functools
import json
from pathlib import Path

import numpy as np
import open_clip
import torch
from safetensors.torch import load_file

FOLDER = Path(__file__).parent / "data" / "golden"
LAYERS, HEADS, UNITS = 3, 3, 13
# Their unit order is emb, mlps, heads; ours is emb, heads, mlps: ours[i] is their unit THEIRS[i].
THEIRS = [0, *range(1 + LAYERS, UNITS), *range(1, 1 + LAYERS)]


@functools.cache
def numbers(name: str) -> dict[str, torch.Tensor]:
    """All arrays of one golden file that are numbers."""
    arrays = np.load(FOLDER / f"{name}.npz")
    return {key: torch.from_numpy(arrays[key]) for key in arrays.files if arrays[key].dtype.kind in "fi"}


def model(dtype: torch.dtype = torch.float64):
    """A fresh copy of the CLIP the numbers were made with."""
    clip = open_clip.CLIP(**json.loads((FOLDER / "clip_config.json").read_text()))
    clip.load_state_dict(load_file(FOLDER / "clip.safetensors"))
    return clip.to(dtype).eval()


def images(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return numbers("inputs")["images"].to(dtype)
