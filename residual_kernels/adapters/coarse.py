"""How is a whole head turned up or down?

One number per unit, without a basis: the paper's coarse baseline.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from residual_kernels import towers
from residual_kernels.adapters.fold import Fold
from residual_kernels.adapters.unit_adapter import UnitAdapter, check_arguments
from residual_kernels.adapters.unit_sum import UnitSum
from residual_kernels.bases.spectral_bases import SpectralBases
from residual_kernels.ops.packing import wide


class CoarseHeads(UnitAdapter):
    """y = sum over units of weight[u] * x_u, plus the rest: one number per head (a baseline).

    There is no basis, and y is not centred.

    Args:
        tower: an image tower that :func:`residual_kernels.decompose` supports.
        rest: what happens to the other units: "zero", "sum", "mean" or "all", as in :class:`ResiDual`.
        kinds: of the units that are adapted.
        bases: of this tower, for the means of rest="mean"; not needed otherwise.
        init: "ones", "normal" (N(1, 1) with `seed`) or a tensor [R].
        seed: random seed of init="normal".

    Raises:
        ValueError: the tower is wrapped already, or an argument is out of range.

    `weight` [R], at least float32, is the only trainable tensor.
    """

    weights_on = "units"
    method = "coarse"

    def __init__(
        self,
        tower: nn.Module,
        rest: str = "zero",
        *,
        kinds: Iterable[str] = ("head",),
        bases: SpectralBases | None = None,
        init: str | Tensor = "ones",
        seed: int = 0,
    ):
        check_arguments(tower, bases, rest)
        kinds = towers.check_kinds(kinds, towers.view(tower).layout)
        super().__init__(tower)
        dtype = wide(next(self.tower.parameters()).dtype)
        units = {kind: UnitSum(self._view.maps(kind), dtype) for kind in kinds}
        spans = [self.layout.span(kind) for kind in kinds]
        self._assemble(rest, bases, units, [span.stop - span.start for span in spans], init, seed)
        self.bases = None
        if rest == "mean" and bases is not None:  # of the bases only the means were read
            used = bases.of(*kinds)
            self.bases = used.keep({kind: [0] * len(part.mean) for kind, part in used.parts.items()})
        self.freeze()

    def _fold(self, fold: Fold, kind: str, weight: Tensor) -> None:
        fold.add_units(self._view.maps(kind), weight)

    def options(self) -> dict[str, Any]:
        return {**super().options(), "kinds": list(self.adapted)}
