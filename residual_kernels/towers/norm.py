"""What is a norm in numbers? LayerNorm, RMS norm or none: x -> s (x - m) o gamma + beta."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from residual_kernels.towers.blocks import whole


@dataclass(frozen=True)
class Norm:
    """`kind` is "layer" (m the mean), "rms" (m = 0) or "none" (m = 0, s = 1).

    `module` has weight, bias and eps where its kind has them; they are read at every call.
    """

    module: nn.Module
    kind: str = "layer"

    def constants(self, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """gamma and beta [width], float64 on the device of `like`."""
        weight, bias = getattr(self.module, "weight", None), getattr(self.module, "bias", None)
        blank = torch.zeros(width, dtype=torch.float64, device=like.device)
        gamma = blank + 1 if weight is None else whole(weight).to(blank)
        return gamma, blank if bias is None else whole(bias).to(blank)

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """s and m of the last dimension of `x`, float32 or better."""
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.kind == "layer":
            variance, mean = torch.var_mean(precise, dim=-1, correction=0)
        else:
            variance = precise.square().mean(-1)
            mean = torch.zeros_like(variance)
        if self.kind == "none":
            return torch.ones_like(mean), mean
        own = cast("float | None", self.module.eps)
        eps = torch.finfo(x.dtype).eps if own is None else own
        return (variance + eps).rsqrt(), mean

    def coordinates(self, z: Tensor, attended: Tensor) -> Tensor:
        """[s z, s] of every head [..., H, C+1], with s of this norm at the attention output `attended`.

        Where a norm stands behind the output projection, a head is linear in these and not in z.
        """
        scale = self.statistics(attended)[0].to(z.dtype)[..., None, None]
        return torch.cat([z * scale, scale.expand(*z.shape[:-1], 1)], dim=-1)


def known_norm(module: nn.Module) -> Norm:
    """:func:`norm_of` a module that has passed a structure check, so that it is one."""
    found = norm_of(module)
    assert found is not None
    return found


def norm_of(module: nn.Module) -> Norm | None:
    """What `module` is as a norm, an Identity being none; None when it is something else.

    RMS norms are told by name, which is all that torch's, timm's and transformers' have in common.
    """
    if isinstance(module, nn.LayerNorm):
        return Norm(module)
    if isinstance(module, nn.Identity):
        return Norm(module, "none")
    if "rmsnorm" in type(module).__name__.lower() and hasattr(module, "eps") and hasattr(module, "weight"):
        return Norm(module, "rms")
    return None
