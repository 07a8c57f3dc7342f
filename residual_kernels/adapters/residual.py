"""How do I put it in a model? ResiDual, the drop-in module that stands where the image tower stood.

A drop-in module wraps a tower, is called like it, returns what it returns, and learns one tensor. All of them
share :class:`~residual_kernels.adapters.tower_adapter.TowerAdapter`; what differs is how the embedding y is
made from the tower's terms (z, s, m and the output), or what is changed inside the tower. The others are
named here too.
"""

from collections.abc import Iterable, Mapping
from typing import cast

from torch import Tensor, nn

from residual_kernels.adapters.coarse import CoarseHeads
from residual_kernels.adapters.fold import Fold
from residual_kernels.adapters.output import OutputIdentity, OutputLinear, OutputSpectral
from residual_kernels.adapters.stream import StreamResiDual
from residual_kernels.adapters.tower_adapter import TowerAdapter
from residual_kernels.adapters.unit_adapter import RESTS, Spread, UnitAdapter, check_arguments
from residual_kernels.adapters.unit_sum import SpectralConstants
from residual_kernels.bases.spectral_bases import SpectralBases, check_placement

__all__ = [
    "RESTS",
    "CoarseHeads",
    "OutputIdentity",
    "OutputLinear",
    "OutputSpectral",
    "ResiDual",
    "StreamResiDual",
    "TowerAdapter",
    "UnitAdapter",
]


class ResiDual(UnitAdapter):
    """y = sum over adapted units of Phi_u^T diag(weight_u) Phi_u (x_u - mu_u), plus the rest.

    Exact, in low rank.

    The anchored form, rest="all", keeps the tower's whole output f(x) and adds what the weights change of it:
    y = f(x) + sum over adapted units of Phi_u^T diag(weight_u - 1) Phi_u (x_u - mu_u). weight = 1 is the
    tower, to the bit, whatever components were kept, and y is an embedding like the tower's own (not
    centred). (Called on images it then runs the tower's own forward. From cached units it gives the cached
    output to the bit; `merge` reads the output along with the units, as :func:`decompose` does, which rounds
    otherwise than the tower by itself.)

    With placement="stream" this makes a :class:`StreamResiDual`: heads are reweighted inside the tower.

    Args:
        tower: an image tower that :func:`residual_kernels.decompose` supports.
        bases: fitted on this very tower by :func:`fit_bases` with the same placement, usually truncated.
            Their kinds are the adapted ones.
        rest: what becomes of the other units: "zero", "sum" (kept) or "mean" (their fitted mean); or "all",
            the anchored form above: nothing is dropped, of the adapted units neither. The stream form is
            anchored already, so there rest is left out (or "all").
        init: "ones" (the default of every class of this library, whatever the form), "normal" (N(1, 1) with
            `seed`, the paper's) or a tensor [J]. By name, :func:`build` starts as the method's record says.
        placement: "output" (the paper's: units as shares of the output) or "stream".
        tokens, layers: of the stream; see :class:`StreamResiDual`.
        train_tower: leave the tower's requires_grad flags as they are, to train it end to end; parameters
            folded into the constants (out_proj, ls_1, ln_post, proj) must not train.
        backend: who computes the operator; see :mod:`residual_kernels.ops.backends`.
        check: compare the first image with the tower's own forward, as :func:`residual_kernels.decompose`
            does.

    `weight` [J], at least float32, is the only trainable tensor; its order is the layout's (heads
    layer-major, then MLPs), components by falling variance. `state_dict` holds `weight`, the constants and
    `tower.*`; `load_state_dict` also takes the tower's own keys.

    Each plain call looks whether the tower is still the one that the constants are of. Compiled and exported
    code does not, and nothing but :meth:`check` sees writes through ``.data``: call it after such.

    Raises ValueError when the bases are of another tower, the tower is wrapped already, or an argument is out
    of range.
    """

    weights_on = "components"
    units: Mapping[str, SpectralConstants]
    bases: SpectralBases

    def __init__(
        self,
        tower: nn.Module,
        bases: SpectralBases,
        rest: str = "zero",
        *,
        init: str | Tensor = "ones",
        seed: int = 0,
        placement: str = "output",
        tokens: str | None = None,
        layers: Iterable[int] | None = None,
        train_tower: bool = False,
        backend: str = "auto",
        check: bool = True,
    ):
        check_placement(placement, tokens)
        if placement == "stream":
            if type(self) is not ResiDual:
                raise ValueError(f"{type(self).__name__} works at the output; use StreamResiDual")
            check_arguments(tower, None, "zero" if rest == "mean" else rest)
            if rest not in ("zero", "all"):
                raise ValueError(
                    f'placement="stream" keeps every other unit as it is; leave rest={rest!r} out'
                )
            # The door: what was asked for is one of those.
            object.__setattr__(self, "__class__", StreamResiDual)
            StreamResiDual.__init__(
                cast(StreamResiDual, self),
                tower,
                bases,
                init=init,
                seed=seed,
                tokens=tokens,
                layers=layers,
                train_tower=train_tower,
                backend=backend,
                check=check,
            )
            return
        if layers is not None:
            raise ValueError('layers belongs to placement="stream"; choose kinds of units with bases.of(...)')
        check_arguments(tower, bases, rest, backend)
        super().__init__(tower, check)
        like = next(self.tower.parameters())
        units: dict[str, nn.Module] = {
            kind: SpectralConstants(self._view.maps(kind), bases.parts[kind], like, backend)
            for kind in bases.kinds
        }
        sizes = [len(bases.parts[kind].components) for kind in bases.kinds]
        self._assemble(rest, bases, units, sizes, init, seed, spread=self._shared(bases))
        if train_tower:
            self._leave_trainable()
        else:
            self.freeze()

    def _shared(self, bases: SpectralBases) -> Spread | None:
        """Which components share a number; here each has its own."""
        return None

    def _centred(self) -> list[Tensor]:
        if self.rest.name == "all":  # the tower's own mean stays
            return []
        return [self.bases.parts[kind].mean.sum(0) for kind in self.adapted]

    def _fold(self, fold: Fold, kind: str, weight: Tensor) -> None:
        fold.add_spectral(self.units[kind], weight)


# what ResiDual(placement="stream") makes is a ResiDual to whoever asks isinstance
ResiDual.register(StreamResiDual)
