"""How does a module stand where the image tower stood?

It is called like the tower and shows the tower's attributes.

:class:`TowerAdapter` is the base of the drop-in modules: it freezes the tower while it lives, gives it back,
and follows casts and checkpoints.
"""

import abc
import weakref
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from residual_kernels import towers
from residual_kernels.adapters import description
from residual_kernels.adapters.frozen import FrozenTower
from residual_kernels.adapters.unit_sum import SpectralForm, at_least_float32
from residual_kernels.bases.spectral_bases import SpectralBases
from residual_kernels.towers import Terms, agreement

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from residual_kernels.display import Table

# Towers that are frozen, with the requires_grad flags they came with and the adapters that live on them: the
# first adapter records the flags; the last to detach restores them.
_frozen: "weakref.WeakKeyDictionary[nn.Module, tuple[dict[str, bool], weakref.WeakSet[TowerAdapter]]]" = (
    weakref.WeakKeyDictionary()
)


# Other ways to ask a tower for features: those that end in an embedding, which would be the plain tower's,
# and those that give tokens, which are the plain tower's unless the adapter works inside.
_EMBEDS = ("forward_head",)
_TOKENS = ("forward_features", "forward_intermediates", "get_intermediate_layers")


class AroundTower(nn.Module):
    """A module around an image tower at `tower`: attributes it lacks come from there."""

    wraps_tower = True  # what towers.unwrap looks for
    changes_tokens = False  # whether tokens inside the tower are others than the plain tower's

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            tower = self.__dict__.get("_modules", {}).get("tower")
            if tower is None or name.startswith("__"):
                raise
            found = getattr(tower, name)
        return partial(_features, self, name) if name in _EMBEDS + _TOKENS else found

    @property
    def checks_tower(self) -> bool:
        """Whether images that run through the tower are compared with its own forward."""
        view = self.__dict__.get("_view")
        return view is None or view.check


def _features(adapter: AroundTower, name: str, *args: Any, **kwargs: Any) -> Any:
    """What the tower's method `name` gives, where that is true of the adapter too.

    "image_features", which open_clip's forward_intermediates gives beside the tokens, are the adapter's
    embedding.
    """
    if name in _EMBEDS or adapter.changes_tokens:
        what = "its embedding" if name in _EMBEDS else "the tokens inside it"
        raise ValueError(
            f"{name} is the plain tower's, but this {type(adapter).__name__} changes {what}; call the "
            f"adapter for its embedding, detach it, or call adapter.tower.{name} for the plain tower's "
            "result"
        )
    found = getattr(adapter.tower, name)(*args, **kwargs)
    if isinstance(found, dict) and "image_features" in found:
        y = adapter(args[0] if args else next(iter(kwargs.values())))
        found["image_features"] = y[0] if isinstance(y, tuple) else y
    return found


