"""What are this ViT's units? The only place that knows a model's internals.

Every supported family is one module that offers a :class:`Tower` view of an image tower: it names the units, gives the
constants that map a unit's coordinates to the output space, and runs the tower while collecting those coordinates at
the pooled token. Families are told apart by structure, never by version.

How to write a view of another family:

1. A file here with `LOOKED_FOR` (what tells the family, for the error about unknown towers), `recognises(tower)` (true
   for unsupported members too, so that they get a reason) and a subclass of `transformer.TransformerTower`; an entry in
   :func:`view`.
2. `__init__` checks the structure against the parts it knows, refuses with UnsupportedTowerError and the reason, and
   sets module, name, layout, width, head_width, dim and pooling. It reads shapes only, so it works on the meta device.
3. `embed` runs everything before the first block with the model's own code: the unit `emb`, convolutions included.
4. `block` runs one block with the model's own norms, MLP, LayerScale and position tables, but writes out the attention,
   because z is what enters its output projection: after inner norms, gates and head scales, [N, tokens, heads, C].
   With `first_only` only the first token's query is computed.
   The MLP's term is all that its branch adds. `edit`, where there is one, changes what attention adds. `blocks` are the
   modules that it runs, whose gradient checkpointing and sharding (FSDP2) are honoured.
5. `out_projection` names the projection's parameters, LayerScale as `gamma`. Where a norm stands behind the projection
   (post-norm blocks) it is named too, and z is `norm.coordinates(z, attended)`.
6. `norm`, `projection` and `finish` (the model's own code again) end it: output = norm(pooled) P + p. Attention pooling
   (pooling = ATTENTION) is told by `pooler`, with `outer_norm` and `pool_mlp` where something stands behind it.
7. Whatever makes the sum inexact is refused: a norm or an MLP behind the sum, max pooling, tokens that are merged.
8. `constant_parameters` lists what `norm`, `projection` and `out_projection` read.

The test is one line for every variant: with random norms, biases and LayerScale, units must sum to the output.
"""

import hashlib
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from residual_kernels.towers.edit import Edit, OutProjection

KINDS = ("emb", "head", "mlp", "pool")  # in this order everywhere; `layout.kinds` are those that a tower has


@dataclass(frozen=True)
class Unit:
    """One residual unit. `layer` and `head` are None where a unit has none."""

    index: int
    kind: str
    layer: int | None
    head: int | None


class UnitLayout(Sequence[Unit]):
    """The units of a tower in the library's order: emb, heads (layer-major), mlps (layer order), pool.

    `pool` says whether there is an MLP behind the pooling (SigLIP, PE-Core), which is one more unit.
    """

    def __init__(self, layers: int, heads: int, pool: bool = False):
        self.layers, self.heads, self.pool = layers, heads, pool
        rows = [("emb", None, None)]
        rows += [("head", layer, head) for layer in range(layers) for head in range(heads)]
        rows += [("mlp", layer, None) for layer in range(layers)]
        rows += [("pool", None, None)] * pool
        self._units = tuple(Unit(index, *row) for index, row in enumerate(rows))

    def __len__(self) -> int:
        return len(self._units)

    def __getitem__(self, index):
        return self._units[index]

    def __repr__(self) -> str:
        pool = ", pool=True" if self.pool else ""
        return f"UnitLayout(layers={self.layers}, heads={self.heads}{pool}, units={len(self)})"

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of units that this tower has, in order."""
        return KINDS if self.pool else KINDS[:-1]

    def span(self, kind: str) -> slice:
        """The contiguous run of layout indices that units of `kind` occupy."""
        heads = 1 + self.layers * self.heads
        mlps = heads + self.layers
        spans = {"emb": (0, 1), "head": (1, heads), "mlp": (heads, mlps), "pool": (mlps, len(self))}
        return slice(*spans[kind])

    def select(
        self, kind: str | None = None, layer: int | None = None, head: int | None = None
    ) -> tuple[Unit, ...]:
        """Units that match every argument given; a ValueError names the arguments when none does."""
        found = tuple(
            unit
            for unit in self._units
            if (kind is None or unit.kind == kind)
            and (layer is None or unit.layer == layer)
            and (head is None or unit.head == head)
        )
        if not found:
            raise ValueError(
                f"no unit has kind={kind!r}, layer={layer}, head={head}; this tower has {self.layers} layers of "
                f"{self.heads} heads and the kinds {', '.join(self.kinds)}"
            )
        return found

    def index(self, unit: "int | Unit | tuple[int, int]", *_) -> int:
        """Layout index of a unit given by index, by row, or by (layer, head)."""
        if isinstance(unit, Unit):
            return unit.index
        if isinstance(unit, tuple):
            layer, head = unit
            if not (0 <= layer < self.layers and 0 <= head < self.heads):
                raise IndexError(
                    f"unit (layer, head) = {unit} is outside {self.layers} layers of {self.heads} heads"
                )
            return 1 + layer * self.heads + head
        if not 0 <= unit < len(self):
            raise IndexError(f"unit {unit} is outside this layout of {len(self)} units")
        return int(unit)


@dataclass(frozen=True)
class UnitMaps:
    """Constants of one kind: x_u = s * (z_u A_u + b_u - (m / share) g) + e / share, in float64.

    A [R, C, D]; b [R, D]; g, e [D]. `share` is the number of units the final norm's constant terms are dealt to.
    """

    A: Tensor
    b: Tensor
    g: Tensor
    e: Tensor
    share: int

    def rows(self) -> Tensor:
        """M [R, C+2, D]: x_u = l_u M_u + e / share with l = (s*z, s, s*m)."""
        units, _, dim = self.A.shape
        slope = (-self.g / self.share).expand(units, 1, dim)
        return torch.cat([self.A, self.b[:, None, :], slope], dim=1)


@dataclass
class Terms:
    """What a tower's forward pass leaves for each image: everything exact units are made of.

    z maps a kind to [N, R, C]; scale, mean [N] (float32 or better) are s and m of the final norm; output [N, D] is the
    tower's own output; tokens its second output where the tower returns one.
    """

    z: dict[str, Tensor]
    scale: Tensor
    mean: Tensor
    output: Tensor
    tokens: Tensor | None = None


class Tower(Protocol):
    """An image tower as the library sees it. Holds no state of its own besides the module it reads."""

    module: nn.Module
    name: str  # architecture family, for messages and files
    layout: UnitLayout
    width: int
    head_width: int
    dim: int  # D
    class_token: bool  # whether the first token is one
    prefix: int  # tokens before the patches: the class token, registers

    def maps(self, kind: str, units: Sequence[int] | None = None) -> UnitMaps: ...

    def check_images(self, images: Tensor) -> None: ...

    def check_mode(self) -> None: ...

    def terms(
        self, images: Tensor, kinds: Iterable[str], edit: "Edit | None" = None, every_token: bool = False
    ) -> Terms:
        """`edit` changes what attention adds to the stream, so that later layers see it; with `every_token` the last
        block computes all tokens even where the output depends on one."""
        ...

    def out_projection(self, layer: int) -> "OutProjection": ...

    def constant_parameters(self) -> dict[str, nn.Parameter]: ...


class UnsupportedTowerError(ValueError):
    """The tower's structure has no exact units here; the message says what was found and what is supported."""


