"""How is a call of a known shape launched again? What its shape decides is made once and kept.

Triton looks a launch up by every argument's type and alignment, which takes longer than most kernels here.
Two calls of one shape differ in the addresses of their tensors only: the rest of the arguments is bound once,
and the compiled kernel is called by itself.
"""

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

Made = TypeVar("Made")
MOST = 4096  # things kept; a program that goes through more shapes than that starts again
_kept: dict[Hashable, Any] = {}


def kept(key: Hashable, make: Callable[[], Made]) -> Made:
    """What `make` made for this key the first time."""
    found = _kept.get(key)
    if found is None:
        if len(_kept) >= MOST:
            _kept.clear()
        found = _kept[key] = make()
    return found


def forget() -> None:
    """Plans and launches are made anew: after something they depend on has changed."""
    _kept.clear()


_HERE = nullcontext()


def on(device: torch.device) -> AbstractContextManager:
    """Launches go to the current device: made that of the tensors where there are several."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


class Launch:
    """A kernel, its grid and its arguments except the `moving` tensors, which a call gives in their order.

    What is compiled depends on whether each moving tensor is aligned to 16 bytes: one compiled kernel is kept
    for each combination that occurs.
    """

    def __init__(
        self,
        kernel: triton.JITFunction,
        grid: tuple[int, ...],
        moving: tuple[str, ...],
        arguments: dict,
        warps: int,
        stages: int,
    ):
        self.kernel, self.grid = kernel, (*grid, 1, 1)[:3]
        self.options = {"num_warps": warps, "num_stages": stages}
        names = list(kernel.arg_names)
        self.values = [arguments.get(name) for name in names]
        self.places = [names.index(name) for name in moving]
        self.compiled: dict[int, Any] = {}

    def __call__(self, *moving: Tensor | None) -> None:
        values = self.values.copy()
        unaligned = 0
        for place, tensor in zip(self.places, moving, strict=True):
            values[place] = tensor
            if tensor is not None and tensor.data_ptr() & 15:
                unaligned |= 1 << place
        compiled = self.compiled.get(unaligned)
        if compiled is not None:
            compiled[self.grid](*values)
            return
        compiled = self.kernel[self.grid](*values, **self.options)
        if compiled is not None:  # the interpreter compiles nothing
            self.compiled[unaligned] = compiled
