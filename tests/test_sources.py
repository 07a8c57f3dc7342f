"""What a model's name means."""

import numpy as np
import pytest
import torch
from PIL import Image

from residual_kernels.data import models as sources


def test_models_by_name(tmp_path):
    model, preprocess, _ = sources.load_model("bundled")
    assert preprocess(Image.fromarray(np.zeros((8, 8, 3), np.uint8))).shape == (3, *model.visual.image_size)
    assert not model.training
    cases = [
        (("ViT-B32", None), "unknown model 'ViT-B32'; nearest are .*ViT-B-32"),
        (("bundeld", None), "nearest are bundled"),
        (("ViT-B-32", None), "say which weights of ViT-B-32: .*openai"),
        (("ViT-B-32", "opneai"), "no weights 'opneai' and no such file exists; nearest are openai"),
        (("bundled", "openai"), "has its own weights"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            sources.load_model(*arguments)


def test_a_local_checkpoint_is_loaded(tmp_path):
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(3)
    made = open_clip.create_model("ViT-S-32-alt")
    save_file(made.state_dict(), tmp_path / "own.safetensors")
    model, _, tokenizer = sources.load_model("ViT-S-32-alt", str(tmp_path / "own.safetensors"))
    assert torch.equal(model.visual.conv1.weight, made.visual.conv1.weight)
    assert tokenizer(["a"]).shape == (1, 77)
