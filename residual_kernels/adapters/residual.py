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
from residual_kernels.adapters.unit_sum import SpectralConstants, SpectralForm
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

    It is computed exactly, in low-rank form.

    The anchored form, rest="all", keeps the tower's whole output f(x) and adds what the weights change: y =
    f(x) + sum over adapted units of Phi_u^T diag(weight_u - 1) Phi_u (x_u - mu_u). With weights of 1 it is
    the tower, to the bit, however many components are kept, and y is an embedding like the tower's own (not
    centred). Called on images, it then runs the tower's own forward pass; from cached units it returns the
    cached output. `merge` reads the output along with the units, as :func:`decompose` does, which rounds
    differently from the tower's own forward pass.

    With placement="stream" this makes a :class:`StreamResiDual`: heads are reweighted inside the tower.

    Args:
        tower: an image tower that :func:`residual_kernels.decompose` supports.
        bases: fitted on this very tower by :func:`fit_bases` with the same placement, usually truncated.
            Their kinds are the adapted ones.
        rest: what happens to the other units: "zero" (dropped), "sum" (kept), "mean" (replaced by their
            fitted mean), or "all", the anchored form above, which drops nothing. The stream form is anchored
            already; leave rest out there.
        init: "ones" (the default of every class of this library), "normal" (N(1, 1) with `seed`, the paper's)
            or a tensor [J]. :func:`build`, which takes a method's name, starts as the method's record says.
        seed: random seed of init="normal".
        placement: "output" (the paper's: units as shares of the output) or "stream".
        tokens, layers: of the stream; see :class:`StreamResiDual`.
        train_tower: leave the tower's requires_grad flags as they are, to train it end to end. Parameters
            that are folded into the constants (out_proj, ls_1, ln_post, proj) must not train.
        backend: which implementation computes the operator; see :mod:`residual_kernels.ops.backends`.
        check: compare the first image with the tower's own forward pass, as
            :func:`residual_kernels.decompose` does.

    Raises:
        ValueError: the bases are of another tower, the tower is wrapped already, or an argument is out of
            range.

    `weight` [J], at least float32, is the only trainable tensor. Its order is the layout's (heads
    layer-major, then MLPs); the components of a unit come by falling variance. `state_dict` holds `weight`,
    the constants and `tower.*`; `load_state_dict` also takes the tower's own keys.

    Each plain call checks whether the tower has changed since the constants were computed. Compiled and
    exported code does not, and writes through ``.data`` are seen by :meth:`check` only.

    Source: Basile et al., "ResiDual Transformer Alignment with Spectral Decomposition", TMLR 2025 (arXiv
    2411.00246). The low-rank form, rest="all" and the stream form are this library's.
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

    def spectral_form(self) -> SpectralForm | None:
        if self._shared(self.bases) is not None:
            return None
        rest = "rest" if self.rest.varies else self.rest.mean if self.rest.name == "mean" else None
        names = tuple(f"{kind}.c" for kind in self.adapted)
        bases = tuple(self.units[kind].basis for kind in self.adapted)
        backend = self.units[self.adapted[0]].backend
        return SpectralForm(names, bases, rest, float(self.rest.name == "all"), backend)

    def _centred(self) -> list[Tensor]:
        if self.rest.name == "all":  # the tower's own mean stays
            return []
        return [self.bases.parts[kind].mean.sum(0) for kind in self.adapted]

    def _fold(self, fold: Fold, kind: str, weight: Tensor) -> None:
        fold.add_spectral(self.units[kind], weight)


# what ResiDual(placement="stream") makes is a ResiDual to whoever asks isinstance
ResiDual.register(StreamResiDual)
