"""What does a model's name mean? The bundled model, or one of open_clip's or transformers' with its weights."""

import difflib
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from residual_kernels.bundled import load_bundled
from residual_kernels.towers.hugging_face import tower as hugging_face
from residual_kernels.towers.hugging_face.text import has_text_side

BUNDLED = "bundled"
TRANSFORMERS = "hf:"
_OWN_CODE = {
    "trust_remote_code": False
}  # no code of a model's folder runs, and nobody is asked whether it may


def nearest(name: str, known: list[str]) -> str:
    """A clause that names the known names nearest to `name`."""
    if not known:
        return "none are known"
    by_lower = {found.lower(): found for found in known}
    close = [by_lower[found] for found in difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.4)]
    return f"nearest are {', '.join(close)}" if close else f"known are {', '.join(known[:5])} ..."


def load_model(name: str, pretrained: str | None = None) -> tuple[nn.Module, Callable, Callable | None]:
    """(model, preprocess, tokenizer) of ``bundled``, of an open_clip name, or of ``hf:NAME``, in eval mode.

    `pretrained` is an open_clip tag (downloaded by open_clip), a local checkpoint, or ``none`` for random weights.
    ``hf:NAME`` is a transformers model: a folder that holds one, or its name on the hub, from where transformers then
    loads it; it has no tokenizer where it embeds no text. Raises ValueError with the nearest known names.
    """
    if name.startswith(TRANSFORMERS):
        if pretrained is not None:
            raise ValueError(f"{name} names a model with its weights; leave --pretrained out")
        return _load_transformers(name.removeprefix(TRANSFORMERS))
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
    except (
        pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, KeyError, TypeError, AttributeError,
        StopIteration, OSError, ValueError, IndexError,
    ) as error:  # fmt: skip
        raise ValueError(f"{pretrained} does not hold weights of {name}: {_reason(error)}") from error
    return model.eval(), preprocess, open_clip.get_tokenizer(name)


def _reason(error: BaseException) -> str:
    """The first line of an error; without torch's advice to load a file that can run code."""
    if "weights_only" in str(error):
        return "it holds more than tensors, and loading that could run code; save it as .safetensors"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def image_tower(model: nn.Module) -> nn.Module:
    """The image tower of a model that :func:`load_model` gave."""
    return model.visual if hasattr(model, "visual") else hugging_face.image_tower(model)


class _Processed:
    """A transformers image processor as a preprocess: a picture to a tensor [3, H, W]."""

    def __init__(self, processor: Callable):
        self.processor = processor

    def __call__(self, picture: Any) -> Tensor:
        return self.processor(images=picture, return_tensors="pt")["pixel_values"][0]


def _load_transformers(source: str) -> tuple[nn.Module, Callable, Callable | None]:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ValueError(
            "hf: models are loaded by the library `transformers`; install it with pip install 'residual-kernels[hf]'"
        ) from error
    try:
        config = transformers.AutoConfig.from_pretrained(source, **_OWN_CODE)
        kind = getattr(transformers, str((config.architectures or ["none"])[0]), None)
        if not (inspect.isclass(kind) and issubclass(kind, transformers.PreTrainedModel)):
            raise ValueError(
                f"{config.architectures} is no class of this transformers ({transformers.__version__})"
            )
        model = kind.from_pretrained(source, use_safetensors=True, **_OWN_CODE).eval()
        hugging_face.image_tower(model)  # says at once what it is not
        preprocess = _Processed(transformers.AutoImageProcessor.from_pretrained(source, **_OWN_CODE))
        tokenizer = None
        if has_text_side(model):
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **_OWN_CODE)
    except (OSError, ValueError, SafetensorError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        if "trust_remote_code" in str(error):
            reason = (
                "it brings code of its own, and this library runs none; use a model that transformers knows"
            )
        else:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{TRANSFORMERS}{source} cannot be loaded: {reason}") from error
    return model, preprocess, tokenizer
