"""How is an adapter folded away?

For a fixed weight everything it does is linear in what the tower computes anyway.

In the stream the change of a layer goes into its output projection, and the tower's own state_dict holds it.
At the output y = s (z F + b + m g) + e with one matrix F for all adapted units: a module of torch layers,
which torch.export and ONNX carry to where this package is absent. Folding is done in float64.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from residual_kernels.adapters.tower_adapter import AroundTower
from residual_kernels.adapters.unit_sum import SpectralConstants, at_least_float32
from residual_kernels.ops.packing import wide
from residual_kernels.towers import Tower, UnitMaps


class Fold:
    """Sums up y = s (z F + b + m g) + e over units, in float64; F is kept in runs of rows as kinds come."""

    def __init__(self, dim: int, device: torch.device):
        self.rows: list[Tensor] = []
        self.b, self.g, self.e = torch.zeros(3, dim, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add_spectral(self, constants: SpectralConstants, weight: Tensor) -> None:
        """The units of one kind, reweighted on their components: sum_j weight[j] c[j] basis[j]."""
        # [J, D]
        proj, weighted = (
            constants.proj.double(),
            weight.double()[:, None] * constants.basis.double(),
        )
        bounds = constants.unit_offsets.tolist()
        runs = [slice(low, high) for low, high in zip(bounds[:-1], bounds[1:], strict=True)]
        self.rows.append(torch.cat([proj[run].T @ weighted[run] for run in runs]))
        self.b += constants.bias.double() @ weighted
        self.g += constants.slope.double() @ weighted
        self.e -= constants.offset.double() @ weighted

    @torch.no_grad()
    def add_units(self, maps: UnitMaps, weight: Tensor) -> None:
        """The units of one kind, each times its weight [R]."""
        weight, share = weight.double(), weight.double().sum() / maps.share
        self.rows.append((weight[:, None, None] * maps.A).flatten(0, 1))
        self.b += weight @ maps.b
        self.g -= share * maps.g
        self.e += share * maps.e

    @torch.no_grad()
    def subtract_units(self, maps: UnitMaps) -> None:
        """Takes the units of the kind added last away once, as they are: what is left is their change."""
        rows = self.rows.pop()
        self.add_units(maps, -maps.b.new_ones(len(maps.A)))
        self.rows[-1] += rows


class MergedUnits(AroundTower):
    """y = s (z F + b + m g) + e, plus the tower's output where it is kept:
    an adapter of units with its weight folded.

    Torch layers only. Around the same tower, not a copy of it, and called like it.
    """

    def __init__(self, view: Tower, kinds: tuple[str, ...], fold: Fold, keep_output: bool):
        super().__init__()
        self._view, self.tower = view, view.module
        self.kinds, self.keep_output = kinds, keep_output
        like = next(self.tower.parameters())
        F = torch.cat(fold.rows)
        self.product = nn.utils.skip_init(nn.Linear, *F.shape, device=like.device, dtype=wide(like.dtype))
        values = {"product.weight": F.T, "product.bias": fold.b, "slope": fold.g, "shift": fold.e}
        check_finite(values)
        with torch.no_grad():
            self.product.weight.copy_(F.T)
            self.product.bias.copy_(fold.b)
        self.product.requires_grad_(False)
        self.register_buffer("slope", fold.g.to(self.product.weight.dtype))
        self.register_buffer("shift", fold.e.to(self.product.weight.dtype))

    def _apply(self, fn, recurse=True):
        self.tower._apply(fn)
        self.product._apply(at_least_float32(fn))
        return super()._apply(at_least_float32(fn), recurse=False)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        batch = self._view.terms(images, self.kinds)
        dtype = self.product.weight.dtype
        z = torch.cat([batch.z[kind].flatten(1) for kind in self.kinds], dim=1).to(dtype)
        scale, mean = batch.scale[:, None].to(dtype), batch.mean[:, None].to(dtype)
        y = scale * (self.product(z) + mean * self.slope) + self.shift
        if self.keep_output:
            y = y + batch.output
        y = y.to(batch.output.dtype)
        return y if batch.tokens is None else (y, batch.tokens)


class MergedOutput(AroundTower):
    """y = W output + b: an adapter of the output as a whole with its weight folded. Torch layers only."""

    def __init__(self, tower: nn.Module, weight: Tensor, bias: Tensor):
        super().__init__()
        self.tower = tower
        like = next(tower.parameters())
        check_finite({"linear.weight": weight, "linear.bias": bias})
        self.linear = nn.utils.skip_init(
            nn.Linear, *weight.shape[::-1], device=like.device, dtype=wide(like.dtype)
        )
        with torch.no_grad():
            self.linear.weight.copy_(weight)
            self.linear.bias.copy_(bias)
        self.linear.requires_grad_(False)

    def _apply(self, fn, recurse=True):
        self.tower._apply(fn)
        self.linear._apply(at_least_float32(fn))
        return self

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        output = self.tower(images)
        pooled = output[0] if isinstance(output, tuple) else output
        y = self.linear(pooled.to(self.linear.weight.dtype)).to(pooled.dtype)
        return (y, *output[1:]) if isinstance(output, tuple) else y


def check_finite(values: Mapping[str, Tensor]) -> None:
    bad = [name for name, value in values.items() if not value.isfinite().all()]
    if bad:
        raise ValueError(
            f"folding gives NaN or Inf in {', '.join(bad)}; check the weights and the tower's parameters"
        )
