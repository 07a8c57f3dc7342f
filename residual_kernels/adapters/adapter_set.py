"""How do several adapters share one tower? Switched by name, or side by side, one for each row of a batch."""

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from residual_kernels import distributed
from residual_kernels.adapters.groups import Group, StreamGroup, UnitsGroup, group_of
from residual_kernels.adapters.tower_adapter import TowerAdapter
from residual_kernels.adapters.unit_sum import at_least_float32, tower_itself
from residual_kernels.towers import Terms
from residual_kernels.towers.edit import Edit
from residual_kernels.zeroshot import ZeroShotHead


class _Member(nn.Module):
    """One adapter of a set: its weights, its classifier, and the key of what it shares with others."""

    def __init__(self, adapter: TowerAdapter, head: ZeroShotHead | None, key: str):
        super().__init__()
        self.key = key
        self.weight = nn.Parameter(cast(Tensor, adapter.weight).detach().clone())
        self.head = None if head is None else copy.deepcopy(head)

    def _apply(self, fn, recurse=True):
        return super()._apply(at_least_float32(fn), recurse)


class AdapterSet(TowerAdapter):
    """Several adapters over one tower.

    Called like the tower, with the active one; or with a name for every row.

        heads = {"digits": digits, "letters": letters}
        adapters = AdapterSet(model.visual, {"digits": a, "letters": b}, heads=heads)
        adapters(images)                                     # the active one, at first the first
        adapters.active = "letters"                          # no tensor moves; None: the tower's own output
        adapters(images, names=["digits", None, "letters"])  # one pass of the backbone, row by row

    Args:
        tower: the image tower that all of them were made on.
        adapters: by name: ResiDual, CoarseHeads or OutputSpectral. Their weights are copied; they stay as
            they are.
        heads: by name, for :meth:`logits`; not every adapter needs one.

    Adapters that differ in their weights alone (the same bases truncated alike, the same rest) share their
    constants, and rows of a batch are told apart inside the operator (`weight_index`). Others share the
    backbone's pass, which is nearly all of the cost: their rows are gathered, and each group is computed by
    itself. :attr:`groups` says which. Those with placement="stream" change their own rows inside that same
    pass.

    `names` is one name, a sequence with a name (or None) for every row, or an int64 tensor [N] of positions
    in :attr:`names`, -1 for None (see :meth:`index`): the form for a compiled graph, which needs all adapters
    to share.

    `trainable` is the active adapter's weight, so :func:`fit` trains that one. In a process group (DDP)
    adapters that no row of a batch uses get gradients of zero. state_dict holds the shared constants once,
    ``members.<name>.weight`` and ``tower.*``.
    """

    def __init__(
        self,
        tower: nn.Module,
        adapters: Mapping[str, TowerAdapter],
        *,
        heads: Mapping[str, ZeroShotHead] | None = None,
    ):
        if isinstance(tower, TowerAdapter):
            raise ValueError(
                f"this tower is wrapped in a {type(tower).__name__} already; use its .tower, or detach it "
                "first"
            )
        if not adapters:
            raise ValueError("an AdapterSet needs at least one adapter")
        heads = dict(heads or {})
        foreign = [name for name in heads if name not in adapters]
        if foreign:
            raise ValueError(f"heads names {', '.join(foreign)}, but the adapters are {', '.join(adapters)}")
        super().__init__(tower)
        self.members = cast("dict[str, _Member]", nn.ModuleDict())  # modules, read as dictionaries
        self.shared = cast("dict[str, Group]", nn.ModuleDict())
        self._active: str | None = None
        self._made = 0
        for name, adapter in adapters.items():
            self.add(name, adapter, heads.get(name))
        self._active = next(iter(adapters))
        self.freeze()

    def __repr__(self) -> str:
        return (
            f"AdapterSet({list(self.members)}, active={self._active!r}, tower={type(self.tower).__name__!r})"
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Names in the order they were added: what positions count."""
        return tuple(self.members)

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Names of the adapters that share their constants, group by group."""
        return tuple(tuple(name for name, m in self.members.items() if m.key == key) for key in self.shared)

    @property
    def active(self) -> str | None:
        """The adapter that a call without names uses; None for the tower's own output."""
        return self._active

    @active.setter
    def active(self, name: str | None) -> None:
        if name is not None:
            self._member(name)
        self._active = name

    def add(self, name: str, adapter: TowerAdapter, head: ZeroShotHead | None = None) -> None:
        """Adds an adapter made on this tower. Its weights are copied.

        Args:
            name: a new name, without dots.
            adapter: ResiDual, CoarseHeads or OutputSpectral.
            head: for :meth:`logits`.

        Raises:
            ValueError: the name is taken or unusable, or the adapter or the head does not fit this tower.
                Nothing is changed then.
        """
        if name in self.members:
            raise ValueError(f"there is an adapter {name!r} already; remove it first, or choose another name")
        if not isinstance(name, str) or not name or "." in name or hasattr(self.members, name):
            raise ValueError(
                "an adapter's name must be a word without dots that nn.ModuleDict does not use itself; "
                f"got {name!r}"
            )
        if not isinstance(adapter, TowerAdapter) or not adapter.constants():
            raise ValueError(
                "an AdapterSet takes adapters that learn one weight vector (ResiDual, CoarseHeads, "
                f"OutputSpectral); got {type(adapter).__name__}"
            )
        if adapter.tower is not self.tower:
            raise ValueError(f"adapter {name!r} wraps another tower; make or load it on this set's tower")
        if adapter.merged:
            raise ValueError(f"adapter {name!r} is merged into the tower; unmerge it first")
        if head is not None and len(head.class_vectors) != self.dim:
            raise ValueError(
                f"the head of {name!r} takes embeddings of {len(head.class_vectors)} numbers; this tower "
                f"gives {self.dim}"
            )
        key = next((key for key, shared in self.shared.items() if shared.serves(adapter)), None)
        if key is None:
            key = str(self._made)
            self._made += 1
            self.shared[key] = group_of(adapter)
        self.members[name] = _Member(adapter, head, key).to(next(self.tower.parameters()).device)
        if self._guard is not None:
            self._guard.keep(self)

    def remove(self, name: str) -> None:
        """Removes an adapter, with the constants that no other adapter shares.

        If it was active, no adapter is active afterwards.

        Args:
            name: of the adapter.

        Raises:
            ValueError: there is no such adapter.
        """
        key = self._member(name).key
        del self.members[name]
        if all(member.key != key for member in self.members.values()):
            del self.shared[key]
            assert self._guard is not None  # since the constructor's end
            self._guard.keep(self)
        if self._active == name:
            self._active = None

    def _member(self, name: str) -> _Member:
        if name not in self.members:
            raise ValueError(f"there is no adapter {name!r} here; known are {', '.join(self.members)}")
        return self.members[name]

    def _shared_by(self, name: str) -> Group:
        return self.shared[self._member(name).key]

    def index(self, names: Sequence[str | None]) -> Tensor:
        """Positions of names, for calls in a compiled graph.

        Args:
            names: N names, or None for the tower's own output.

        Returns:
            [N] int64 on the tower's device; -1 for None.

        Raises:
            ValueError: there is no adapter of that name.
        """
        for name in {name for name in names if name is not None}:
            self._member(name)
        position = {name: i for i, name in enumerate(self.members)} | {None: -1}
        device = next(self.tower.parameters()).device
        return torch.tensor([position[name] for name in names], dtype=torch.int64, device=device)

    # These four follow the active adapter, where one adapter has them fixed.

    @property
    def kinds(self) -> tuple[str, ...]:  # type: ignore[override]  # nobody sets it
        """What the tower is asked for by :meth:`collect`: enough for every adapter."""
        return self._kinds(self.shared)

    @property
    def placement(self) -> str:  # type: ignore[override]  # nobody sets it
        """Where the active adapter works."""
        return "stream" if self.changes_tokens else "output"

    @property
    def adapted(self) -> tuple[str, ...]:  # type: ignore[override]  # nobody sets it
        """Kinds that a cache must hold for the active adapter."""
        return () if self._active is None else self._shared_by(self._active).reads

    def _kinds(self, keys) -> tuple[str, ...]:
        return tuple(dict.fromkeys(kind for key in keys for kind in self.shared[key].kinds))

    def trainable(self) -> list[nn.Parameter]:
        """The active adapter's weight. Raises ValueError if none is active."""
        if self._active is None:
            raise ValueError(f"no adapter is active; set .active to one of {', '.join(self.members)}")
        return [self.members[self._active].weight]

    @property
    def removed_mean(self) -> Tensor:
        """That of the active adapter; zero for the tower's own output."""
        if self._active is None:
            like = next(self.tower.parameters())
            return like.new_zeros(self.dim)
        return self._shared_by(self._active).removed_mean.to(self.members[self._active].weight)

    def _chosen(self, names: str | Sequence[str | None] | Tensor | None, rows: int):
        """(member or None, None) for all rows alike; (index [N], keys of the groups it may touch) for one a
        row."""
        if names is None or isinstance(names, str):
            name = self._active if names is None else names
            return (None if name is None else self._member(name)), None
        if isinstance(names, Tensor):
            if names.shape != (rows,) or names.dtype != torch.int64:
                raise ValueError(
                    f"names must be int64 [N] = ({rows},), positions in the set; got {names.dtype} "
                    f"{tuple(names.shape)}"
                )
            if names.device.type == "cpu" and rows and not torch.compiler.is_compiling():
                low, high = int(names.min()), int(names.max())
                if low < -1 or high >= len(self.members):
                    raise ValueError(
                        f"names runs from {low} to {high}, but there are {len(self.members)} adapters"
                    )
            return names, tuple(self.shared.keys())
        names = list(names)
        if len(names) != rows:
            raise ValueError(
                f"names has {len(names)} entries for {rows} images; give one for each, or one name"
            )
        index = self.index(names)
        used = {self.members[name].key for name in names if name is not None}
        return index, tuple(key for key in self.shared if key in used)

    def forward(
        self, images: Tensor, names: str | Sequence[str | None] | Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The embeddings, by the active adapter or by the adapters that are named.

        Args:
            images: [N, 3, H, W], as the tower takes them.
            names: one name, N names (None for the tower's own output), or positions [N] int64 (see
                :meth:`index`). The active adapter by default.

        Returns:
            y [N, D] in the output's dtype, or (y, tokens) where the tower returns tokens.

        Raises:
            ValueError: there is no adapter of that name, or not one name per image.
        """
        chosen, keys = self._chosen(names, len(images))
        if chosen is None:
            return self.tower(self._view.here(images))
        found = self._forward(images, chosen, keys)
        if torch.is_grad_enabled() and distributed.world() > 1:
            # data parallelism waits for a gradient of every parameter: those that no row used get zeros
            y, *tokens = found if isinstance(found, tuple) else (found,)
            for member in self.members.values():
                y = y + member.weight[:0].sum().to(y.dtype)
            return (y, *tokens) if tokens else y
        return found

    def _forward(self, images: Tensor, chosen: "_Member | Tensor", keys: tuple[str, ...] | None):
        if isinstance(chosen, _Member):
            shared, weight = self.shared[chosen.key], chosen.weight
            if isinstance(shared, UnitsGroup) and shared.leaves_the_tower(weight):
                return tower_itself(
                    self._view,
                    images,
                    lambda images: self._view.terms(images, shared.kinds),
                    lambda batch: shared.change(batch, weight),
                )
        touched = (chosen.key,) if isinstance(chosen, _Member) else keys or ()
        edits = [self._edit(key, chosen) for key in touched if self._in_stream(key)]
        edit = functools.partial(_one_after_another, edits) if edits else None
        batch = self._view.terms(images, self._kinds(touched), edit)
        y = self._read(batch, chosen, keys)
        return y if batch.tokens is None else (y, batch.tokens)

    @property
    def changes_tokens(self) -> bool:  # type: ignore[override]  # nobody sets it
        return self._active is not None and self._in_stream(self._member(self._active).key)

    def from_units(self, terms: Terms, names: str | Sequence[str | None] | Tensor | None = None) -> Tensor:
        """The embeddings of units collected before.

        Args:
            terms: a batch of a UnitCache, or what :meth:`collect` returned.
            names: as in :meth:`forward`.

        Returns:
            y [N, D] in the output's dtype.

        Raises:
            ValueError: the terms lack a kind, or one of the adapters works inside the tower and needs images.
        """
        chosen, keys = self._chosen(names, len(terms.output))
        self._check_terms(terms, keys if keys is not None else () if chosen is None else (chosen.key,))
        return terms.output if chosen is None else self._read(terms, chosen, keys)

    def _check_terms(self, terms: Terms, touched: Sequence[str]) -> None:
        """Raises ValueError unless these terms are all that the groups `touched` read."""
        if any(map(self._in_stream, touched)):
            raise ValueError(
                "one of these adapters works inside the tower, so its output cannot be computed from cached "
                "units; give images"
            )
        missing = [kind for key in touched for kind in self.shared[key].reads if kind not in terms.z]
        if missing:
            raise ValueError(
                f"this batch holds no terms of kind {', '.join(dict.fromkeys(missing))}; "
                "encode with kinds that include it"
            )

    def _embed(self, terms: Terms) -> Tensor:
        return self.from_units(terms)

    def features(self, terms: Terms) -> dict[str, Tensor]:
        """The terms that the active adapter reads. What they become depends on which adapter is active.

        Args:
            terms: a batch of N images.

        Returns:
            Tensors with N rows, by name.
        """
        self._check_terms(terms, () if self._active is None else (self._member(self._active).key,))
        kept = {f"z.{kind}": terms.z[kind] for kind in self.adapted}
        return {"scale": terms.scale, "mean": terms.mean, "output": terms.output, **kept}

    def features_of_images(self, images: Tensor) -> dict[str, Tensor]:
        if self.changes_tokens:
            return {"images": images}  # inside the tower everything depends on the weight
        return super().features_of_images(images)

    def from_features(self, features: dict[str, Tensor], weights: Sequence[Tensor]) -> Tensor:
        assert self._active is not None  # else nothing is trainable
        shared = self._shared_by(self._active)
        found = []
        for task, weight in enumerate(weights[0]):
            if isinstance(shared, StreamGroup):
                batch = self._view.terms(features["images"], (), shared.edit(weight))
            else:
                own = features["scale"].ndim == 2  # rows of its own for every task
                one = {name: value[task] if own else value for name, value in features.items()}
                z = {name.removeprefix("z."): value for name, value in one.items() if name.startswith("z.")}
                batch = Terms(z=z, scale=one["scale"], mean=one["mean"], output=one["output"])
            found.append(shared(batch, weight).to(weight.dtype))
        return torch.stack(found)

    def merge(self) -> nn.Module:
        """Raises ValueError: a set of adapters has no single weight to fold. Merge an adapter by itself."""
        raise ValueError(
            "a set of adapters has no one weight to fold away; merge an adapter by itself (its own merge())"
        )

    def _in_stream(self, key: str) -> bool:
        """Whether the adapters of this group work inside the tower."""
        return isinstance(self.shared[key], StreamGroup)

    def _weights(self, key: str) -> Tensor:
        """[T, J] of the adapters of one group."""
        return torch.stack([member.weight for member in self.members.values() if member.key == key])

    def _edit(self, key: str, chosen: "_Member | Tensor") -> Edit:
        """What a group in the stream does in every block.

        Rows of other groups keep what they have (weights of one).
        """
        group = self.shared[key]
        assert isinstance(group, StreamGroup)
        if isinstance(chosen, _Member):
            return group.edit(chosen.weight)
        weights = self._weights(key)
        local = self._local(key, chosen)
        index = torch.where(local < 0, len(weights), local)
        return group.edit(torch.cat([weights, torch.ones_like(weights[:1])]), index)

    def _read(self, terms: Terms, chosen: "_Member | Tensor", keys: tuple[str, ...] | None) -> Tensor:
        """y [N, D] by one adapter, or by each row's own."""
        if isinstance(chosen, _Member):
            return self.shared[chosen.key](terms, chosen.weight).to(terms.output.dtype)
        y = terms.output
        outside = [key for key in keys or () if not self._in_stream(key)]
        for key in outside:
            local = self._local(key, chosen)
            if len(outside) == 1:  # no look at the values: what a graph can hold
                ours = self.shared[key](terms, self._weights(key), local.clamp_min(0))
                y = torch.where(local[:, None] < 0, y, ours.to(y.dtype))
                continue
            rows = (local >= 0).nonzero().flatten()
            if len(rows):
                ours = self.shared[key](_rows(terms, rows), self._weights(key), local[rows])
                y = y.index_copy(0, rows, ours.to(y.dtype))
        return y

    def _local(self, key: str, index: Tensor) -> Tensor:
        """Positions within a group of positions within the set; -1 for those outside of it."""
        inside = [member.key == key for member in self.members.values()]
        table = [sum(inside[:i]) if yes else -1 for i, yes in enumerate(inside)]
        return torch.tensor([*table, -1], device=index.device)[index]  # an index of -1 reads the last one

    def logits(self, images: Tensor, names: str | Sequence[str | None] | Tensor | None = None) -> Tensor:
        """Logits of each row's adapter by its own head.

        Args:
            images: [N, 3, H, W].
            names: as in :meth:`forward`.

        Returns:
            [N, K]. If heads have different numbers of classes, K is the largest, and columns past a row's own
            are -inf, so that softmax and argmax hold.

        Raises:
            ValueError: a row has no adapter, or its adapter has no head.
        """
        chosen, keys = self._chosen(names, len(images))
        row_names: list[Any]
        if keys is None:
            row_names = [self._active if names is None else names]
        else:
            row_names = [None if i < 0 else self.names[i] for i in chosen.tolist()]
        heads = {name: None if name is None else self.members[name].head for name in row_names}
        lacking = [name for name, head in heads.items() if head is None]
        if lacking:
            what = "a row without an adapter" if lacking[0] is None else f"adapter {lacking[0]!r}"
            raise ValueError(f"{what} has no head to read it; give heads= to AdapterSet, or head= to add")
        y = self(images, names)
        y = y[0] if isinstance(y, tuple) else y
        given = {name: head for name, head in heads.items() if head is not None}
        if keys is None:
            return given[row_names[0]](y)
        classes = max((len(head.class_names) for head in given.values()), default=0)
        logits = y.new_full(
            (len(y), classes), float("-inf"), dtype=torch.promote_types(y.dtype, torch.float32)
        )
        for name, head in given.items():
            rows = (chosen == self.names.index(name)).nonzero().flatten()
            part = nn.functional.pad(head(y[rows]), (0, classes - len(head.class_names)), value=float("-inf"))
            logits = logits.index_copy(0, rows, part.to(logits.dtype))
        return logits

    def extra_repr(self) -> str:
        return f"active={self._active!r}, groups={self.groups}"


def _one_after_another(edits: list[Edit], layer: int, z: Tensor, attended: Tensor) -> Tensor:
    for edit in edits:
        attended = edit(layer, z, attended)
    return attended


def _rows(terms: Terms, rows: Tensor) -> Terms:
    return Terms(
        z={kind: value[rows] for kind, value in terms.z.items()},
        scale=terms.scale[rows],
        mean=terms.mean[rows],
        output=terms.output[rows],
    )
