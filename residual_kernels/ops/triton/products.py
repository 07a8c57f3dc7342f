"""The vendor's matrix products, with float32 sums whatever they are cut into.

A long sum over few outputs is cut into parts by the vendor (split-K), and with 16-bit outputs the parts are
added in 16 bits unless torch's switches forbid it. They are off while one of our products is launched, and
back behind it.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

_NAMES = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
_lock = threading.Lock()
_inside = 0  # threads that launch a product now: the first writes the switches down, the last puts them back
_found: list[bool] = []


@contextmanager
def _switched_off() -> Iterator[None]:
    global _inside
    switches = torch.backends.cuda.matmul
    with _lock:
        if _inside == 0:
            _found[:] = [getattr(switches, name) for name in _NAMES]
            for name in _NAMES:
                setattr(switches, name, False)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                for name, value in zip(_NAMES, _found, strict=True):
                    setattr(switches, name, value)


def float32_sums(x: Tensor):
    """A context in which products of `x` add in float32."""
    return _switched_off() if x.is_cuda and x.dtype.itemsize == 2 else nullcontext()


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """left @ right in their dtype, rounded once."""
    with float32_sums(left):
        return torch.mm(left, right, out=out) if left.ndim == 2 else torch.matmul(left, right, out=out)


def product_float32(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, accumulated and returned in float32."""
    if left.dtype == torch.float32:
        return left @ right
    if left.device.type == "cuda" and torch.version.hip is None:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.to(torch.float32) @ right.to(torch.float32)
