"""How do I put it in a model? Drop-in modules that stand where the image tower stood.

Every module here wraps a tower, is called like it, returns what it returns, and learns one tensor. They share
:class:`TowerAdapter`; what differs is how the embedding y is made from the tower's terms (z, s, m and the output).
"""

import abc
import weakref
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from residual_kernels import backends, towers
from residual_kernels.ops.packing import wide
from residual_kernels.pca import OUTPUT, SpectralBases
from residual_kernels.towers import Terms
from residual_kernels.units import Rest, SpectralConstants, UnitSum, at_least_float32

RESTS = ("zero", "sum", "mean")

# Towers that are frozen, with the requires_grad flags they came with and the adapters that live on them: the first to
# come writes the flags down, the last to go puts them back.
_frozen: "weakref.WeakKeyDictionary[nn.Module, tuple[dict[str, bool], weakref.WeakSet[TowerAdapter]]]" = (
    weakref.WeakKeyDictionary()
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


class TowerAdapter(nn.Module, abc.ABC):
    """An image tower whose embedding is made anew from its units. Base of the modules below.

    Called like the tower, with images [N, 3, H, W], it returns y [N, D] in the output's dtype, or (y, tokens) where the
    tower returns tokens. Attributes it lacks come from the tower. The tower's parameters are frozen while wrapped;
    :meth:`detach` gives the tower back with its flags restored.
    """

    default_lr = 0.8  # of the paper, for weights on components and heads
    kinds: tuple[str, ...] = ()  # what the tower must be asked for
    bases: SpectralBases | None = None  # what the constants were made of, kept for save_adapter
    wraps_tower = True  # what towers.unwrap looks for
    _flags: dict[str, bool] | None = (
        None  # the tower's requires_grad flags before it was frozen; None: left trainable
    )

    def __init__(self, tower: nn.Module):
        super().__init__()
        self._view = towers.view(tower)
        self.tower = tower

    def freeze(self) -> None:
        """Freezes the tower's parameters; :meth:`detach` restores their flags. The last step of every constructor."""
        flags, adapters = _frozen.get(self.tower, (None, weakref.WeakSet()))
        thawed = any(p.requires_grad for p in self.tower.parameters())
        if flags is None or (thawed and not adapters):
            flags = {name: p.requires_grad for name, p in self.tower.named_parameters()}
        adapters.add(self)
        _frozen[self.tower] = flags, adapters
        self._flags = flags
        self.tower.requires_grad_(False)

    def _leave_trainable(self) -> None:
        """Instead of freezing: the tower trains along, but for what is folded into the constants."""
        fixed = self._folded_and_trainable()
        if fixed:
            raise ValueError(
                f"train_tower=True, but {len(fixed)} parameters that are folded into the constants would train "
                f"({', '.join(fixed[:3])} ...); set requires_grad_(False) on out_proj, ls_1, ln_post and proj first"
            )
        if not any(p.requires_grad for p in self.tower.parameters()):
            raise ValueError(
                "train_tower=True, but nothing in this tower would train; set requires_grad_(True) where it should, "
                "and detach other adapters on it first"
            )

    def _folded_and_trainable(self) -> list[str]:
        return [name for name, p in self._view.constant_parameters().items() if p.requires_grad]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            tower = self.__dict__.get("_modules", {}).get("tower")
            if tower is None or name.startswith("__"):
                raise
            return getattr(tower, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # What is the tower's own (output_tokens, say) is set there, so that both go on agreeing.
        tower = self.__dict__.get("_modules", {}).get("tower")
        own = tower is None or name in self.__dict__ or hasattr(type(self), name) or name.startswith("_")
        registered = not own and any(
            name in self.__dict__[kind] for kind in ("_parameters", "_buffers", "_modules")
        )
        if own or registered or not hasattr(tower, name):
            super().__setattr__(name, value)
        else:
            setattr(tower, name, value)

    def lock(self, *args: Any, **kwargs: Any) -> None:
        """The tower's own `lock`, refused (and undone) where it would let parameters train that are folded in."""
        self.tower.lock(*args, **kwargs)
        fixed = self._folded_and_trainable()
        if fixed:
            self.tower.requires_grad_(False)
            raise ValueError(
                f"this would train parameters that are folded into the constants ({', '.join(fixed[:3])} ...); "
                "the tower stays frozen"
            )

    def _apply(self, fn, recurse=True):
        # Own tensors stay at float32 or better; the tower and the constants follow fn by their own rules.
        if recurse:
            for child in self.children():
                child._apply(fn)
        return super()._apply(at_least_float32(fn), recurse=False)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        # A checkpoint of the bare tower loads too: its keys move under "tower.", and what only the adapter has stays.
        names = self.tower.state_dict().keys()
        own = {name: value for name, value in self.state_dict().items() if not name.startswith("tower.")}
        bare = not any(prefix + name in state_dict for name in own) and all(
            prefix + n in state_dict for n in names
        )
        if bare:
            for name in names:
                state_dict[f"{prefix}tower.{name}"] = state_dict.pop(prefix + name)
            state_dict.update({prefix + name: value for name, value in own.items()})
            self._check_constants(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _check_constants(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Raises ValueError when the tower's incoming weights are not those that the constants were made of."""
        for name, held in self._view.constant_parameters().items():
            coming = state_dict[f"{prefix}tower.{name}"]
            if held.is_meta or coming.shape != held.shape:  # a wrong shape is load_state_dict's own error
                continue
            if not torch.equal(coming.to(held), held):
                raise ValueError(
                    f"these weights have another {name} than the tower that the bases were fitted on, so the constants "
                    "would not match them; detach, load them into the tower and fit bases for it"
                )

    @property
    def layout(self) -> towers.UnitLayout:
        """The tower's units in order."""
        return self._view.layout

    @property
    def dim(self) -> int:
        """D, the dimension of the embedding."""
        return self._view.dim

    @property
    def removed_mean(self) -> Tensor:
        """[D], the means of the adapted units (as fitted), which y lacks because it is centred.

        Classes are told apart without it. Text-image retrieval compares images with captions that know the mean: use
        ``normalize(y + residual.removed_mean)``, which with all components, weights of one and rest="sum" is the
        tower's own embedding.
        """
        like = self.trainable()[0].detach()
        return sum((mean.to(like) for mean in self._centred()), like.new_zeros(self.dim))

    def _centred(self) -> list[Tensor]:
        """The means [D] that the embedding is taken about."""
        return []

    def trainable(self) -> list[nn.Parameter]:
        """The adapter's own parameters, without the tower's."""
        return [p for name, p in self.named_parameters() if not name.startswith("tower.")]

    def detach(self) -> nn.Module:
        """Restores the tower's requires_grad flags (when no other adapter lives on it) and returns the tower."""
        _, adapters = _frozen.get(self.tower, (None, weakref.WeakSet()))
        adapters.discard(self)
        if self._flags is not None and not adapters:
            for name, p in self.tower.named_parameters():
                p.requires_grad_(self._flags.get(name, p.requires_grad))
            _frozen.pop(self.tower, None)
        return self.tower

    def collect(self, images: Tensor) -> Terms:
        """Runs the tower and returns what :meth:`from_units` needs of it."""
        return self._view.terms(images, self.kinds)

    def from_units(self, batch: Terms) -> Tensor:
        """y [N, D] from terms collected before (a batch of a UnitCache, or :meth:`collect`)."""
        missing = [kind for kind in self._reads() if kind not in batch.z]
        if missing:
            raise ValueError(
                f"this batch holds no terms of kind {', '.join(missing)}; encode with kinds that include it"
            )
        return self._embed(batch).to(batch.output.dtype)

    def _reads(self) -> tuple[str, ...]:
        """Kinds that from_units cannot do without."""
        return self.kinds

    @abc.abstractmethod
    def _embed(self, batch: Terms) -> Tensor:
        """y [N, D] from a batch's terms."""

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        batch = self.collect(images)
        y = self.from_units(batch)
        return y if batch.tokens is None else (y, batch.tokens)


class UnitAdapter(TowerAdapter):
    """An adapter that reweights the units of some kinds and decides what becomes of the rest.

    `units` maps each adapted kind to a module with ``forward(z, scale, mean, weight)``; `weight` runs through them in
    layout order.
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

    def _reads(self) -> tuple[str, ...]:
        return self.adapted

    def adapted_sum(self, batch: Terms) -> Tensor:
        """The reweighted units alone, [N, D], without the rest."""
        weights = self.weight.split(self._sizes)
        return sum(
            self.units[kind](batch.z[kind], batch.scale, batch.mean, weight)
            for kind, weight in zip(self.adapted, weights, strict=True)
        )

    def _embed(self, batch: Terms) -> Tensor:
        y = self.adapted_sum(batch)
        rest = self.rest(batch)
        return y if rest is None else y + rest


class ResiDual(UnitAdapter):
    """y = sum over adapted units of Phi_u^T diag(weight_u) Phi_u (x_u - mu_u), plus the rest. Exact, in low rank.

    Args:
        tower: an image tower that :func:`residual_kernels.decompose` supports.
        bases: fitted on this very tower by :func:`fit_bases`, usually truncated. Their kinds are the adapted ones.
        rest: what becomes of the other units: "zero", "sum" (kept) or "mean" (their fitted mean).
        init: "ones", "normal" (N(1, 1) with `seed`) or a tensor [J].
        train_tower: leave the tower's requires_grad flags as they are, to train it end to end; parameters folded into
            the constants (out_proj, ls_1, ln_post, proj) must not train.
        backend: who computes the operator; see :mod:`residual_kernels.backends`.

    `weight` [J], at least float32, is the only trainable tensor; its order is the layout's (heads layer-major, then
    MLPs), components by falling variance. `state_dict` holds `weight`, the constants and `tower.*`;
    `load_state_dict` also takes the tower's own keys.

    Raises ValueError when the bases are of another tower, the tower is wrapped already, or an argument is out of range.
    """

    def __init__(
        self,
        tower: nn.Module,
        bases: SpectralBases,
        rest: str = "zero",
        *,
        init: str | Tensor = "ones",
        seed: int = 0,
        train_tower: bool = False,
        backend: str = "auto",
    ):
        _check_arguments(tower, bases, rest, backend)
        super().__init__(tower)
        like = next(tower.parameters())
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
        return [self.bases.parts[kind].mean.sum(0) for kind in self.adapted]

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
        dtype = wide(next(tower.parameters()).dtype)
        units = {kind: UnitSum(self._view.maps(kind), dtype) for kind in kinds}
        spans = [self.layout.span(kind) for kind in kinds]
        self._assemble(rest, bases, units, [span.stop - span.start for span in spans], init, seed)
        self.freeze()


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
        like = next(tower.parameters())
        self.bases = replace(bases, moments=None)
        self.spectral = SpectralConstants(None, bases.parts[OUTPUT], like, backend)
        self.weight = _initial_weight(len(self.spectral.basis), init, seed, like)
        self.freeze()

    def _centred(self) -> list[Tensor]:
        return [self.bases.parts[OUTPUT].mean[0]]

    def _embed(self, batch: Terms) -> Tensor:
        return self.spectral(batch.output[:, None, :], None, None, self.weight)


class OutputLinear(TowerAdapter):
    """y = W output + b with a torch.nn.Linear(D, D), initialised by torch's default under `seed` (a baseline)."""

    default_lr = 1e-3

    def __init__(self, tower: nn.Module, *, seed: int = 0):
        _check_arguments(tower, None)
        super().__init__(tower)
        like = next(tower.parameters())
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


def _check_arguments(
    tower: nn.Module, bases: SpectralBases | None, rest: str = "zero", backend: str = "auto"
) -> None:
    """Everything about the arguments that can be wrong, before anything is touched."""
    if isinstance(tower, TowerAdapter):
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
        bases.check_tower(view)
