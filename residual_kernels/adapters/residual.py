"""How do I put it in a model? Drop-in modules that stand where the image tower stood.

Every module here wraps a tower, is called like it, returns what it returns, and learns one tensor. They share
:class:`~residual_kernels.adapters.tower_adapter.TowerAdapter`; what differs is how the embedding y is made from the
tower's terms (z, s, m and the output), or what is changed inside the tower.
"""

import abc
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from residual_kernels import towers
from residual_kernels.adapters.fold import Fold, MergedOutput, MergedUnits, fold_into_tower
from residual_kernels.adapters.stream import StreamHeads
from residual_kernels.adapters.tower_adapter import AroundTower, TowerAdapter
from residual_kernels.adapters.unit_sum import (
    Rest,
    SpectralConstants,
    UnitSum,
    at_least_float32,
    reweighted_sum,
    tower_itself,
)
from residual_kernels.bases.spectral_bases import OUTPUT, SpectralBases, check_placement
from residual_kernels.ops import backends
from residual_kernels.ops.packing import wide
from residual_kernels.towers import Terms

RESTS = ("zero", "sum", "mean", "all")
STREAM_LR = (
    0.3  # for weights inside the tower: best or next to best on validation in benchmarks/stream_digits.py
)


def _initial_weight(size: int, init: str | Tensor, seed: int, like: Tensor) -> nn.Parameter:
    """Ones, N(1, 1) drawn from a generator with `seed`, or a copy of a tensor [size]; at least float32."""
    dtype = wide(like.dtype)
    if isinstance(init, Tensor):
        if init.shape != (size,):
            raise ValueError(
                f"init must have shape ({size},), one number per kept component; got {tuple(init.shape)}"
            )
        value = init.detach().clone()
    elif init == "ones":
        value = torch.ones(size)
    elif init == "normal":
        value = 1 + torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    else:
        raise ValueError(f'init must be "ones", "normal" or a tensor; got {init!r}')
    return nn.Parameter(value.to(device=like.device, dtype=dtype))


class UnitAdapter(TowerAdapter):
    """An adapter that reweights the units of some kinds and decides what becomes of the rest.

    `units` maps each adapted kind to a module with ``forward(z, scale, mean, weight)``; `weight` runs through them in
    layout order. With rest="all" the tower's whole output is kept, and the units add what `weight - 1` makes of them.
    """

    def _assemble(
        self,
        rest: str,
        bases: SpectralBases | None,
        units: dict[str, nn.Module],
        sizes: list[int],
        init: str | Tensor,
        seed: int,
    ) -> None:
        like = next(self.tower.parameters())
        self.bases = None if bases is None else replace(bases, moments=None)
        self.adapted = tuple(units)
        self.rest = Rest(rest, self.adapted, self._view, wide(like.dtype))
        self.rest.set_mean(bases, like)
        self.kinds = self.layout.kinds if rest == "sum" else self.adapted
        self.units = nn.ModuleDict(units)
        self._sizes = sizes
        self.weight = _initial_weight(sum(sizes), init, seed, like)

    def options(self) -> dict[str, Any]:
        return {"rest": self.rest.rest}

    def _reads(self) -> tuple[str, ...]:
        return self.adapted

    def adapted_sum(self, batch: Terms) -> Tensor:
        """The reweighted units alone, [N, D], without the rest; with rest="all" what they add to the output."""
        return reweighted_sum(self.units, self._sizes, batch, self.rest.factors(self.weight))

    def _embed(self, batch: Terms) -> Tensor:
        y = self.adapted_sum(batch)
        rest = self.rest(batch)
        return y if rest is None else y + rest

    def features(self, batch: Terms) -> dict[str, Tensor]:
        found = {}
        for kind in self.adapted:
            one = self.units[kind].features(batch.z[kind], batch.scale, batch.mean)
            found |= {f"{kind}.{name}": value for name, value in one.items()}
        if self.rest.varies:
            rest = self.rest(batch)
            found["rest"] = rest.to(wide(rest.dtype))
        return found

    def from_features(self, features: dict[str, Tensor], weights: Sequence[Tensor]) -> Tensor:
        y = 0.0
        factors = self.rest.factors(weights[0])
        for kind, weight in zip(self.adapted, factors.split(self._sizes, -1), strict=True):
            own = {
                name.removeprefix(f"{kind}."): value
                for name, value in features.items()
                if name.startswith(f"{kind}.")
            }
            y = y + self.units[kind].from_features(own, weight)
        if self.rest.rest == "zero":
            return y
        return y + (features["rest"] if self.rest.varies else self.rest.mean)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if self.rest.leaves_the_tower(self.weight):
            return tower_itself(self.tower, images, lambda: self.adapted_sum(self.collect(images)))
        return super().forward(images)

    def merge(self) -> nn.Module:
        fold = Fold(self.dim, self.weight.device)
        factors = self.rest.factors(self.weight.detach())
        others_stay = self.rest.rest == "sum" and bool(self.rest.others)
        for kind, weight in zip(self.adapted, factors.split(self._sizes), strict=True):
            self._fold(fold, kind, weight)
            if others_stay:
                fold.subtract_units(self._view.maps(kind))
        if self.rest.rest == "mean":
            fold.e += self.rest.mean
        return MergedUnits(self._view, self.adapted, fold, keep_output=others_stay or self.rest.rest == "all")

    @abc.abstractmethod
    def _fold(self, fold: Fold, kind: str, weight: Tensor) -> None:
        """Adds the reweighted units of one kind to what is folded."""