def unwrap(tower: nn.Module) -> nn.Module:
    """The tower inside an adapter of this library, or the module itself."""
    return tower.tower if getattr(tower, "wraps_tower", False) is True else tower


def view(tower: nn.Module) -> Tower:
    """The :class:`Tower` view of an image tower, chosen by structure.

    Raises UnsupportedTowerError (a ValueError) with the reason when the tower cannot be decomposed exactly, or with
    what was looked for when it is of no known family.
    """
    from residual_kernels.towers import open_clip, timm
    from residual_kernels.towers.hugging_face import tower as hugging_face

    kind = type(tower).__name__
    if isinstance(getattr(tower, "visual", None), nn.Module):
        raise UnsupportedTowerError(
            f"{kind} is a whole CLIP model; pass its image tower, model.visual, or use attach(model, ...)"
        )
    families = {
        open_clip: open_clip.OpenClipTower,
        timm: timm.TimmTower,
        hugging_face: hugging_face.HuggingFaceTower,
    }
    for family, build in families.items():
        if family.recognises(tower):
            return build(tower)
    raise UnsupportedTowerError(
        f"{kind} is no image tower that this library knows: it has none of "
        f"{'; '.join(family.LOOKED_FOR for family in families)}"
    )


def check_kinds(kinds: Iterable[str], layout: UnitLayout | None = None) -> tuple[str, ...]:
    """`kinds` in layout order without repeats; a ValueError names what is wrong with it, or absent from `layout`."""
    if isinstance(kinds, str):
        raise ValueError(f"kinds must be a tuple such as ({kinds!r},); got the string {kinds!r}")
    kinds = tuple(kinds)
    there = KINDS if layout is None else layout.kinds
    unknown = [kind for kind in kinds if kind not in there]
    if unknown or not kinds:
        raise ValueError(
            f"kinds must name at least one of {', '.join(there)}"
            f"{'' if layout is None else ', which this tower has'}; got {kinds}"
        )
    return tuple(kind for kind in there if kind in kinds)


def checksum(tower: nn.Module) -> str:
    """SHA-256 of a tower's weights: names, shapes and values rounded to bfloat16.

    A cast to bfloat16 or float64 keeps it; float16 rounds differently, so fit and use in float16 alike, or in neither.
    """
    state = sorted(tower.state_dict().items())
    stamp = _stamp(state)
    known = _checksums.get(tower)
    if known is not None and known[0] == stamp:
        return known[1]
    digest = hashlib.sha256()
    for name, tensor in state:
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        value = tensor.detach().to("cpu")
        if value.is_floating_point():
            value = value.to(torch.bfloat16).view(torch.int16)
        digest.update(value.contiguous().numpy().data)
    _checksums[tower] = stamp, digest.hexdigest()
    return digest.hexdigest()


# Hashing ViT-bigG takes seconds, and every fit and evaluation asks. A tower's checksum is kept until its weights move,
# their version counters rise, or a sample of their values differs (writes through `.data` raise no counter).
_checksums: "weakref.WeakKeyDictionary[nn.Module, tuple[tuple, str]]" = weakref.WeakKeyDictionary()
_SAMPLE = 1009


def _stamp(state: list[tuple[str, Tensor]]) -> tuple:
    seen = []
    for name, tensor in state:
        sample = tensor.detach().reshape(-1)[::_SAMPLE].double()
        version = None if tensor.is_inference() else tensor._version
        seen.append((name, tuple(tensor.shape), tensor.dtype, tensor.data_ptr(), version, sample.sum()))
    sums = torch.stack([entry[-1].cpu() for entry in seen]).tolist() if seen else []
    return tuple((*entry[:-1], total) for entry, total in zip(seen, sums, strict=True))
