"""Which units does a tower have, and in which order? Embedding, heads, MLPs, and the MLP behind a pooling."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from residual_kernels import display

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

    Args:
        layers: L.
        heads: H, heads per layer.
        pool: whether there is an MLP behind the pooling (SigLIP, PE-Core), which is one more unit.
    """

    def __init__(self, layers: int, heads: int, pool: bool = False):
        self.layers, self.heads, self.pool = layers, heads, pool
        rows: list[tuple[str, int | None, int | None]] = [("emb", None, None)]
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

    def _repr_html_(self) -> str:
        facts = {"layers": self.layers, "heads a layer": self.heads, "units": len(self)}
        rows = []
        for kind in self.kinds:
            span = self.span(kind)
            rows.append([kind, span.stop - span.start, f"{span.start} to {span.stop - 1}"])
        return display.card("UnitLayout", facts, ("kind", "units", "index"), rows)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of units that this tower has, in order."""
        return KINDS if self.pool else KINDS[:-1]

    def span(self, kind: str) -> slice:
        """The contiguous run of layout indices that a kind's units occupy.

        Args:
            kind: "emb", "head", "mlp" or "pool".

        Returns:
            A slice of layout indices.
        """
        heads = 1 + self.layers * self.heads
        mlps = heads + self.layers
        spans = {"emb": (0, 1), "head": (1, heads), "mlp": (heads, mlps), "pool": (mlps, len(self))}
        return slice(*spans[kind])

    def select(
        self, kind: str | None = None, layer: int | None = None, head: int | None = None
    ) -> tuple[Unit, ...]:
        """Units that match every argument given.

        Args:
            kind: "emb", "head", "mlp" or "pool".
            layer: counted from 0.
            head: counted from 0.

        Returns:
            The units, in layout order.

        Raises:
            ValueError: no unit matches.
        """
        found = tuple(
            unit
            for unit in self._units
            if (kind is None or unit.kind == kind)
            and (layer is None or unit.layer == layer)
            and (head is None or unit.head == head)
        )
        if not found:
            raise ValueError(
                f"no unit has kind={kind!r}, layer={layer}, head={head}; this tower has {self.layers} "
                f"layers of {self.heads} heads and the kinds {', '.join(self.kinds)}"
            )
        return found

    def index(self, unit: "int | Unit | tuple[int, int]", *_) -> int:
        """The layout index of a unit.

        Args:
            unit: layout index, layout row or (layer, head).

        Returns:
            An index in [0, U).

        Raises:
            IndexError: there is no such unit.
        """
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


def check_kinds(kinds: Iterable[str], layout: UnitLayout | None = None) -> tuple[str, ...]:
    """`kinds` in layout order without repeats.

    A ValueError names what is wrong with it, or absent from `layout`.
    """
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