class TowerAdapter(AroundTower, abc.ABC):
    """An image tower whose embedding is made anew from its units. Base of the drop-in modules.

    Called like the tower, with images [N, 3, H, W], it returns y [N, D] in the output's dtype, or (y, tokens)
    where the tower returns tokens. Attributes it lacks come from the tower. The tower's parameters are frozen
    while wrapped; :meth:`detach` gives the tower back with its flags restored.
    """

    folds_tower = True  # whether weights of the tower are in the constants
    default_lr = 0.8  # of the paper, for weights on components and heads
    placement = (
        "output"  # "stream": what the tower computes depends on the weights, so that nothing can be cached
    )
    weights_on = "output"  # what a learned number belongs to: "components", "units", "output" or "nothing"
    rest_name: str | None = None  # what becomes of units that are not adapted, where that is a choice
    method: str | None = None  # the name in METHODS that it was built by, or that its class stands for
    fitted = False  # whether :func:`fit` has given it weights
    adapted: tuple[str, ...] = ()  # kinds of units that are reweighted: what a cache must hold
    kinds: tuple[str, ...] = ()  # what the tower must be asked for
    _sizes: Sequence[int] = ()  # how many components each adapted kind has
    bases: SpectralBases | None = None  # what the constants were made of, kept for save_adapter
    _flags: dict[str, bool] | None = (
        None  # the tower's requires_grad flags before it was frozen; None: left trainable
    )

    def __init__(self, tower: nn.Module, check: bool = True):
        super().__init__()
        self._view = towers.view(tower)
        self._view.check = check  # whether the first image is compared with the tower's own forward
        self.tower = self._view.module  # of a whole transformers model, its image side

    def freeze(self) -> None:
        """Freezes the tower's parameters; :meth:`detach` restores their flags.

        The last step of every constructor.
        """
        flags, adapters = _frozen.get(self.tower, (None, weakref.WeakSet()))
        thawed = any(p.requires_grad for p in self.tower.parameters())
        if flags is None or (thawed and not adapters):
            flags = {name: p.requires_grad for name, p in self.tower.named_parameters()}
        adapters.add(self)
        _frozen[self.tower] = flags, adapters
        self._flags = flags
        self.tower.requires_grad_(False)
        self._watch_tower()

    def _watch_tower(self) -> None:
        """From now on the tower's weights are to stay what the constants were made of."""
        guard = self._guard or FrozenTower(self._view, self.folds_tower)
        guard.keep(self)
        self._view.guard = guard

    @property
    def _guard(self) -> FrozenTower | None:
        return cast("FrozenTower | None", self._view.guard)  # which :meth:`_watch_tower` put there

    def _accept_tower(self) -> None:
        """Takes the tower's weights as they are now for those that the constants are of."""
        if self._guard is not None:
            self._guard.accept()

    def train(self, mode: bool = True):
        """Sets the mode of this module and its tower; `eval` does the same with mode=False.

        Compiled code checks nothing while it runs. So an adapter that torch.compile has traced checks here
        that its folded weights are still the same.

        Args:
            mode: True for training, False for evaluation.

        Returns:
            This module.

        Raises:
            ValueError: folded weights have changed since torch.compile traced the adapter.
        """
        super().train(mode)
        if self._guard is not None and self._guard.compiled:
            self._guard()
        return self

    def still(self) -> None:
        """Raises ValueError where the tower is no longer made as it was: blocks, pooling, folded weights.

        This quick check runs with every forward pass; :meth:`check` compares the values too.
        """
        self._view.still()

    @torch.no_grad()
    def check(self, images: Tensor | None = None) -> None:
        """Checks by hand that this adapter is still what its weights and its tower say.

        Every plain forward pass notices most changes by itself. This is for what it cannot see: writes
        through ``.data``, which raise no version counter, and code from ``torch.compile`` or
        ``torch.export``, which checks nothing.

        Args:
            images: [N, 3, H, W]; the first is compared with the tower's own forward pass.

        Raises:
            ValueError: the tower or its folded weights have changed; these are compared by checksums of all
                their values, to a few roundings.
        """
        self.still()
        if self._guard is not None:
            self._guard.compare()
        if images is not None:
            self._view.check_images(images)
            agreement.check(self._view, images[:1])

    @property
    def merged(self) -> bool:
        """Whether the weights are folded into the tower's own parameters."""
        return False

    def tower_checksum(self) -> str:
        """The checksum of the tower that this adapter is for.

        A weight average (EMA) of the whole module rounds frozen weights too: to that rounding they are the
        same tower. Raises ValueError where the tower is no longer made as it was.
        """
        self.still()
        checksum = towers.checksum(self.tower, afresh=True)
        if self.bases is None or checksum == self.bases.checksum:
            return checksum
        return self.bases.checksum if self._guard is not None and self._guard.rounded() else checksum

    def _leave_trainable(self) -> None:
        """Instead of freezing: the tower trains along, but for what is folded into the constants."""
        fixed = self._folded_and_trainable()
        if fixed:
            raise ValueError(
                f"train_tower=True, but {len(fixed)} parameters that are folded into the constants would "
                f"train ({', '.join(fixed[:3])} ...); set requires_grad_(False) on out_proj, ls_1, ln_post "
                "and proj first"
            )
        if not any(p.requires_grad for p in self.tower.parameters()):
            raise ValueError(
                "train_tower=True, but nothing in this tower would train; set requires_grad_(True) where "
                "it should, and detach other adapters on it first"
            )
        self._watch_tower()

    def _folded_and_trainable(self) -> list[str]:
        return [name for name, p in self._view.constant_parameters().items() if p.requires_grad]

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
        """The tower's own `lock`, refused (and undone) where parameters that are folded in would train.

        Args:
            args, kwargs: of the tower's `lock`.

        Raises:
            ValueError: parameters that are folded into the constants would train.
        """
        cast(Any, self.tower).lock(*args, **kwargs)
        fixed = self._folded_and_trainable()
        if fixed:
            self.tower.requires_grad_(False)
            raise ValueError(
                f"this would train parameters that are folded into the constants ({', '.join(fixed[:3])} "
                "...); the tower stays frozen"
            )

    def _apply(self, fn, recurse=True):
        # Own tensors stay at float32 or better; the tower and the constants follow fn by their own rules.
        if recurse:
            for child in self.children():
                child._apply(fn)
        return super()._apply(at_least_float32(fn), recurse=False)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        # A checkpoint of the bare tower loads too: its keys move under "tower.", and what only the adapter
        # has stays.
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
        elif self._guard is not None and any(prefix + name in state_dict for name in own if name != "weight"):
            self._guard.forget()  # tower and constants come together
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _check_constants(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Raises ValueError when the tower's incoming weights are not those that the constants were made
        of."""
        for name, folded in self._view.constant_parameters().items():
            coming = state_dict[f"{prefix}tower.{name}"]
            if folded.is_meta or coming.shape != folded.shape:  # a wrong shape is load_state_dict's own error
                continue
            if not torch.equal(coming.to(folded), folded):
                raise ValueError(
                    f"these weights have another {name} than the tower that the bases were fitted on, so "
                    "the constants would not match them; detach, load them into the tower and fit bases "
                    "for it"
                )

    def options(self) -> dict[str, Any]:
        """Constructor arguments, besides tower and bases, that are saved with the adapter, as JSON."""
        return {}

    @property
    def layout(self) -> towers.UnitLayout:
        """The tower's units in order."""
        return self._view.layout

    @property
    def dim(self) -> int:
        """D, the dimension of the embedding."""
        return self._view.dim

    @property
    def device(self) -> torch.device:
        """Where the tower is, and with it everything here."""
        return next(self.tower.parameters()).device

    def component_weight(self, weight: Tensor | None = None) -> Tensor:
        """What each component's coefficient is multiplied by.

        With weights on units, a unit counts as one component.

        Args:
            weight: other weights [..., P] in place of its own.

        Returns:
            [J], or [..., J] for other weights.

        Raises:
            ValueError: no number belongs to a component (a linear layer).
        """
        raise ValueError(f"{type(self).__name__} reweights no components")

    def __repr__(self) -> str:
        return description.described(self)

    def _initial(self) -> list[Tensor]:
        """The weights that it was made with, in the order of :meth:`trainable`."""
        return []

    def table(self) -> "Table":
        """The learned weights, one row per component.

        Returns:
            One dict per component: component (its place in `component_weight()`), unit (layout index), kind,
            layer, head, place (0 for the largest variance of its unit), weight, and explained, its share of
            the unit's variance over the images that the bases were fitted on. What does not apply is None.
            `.to_pandas()` makes a DataFrame.

        Raises:
            ValueError: no number belongs to a component (a linear layer, the base).
        """
        return description.table(self)

    def plot(self) -> "Figure":
        """The weights by layer and head; by component where there are no layers.

        Returns:
            A matplotlib Figure.

        Raises:
            ValueError: as :meth:`table`.
            ImportError: matplotlib is missing.
        """
        return description.plot(self)

    def constants(self) -> dict[str, nn.Module]:
        """Modules that hold what one weight vector is applied to; {} where no such vector is learned."""
        return {}

    @property
    def removed_mean(self) -> Tensor:
        """[D], the means of the adapted units (as fitted), which y lacks because it is centred.

        Classes are told apart without it. Text-image retrieval compares images with captions that know the
        mean: use ``normalize(y + residual.removed_mean)``, which with all components, weights of one and
        rest="sum" is the tower's own embedding.
        """
        like = next(self.tower.parameters()).detach()
        like = like.to(torch.promote_types(like.dtype, torch.float32))
        return sum((mean.to(like) for mean in self._centred()), like.new_zeros(self.dim))

    def _centred(self) -> list[Tensor]:
        """The means [D] that the embedding is taken about."""
        return []

    def trainable(self) -> list[nn.Parameter]:
        """The adapter's own parameters, without the tower's."""
        return [p for name, p in self.named_parameters() if not name.startswith("tower.")]

    def neighbours(self) -> int:
        """How many other adapters live on this tower."""
        _, adapters = _frozen.get(self.tower, (None, weakref.WeakSet()))
        return len(adapters) - (self in adapters)

    def detach(self) -> nn.Module:
        """Returns the tower, with its requires_grad flags restored if no other adapter lives on it."""
        _, adapters = _frozen.get(self.tower, (None, weakref.WeakSet()))
        adapters.discard(self)
        if self._flags is not None and not adapters:
            for name, p in self.tower.named_parameters():
                if not p.is_inference():  # it cannot train, and torch sets no flag of it
                    p.requires_grad_(self._flags.get(name, p.requires_grad))
            _frozen.pop(self.tower, None)
        return self.tower

    def collect(self, images: Tensor) -> Terms:
        """Runs the tower and returns what :meth:`from_units` needs of it.

        Args:
            images: [N, 3, H, W], as the tower takes them.

        Returns:
            z per kind, scale, mean, the tower's output and, where the tower returns them, its tokens.
        """
        return self._view.terms(images, self.kinds)

    def from_units(self, terms: Terms) -> Tensor:
        """The embeddings of units collected before.

        Args:
            terms: a batch of a UnitCache, or what :meth:`collect` returned.

        Returns:
            y [N, D] in the output's dtype.

        Raises:
            ValueError: the terms lack a kind, or this adapter works inside the tower and needs images.
        """
        missing = [kind for kind in self._reads() if kind not in terms.z]
        if missing:
            raise ValueError(
                f"this batch holds no terms of kind {', '.join(missing)}; encode with kinds that include it"
            )
        return self._embed(terms).to(terms.output.dtype)

    def _reads(self) -> tuple[str, ...]:
        """Kinds that from_units cannot do without."""
        return self.kinds

    @abc.abstractmethod
    def _embed(self, terms: Terms) -> Tensor:
        """y [N, D] from the terms of a batch."""

    @abc.abstractmethod
    def features(self, terms: Terms) -> dict[str, Tensor]:
        """The part of y that does not depend on the weights. A fit on a cache computes it once.

        Args:
            terms: a batch of N images.

        Returns:
            Tensors with N rows, by name.

        Raises:
            ValueError: this adapter works inside the tower, so no part of y is independent of the weights.
        """

    @torch.no_grad()
    def features_of_images(self, images: Tensor) -> dict[str, Tensor]:
        """:meth:`features` of images, by running the tower.

        Args:
            images: [N, 3, H, W].

        Returns:
            Tensors with N rows, by name.
        """
        return self.features(self.collect(images))

    @abc.abstractmethod
    def from_features(self, features: dict[str, Tensor], weights: Sequence[Tensor]) -> Tensor:
        """The embeddings from :meth:`features` and from given weights.

        Args:
            features: what :meth:`features` returned, with rows [N, ...]; or [T, N, ...], with rows of its own
                for each task.
            weights: tensors in the order of :meth:`trainable`. Leading dimensions broadcast: weights [T, J]
                compute T tasks at once.

        Returns:
            y [..., N, D], at least float32.
        """

    def spectral_form(self) -> SpectralForm | None:
        """How :meth:`from_features` is a sum over components with a weight each; None where it is none."""
        return None

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The embeddings of images; called like the tower.

        Args:
            images: [N, 3, H, W], as the tower takes them.

        Returns:
            y [N, D] in the output's dtype, or (y, tokens) where the tower returns tokens.
        """
        batch = self.collect(images)
        y = self._embed(batch).to(batch.output.dtype)
        return y if batch.tokens is None else (y, batch.tokens)

    @abc.abstractmethod
    def merge(self) -> nn.Module:
        """The adapter with its weight folded away: torch layers around the same tower, which is not copied.

        It is called like the tower, gives the same embeddings as this module with its present weight, and can
        be exported.

        Returns:
            A new module.

        Raises:
            ValueError: the tower has changed since the adapter was made, or the fold gives NaN or Inf.
        """
