"""How is a transformer tower run and read? What the views of all families share.

A subclass of :class:`TransformerTower` says where a model keeps its parts; this file collects z, s and m at
the pooled token and makes the constants, for any of the poolings below. Nothing is hooked, swapped or
written: the tower is read.
"""

import abc
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from residual_kernels.towers import agreement
from residual_kernels.towers.blocks import run_block, whole
from residual_kernels.towers.edit import stream_maps
from residual_kernels.towers.layout import UnitLayout, check_kinds
from residual_kernels.towers.norm import Norm
from residual_kernels.towers.pooling import AttentionPooler, attended
from residual_kernels.towers.view import Edit, Guard, OutProjection, Terms, UnitMaps, UnsupportedTowerError
from residual_kernels.towers.watch import Watch, counter, difference

# Where a tower needs every token's terms until the last layer is done (average pooling after the norm,
# attention pooling), images are taken in groups so that these stay within this many bytes.
TOKEN_BYTES = 256 * 2**20

# Newer torch tells export from compile.
_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)

FIRST = "class token"
AVERAGE = "average, norm after"  # tokens are averaged, then normalised
NORMED_AVERAGE = "average, norm before"  # every token is normalised, then they are averaged
ATTENTION = "attention"  # every token is normalised, then a pooler attends to them


# An :data:`~residual_kernels.towers.edit.Edit` of one layer: (z, what attention adds) -> what it is to add
# instead.
BlockEdit = Callable[[Tensor, Tensor], Tensor]


