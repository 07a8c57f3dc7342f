"""What does a model's name mean?

The bundled model, or one of open_clip's or transformers' with its weights.
"""

import contextlib
import difflib
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from residual_kernels.bundled import load_bundled
from residual_kernels.data import downloads, weight_files
from residual_kernels.data.model_names import BUNDLED, TRANSFORMERS
from residual_kernels.data.user_text import user_path
from residual_kernels.towers.hugging_face import image_tower as hugging_face
from residual_kernels.towers.hugging_face.text import has_text_side

# No code of a model's folder runs, and nobody is asked whether it may.
_OWN_CODE = {"trust_remote_code": False}


def nearest(name: str, known: list[str]) -> str:
    """A clause that names the known names nearest to `name`."""
    if not known:
        return "none are known"
    by_lower = {found.lower(): found for found in known}
    close = [by_lower[found] for found in difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.4)]
    return f"nearest are {', '.join(close)}" if close else f"known are {', '.join(known[:5])} ..."


def load_model(name: str, pretrained: str | None = None) -> tuple[nn.Module, Callable, Callable | None]:
    """(model, preprocess, tokenizer) of ``bundled``, of an open_clip name, or of ``hf:NAME``, in eval mode.

    `pretrained` is an open_clip tag (downloaded by open_clip), a local checkpoint, or ``none`` for random
    weights. ``hf:NAME`` is a transformers model: a folder that holds one, or its name on the hub, from where
    transformers then loads it; it has no tokenizer where it embeds no text. What was downloaded before is
    loaded without a network.

    Raises ValueError with the nearest known names, with all that is wrong with a checkpoint, or, for weights
    that are not on this machine, with what the network said.
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
            f"say which weights of {name}: --pretrained with a tag "
            f"({', '.join(tags[:4]) or 'there is none'}), a checkpoint file, or none for random weights"
        )
    weights = None if pretrained == "none" else pretrained
    if weights is not None and weights not in tags:
        path = user_path(weights)
        if not path.exists():
            raise ValueError(
                f"{name} has no weights {pretrained!r} and no such file exists; {nearest(pretrained, tags)}"
            )
        weight_files.check_file(path)
        weights = str(path)
    with _files_of(name, weights if weights in tags else None):
        try:
            model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=weights)
        except (*weight_files.ABOUT_WEIGHTS, SafetensorError, OSError) as error:
            if weights is None:
                raise
            if weights in tags:
                raise ValueError(
                    f"the weights {weights} of {name} could not be loaded: {_line(error)}"
                ) from error
            raise ValueError(
                f"{pretrained} does not hold weights of {name}: {weight_files.reason(error)}"
            ) from error
        return model.eval(), preprocess, open_clip.get_tokenizer(name)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def _files_of(name: str, tag: str | None) -> Iterator[None]:
    """Around loading an open_clip model: without a network where all its files are here,
    else after one question."""
    import open_clip

    text = open_clip.get_model_config(name).get("text_cfg", {})
    wanted: list[tuple[str, str, Sequence[str]]] = []  # what it is, repository, names that its file may have
    if tag is not None:
        found = open_clip.get_pretrained_cfg(name, tag)
        if found.get("hf_hub"):
            repository, _, file = found["hf_hub"].rpartition("/")
            files = [file, f"{file.rpartition('.')[0]}.safetensors"] if file else list(_WEIGHTS)
            wanted.append((f"the files of the weights {tag} of {name}", repository, files))
        elif found.get("url") and not (_OPEN_CLIP / Path(found["url"]).name).expanduser().is_file():
            wanted.append((f"the files of the weights {tag} of {name}", found["url"], []))
    if text.get("hf_model_name"):
        wanted.append((f"the files of the text tower of {name}", text["hf_model_name"], ["config.json"]))
    if text.get("hf_tokenizer_name"):
        wanted.append((f"the files of the tokenizer of {name}", text["hf_tokenizer_name"], _TOKENIZERS))
    lacking = [row for row in wanted if not downloads.on_this_machine(row[1], row[2])]
    if not lacking:
        with downloads.without_network():
            yield
        return
    what, place, _ = lacking[0]
    _ask(f"{what} ({place}) exist, but not on this machine", "give a checkpoint file with --pretrained")
    yield


_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "spiece.model")
_OPEN_CLIP = Path("~/.cache/clip")  # where open_clip keeps what it downloads by address


def _ask(what: str, instead: str) -> None:
    """Raises ValueError where something has to be downloaded and the network does not allow it."""
    why = downloads.unreachable()
    if why is not None:
        raise ValueError(f"{what}, and {why}; download it where there is a network, or {instead}")


def image_tower(model: nn.Module) -> nn.Module:
    """The image tower of a model that :func:`load_model` gave."""
    visual = getattr(model, "visual", None)
    return hugging_face.image_tower(model) if visual is None else visual


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
            "hf: models are loaded by the library `transformers`; install it with pip install "
            "'residual-kernels[hf]'"
        ) from error
    if not source:
        raise ValueError(
            f"{TRANSFORMERS} names no model; write a folder or a name on the hub after the colon"
        )
    local = user_path(source)
    if local.is_dir():
        return _from_transformers(transformers, source, str(local), True)
    if re.fullmatch(r"(?:[\w.-]+/)?[\w.-]+", source) is None:
        raise ValueError(
            f"{TRANSFORMERS}{source} cannot be loaded: there is no such folder, and the hub has no such names"
        )
    if downloads.on_this_machine(source, ["config.json"]):
        try:
            return _from_transformers(transformers, source, source, True)
        except ValueError as error:
            # with any other cause all files are here, and something is wrong with them
            if not isinstance(error.__cause__, OSError):
                raise
    _ask(
        f"{TRANSFORMERS}{source} cannot be loaded: it is no folder here and was not downloaded before",
        f"name a folder: {TRANSFORMERS}FOLDER",
    )
    return _from_transformers(transformers, source, source, False)


def _from_transformers(
    transformers: ModuleType, source: str, place: str, local: bool
) -> tuple[nn.Module, Callable, Callable | None]:
    options = {"local_files_only": local, **_OWN_CODE}
    try:
        config = transformers.AutoConfig.from_pretrained(place, **options)
        kind: Any = getattr(transformers, str((config.architectures or ["none"])[0]), None)
        known = inspect.isclass(kind) and issubclass(kind, transformers.PreTrainedModel)
        if not known:
            raise ValueError(
                f"{config.architectures} is not a class of this transformers release "
                f"({transformers.__version__})"
            )
        model = kind.from_pretrained(place, use_safetensors=True, **options).eval()
        hugging_face.image_tower(model)  # says at once what it is not
        preprocess = _Processed(transformers.AutoImageProcessor.from_pretrained(place, **options))
        tokenizer = None
        if has_text_side(model):
            tokenizer = transformers.AutoTokenizer.from_pretrained(place, **options)
    except (OSError, ValueError, SafetensorError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        if "trust_remote_code" in str(error):
            reason = (
                "it brings code of its own, and this library runs none; use a model that transformers knows"
            )
        else:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{TRANSFORMERS}{source} cannot be loaded: {reason}") from error
    return model, preprocess, tokenizer
