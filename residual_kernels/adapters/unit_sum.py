"""How are the units of one kind computed from their coordinates?

Sums, reweighted sums, and what becomes of the rest.

These are the parts that the drop-in modules are assembled from. All of them keep their tensors at float32 or
better.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from residual_kernels import ops, towers
from residual_kernels.bases.principal import KindBases
from residual_kernels.bases.spectral_bases import OUTPUT, SpectralBases
from residual_kernels.ops import backends, reference
from residual_kernels.ops.packing import PackedUnits, wide
from residual_kernels.towers import Terms, UnitMaps


def at_least_float32(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`fn` of Module._apply (a cast or a move), without rounding floating tensors below float32."""

    def keep(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        if moved.dtype in (torch.bfloat16, torch.float16):
            return tensor.to(device=moved.device, dtype=torch.float32)
        return moved

    return keep


class UnitSum(nn.Module):
    """sum_u weight[u] * x_u over the units of one kind, from their coordinates,
    without ever making an x_u."""

    A: Tensor
    b: Tensor
    g: Tensor
    e: Tensor

    def __init__(self, maps: UnitMaps, dtype: torch.dtype):
        super().__init__()
        self.share = maps.share
        self.shared_map = maps.A.stride(0) == 0  # MLP units all use one map: sum first, map once
        A = maps.A[0] if self.shared_map else maps.A.flatten(0, 1)  # [C, D] or [R*C, D]
        for name, value in (("A", A), ("b", maps.b), ("g", maps.g), ("e", maps.e)):
            self.register_buffer(name, value.to(dtype, copy=True))

    def _apply(self, fn, recurse=True):
        return super()._apply(at_least_float32(fn), recurse)

    @property
    def unit_offsets(self) -> Tensor:
        """[R+1] where each unit's numbers begin: it has one."""
        return torch.arange(len(self.b) + 1)

    def forward(
        self,
        z: Tensor,
        scale: Tensor,
        mean: Tensor,
        weight: Tensor | None = None,
        weight_index: Tensor | None = None,
    ) -> Tensor:
        """[N, D] in z's dtype widened to at least float32; `weight` [R], [T, R] with an index [N],
        or None for ones.

        Without an index, leading dimensions of z [..., N, R, C] (scale and mean [..., N]) and of weight [...,
        R] broadcast.
        """
        z = z.to(self.A.dtype)
        if weight is None:
            chosen = z.new_ones(1, z.shape[-2])
        else:
            # [..., 1 or N, R]
            chosen = weight.unsqueeze(-2) if weight_index is None else weight[weight_index]
            z = z * chosen[..., None]
        raw = z.sum(-2) @ self.A if self.shared_map else z.flatten(-2) @ self.A
        total = chosen.sum(-1, keepdim=True) / self.share
        raw = raw + chosen @ self.b - mean[..., None] * (total * self.g)
        return scale[..., None] * raw + total * self.e

    def features(self, z: Tensor, scale: Tensor, mean: Tensor) -> dict[str, Tensor]:
        """What :meth:`from_features` reads besides the weight."""
        return {"z": z.to(self.A.dtype), "scale": scale, "mean": mean}

    def from_features(self, features: dict[str, Tensor], weight: Tensor) -> Tensor:
        return self(features["z"], features["scale"], features["mean"], weight)


# Weights on a device that were not all 1, with the version at which that was seen. Writing ones through
# `.data` raises no version: y is then the tower's output to rounding, not to the bit.
_left_one: "WeakIdKeyDictionary" = WeakIdKeyDictionary()


class Rest(nn.Module):
    """What becomes of the units that are not adapted: dropped, kept, or replaced by their fitted mean.

    With "all" it is the tower's whole output, adapted units included, so that these are to add their change
    alone: :meth:`factors` says what multiplies them.
    """

    mean: Tensor  # with "mean" alone

    def __init__(self, name: str, adapted: tuple[str, ...], view: towers.Tower, dtype: torch.dtype):
        super().__init__()
        self.name, self.adapted = name, adapted
        self.others = (
            tuple(kind for kind in view.layout.kinds if kind not in adapted) if name == "sum" else ()
        )
        self.sums = nn.ModuleDict({kind: UnitSum(view.maps(kind), dtype) for kind in self.others})
        # Read when a cache holds the adapted kinds alone; large, made from the tower at first need and never
        # stored.
        self._view = view
        self._adapted_sums: dict[str, UnitSum] = {}

    @property
    def varies(self) -> bool:
        """Whether the rest differs from image to image."""
        return self.name in ("sum", "all")

    def factors(self, weight: Tensor) -> Tensor:
        """What adapted units are multiplied by: `weight`, or its distance from 1 where the whole output is
        kept."""
        return weight - 1 if self.name == "all" else weight

    def leaves_the_tower(self, weight: Tensor) -> bool:
        """Whether y is the tower's own output: all is kept and every weight is 1.

        False where values cannot be asked for, since a graph must not depend on them."""
        if self.name != "all" or weight.is_meta or torch.compiler.is_compiling():
            return False
        if torch._C._are_functorch_transforms_active():
            return False
        if weight.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        if weight.device.type == "cpu" or weight.is_inference():
            return bool((weight == 1).all())
        if _left_one.get(weight) == weight._version:  # a device is asked once, not at every call
            return False
        ones = bool((weight == 1).all())
        if not ones:
            _left_one[weight] = weight._version
        return ones

    def set_mean(self, bases: SpectralBases | None, like: Tensor) -> None:
        """Stores the fitted mean of the units that are not adapted:
        the output's mean less the adapted units' means."""
        if self.name != "mean" or bases is None:  # check_arguments has refused "mean" without bases
            return
        mean = bases.parts[OUTPUT].mean[0]
        for kind in self.adapted:
            if kind not in bases.parts:
                raise ValueError(
                    f'rest="mean" needs bases of kind {kind!r}; these hold {", ".join(bases.kinds)}'
                )
            mean = mean - bases.parts[kind].mean.sum(0)
        self.register_buffer("mean", mean.to(device=like.device, dtype=wide(like.dtype)))

    def _apply(self, fn, recurse=True):
        if recurse:
            for child in self.children():
                child._apply(fn)
        self._adapted_sums.clear()
        return super()._apply(at_least_float32(fn), recurse=False)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._adapted_sums.clear()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_adapted_sums": {}}

    def forward(self, terms: Terms) -> Tensor | None:
        """[N, D] or [D] to add to the adapted units' sum; None for nothing."""
        if self.name == "zero":
            return None
        if self.name == "mean":
            return self.mean
        if self.name == "all":
            return terms.output
        if all(kind in terms.z for kind in self.others):
            return sum(self.sums[kind](terms.z[kind], terms.scale, terms.mean) for kind in self.others)
        kept = terms.output.to(terms.scale.dtype)
        for kind in self.adapted:
            if kind not in self._adapted_sums:
                self._adapted_sums[kind] = UnitSum(self._view.maps(kind), kept.dtype)
            kept = kept - self._adapted_sums[kind](terms.z[kind], terms.scale, terms.mean)
        return kept


def tower_itself(
    view: towers.Tower,
    images: Tensor,
    collect: Callable[[Tensor], Terms],
    change: Callable[[Terms], Tensor] | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The tower's own output, to the bit: read along with its units,
    its sums would be taken in another order.

    `change` gives what the weights add to the terms that `collect` reads. It is zero here, but with gradients
    on, the weights' comes from there; None where there are no weights. Tokens that only the terms have (of a
    tower in a transformers model) come from them.
    """
    view.check_images(images)
    images = view.here(images)
    view.look(images)
    output = view.module(images)
    y, *tokens = output if isinstance(output, tuple) else (output,)
    lacking = view.returns_tokens and not tokens
    learns = change if torch.is_grad_enabled() else None
    if not lacking and learns is None:
        return output
    batch = collect(images)
    if learns is not None:
        y = y + learns(batch).to(y.dtype)
    tokens = [batch.tokens] if lacking else tokens
    return (y, *tokens) if tokens else y


def reweighted_sum(
    units: Mapping[str, Any],
    sizes: Sequence[int],
    terms: Terms,
    weight: Tensor,
    weight_index: Tensor | None = None,
) -> Tensor:
    """The reweighted units of all kinds, [N, D]; `weight` [J], or [T, J] with an index [N],
    runs through them."""
    return sum(
        unit(terms.z[kind], terms.scale, terms.mean, part, weight_index)
        for (kind, unit), part in zip(units.items(), weight.split(list(sizes), dim=-1), strict=True)
    )


@dataclass(frozen=True)
class SpectralForm:
    """y[n] = rest[n] + sum_j (weight_j - shift) c[n,j] basis[j]: all that a fit needs to make y by itself.

    Attributes:
        coefficients: names of the features [N, J_k] that make c side by side, in the order of the weights.
        bases: their basis vectors, [J_k, D] each.
        rest: the name of the feature [N, D], one vector [D] for all rows, or None for nothing.
        shift: what is taken off every weight.
        backend: who computes, as the adapter was told.
    """

    coefficients: tuple[str, ...]
    bases: tuple[Tensor, ...]
    rest: str | Tensor | None
    shift: float
    backend: str


class SpectralConstants(nn.Module):
    """proj, bias, slope, offset, basis of one kind (buffers), and their packed form for the backend
    (derived)."""

    proj: Tensor
    bias: Tensor
    slope: Tensor
    offset: Tensor
    basis: Tensor
    unit_offsets: Tensor

    def __init__(self, maps: UnitMaps | None, part: KindBases, like: Tensor, backend: str):
        super().__init__()
        self.backend = backend
        # All constants come from one rounding of the components, the one that files keep, and from copies
        # laid out alike, since BLAS adds up by alignment: an adapter that was saved and loaded is the same
        # bit for bit.
        basis = part.components.to(wide(like.dtype)).double().clone(memory_format=torch.contiguous_format)
        rounded = replace(part, components=basis, mean=part.mean.clone(memory_format=torch.contiguous_format))
        proj, bias, slope, offset = _constants(maps, rounded, like.device)
        constants = {"proj": proj, "bias": bias, "slope": slope, "offset": offset, "basis": basis}
        for name, value in constants.items():
            self.register_buffer(name, value.to(device=like.device, dtype=wide(like.dtype), copy=True))
        self.register_buffer("unit_offsets", part.offsets.to(device=like.device, copy=True))
        self._dtype = like.dtype  # the tower's, which z will have
        self._packs: dict[torch.dtype, PackedUnits] = {}
        self._read: tuple[Tensor, int, list[int]] | None = None  # unit_offsets, their version, and as numbers
        self._repack()

    def _repack(self) -> None:
        """Packs anew for z of the tower's dtype: before the first call,
        so that a compiled one never has to."""
        self._packs.clear()
        here = self.proj.device
        ready = self.backend == "auto" or backends.missing(self.backend, here, self._dtype) is None
        if here.type != "meta" and ready:
            self.packed(self._dtype)

    def _apply(self, fn, recurse=True):
        self._dtype = fn(torch.empty(0, dtype=self._dtype, device=self.proj.device)).dtype
        was_meta = self.proj.is_meta
        super()._apply(at_least_float32(fn), recurse)
        if was_meta:  # memory without values yet: packed when they are loaded
            self._packs.clear()
        else:
            self._repack()
        return self

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._repack()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_packs": {}}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._repack()

    def packed(self, dtype: torch.dtype) -> PackedUnits:
        """The constants laid out for z of `dtype`; made anew after every move, cast or load."""
        if dtype not in self._packs:
            self._packs[dtype] = ops.pack_units(
                self.proj.to(dtype),
                self.bias,
                self.slope,
                self.offset,
                self.basis.to(dtype),
                self.unit_offsets,
                backend=self.backend,
            )
        return self._packs[dtype]

    def forward(
        self,
        z: Tensor,
        scale: Tensor | None,
        mean: Tensor | None,
        weight: Tensor,
        weight_index: Tensor | None = None,
    ) -> Tensor:
        """[N, D] in z's dtype; `weight` [J], or [T, J] with an index [N]."""
        dtype = z.dtype
        if torch.is_autocast_enabled(z.device.type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(z.device.type)
            # Packing cannot be part of a graph.
            if torch.compiler.is_compiling() and dtype not in self._packs:
                with torch.autocast(z.device.type, enabled=False):
                    return ops.spectral_reweight_packed(
                        z.to(self._dtype), scale, mean, weight, self.packed(self._dtype), weight_index
                    )
        return ops.spectral_reweight_packed(z, scale, mean, weight, self.packed(dtype), weight_index)

    def features(self, z: Tensor, scale: Tensor | None, mean: Tensor | None) -> dict[str, Tensor]:
        """The coefficients c [N, J]: they do not depend on the weight, so a fit computes them once."""
        constants = (self.proj, self.bias, self.slope, self.offset)
        return {"c": reference.coefficients(z.to(self.proj.dtype), scale, mean, *constants, self._bounds())}

    def _bounds(self) -> Tensor | list[int]:
        """unit_offsets as numbers, read once: a device would have to be waited for at every batch."""
        offsets = self.unit_offsets
        if torch.compiler.is_compiling() or offsets.is_inference():
            return offsets
        if self._read is None or self._read[0] is not offsets or self._read[1] != offsets._version:
            self._read = offsets, offsets._version, offsets.tolist()
        return self._read[2]

    def from_features(self, features: dict[str, Tensor], weight: Tensor) -> Tensor:
        """y [N, D] of coefficients [N, J] and weight [J]; [T, N, D] of weights [T, J] and [N, J],
        or [T, N, J]."""
        c = features["c"]
        if not self._compiled_for(c, weight.shape[0] if weight.ndim == 2 else 1):
            return (c * weight.unsqueeze(-2)) @ self.basis
        pack = self.packed(c.dtype)
        if c.ndim == 2:
            return ops.spectral_sum(c, weight, pack)
        return torch.cat([ops.spectral_sum(*one, pack) for one in zip(c, weight.split(1), strict=True)])

    def _compiled_for(self, c: Tensor, tasks: int) -> bool:
        """Whether a fast backend is to sum these coefficients.

        Nothing is packed for one that is not asked for.
        """
        if self.backend not in ("auto", "cpp", "triton") or c.requires_grad:
            return False
        if torch._C._are_functorch_transforms_active():
            return False
        if torch.compiler.is_compiling() and c.dtype not in self._packs:  # packing cannot be part of a graph
            return False
        chosen = backends.resolve(self.backend, c.device, c.dtype)
        if chosen == "triton":
            shape = (c.shape[-2], 1 if c.ndim == 3 else tasks, c.shape[-1], self.basis.shape[1])
            from residual_kernels.ops.triton.backend import spectral_sum_pays  # the package is optional

            return c.dtype == torch.float32 and spectral_sum_pays(*shape)
        return chosen == "cpp"


def _constants(maps: UnitMaps | None, part: KindBases, device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """proj [J, C], bias, slope, offset [J] in float64.

    Without maps the unit is given in the output space itself.
    """
    proj, bias, slope, offset = [], [], [], []
    for unit in range(len(part.mean)):
        phi, mu = part.components[part.run(unit)].to(device), part.mean[unit].to(device)
        if maps is None:
            proj.append(phi)
            bias.append(phi.new_zeros(len(phi)))
            slope.append(phi.new_zeros(len(phi)))
            offset.append(phi @ mu)
        else:
            proj.append(phi @ maps.A[unit].T)
            bias.append(phi @ maps.b[unit])
            slope.append(phi @ (-maps.g / maps.share))
            offset.append(phi @ (mu - maps.e / maps.share))
    return torch.cat(proj), torch.cat(bias), torch.cat(slope), torch.cat(offset)
