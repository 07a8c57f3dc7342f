"""Are these the same weights? A checksum of a tower that casts to bfloat16 and float64 keep."""

import hashlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from residual_kernels.towers.view import UnsupportedTowerError
from residual_kernels.towers.wrappers import inner


def checksum(tower: nn.Module, afresh: bool = False) -> str:
    """SHA-256 of a tower's weights: names, shapes and values rounded to bfloat16.

    A cast to bfloat16 or float64 keeps it; float16 rounds differently, so fit and use in float16 alike, or in
    neither. What was computed before is remembered while version counters and a sample of the values stay;
    `afresh` reads all values, for writes through ``.data``, which raise no counter.
    """
    tower = inner(tower)  # a wrapper may give every name a prefix
    state = [
        each for name, value in sorted(tower.state_dict().items()) for each in plain_tensors(name, value)
    ]
    if any(tensor.is_meta for _, tensor in state):
        raise UnsupportedTowerError(
            "some of this tower's weights are on meta, without values: load them, or let accelerate load the "
            "tower whole on one device"
        )
    samples, known = _samples(state), _checksums.get(tower)
    arriving: Iterator[Tensor] | None = None
    if known is None or afresh:  # the samples travel with the values
        arriving = on_cpu([*samples, *(_rounded(tensor) for _, tensor in state)])
        samples = [next(arriving) for _ in samples]
    stamp = _stamp(state, samples)
    if known is not None and known[0] == stamp and not afresh:
        return known[1]
    digest = hashlib.sha256()
    values = on_cpu([_rounded(tensor) for _, tensor in state]) if arriving is None else arriving
    for (name, tensor), value in zip(state, values, strict=True):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(value.numpy().data)
    _checksums[tower] = stamp, digest.hexdigest()
    return digest.hexdigest()


def plain_tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """What an entry of a state_dict consists of, as (name, plain tensor).

    A quantised tensor gives its integers and scales one by one. What is no tensor (a dtype) becomes a name.
    """
    if isinstance(value, list | tuple):
        for place, each in enumerate(value):
            yield from plain_tensors(f"{name}.{place}", each)
    elif not isinstance(value, Tensor):
        yield f"{name}={value}", torch.empty(0)
    elif value.is_quantized:
        yield name, value.dequantize()
    elif hasattr(value, "__tensor_flatten__") and not hasattr(value, "full_tensor"):  # FSDP2's are numbers
        for inside in value.__tensor_flatten__()[0]:
            yield from plain_tensors(f"{name}.{inside}", getattr(value, inside))
    elif value.is_floating_point() and value.dtype.itemsize == 1:
        yield name, value.view(torch.uint8)
    else:
        yield name, value


def _rounded(tensor: Tensor) -> Tensor:
    """What of a tensor counts: floating values as bfloat16. 16 bits on the way from a device, not 32."""
    value = tensor.detach()
    return (value.to(torch.bfloat16).view(torch.int16) if value.is_floating_point() else value).contiguous()


TOGETHER = 256 << 20  # bytes that travel in one copy


def on_cpu(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same tensors on the CPU, in their order.

    Those of one device travel many at a time, not one by one.
    """
    waiting: list[Tensor] = []
    for tensor in tensors:
        if waiting and (
            tensor.device != waiting[0].device or sum(x.nbytes for x in waiting) + tensor.nbytes > TOGETHER
        ):
            yield from _moved(waiting)
            waiting = []
        waiting.append(tensor)
    if waiting:
        yield from _moved(waiting)


def _moved(tensors: list[Tensor]) -> Iterator[Tensor]:
    """Tensors of one device, moved in one copy."""
    if tensors[0].device.type == "cpu":
        yield from tensors
        return
    flat = torch.cat([x.reshape(-1).view(torch.uint8) for x in tensors]).cpu()
    for part, x in zip(flat.split([x.nbytes for x in tensors]), tensors, strict=True):
        yield part.clone().view(x.dtype).view(x.shape)  # a part of its own starts where its dtype may


# Hashing ViT-bigG takes seconds, and every fit and evaluation asks. A tower's checksum is kept until its
# weights move, their version counters rise, or a sample of their values differs (writes through `.data` raise
# no counter).
_checksums: "weakref.WeakKeyDictionary[nn.Module, tuple[tuple, str]]" = weakref.WeakKeyDictionary()
_SAMPLE = 1009


def _samples(state: list[tuple[str, Tensor]]) -> list[Tensor]:
    """Sums of every 1009th value: [tensors] float64 on their device,
    or one by one where there are several devices."""
    sums = [tensor.detach().reshape(-1)[::_SAMPLE].double().sum() for _, tensor in state]
    return [torch.stack(sums)] if len({one.device for one in sums}) == 1 else sums


def _stamp(state: list[tuple[str, Tensor]], samples: list[Tensor]) -> tuple:
    seen: list[tuple] = []
    for name, tensor in state:
        version = None if tensor.is_inference() else tensor._version
        seen.append((name, tuple(tensor.shape), tensor.dtype, tensor.data_ptr(), version))
    sums = [value for one in samples for value in one.reshape(-1).tolist()]
    return tuple((*entry, total) for entry, total in zip(seen, sums, strict=True))
