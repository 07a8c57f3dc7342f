"""What does a model's name mean? The bundled model, or one of open_clip's with its weights."""

import difflib
import pickle
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from torch import nn

from residual_kernels.bundled import load_bundled

BUNDLED = "bundled"


def nearest(name: str, known: list[str]) -> str:
    """A clause that names the known names nearest to `name`."""
    if not known:
        return "none are known"
    by_lower = {found.lower(): found for found in known}
    close = [by_lower[found] for found in difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.4)]
    return f"nearest are {', '.join(close)}" if close else f"known are {', '.join(known[:5])} ..."


def load_model(name: str, pretrained: str | None = None) -> tuple[nn.Module, Callable, Callable]:
    """(model, preprocess, tokenizer) of ``bundled`` or of an open_clip name, in eval mode.

    `pretrained` is an open_clip tag (downloaded by open_clip), a local checkpoint, or ``none`` for random weights.
    Raises ValueError with the nearest known names.
    """
    import open_clip

    if name == BUNDLED:
        if pretrained is not None:
            raise ValueError("the bundled model has its own weights; leave --pretrained out")
        return load_bundled()
    models = open_clip.list_models()
    if name not in models:
        raise ValueError(f"unknown model {name!r}; {nearest(name, [BUNDLED, *models])}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is None:
        raise ValueError(
            f"say which weights of {name}: --pretrained with a tag ({', '.join(tags[:4]) or 'there is none'}), "
            "a checkpoint file, or none for random weights"
        )
    if pretrained != "none" and pretrained not in tags and not Path(pretrained).is_file():
        raise ValueError(
            f"{name} has no weights {pretrained!r} and no such file exists; {nearest(pretrained, tags)}"
        )
    weights = None if pretrained == "none" else pretrained
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=weights)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{pretrained} does not hold weights of {name}: {reason}") from error
    return model.eval(), preprocess, open_clip.get_tokenizer(name)
