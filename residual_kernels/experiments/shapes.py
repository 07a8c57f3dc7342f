"""On what is speed measured? The attention heads of four CLIP towers, and inputs of those shapes by seed."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """The heads of a tower as `spectral_reweight` sees them. Letters of docs/HOW_IT_WORKS.md: R, C, D."""

    name: str
    units: int  # R = layers * heads
    coordinates: int  # C = head width
    dim: int  # D = shared embedding dimension
    ragged_mean: int = 30  # about the mean K of a basis cut at 90 % explained variance

    def full(self) -> list[int]:
        """K_u = min(D, C+2) for every unit: nothing cut, the exact rank."""
        return [min(self.dim, self.coordinates + 2)] * self.units

    def ragged(self, seed: int = 0) -> list[int]:
        """K_u from 1 to C+2 with mean about `ragged_mean`, as an energy cut leaves them.

        The same for the same seed.
        """
        draw = random.Random(f"{self.name} {seed}")
        most = min(self.dim, self.coordinates + 2)
        spread = self.ragged_mean / 2
        return [min(most, max(1, round(draw.gauss(self.ragged_mean, spread)))) for _ in range(self.units)]

    def components(self, kind: str) -> list[int]:
        """K of every unit: `kind` is ``full``, ``ragged`` or one number for all."""
        if kind in ("full", "ragged"):
            return getattr(self, kind)()
        return [min(self.dim, self.coordinates + 2, int(kind))] * self.units


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("B/16", units=144, coordinates=64, dim=512, ragged_mean=40),
        Shape("L/14", units=384, coordinates=64, dim=768),
        Shape("H/14", units=512, coordinates=80, dim=1024),
        Shape("bigG/14", units=768, coordinates=104, dim=1280),
    )
}


@dataclass(frozen=True)
class Operands:
    """Inputs of the operators for one shape, in the order `spectral_reweight` takes them."""

    z: Tensor  # [N, R, C]
    scale: Tensor  # [N]
    mean: Tensor  # [N]
    proj: Tensor  # [J, C]
    bias: Tensor  # [J]
    slope: Tensor  # [J]
    offset: Tensor  # [J]
    weight: Tensor  # [J]
    basis: Tensor  # [J, D], rows of about unit length, nearly orthogonal
    unit_offsets: Tensor  # [R+1] int64
    dy: Tensor  # [N, D], an incoming gradient


def problem(
    shape: Shape,
    rows: int,
    components: list[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Operands:
    """Inputs of realistic sizes: z and coefficients of about unit variance,
    basis rows of about unit length."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    total, width, dim = sum(components), shape.coordinates, shape.dim
    wide = torch.promote_types(dtype, torch.float32)
    offsets = torch.tensor([0, *components]).cumsum(0)
    return Operands(
        z=normal(rows, shape.units, width).to(device, dtype),
        scale=(1 + 0.1 * normal(rows)).to(device, wide),
        mean=(0.1 * normal(rows)).to(device, wide),
        proj=(normal(total, width) / width**0.5).to(device, dtype),
        bias=(0.1 * normal(total)).to(device, wide),
        slope=(0.1 * normal(total)).to(device, wide),
        offset=(0.1 * normal(total)).to(device, wide),
        weight=(1 + normal(total)).to(device, wide),
        basis=(normal(total, dim) / dim**0.5).to(device, dtype),
        unit_offsets=offsets.to(device),
        dy=(normal(rows, dim) / dim**0.5).to(device, dtype),
    )