class ResiDual(UnitAdapter):
    """y = sum over adapted units of Phi_u^T diag(weight_u) Phi_u (x_u - mu_u), plus the rest. Exact, in low rank.

    The anchored form, rest="all", keeps the tower's whole output f(x) and adds what the weights change of it:
    y = f(x) + sum over adapted units of Phi_u^T diag(weight_u - 1) Phi_u (x_u - mu_u). weight = 1 is the tower, to the
    bit, whatever components were kept, and y is an embedding like the tower's own (not centred). (Called on images it
    then runs the tower's own forward. From cached units it gives the cached output to the bit; `merge` reads the output
    along with the units, as :func:`decompose` does, which rounds otherwise than the tower by itself.)

    With placement="stream" the heads are reweighted inside the tower instead: a head that adds x to the residual stream
    at a token adds x + Phi^T diag(weight - 1) Phi (x - mu), so that later layers see it. weight = 1 is the tower, and y
    is an embedding like the tower's own (not centred).

    Args:
        tower: an image tower that :func:`residual_kernels.decompose` supports.
        bases: fitted on this very tower by :func:`fit_bases` with the same placement, usually truncated. Their kinds
            are the adapted ones.
        rest: what becomes of the other units: "zero", "sum" (kept) or "mean" (their fitted mean); or "all", the
            anchored form above: nothing is dropped, of the adapted units neither. The stream form is anchored
            already, so there rest is left out (or "all").
        placement: "output" (the paper's: units as shares of the output) or "stream".
        tokens: of the stream: "all", "class" or "patches" (without class token and registers); those that the bases
            were fitted over by default.
        layers: of the stream: whose heads are adapted; all by default.
        init: "ones", "normal" (N(1, 1) with `seed`) or a tensor [J].
        train_tower: leave the tower's requires_grad flags as they are, to train it end to end; parameters folded into
            the constants (out_proj, ls_1, ln_post, proj) must not train.
        backend: who computes the operator; see :mod:`residual_kernels.ops.backends`.

    In the stream every forward pass runs the tower, and training runs it backwards too (gradient checkpointing is
    honoured): `fit` takes loaders, not caches.

    `weight` [J], at least float32, is the only trainable tensor; its order is the layout's (heads layer-major, then
    MLPs), components by falling variance. `state_dict` holds `weight`, the constants and `tower.*`;
    `load_state_dict` also takes the tower's own keys.

    Raises ValueError when the bases are of another tower, the tower is wrapped already, or an argument is out of range.
    """

    placement = "output"
    _originals: dict[str, Tensor] | None = None  # of a tower that the weight is merged into

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
    ):
        _check_arguments(tower, bases, rest, backend, placement)
        check_placement(placement, tokens)
        if placement == "stream" and rest not in ("zero", "all"):
            raise ValueError(f'placement="stream" keeps every other unit as it is; leave rest={rest!r} out')
        if placement == "output" and layers is not None:
            raise ValueError('layers belongs to placement="stream"; choose kinds of units with bases.of(...)')
        super().__init__(tower)
        self.placement = placement
        self.default_lr = STREAM_LR if placement == "stream" else type(self).default_lr
        like = next(self.tower.parameters())
        if placement == "stream":
            units = {"head": StreamHeads(self._view, bases, layers, tokens, like, backend)}
            sizes = [sum(units["head"].sizes)]
        else:
            units = {
                kind: SpectralConstants(self._view.maps(kind), bases.parts[kind], like, backend)
                for kind in bases.kinds
            }
            sizes = [len(bases.parts[kind].components) for kind in bases.kinds]
        self._assemble(rest, bases, units, sizes, init, seed)
        if train_tower:
            self._leave_trainable()
        else:
            self.freeze()

    def _centred(self) -> list[Tensor]:
        if self.placement == "stream" or self.rest.rest == "all":  # the tower's own mean stays
            return []
        return [self.bases.parts[kind].mean.sum(0) for kind in self.adapted]

    def collect(self, images: Tensor) -> Terms:
        if self.placement == "output":
            return super().collect(images)
        return self._view.terms(images, (), None if self.merged else self.units["head"].edit(self.weight))

    def _embed(self, batch: Terms) -> Tensor:
        return super()._embed(batch) if self.placement == "output" else batch.output

    def _check_placement_of_units(self) -> None:
        if self.placement == "stream":
            raise ValueError(
                "this adapter works inside the tower, so units kept before cannot tell its output; give images, or a "
                "loader of (images, labels) instead of a cache"
            )

    def from_units(self, batch: Terms) -> Tensor:
        self._check_placement_of_units()
        return super().from_units(batch)

    def features(self, batch: Terms) -> dict[str, Tensor]:
        self._check_placement_of_units()
        return super().features(batch)

    def features_of_images(self, images: Tensor) -> dict[str, Tensor]:
        if self.placement == "output":
            return super().features_of_images(images)
        return {"images": images}  # inside the tower everything depends on the weight

    def from_features(self, features: dict[str, Tensor], weights: Sequence[Tensor]) -> Tensor:
        if self.placement == "output":
            return super().from_features(features, weights)
        edits = [None if self.merged else self.units["head"].edit(weight) for weight in weights[0]]
        return torch.stack([self._view.terms(features["images"], (), edit).output for edit in edits])

    def options(self) -> dict[str, Any]:
        if self.placement == "output":
            return super().options()
        heads = self.units["head"]
        return {"placement": "stream", "tokens": heads.tokens, "layers": list(heads.layers)}

    def _fold(self, fold: Fold, kind: str, weight: Tensor) -> None:
        fold.add_spectral(self.units[kind], weight)

    def merge(self) -> nn.Module:
        """The adapter with its weight folded away.

        At the output: a new module of torch layers around the same tower (not a copy), y = s (z F + b + m g) + e with
        one matrix F, which torch.export and ONNX can carry.

        In the stream with tokens="all": the tower itself, its output projections holding the change (LayerScale folded
        in and set to one). Its state_dict has the same keys as ever and loads where this package is absent. This module
        goes on giving the same numbers, and :meth:`unmerge` or :meth:`detach` put the tower's own weights back.

        Raises ValueError, with nothing changed, where folding is impossible or gives NaN or Inf.
        """
        if self.placement == "output":
            return super().merge()
        if self.merged:
            raise ValueError("this adapter is merged already; unmerge it first")
        if self.neighbours():
            raise ValueError(
                f"{self.neighbours()} more adapters live on this tower, and merging would change it beneath them; "
                "detach them, or merge a copy (copy.deepcopy)"
            )
        changed = fold_into_tower(self._view, self.units["head"], self.weight.detach())
        names = {p: name for name, p in self.tower.named_parameters()}
        self._originals = {names[p]: value for p, value in changed}
        return self.tower

    @property
    def merged(self) -> bool:
        """Whether :meth:`merge` has folded the weight into the tower's own parameters."""
        return self._originals is not None

    def unmerge(self) -> None:
        """Puts the tower's own weights back, bit for bit, after :meth:`merge` in the stream."""
        if not self.merged:
            raise ValueError("this adapter is not merged into its tower, so there is nothing to undo")
        with torch.no_grad():
            for name, value in self._originals.items():
                self.tower.get_parameter(name).copy_(value)
        self._originals = None

    def detach(self) -> nn.Module:
        if self.merged:
            self.unmerge()
        return super().detach()

    def weight_of(self, unit) -> Tensor:
        """The weights [K_u] of one adapted unit, by layout index, row or (layer, head)."""
        row = self.layout[self.layout.index(unit)]
        if row.kind not in self.adapted:
            raise ValueError(
                f"unit {unit} is of kind {row.kind!r}, which is not adapted ({', '.join(self.adapted)} are)"
            )
        position = self.adapted.index(row.kind)
        offsets = self.units[row.kind].unit_offsets
        index = row.index - self.layout.span(row.kind).start
        start = sum(self._sizes[:position])
        return self.weight[start + int(offsets[index]) : start + int(offsets[index + 1])]


