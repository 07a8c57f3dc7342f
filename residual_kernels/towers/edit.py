"""Where do heads enter the residual stream?

What a view tells of it, so that heads can be changed inside the tower.

At a token, head h of layer l adds h_lh = gamma o (W_lh z_lh + b_l / H) to the stream, in model width: W_lh is
its slice of the output projection, b_l the projection's bias, gamma the LayerScale where there is one. A head
has rank C here. Where a norm stands behind the projection (EVA02-E), z is [s z, s] with that norm's s, and C
is one more.
"""

from collections.abc import Iterable

import torch

from residual_kernels.towers.blocks import whole
from residual_kernels.towers.view import Edit, OutProjection, Tower, UnitMaps

__all__ = ["TOKENS", "Edit", "OutProjection", "check_layers", "stream_maps", "token_run"]

TOKENS = ("all", "class", "patches")


@torch.no_grad()
def stream_maps(view: Tower, layer: int) -> UnitMaps:
    """A [H, C, width] and b [H, width] of one layer's heads in float64: h = z A + b at every token."""
    out, heads = view.out_projection(layer), view.layout.heads
    gain = out.gain()
    A = whole(out.weight).double().unflatten(1, (heads, -1)).permute(1, 2, 0) * gain
    b = torch.zeros_like(gain) if out.bias is None else gain * whole(out.bias).double() / heads
    if out.norm is not None:
        A = torch.cat([A, b.expand(heads, 1, -1)], dim=1)
        A = A - A.mean(2, keepdim=True) if out.norm.kind == "layer" else A
        gamma, beta = out.norm.constants(len(gain), gain)
        A, b = A * gamma, beta / heads
    none = torch.zeros_like(gain)  # no final norm here
    return UnitMaps(A=A, b=b.expand(heads, -1), g=none, e=none, share=1)


def token_run(view: Tower, tokens: str) -> slice:
    """The run of tokens that "all", "class" or "patches" names in this tower."""
    if tokens not in TOKENS:
        raise ValueError(f"tokens must be one of {', '.join(TOKENS)}; got {tokens!r}")
    if tokens == "class" and not view.class_token:
        raise ValueError('tokens="class", but this tower has no class token; use "all" or "patches"')
    return {"all": slice(None), "class": slice(0, 1), "patches": slice(view.prefix, None)}[tokens]


def check_layers(view: Tower, layers: Iterable[int] | None) -> tuple[int, ...]:
    """`layers` in order without repeats, all of them for None.

    A ValueError names those that the tower lacks.
    """
    depth = view.layout.layers
    if layers is None:
        return tuple(range(depth))
    if isinstance(layers, int | str):
        raise ValueError(f"layers must be several numbers of layers, such as [{layers}]; got {layers!r}")
    chosen = sorted({int(layer) for layer in layers})
    if not chosen or chosen[0] < 0 or chosen[-1] >= depth:
        raise ValueError(f"layers must name some of the layers 0 to {depth - 1}; got {chosen}")
    return tuple(chosen)
