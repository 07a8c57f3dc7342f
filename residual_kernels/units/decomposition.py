"""What an image's embedding is the sum of: one vector of the output space per residual unit, exactly."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from residual_kernels import towers
from residual_kernels.towers import Terms, Tower, Unit, UnitLayout, UnitMaps
from residual_kernels.units.checks import check_finite


def expand(maps: UnitMaps, z: Tensor, scale: Tensor, mean: Tensor) -> Tensor:
    """x_u = scale * (z_u A_u + b_u - (mean / share) g) + e / share for all units of a kind: [N, R, D]."""
    A, b, g, e = (t.to(scale.dtype) for t in (maps.A, maps.b, maps.g, maps.e))
    raw = torch.einsum("nrc,rcd->nrd", z.to(scale.dtype), A) + b
    return scale[:, None, None] * (raw - mean[:, None, None] * (g / maps.share)) + e / maps.share


@dataclass
class Decomposition:
    """The exact parts of one batch of embeddings. Made by :func:`decompose`.

    Attributes:
        output: [N, D], what the tower itself returns.
        layout: the units in order; rows with .index, .kind, .layer, .head.
        terms: the short form: z per kind [N, R, C], scale [N], mean [N].
    """

    output: Tensor
    layout: UnitLayout
    terms: Terms
    _tower: Tower = field(repr=False)

    def units(self, kind: str | None = None, layer: int | None = None, head: int | None = None) -> Tensor:
        """Units in the output space, in layout order. ``units().sum(1)`` equals ``output``.

        Args:
            kind: only this kind of unit: "emb", "head", "mlp" or "pool".
            layer: only units of this layer.
            head: only this head of each layer.

        Returns:
            [N, U, D], float32 or better.

        Raises:
            ValueError: no unit matches, the kind was not collected, or the tower, whose weights are read
                here, has changed since the images ran.
        """
        chosen = self.layout.select(kind, layer, head)
        found = []
        for name in self.layout.kinds:
            rows = [unit for unit in chosen if unit.kind == name]
            if rows:
                found.append(self._expand(name, rows))
        return torch.cat(found, dim=1)

    def _expand(self, kind: str, rows: list[Unit]) -> Tensor:
        if kind not in self.terms.z:
            raise ValueError(f"kind {kind!r} was not collected; call decompose with kinds that include it")
        self._tower.same_weights()
        index = [unit.index - self.layout.span(kind).start for unit in rows]
        maps = self._tower.maps(kind, index)
        return expand(maps, self.terms.z[kind][:, index], self.terms.scale, self.terms.mean)


def decompose(
    tower: nn.Module, images: Tensor, kinds: Iterable[str] | None = None, *, check: bool = True
) -> Decomposition:
    """Runs an image tower and keeps what its output is the sum of.

    Args:
        tower: a supported image tower, or a ResiDual (its tower is decomposed).
        images: [N, 3, H, W], preprocessed, in the tower's dtype; those on the CPU are moved to its device.
        kinds: which units to collect; the default is all, and only then does their sum equal the output.
        check: compare the first image with the model's own forward, the first time and after the tower has
            changed.

    Returns:
        A :class:`Decomposition`. Sums are exact to rounding (about 1e-6 relative in float32).

    Raises:
        UnsupportedTowerError: the tower has no exact units, or computes something else than its parts say (a
            hook, a subclass, a LoRA ...); the message says why, and where.
        ValueError: images of another shape, dtype or device, or with NaN or Inf (named by index).

    The tower is left bitwise as it was. Gradients flow as through the tower itself.
    """
    view = towers.view_inside(tower, check)
    kinds = view.layout.kinds if kinds is None else towers.check_kinds(kinds, view.layout)
    view.check_images(images)
    check_finite(images)
    terms = view.terms(images, kinds)
    view.stamp()
    return Decomposition(output=terms.output, layout=view.layout, terms=terms, _tower=view)
