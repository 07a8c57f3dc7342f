"""What does the library know of an image tower?

The protocol of a view, and the records that views hand out.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from residual_kernels.towers.blocks import whole
from residual_kernels.towers.layout import UnitLayout
from residual_kernels.towers.norm import Norm

# What a view calls in every block: (layer, z [N, tokens, H, C], what attention adds to the stream [N, tokens,
# width]) -> what it is to add instead. With the class token alone in the last block, tokens is 1 there.
Edit = Callable[[int, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class UnitMaps:
    """Constants of one kind: x_u = s * (z_u A_u + b_u - (m / share) g) + e / share, in float64.

    A [R, C, D]; b [R, D]; g, e [D]. `share` is the number of units the final norm's constant terms are dealt
    to.
    """

    A: Tensor
    b: Tensor
    g: Tensor
    e: Tensor
    share: int

    def rows(self) -> Tensor:
        """M [R, C+2, D]: x_u = l_u M_u + e / share with l = (s*z, s, s*m)."""
        units, _, dim = self.A.shape
        slope = (-self.g / self.share).expand(units, 1, dim)
        return torch.cat([self.A, self.b[:, None, :], slope], dim=1)


@dataclass
class Terms:
    """What a tower's forward pass leaves for each image:
    per-image quantities from which every unit is computed.

    z maps a kind to [N, R, C]; scale, mean [N] (float32 or better) are s and m of the final norm; output [N,
    D] is the tower's own output; tokens its second output where the tower returns one.
    """

    z: dict[str, Tensor]
    scale: Tensor
    mean: Tensor
    output: Tensor
    tokens: Tensor | None = None


@dataclass(frozen=True)
class OutProjection:
    """What makes a layer's term of the stream from the z of its heads: gamma o (weight z + bias),
    or its norm."""

    weight: nn.Parameter  # [width, H*C]
    bias: nn.Parameter | None
    gamma: nn.Parameter | None = None  # LayerScale, [width]
    norm: Norm | None = None  # behind the projection; then there is no LayerScale

    def gain(self) -> Tensor:
        """gamma in float64; ones where there is none."""
        if self.gamma is not None:
            return whole(self.gamma).double()
        return torch.ones(len(self.weight), dtype=torch.float64, device=self.weight.device)


class Guard(Protocol):
    """What stands on a tower, and minds that its weights stay: an adapter."""

    def __call__(self) -> None:
        """Raises ValueError where weights that it is made of have changed, or would train; in plain calls."""

    def compare(self) -> None:
        """The same whatever counters say: weights may have been put in other places, or written unseen."""

    def would_train(self) -> str | None:
        """What is wrong if such weights would train, whatever kind of call this is; None if none would."""


class Tower(Protocol):
    """An image tower as the library sees it. Holds no state of its own besides the module it reads."""

    module: nn.Module
    name: str  # architecture family, for messages and files
    layout: UnitLayout
    width: int
    head_width: int
    dim: int  # D
    class_token: bool  # whether the first token is one
    prefix: int  # tokens before the patches: the class token, registers
    returns_tokens: bool  # whether the call also returns tokens
    check: bool  # whether the first image is compared with the model's own forward
    guard: "Guard | None"  # asked before each run
    folded: Mapping[str, tuple[int, ...]] | None  # parameters in an adapter's constants, and their shapes

    def maps(self, kind: str, units: Sequence[int] | None = None) -> UnitMaps: ...

    def check_images(self, images: Tensor) -> None: ...

    def here(self, images: Tensor) -> Tensor: ...

    def check_mode(self) -> None: ...

    def still(self) -> None: ...

    def look(self, images: Tensor) -> bool: ...

    def stamp(self) -> None: ...

    def same_weights(self) -> None: ...

    def terms(
        self, images: Tensor, kinds: Iterable[str], edit: Edit | None = None, every_token: bool = False
    ) -> Terms:
        """`edit` changes what attention adds to the stream, so that later layers see it; with `every_token`
        the last block computes all tokens even where the output depends on one."""
        ...

    def out_projection(self, layer: int) -> OutProjection: ...

    def constant_parameters(self) -> dict[str, nn.Parameter]: ...


_ORIGINAL = re.compile(r"(?:parametrizations\.(\w+)\.original\d*|(\w+?)_(?:orig|g|v))$")


def registered_name(name: str) -> str:
    """The name of the weight that a parameter makes: itself,
    or what a parametrisation or pruning computes from it."""
    return _ORIGINAL.sub(lambda found: found[1] or found[2], name)


class UnsupportedTowerError(ValueError):
    """The tower's structure has no exact units here.

    The message says what was found and what is supported.
    """