class CoarseHeads(UnitAdapter):
    """y = sum over units of weight[u] * x_u, plus the rest: one number per head, no basis, not centred (a baseline).

    `kinds` are the adapted ones; rest="mean" needs `bases` for the fitted means. `weight` [R]. Other arguments as in
    :class:`ResiDual`.
    """

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
        _check_arguments(tower, bases, rest)
        kinds = towers.check_kinds(kinds, towers.view(tower).layout)
        super().__init__(tower)
        dtype = wide(next(self.tower.parameters()).dtype)
        units = {kind: UnitSum(self._view.maps(kind), dtype) for kind in kinds}
        spans = [self.layout.span(kind) for kind in kinds]
        self._assemble(rest, bases, units, [span.stop - span.start for span in spans], init, seed)
        self.bases = None
        if rest == "mean":  # of the bases only the means were read
            used = bases.of(*kinds)
            self.bases = used.keep({kind: [0] * len(part.mean) for kind, part in used.parts.items()})
        self.freeze()

    def _fold(self, fold: Fold, kind: str, weight: Tensor) -> None:
        fold.add_units(self._view.maps(kind), weight)

    def options(self) -> dict[str, Any]:
        return {**super().options(), "kinds": list(self.adapted)}


class OutputSpectral(TowerAdapter):
    """y = Phi^T diag(weight) Phi (output - mu): the tower's output as one unit, all components kept (a baseline).

    `weight` [D]. Arguments as in :class:`ResiDual`.
    """

    default_lr = 1e-3

    def __init__(
        self,
        tower: nn.Module,
        bases: SpectralBases,
        *,
        init: str | Tensor = "ones",
        seed: int = 0,
        backend: str = "auto",
    ):
        _check_arguments(tower, bases, backend=backend)
        super().__init__(tower)
        like = next(self.tower.parameters())
        self.bases = replace(bases, parts={OUTPUT: bases.parts[OUTPUT]}, moments=None)
        self.spectral = SpectralConstants(None, bases.parts[OUTPUT], like, backend)
        self.weight = _initial_weight(len(self.spectral.basis), init, seed, like)
        self.freeze()

    def _centred(self) -> list[Tensor]:
        return [self.bases.parts[OUTPUT].mean[0]]

    def _embed(self, batch: Terms) -> Tensor:
        return self.spectral(batch.output[:, None, :], None, None, self.weight)

    def features(self, batch: Terms) -> dict[str, Tensor]:
        return self.spectral.features(batch.output[:, None, :], None, None)

    def from_features(self, features: dict[str, Tensor], weights: Sequence[Tensor]) -> Tensor:
        return self.spectral.from_features(features, weights[0])

    def merge(self) -> nn.Module:
        fold = Fold(self.dim, self.weight.device)
        fold.add_spectral(self.spectral, self.weight)
        return MergedOutput(self.tower, fold.rows[0].T, fold.b + fold.e)


