"""How are heads reweighted inside the tower?

Where they enter the residual stream, so that later layers see it.

:class:`StreamResiDual` is the adapter. At a token, head h of layer l adds x = h_lh to the stream
(:mod:`residual_kernels.towers.edit`). It adds x + Phi^T diag(weight - 1) Phi (x - mu) instead: weight = 1
changes nothing, to the bit.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from residual_kernels.adapters.fold import Fold, check_finite
from residual_kernels.adapters.unit_adapter import WeightedUnits, check_arguments
from residual_kernels.adapters.unit_sum import SpectralConstants
from residual_kernels.bases.spectral_bases import SpectralBases, check_placement
from residual_kernels.towers import Terms, Tower
from residual_kernels.towers.edit import Edit, check_layers, stream_maps, token_run

# for weights inside the tower: best or next to best on validation in benchmarks/stream_digits.py
STREAM_LR = 0.3


class StreamHeads(nn.Module):
    """Constants of the adapted layers' heads in model width, and the change they make to the stream.

    `layers` are those adapted, `tokens` says at which tokens; components run layer-major, and unit_offsets
    [R+1] counts every head of the tower, those of other layers with none.
    """

    unit_offsets: Tensor

    def __init__(
        self,
        view: Tower,
        bases: SpectralBases,
        layers: Iterable[int] | None,
        tokens: str | None,
        like: Tensor,
        backend: str,
    ):
        super().__init__()
        self.layers = check_layers(view, layers)
        chosen = bases.tokens if tokens is None else tokens
        assert chosen is not None  # bases in the stream have some
        self.tokens = chosen
        self._run = token_run(view, self.tokens)
        heads, part = view.layout.heads, bases.parts["head"]
        constants, offsets, self.sizes = {}, [torch.zeros(1, dtype=torch.int64)], []
        for layer in range(view.layout.layers):
            if layer in self.layers:
                own = part.units(layer * heads, (layer + 1) * heads)
                constants[str(layer)] = SpectralConstants(stream_maps(view, layer), own, like, backend)
                self.sizes.append(len(own.components))
                offsets.append(offsets[-1][-1] + own.offsets[1:])
            else:
                offsets.append(offsets[-1][-1].expand(heads))
        self.constants = cast(Mapping[str, SpectralConstants], nn.ModuleDict(constants))
        self.register_buffer("unit_offsets", torch.cat(offsets).to(like.device))

    def edit(self, weight: Tensor, weight_index: Tensor | None = None) -> Edit:
        """What a view is to call in every block, for weight [J],
        or [T, J] with an index [N] of the images' own."""
        less_one = dict(zip(self.layers, (weight - 1).split(self.sizes, dim=-1), strict=True))

        def change(layer: int, z: Tensor, attended: Tensor) -> Tensor:
            if layer not in less_one:
                return attended
            chosen = z[:, self._run]  # [N, tokens, H, C]
            if not chosen.shape[1]:  # "patches", and the last block computes the class token alone
                return attended
            rows = None if weight_index is None else weight_index.repeat_interleave(chosen.shape[1])
            delta = self.constants[str(layer)](chosen.flatten(0, 1), None, None, less_one[layer], rows)
            delta = delta.unflatten(0, chosen.shape[:2])
            if delta.shape == attended.shape:
                return attended + delta
            start, stop, _ = self._run.indices(attended.shape[1])
            pieces = (attended[:, :start], attended[:, start:stop] + delta, attended[:, stop:])
            return torch.cat(pieces, dim=1)

        return change