class TransformerTower(abc.ABC):
    """A :class:`~residual_kernels.towers.Tower` whose output is a norm and a linear map of a pooled residual
    stream.

    A subclass sets these and the methods marked abstract. It holds the module and plain numbers, never a
    parameter: those are read where they are needed, so that moves, casts and loads are seen.

    Attributes:
        module: the tower. name: its family, for messages and files.
        layout, width, head_width (C), dim (D): sizes.
        class_token, prefix: whether the first token is one; how many tokens stand before the patches.
        pooling: FIRST, AVERAGE, NORMED_AVERAGE or ATTENTION; `span`: the tokens that are pooled.
        returns_tokens: whether the call also returns tokens, so that the last block must compute them all.
    """

    module: nn.Module
    name: str
    layout: UnitLayout
    width: int
    head_width: int
    dim: int
    class_token: bool = True
    prefix: int = 1
    pooling: str = FIRST
    span: slice = slice(1, None)
    returns_tokens: bool = False
    check: bool = True  # whether one image is compared with the model's own forward
    guard: Guard | None = None  # asked before each run: an adapter's view of its weights
    folded: Mapping[str, tuple[int, ...]] | None = (
        None  # parameters in an adapter's constants, and their shapes
    )
    _watch: Watch | None = None
    _stamp: dict[str, tuple[int, int | None]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_watch": None, "_stamp": None}  # of these very modules

    # Where the parts are.

    @property
    @abc.abstractmethod
    def stem_weight(self) -> Tensor:
        """A parameter of the first layer: images must have its dtype and device."""

    @property
    @abc.abstractmethod
    def image_size(self) -> tuple[int, int] | None:
        """Height and width that images must have; None where the tower takes others too."""

    @property
    @abc.abstractmethod
    def norm(self) -> Norm:
        """The final norm."""

    @property
    @abc.abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The modules that `block` runs."""

    @abc.abstractmethod
    def projection(self) -> tuple[Tensor | None, Tensor | None]:
        """P [width, D] and p [D] of output = norm(pooled) P + p; None for the identity and for no bias.

        With attention pooling the last norm is `outer_norm`.
        """

    @abc.abstractmethod
    def out_projection(self, layer: int) -> OutProjection:
        """The parameters that make the layer's term of the stream from the z of its heads."""

    @abc.abstractmethod
    def constant_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that the maps are made of: a trained copy of them would not match the maps."""

    # Of attention pooling alone: its own projections, the norm behind it, and the MLP behind it (the unit
    # `pool`).

    def pooler(self) -> AttentionPooler:
        raise NotImplementedError(f"{type(self).__name__} does not pool by attention, so it has no pooler")

    @property
    def outer_norm(self) -> Norm:
        return Norm(nn.Identity(), "none")

    def pool_mlp(self, pooled: Tensor) -> Tensor:
        """What the MLP behind the pooling adds to the pooled vector [N, width]."""
        raise NotImplementedError(f"{type(self).__name__} has no MLP behind its pooling")

    # How it runs.

    @property
    @abc.abstractmethod
    def recomputes(self) -> bool:
        """Whether gradient checkpointing is switched on in the tower."""

    @abc.abstractmethod
    def drops(self) -> list[str]:
        """Names of what the tower drops at random while it trains, so that its units are not repeatable."""

    def unsteady(self) -> list[str]:
        """All that makes units unrepeatable in training mode, as in "drops patches at random"."""
        return [f"drops {', '.join(found)} at random"] if (found := self.drops()) else []

    def inexact(self) -> list[str]:
        """What the tower has that would spoil the sum of the units in training mode, as in "drop path"."""
        return []

    @abc.abstractmethod
    def token_count(self, images: Tensor) -> int:
        """Tokens that these images become."""

    @abc.abstractmethod
    def embed(self, images: Tensor) -> tuple[Tensor, Any]:
        """The stream before the first block [N, tokens, width], and what else the blocks need
        (position tables)."""

    @abc.abstractmethod
    def block(
        self, index: int, x: Tensor, context: Any, first_only: bool, edit: BlockEdit | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One block: the stream after it, the heads' coordinates z [N, tokens, H, C] and the MLP's whole
        term.

        With `first_only` nothing reads the other tokens afterwards: return the first alone, [N, 1, ...]. What
        attention adds to the stream is `edit(z, attended)` where there is an edit.
        """

    @abc.abstractmethod
    def finish(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The tower's own output [N, D] from the stream after the last block,
        and its tokens where it returns them."""

    def own(self, images: Tensor) -> Tensor:
        """The model's own embedding [N, D], by its own forward."""
        output = self.module(images)
        return output[0] if isinstance(output, tuple) else output

    def beside(self) -> list[nn.Module]:
        """Modules outside of `module` that :meth:`own` runs."""
        return []

    def afresh(self) -> "TransformerTower":
        """A new view of the same tower, as it is made now."""
        build: Callable[[nn.Module], TransformerTower] = type(self)  # a subclass is made of the module alone
        return build(self.module)

    # Whether it is still what it was.

    def still(self) -> None:
        """Raises ValueError, in words, where the tower is no longer made as it was when this view was.

        Costs a glance where nothing has changed since the last run.
        """
        if self._watch is not None and self._watch.unchanged():
            return
        kind: type[ValueError] = ValueError
        try:
            what = difference(self, self.afresh(), self.folded)
        except UnsupportedTowerError as error:
            kind, what = UnsupportedTowerError, str(error)
        if what is not None:
            made, anew = (
                ("this adapter was made", "detach, fit bases of the tower as it is and make a new adapter")
                if self.guard is not None
                else ("it was read", "decompose it again")
            )
            raise kind(f"the tower has changed since {made}: {what}. Undo that, or {anew}")

    def stamp(self) -> None:
        """Remembers the weights that the maps are made of, for :meth:`same_weights`."""
        self._stamp = {name: (id(p), counter(p)) for name, p in self.constant_parameters().items()}

    def same_weights(self) -> None:
        """Raises ValueError where the maps are no longer made of the weights that :meth:`stamp` saw."""
        self.still()
        if self._stamp is None:
            return
        now = {name: (id(p), counter(p)) for name, p in self.constant_parameters().items()}
        if changed := [name for name in self._stamp | now if now.get(name) != self._stamp.get(name)]:
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise ValueError(
                f"{changed[0]}{more}, from which units are computed, has been changed, replaced or removed "
                "since these images ran; decompose them again"
            )

    def look(self, images: Tensor) -> bool:
        """Looks, before a run, whether the tower is what it was and computes what this view computes.

        Returns False where this is no plain code, so that nothing was looked at. Raises ValueError where
        something has changed.
        """
        if torch.compiler.is_compiling() or not agreement.eager(images):
            return False
        if self._watch is None or not self._watch.unchanged():
            if self._watch is not None or self.guard is not None:  # else it was made a moment ago
                self.still()
            if self.guard is not None:
                self.guard.compare()  # a block may stand in another's place
            before = self._watch
            self._watch = (
                agreement.agreed(self, images, before)
                if self.check
                else Watch(self.module, self.beside(), before)
            )
        if self.guard is not None:
            self.guard()
        return True

    # What is made of them.

    @property
    def shortens(self) -> bool:
        """Whether the last block computes one token alone:
        nothing reads the others unless somebody wants them."""
        return self.pooling == FIRST and not self.returns_tokens

    @property
    def sums_units(self) -> bool:
        """Whether heads are summed in the stream; with attention pooling z is x_u itself."""
        return self.pooling != ATTENTION

    @torch.no_grad()
    def maps(self, kind: str, units: Sequence[int] | None = None) -> UnitMaps:
        """Constants of one kind, float64 on the tower's device; of some of its units
        (counted from 0) or of all."""
        if units is None:
            span = self.layout.span(kind)
            units = range(span.stop - span.start)
        like = self.stem_weight
        if self.pooling == ATTENTION:  # z is x_u itself
            eye = torch.eye(self.dim, dtype=torch.float64, device=like.device)
            A, none = eye.expand(len(units), -1, -1), torch.zeros_like(eye[0])
            return UnitMaps(A=A, b=none.expand(len(units), -1), g=none, e=none, share=1)
        P, p = (None if t is None else whole(t) for t in self.projection())
        P = torch.eye(self.width, dtype=torch.float64, device=like.device) if P is None else P.double()
        gamma, beta = self.norm.constants(self.width, like)
        folded = gamma[:, None] * P  # [width, D]
        share = 2 * self.layout.layers + 1
        if kind == "head":
            share *= self.layout.heads
            places = [divmod(unit, self.layout.heads) for unit in units]
            made = {layer: stream_maps(self, layer) for layer in sorted({layer for layer, _ in places})}
            A = torch.stack([made[layer].A[head] for layer, head in places]) @ folded
            b = torch.stack([made[layer].b[head] for layer, head in places]) @ folded
        else:
            A = folded.expand(len(units), -1, -1)
            b = P.new_zeros(len(units), self.dim)
        e = beta @ P if p is None else beta @ P + p.double()
        return UnitMaps(A=A, b=b, g=gamma @ P, e=e, share=share)

    def check_mode(self) -> None:
        """Raises ValueError when the tower is in a mode in which its units would not be repeatable."""
        if self.module.training and (found := self.unsteady()):
            raise ValueError(
                f"this tower is in training mode and {', '.join(found)}; call .eval() on it first"
            )

    def check_images(self, images: Tensor) -> None:
        """Raises ValueError for images this tower cannot take: rank, size, dtype, or a device other than its
        own or the CPU."""
        height, width = self.image_size or ("H", "W")
        if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3:
            shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"images must be a tensor [N, 3, {height}, {width}]; got {shape}")
        if images.shape[0] == 0:  # len() would fix the batch size of an exported graph
            raise ValueError("this batch holds no images, and the tower cannot run on none")
        if self.image_size is not None and images.shape[2:] != (height, width):
            raise ValueError(
                f"this tower takes images of {height} x {width} pixels; got {images.shape[2]} x "
                f"{images.shape[3]}; resize them (the tower's preprocess does)"
            )
        weight = self.stem_weight
        if weight.is_meta and not images.is_meta:
            agreement.check_here(self)
        if images.device.type not in ("cpu", weight.device.type):
            raise ValueError(
                f"images are on {images.device} but the tower is on {weight.device}; move one of them"
            )
        if not images.is_floating_point():
            raise ValueError(
                f"images have dtype {images.dtype}; use the preprocess of the model (floating point)"
            )
        if weight.dtype.itemsize == 1:
            raise UnsupportedTowerError(
                f"this tower's first layer is kept in {weight.dtype} between calls, and units need weights "
                "of 16 bits or more; decompose the tower before that"
            )
        if images.dtype != weight.dtype and not torch.is_autocast_enabled(weight.device.type):
            raise ValueError(
                f"images are {images.dtype} but the tower is {weight.dtype}; cast them with "
                f"images.to({weight.dtype})"
            )

    def here(self, images: Tensor) -> Tensor:
        """Images on the tower's device: those of the CPU are moved, and nobody waits for it."""
        device = self.stem_weight.device
        return images if images.device == device else images.to(device, non_blocking=True)

    def terms(
        self, images: Tensor, kinds: Iterable[str], edit: Edit | None = None, every_token: bool = False
    ) -> Terms:
        """Runs the tower on images [N, 3, H, W] and collects z of `kinds`, s, m and the output.

        `edit` changes what attention adds to the stream, so that later layers see it; with `every_token` the
        last block computes all tokens even where the output depends on one. Gradients flow to images and
        parameters as in the tower itself; gradient checkpointing is honoured. With `check` the first image is
        compared with the model's own forward (:mod:`residual_kernels.towers.agreement`), and again after the
        tower's modules or hooks have changed.
        """
        kinds = check_kinds(kinds, self.layout) if kinds else ()
        self.check_images(images)
        images = self.here(images)
        if self.module.training and (found := self.inexact()):
            raise ValueError(
                f"this tower is in training mode and has {', '.join(found)}, so its output is not a sum of "
                "units; call .eval() on it"
            )
        if not self.look(images) and self.guard is not None and not _exporting():
            why = self.guard.would_train()
            if why is not None and torch.is_grad_enabled():
                raise ValueError(why)
        if not self._keeps_tokens or _exporting():  # a graph for any batch size takes the batch whole
            return self.run(images, kinds, edit, every_token)
        units = {"emb": 1, "head": self.layout.layers, "mlp": self.layout.layers}
        units_kept = sum(units.get(kind, 0) for kind in kinds)
        per_image = self.token_count(images) * self.width * (units_kept + 1) * images.element_size()
        groups = images.split(max(1, TOKEN_BYTES // per_image))
        return _joined([self.run(part, kinds, edit, every_token) for part in groups])

    def run(
        self, images: Tensor, kinds: tuple[str, ...], edit: Edit | None = None, every_token: bool = False
    ) -> Terms:
        """:meth:`terms` of images that have been checked, all at once."""
        x, context = self.embed(images)
        terms: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
        if "emb" in kinds:
            terms["emb"].append(self._select(x.unsqueeze(-2)))
        recompute = self.recomputes and torch.is_grad_enabled()
        last = self.layout.layers - 1
        shorten = self.shortens and not every_token
        for index in range(self.layout.layers):
            here = None if edit is None else partial(edit, index)
            arguments = (index, x, context, shorten and index == last, here)
            x, z, mlp = run_block(self.blocks[index], self.block, *arguments, recompute=recompute)
            if "head" in kinds:
                terms["head"].append(self._select(z))
            if "mlp" in kinds:
                terms["mlp"].append(self._select(mlp.unsqueeze(-2)))
        output, tokens = self.finish(x)
        if self.pooling == ATTENTION:
            z = attended(self, x, terms) if terms else {}
            scale, mean = Norm(nn.Identity(), "none").statistics(output)
            return Terms(z=z, scale=scale, mean=mean, output=output, tokens=tokens)
        scale, mean = self.norm.statistics(self._select(x))
        if self._keeps_tokens:
            share = scale / scale.sum(1, keepdim=True)  # [N, tokens]
            mean = (share * mean).sum(1)
            scale = scale.mean(1)
            terms = {
                kind: [torch.einsum("nt,ntrc->nrc", share.to(part.dtype), part) for part in of_kind]
                for kind, of_kind in terms.items()
            }
        z = {kind: torch.cat(of_kind, dim=1) for kind, of_kind in terms.items()}  # [N, R, C]
        return Terms(z=z, scale=scale, mean=mean, output=output, tokens=tokens)

    @property
    def _keeps_tokens(self) -> bool:
        return self.pooling not in (FIRST, AVERAGE)

    def _select(self, x: Tensor) -> Tensor:
        """The pooled token of [N, tokens, ...], or the tokens that will be pooled once their norms are
        known."""
        if self.pooling == FIRST:
            return x[:, 0]
        return x[:, self.span] if self._keeps_tokens else x[:, self.span].mean(dim=1)


def _joined(groups: list[Terms]) -> Terms:
    """Terms of consecutive groups of images as one."""
    if len(groups) == 1:
        return groups[0]
    return Terms(
        z={kind: torch.cat([group.z[kind] for group in groups]) for kind in groups[0].z},
        scale=torch.cat([group.scale for group in groups]),
        mean=torch.cat([group.mean for group in groups]),
        output=torch.cat([group.output for group in groups]),
        tokens=None
        if groups[0].tokens is None
        else torch.cat([group.tokens for group in groups if group.tokens is not None]),
    )