class OutputLinear(TowerAdapter):
    """y = W output + b with a torch.nn.Linear(D, D), initialised by torch's default under `seed` (a baseline)."""

    default_lr = 1e-3

    def __init__(self, tower: nn.Module, *, seed: int = 0):
        _check_arguments(tower, None)
        super().__init__(tower)
        like = next(self.tower.parameters())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.linear = nn.Linear(self.dim, self.dim)
        self.linear.to(device=like.device, dtype=wide(like.dtype))
        self.freeze()

    def _apply(self, fn, recurse=True):
        self.tower._apply(fn)
        self.linear._apply(at_least_float32(fn))
        return self

    def _embed(self, batch: Terms) -> Tensor:
        return self.linear(batch.output.to(self.linear.weight.dtype))

    def features(self, batch: Terms) -> dict[str, Tensor]:
        return {"output": batch.output.to(self.linear.weight.dtype)}

    def from_features(self, features: dict[str, Tensor], weights: Sequence[Tensor]) -> Tensor:
        weight, bias = weights
        return features["output"] @ weight.mT + bias.unsqueeze(-2)

    def merge(self) -> nn.Module:
        return MergedOutput(self.tower, self.linear.weight.detach(), self.linear.bias.detach())


def _check_arguments(
    tower: nn.Module,
    bases: SpectralBases | None,
    rest: str = "zero",
    backend: str = "auto",
    placement: str = "output",
) -> None:
    """Everything about the arguments that can be wrong, before anything is touched."""
    if isinstance(tower, AroundTower):
        raise ValueError(
            f"this tower is wrapped in a {type(tower).__name__} already; use its .tower, or detach it first"
        )
    if backend not in (
        "auto",
        *backends.BACKENDS,
    ):  # whether it is here is asked where it computes: modules move
        raise ValueError(f"unknown backend {backend!r}; choose one of {', '.join(backends.BACKENDS)} or auto")
    if rest not in RESTS:
        raise ValueError(f"rest must be one of {', '.join(RESTS)}; got {rest!r}")
    if rest == "mean" and bases is None:
        raise ValueError('rest="mean" needs bases: the mean is the fitted one, not the batch\'s')
    view = towers.view(tower)
    if bases is not None:
        if bases.placement != placement:
            raise ValueError(
                f"these bases were fitted with placement={bases.placement!r}, but {placement!r} is wanted here; fit "
                f"them with fit_bases(..., placement={placement!r})"
            )
        bases.check_tower(view)
