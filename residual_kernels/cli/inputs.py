"""What options become: a device, a model, a loader, a cache."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from residual_kernels import distributed, sources
from residual_kernels.cache import MANIFEST, UnitCache, encode
from residual_kernels.cli.printing import bar
from residual_kernels.images import Images, open_images

HEAD, CLASSES = "head.safetensors", "classes.json"  # beside an adapter that `fit` wrote
CLASSES_WHAT = "list of class folders"
DEFAULT_TEMPLATES = ("a photo of a {}.",)
BUNDLED_TEMPLATES = ("a {}",)  # what its captions say of anything, drawn or photographed


def device_of(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def loader_of(data: Any, batch_size: int, workers: int) -> DataLoader:
    return DataLoader(data, batch_size=batch_size, num_workers=workers)


def prepare(model: str, pretrained: str | None, device: str | None):
    clip, preprocess, tokenizer = sources.load_model(model, pretrained)
    return clip.to(device_of(device)), preprocess, tokenizer


def cached(tower, images, kinds, title: str, batch_size: int, workers: int) -> UnitCache:
    """The images' cache: read before where `--data` named one, made now otherwise."""
    if isinstance(images, UnitCache):
        images.check(tower, kinds)
        return images
    if distributed.world() > 1:
        raise ValueError(
            "several processes fit on a cache that they share: run `encode` first (torchrun shares that work too), and "
            "name its folder in place of the images"
        )
    with bar(title, len(images)) as step:
        return encode(
            tower, loader_of(images, batch_size, workers), None, kinds, class_names=images.class_names, progress=step
        )  # fmt: skip


def opened(path: Path, preprocess: Callable, labelled: bool = True) -> UnitCache | Images:
    """The cache or the images that `path` names."""
    if (path / MANIFEST).is_file():
        return UnitCache.load(path)
    return open_images(path, preprocess, labelled=labelled)