class StreamResiDual(WeightedUnits):
    """ResiDual inside the tower: heads are reweighted where they enter the residual stream.

    A head that adds x to the stream adds x + Phi^T diag(weight - 1) Phi (x - mu) instead, at every token.
    Later layers see the change. With weights of 1 it is the tower, and y is an embedding like the tower's own
    (not centred).

    Args:
        tower: an image tower that :func:`residual_kernels.decompose` supports.
        bases: fitted on this very tower by :func:`fit_bases` with placement="stream", usually truncated.
        tokens: "all", "class" or "patches" (without class token and registers); those that the bases were
            fitted over by default.
        layers: whose heads are adapted; all by default.
        init, seed, train_tower, backend, check: as in :class:`ResiDual`.

    Raises:
        ValueError: the bases are of another tower or placement, the tower is wrapped already, or an argument
            is out of range.

    Every forward pass runs the tower, and training runs it backwards too (gradient checkpointing is
    honoured): `fit` takes loaders, not caches. `weight` [J] runs through the heads of the adapted layers,
    layer-major.
    """

    placement = "stream"
    method = "stream"
    changes_tokens = True
    weights_on = "components"
    units: Mapping[str, StreamHeads]
    bases: SpectralBases
    default_lr = STREAM_LR
    _originals: dict[str, Tensor] | None = None  # of a tower that the weight is merged into

    def __init__(
        self,
        tower: nn.Module,
        bases: SpectralBases,
        *,
        init: str | Tensor = "ones",
        seed: int = 0,
        tokens: str | None = None,
        layers: Iterable[int] | None = None,
        train_tower: bool = False,
        backend: str = "auto",
        check: bool = True,
    ):
        check_arguments(tower, bases, backend=backend, placement="stream")
        check_placement("stream", tokens)
        super().__init__(tower, check)
        like = next(self.tower.parameters())
        heads = StreamHeads(self._view, bases, layers, tokens, like, backend)
        self._assemble("all", bases, {"head": heads}, [sum(heads.sizes)], init, seed)
        if train_tower:
            self._leave_trainable()
        else:
            self.freeze()

    def options(self) -> dict[str, Any]:
        heads = self.units["head"]
        return {"tokens": heads.tokens, "layers": list(heads.layers)}

    def _reads(self) -> tuple[str, ...]:
        return ()

    def collect(self, images: Tensor) -> Terms:
        return self._view.terms(images, (), None if self.merged else self.units["head"].edit(self.weight))

    def _embed(self, terms: Terms) -> Tensor:
        return terms.output

    def _refuse_units(self) -> NoReturn:
        raise ValueError(
            "this adapter works inside the tower, so its output cannot be computed from cached units; give "
            "images, or a "
            "loader of (images, labels) instead of a cache"
        )

    def from_units(self, terms: Terms) -> Tensor:
        self._refuse_units()

    def features(self, terms: Terms) -> dict[str, Tensor]:
        self._refuse_units()

    def features_of_images(self, images: Tensor) -> dict[str, Tensor]:
        return {"images": images}  # inside the tower everything depends on the weight

    def from_features(self, features: dict[str, Tensor], weights: Sequence[Tensor]) -> Tensor:
        edits = [None if self.merged else self.units["head"].edit(weight) for weight in weights[0]]
        return torch.stack([self._view.terms(features["images"], (), edit).output for edit in edits])

    def merge(self) -> nn.Module:
        """The tower itself, with the change folded into its output projections.

        LayerScale is folded in too, and set to one. Needs tokens="all". The tower's state_dict keeps its
        keys, so it loads where this package is absent. This module still gives the same embeddings, and
        :meth:`unmerge` or :meth:`detach` restore the tower's own weights.

        Returns:
            The tower.

        Raises:
            ValueError: folding is impossible or gives NaN or Inf. Nothing is changed then.
        """
        if self.merged:
            raise ValueError("this adapter is merged already; unmerge it first")
        if self.neighbours():
            raise ValueError(
                f"{self.neighbours()} more adapters live on this tower, and merging would change it "
                "beneath them; detach them, or merge a copy (copy.deepcopy)"
            )
        self.still()
        changed = fold_into_tower(self._view, self.units["head"], self.weight.detach())
        names = {p: name for name, p in self.tower.named_parameters()}
        self._originals = {names[p]: value for p, value in changed}
        self._accept_tower()
        return self.tower

    @property
    def merged(self) -> bool:
        """Whether :meth:`merge` has folded the weight into the tower's own parameters."""
        return self._originals is not None

    def unmerge(self) -> None:
        """Puts the tower's own weights back, bit for bit, after :meth:`merge`."""
        if self._originals is None:
            raise ValueError("this adapter is not merged into its tower, so there is nothing to undo")
        with torch.no_grad():
            for name, value in self._originals.items():
                self.tower.get_parameter(name).copy_(value)
        self._originals = None
        self._accept_tower()

    def detach(self) -> nn.Module:
        """Restores the tower's own weights after :meth:`merge`, and its flags, and returns the tower."""
        if self.merged:
            self.unmerge()
        return super().detach()


@torch.no_grad()
def fold_into_tower(view: Tower, heads: StreamHeads, weight: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
    """Folds a change of the stream into the tower's output projections;
    (parameter, its value before) of all changed.

    W' = gamma o W + Phi^T diag(weight - 1) Phi (gamma o W) head by head, the bias alike, and gamma becomes
    one. Raises ValueError, with the tower unchanged, where this cannot be said in the tower's own parameters.
    """
    if heads.tokens != "all":
        raise ValueError(
            f'tokens="{heads.tokens}" changes some tokens and not others, which no output projection can; '
            'only tokens="all" can be merged: export the attached module instead (torch.export)'
        )
    changes: list[tuple[nn.Parameter, Tensor]] = []
    for layer, run in zip(heads.layers, weight.double().split(heads.sizes), strict=True):
        out = view.out_projection(layer)
        if out.norm is not None:
            raise ValueError(
                f"layer {layer} normalises what attention adds (post-norm), so its change does not fold "
                "into the output projection; export the attached module instead (torch.export)"
            )
        if out.bias is None:
            raise ValueError(
                f"the output projection of layer {layer} has no bias to fold the means into; export the "
                "attached module instead (torch.export)"
            )
        if any(p.is_inference() for p in (out.weight, out.bias)):
            raise ValueError(
                f"the output projection of layer {layer} was made in torch.inference_mode, so it can never "
                "be written again; load the tower outside of inference_mode to merge"
            )
        if not all(isinstance(p, nn.Parameter) for p in (out.weight, out.bias)):
            raise ValueError(
                f"the output projection of layer {layer} is parametrised, so its weight cannot be written; "
                "export the attached module instead (torch.export)"
            )
        gain, fold = out.gain(), Fold(len(out.weight), out.weight.device)
        fold.add_spectral(heads.constants[str(layer)], run - 1)
        changes.append((out.weight, out.weight.double() * gain[:, None] + fold.rows[0].T))
        changes.append((out.bias, out.bias.double() * gain + fold.b + fold.e))
        if out.gamma is not None:
            changes.append((out.gamma, torch.ones_like(out.gamma)))
    if len({id(parameter) for parameter, _ in changes}) < len(changes):
        raise ValueError(
            "layers of this tower share (tie) their output projections, so each cannot hold a change of "
            "its own; export the attached module instead (torch.export)"
        )
    check_finite({f"parameter {index}": value for index, (_, value) in enumerate(changes)})
    originals = [(parameter, parameter.detach().clone()) for parameter, _ in changes]
    for parameter, value in changes:
        parameter.copy_(value)
    return originals
