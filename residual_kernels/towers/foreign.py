"""What type has a module of another library?

None that a checker could hold its versions to: structure is looked at.

A view's structure check says at run time which parts a module has; what it has passed is read as
:data:`Foreign`.
"""

from typing import Any, Protocol, TypeAlias

from torch import Tensor

Foreign: TypeAlias = Any


class Submodule(Protocol):
    """A norm, an MLP or a projection: called with the stream."""

    def __call__(self, x: Tensor, /) -> Tensor: ...
