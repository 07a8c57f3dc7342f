"""Three classes of images that differ in brightness, as a cache, with a head of random class vectors."""

import math

import torch
from test_towers import images_for
from torch import Tensor

import residual_kernels as rk

KINDS = ("head", "mlp")


def images_of(tower, counts: tuple[int, ...], dtype=torch.float32) -> tuple[Tensor, Tensor]:
    """Images for a tower, so many of each class, and their labels."""
    labels = torch.repeat_interleave(torch.tensor(counts))
    return images_for(tower, len(labels), dtype) * 0.5 + (labels - 1.0)[:, None, None, None], labels


def cache_of(tower, counts: tuple[int, ...], names, dtype=torch.float32) -> rk.UnitCache:
    return rk.encode(tower, [images_of(tower, counts, dtype)], kinds=KINDS, class_names=names)


def head_of(names, seed: int = 2, dtype=torch.float32) -> rk.ZeroShotHead:
    vectors = torch.randn(32, len(names), generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return rk.ZeroShotHead(vectors, names, math.log(10.0))


def parts_of(cache: rk.UnitCache, count: int = 80) -> tuple[rk.UnitCache, rk.UnitCache]:
    """Two parts of a cache in a random order, the first of `count` images."""
    order = torch.randperm(len(cache), generator=torch.Generator().manual_seed(0))
    return cache.subset(order[:count]), cache.subset(order[count:])
