"""What are bases?

Principal components of every unit: from its moments, cut, merged, saved, checked against a tower.

A unit's output is x_u = l_u M_u + const, so the second moment of l (:mod:`residual_kernels.bases.moments`) is
all that PCA needs. With M^T = Q T, the eigenvectors of T cov(l) T^T, mapped by Q, are the components.
"""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from residual_kernels import display, towers
from residual_kernels.bases.moments import Moments
from residual_kernels.files import Head, check_shapes, digest, load_tensors, save_tensors
from residual_kernels.schema import Count
from residual_kernels.towers import Tower, UnitLayout

if TYPE_CHECKING:
    from matplotlib.figure import Figure
from residual_kernels.bases.principal import KindBases, principal

OUTPUT = "output"  # the tower's output as one more unit: OutputSpectral and rest="mean" need it
PLACEMENTS = ("output", "stream")
WHAT = "spectral bases file"


class _Required(Head):
    layers: Count
    heads: Count
    dim: Count
    width: Count
    tower: str
    checksum: str
    count: Count
    kinds: list[str]
    moments: bool


class BasesHeader(_Required, total=False):
    """What a bases file says beside its tensors."""

    pool: bool
    placement: str
    tokens: str | None


@dataclass(frozen=True)
class SpectralBases:
    """Means and principal components of a tower's units. Made by :func:`fit_bases`; immutable.

    Units are named by layout index, by a layout row, or by (layer, head).

    Attributes:
        layout: the tower's units in order.
        dim: D, the length of a component; with placement="stream" the model width.
        width: the model width.
        tower: the name of the tower's family.
        checksum: of the tower's weights.
        count: how many images the bases were fitted on; with placement="stream" how many tokens.
        parts: means, components and variances by kind, and of the output.
        moments: what :meth:`merge` needs, by kind; None after truncation.
        placement: "output" or "stream".
        tokens: of the stream: which tokens the bases were fitted over; None for the output.
    """

    layout: UnitLayout
    dim: int
    width: int
    tower: str
    checksum: str
    count: int
    parts: dict[str, KindBases]  # by kind, and OUTPUT
    moments: dict[str, Moments] | None = None
    placement: str = "output"
    tokens: str | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(kind for kind in self.layout.kinds if kind in self.parts)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{kind}: {len(self.parts[kind].components)}" for kind in self.kinds)
        rows = "images" if self.tokens is None else f"tokens ({self.tokens})"
        return f"SpectralBases({self.tower}, {self.layout}, {rows}={self.count}, components=({sizes}))"

    def plot(self, kind: str | None = None, energy: float = 0.9) -> "Figure":
        """Cumulative explained variance of every unit of a kind, coloured by layer.

        Args:
            kind: one that these bases hold, or "output"; heads by default.
            energy: where the dashed line is.

        Returns:
            A matplotlib Figure.

        Raises:
            ValueError: these bases do not hold the kind.
            ImportError: matplotlib is missing.
        """
        kind = next(iter(sorted(self.parts, key=lambda name: name != "head"))) if kind is None else kind
        if kind not in self.parts:
            raise ValueError(f"these bases hold {', '.join(self.parts)}, not {kind!r}")
        return display.drawing().spectra(self, energy, kind)

    def _repr_html_(self) -> str:
        facts = {
            "tower": self.tower,
            "images" if self.tokens is None else f"tokens ({self.tokens})": self.count,
            "placement": self.placement,
            "D" if self.placement == "output" else "width": self.dim,
        }
        rows = [[kind, len(part.mean), len(part.components)] for kind, part in self.parts.items()]
        return display.card("SpectralBases", facts, ("kind", "units", "components"), rows)

    def _find(self, unit) -> tuple[KindBases, int]:
        row = self.layout[self.layout.index(unit)]
        if row.kind not in self.parts:
            raise ValueError(f"unit {unit} is of kind {row.kind!r}; these bases hold {', '.join(self.kinds)}")
        return self.parts[row.kind], row.index - self.layout.span(row.kind).start

    def mean(self, unit) -> Tensor:
        """The mean mu_u of a unit over the fitting images.

        Args:
            unit: layout index, layout row or (layer, head).

        Returns:
            [D] float64.

        Raises:
            ValueError: these bases do not hold the unit's kind.
        """
        part, index = self._find(unit)
        return part.mean[index]

    def components(self, unit) -> Tensor:
        """The principal components Phi_u of a unit, by falling variance.

        Args:
            unit: layout index, layout row or (layer, head).

        Returns:
            [K_u, D] float64, orthonormal rows; the largest entry of each is positive.

        Raises:
            ValueError: these bases do not hold the unit's kind.
        """
        part, index = self._find(unit)
        return part.components[part.run(index)]

    def explained_variance(self, unit) -> Tensor:
        """The variance (over n - 1) along each kept component of a unit.

        Args:
            unit: layout index, layout row or (layer, head).

        Returns:
            [K_u] float64.

        Raises:
            ValueError: these bases do not hold the unit's kind.
        """
        part, index = self._find(unit)
        return part.variance[part.run(index)]

    def explained_variance_ratio(self, unit) -> Tensor:
        """The share of a unit's total variance along each kept component.

        Args:
            unit: layout index, layout row or (layer, head).

        Returns:
            [K_u] float64; zeros for a constant unit.

        Raises:
            ValueError: these bases do not hold the unit's kind.
        """
        part, index = self._find(unit)
        return part.ratio(index)

    def of(self, *kinds: str) -> "SpectralBases":
        """The bases of some kinds alone (and of the output).

        Args:
            kinds: "head", "mlp" ...

        Returns:
            New bases.

        Raises:
            ValueError: these bases do not hold one of the kinds.
        """
        missing = [kind for kind in towers.check_kinds(kinds, self.layout) if kind not in self.parts]
        if missing:
            raise ValueError(f"these bases hold {', '.join(self.kinds)}, not {', '.join(missing)}")

        def pick(by_kind: dict) -> dict:
            wanted = (*towers.check_kinds(kinds, self.layout), OUTPUT)
            return {kind: by_kind[kind] for kind in wanted if kind in by_kind}

        return replace(
            self, parts=pick(self.parts), moments=None if self.moments is None else pick(self.moments)
        )

    def truncate(
        self,
        energy: float | None = None,
        components: int | None = None,
        max_components: int | None = None,
    ) -> "SpectralBases":
        """Bases with fewer components per unit; the output's own basis stays whole.

        Args:
            energy: keep the first k whose cumulative explained variance is strictly above this (all when none
                is; one for a constant unit), in (0, 1].
            components: keep this many (clamped to what there is, with one warning).
            max_components: upper limit on top of `energy`.

        Returns:
            New bases.

        Raises:
            ValueError: unless exactly one of `energy` and `components` is given, or `max_components` alone.
        """
        if (energy is not None) + (components is not None) > 1 or (energy, components, max_components) == (
            None,
        ) * 3:
            raise ValueError("give energy or components (and max_components with energy, or alone)")
        if energy is not None and not 0 < energy <= 1:
            raise ValueError(f"energy must lie in (0, 1]; got {energy}")
        for name, value in (("components", components), ("max_components", max_components)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        parts, clamped = dict(self.parts), 0
        for kind in self.kinds:
            part = self.parts[kind]
            sizes = []
            for unit in range(len(part.mean)):
                size = part.run(unit).stop - part.run(unit).start
                keep = size
                if energy is not None:
                    ratio = part.ratio(unit)
                    keep = int((ratio.cumsum(0) <= energy).sum()) + 1 if ratio.any() else 1
                elif components is not None:
                    keep = components
                    clamped += components > size
                if max_components is not None:
                    keep = min(keep, max_components)
                sizes.append(min(keep, size))
            parts[kind] = _take(part, sizes)
        if clamped:
            warnings.warn(
                f"components={components} is more than {clamped} units hold; those keep all they have",
                stacklevel=2,
            )
        return replace(self, parts=parts, moments=None)

    def keep(self, sizes: Mapping[str, Sequence[int]]) -> "SpectralBases":
        """The bases of some kinds alone, with a given number of components of each unit.

        Args:
            sizes: kind -> for each unit, how many of its first components to keep (0: its mean only).

        Returns:
            New bases.

        Raises:
            ValueError: these bases do not hold a kind, or a unit has fewer components.
        """
        parts = {}
        for kind, wanted in sizes.items():
            if kind not in self.parts:
                raise ValueError(f"these bases hold {', '.join(self.kinds)}, not {kind}")
            there = self.parts[kind].offsets.diff().tolist()
            if len(wanted) != len(there) or any(not 0 <= k <= n for k, n in zip(wanted, there, strict=True)):
                raise ValueError(
                    f"these bases hold up to {max(there)} components for {len(there)} units of kind "
                    f"{kind!r}; asked for were up to {max(wanted, default=0)} for {len(wanted)}"
                )
            parts[kind] = _take(self.parts[kind], list(wanted))
        return replace(self, parts=parts, moments=None)

    def fingerprint(self) -> str:
        """SHA-256 of what an adapter rests on: the tower's checksum, the means and the components.

        Components count as float32, so that bases in memory and the file that :meth:`save` wrote have one
        fingerprint.

        Returns:
            64 hexadecimal digits.
        """
        tensors: dict[str, Tensor] = {}
        for kind, part in self.parts.items():
            tensors |= {f"{kind}.mean": part.mean, f"{kind}.offsets": part.offsets}
            tensors[f"{kind}.components"] = part.components.float()
        return digest(tensors, {"tower": self.checksum})

    def merge(self, other: "SpectralBases") -> "SpectralBases":
        """Bases of both fitting sets together, equal to one fit on their union.

        Args:
            other: bases of the same tower and kinds, with moments.

        Returns:
            New bases; the two stay as they are.

        Raises:
            ValueError: the towers or kinds differ, or either was truncated or saved without moments.
        """
        if self.checksum != other.checksum:
            raise ValueError("these bases come from two different towers (their checksums differ)")
        if self.kinds != other.kinds:
            raise ValueError(f"these bases hold different kinds: {self.kinds} and {other.kinds}")
        if (self.placement, self.tokens) != (other.placement, other.tokens):
            raise ValueError(
                f"these bases are of two placements: {self.placement} (tokens: {self.tokens}) and "
                f"{other.placement} (tokens: {other.tokens})"
            )
        if self.moments is None or other.moments is None:
            raise ValueError(
                "merging needs the moments of both bases; truncated bases, and files saved without "
                "moments=True, have none"
            )
        merged = {kind: self.moments[kind].merge(other.moments[kind]) for kind in self.moments}
        return from_moments(self, merged)

    def save(
        self, path: str | os.PathLike, *, moments: bool = False, dtype: torch.dtype = torch.float32
    ) -> str:
        """Writes one safetensors file, atomically.

        Args:
            path: the file.
            moments: keep the moments too, so that the file can be merged with others; it is then about twice
                as large.
            dtype: of the components; everything else is stored in float64.

        Returns:
            The file's checksum (SHA-256).

        Raises:
            ValueError: moments are asked for, but these bases were truncated or loaded without them.
        """
        tensors, header = self.contents(moments=moments, dtype=dtype)
        return save_tensors(path, tensors, WHAT, header)["sha256"]

    def contents(
        self, *, moments: bool = False, dtype: torch.dtype = torch.float32
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and header of the file that :meth:`save` writes.

        Args:
            moments, dtype: as in :meth:`save`.

        Returns:
            (tensors by name, header).

        Raises:
            ValueError: moments are asked for, but these bases have none.
        """
        tensors: dict[str, Tensor] = {}
        for kind, part in self.parts.items():
            tensors |= {f"{kind}.{name}": value for name, value in vars(part).items()}
            tensors[f"{kind}.components"] = part.components.to(dtype)
        if moments:
            if self.moments is None:
                raise ValueError(
                    "these bases hold no moments to save (they were truncated or loaded without)"
                )
            for kind, sums in self.moments.items():
                tensors |= {f"{kind}.moments.{name}": getattr(sums, name) for name in _MOMENT_TENSORS}
        header = {
            "layers": self.layout.layers,
            "heads": self.layout.heads,
            "pool": self.layout.pool,
            "dim": self.dim,
            "width": self.width,
            "tower": self.tower,
            "checksum": self.checksum,
            "count": self.count,
            "kinds": list(self.parts),
            "moments": moments,
            "placement": self.placement,
            "tokens": self.tokens,
        }
        return tensors, header

    @classmethod
    def load(cls, path: str | os.PathLike, *, sha256: str | None = None) -> "SpectralBases":
        """The bases that :meth:`save` wrote.

        Args:
            path: the file.
            sha256: a checksum that :meth:`save` returned; with it, the file must be that very one.

        Returns:
            The bases.

        Raises:
            FileNotFoundError: there is no file. ValueError: it is damaged, or another one.
        """
        tensors, header = load_tensors(path, WHAT, BasesHeader)
        if sha256 is not None and header["sha256"] != sha256:
            raise ValueError(f"{path} holds other bases than those asked for (another checksum)")
        layout = _checked_contents(path, tensors, header)
        parts = {
            kind: KindBases(
                **{
                    name: tensors[f"{kind}.{name}"]
                    for name in ("mean", "variance", "total_variance", "offsets")
                },
                components=tensors[f"{kind}.components"].double(),
            )
            for kind in header["kinds"]
        }
        moments = None
        if header["moments"]:
            moments = {
                kind: Moments(
                    header["count"], **{name: tensors[f"{kind}.moments.{name}"] for name in _MOMENT_TENSORS}
                )
                for kind in header["kinds"]
            }
        return cls(
            layout=layout,
            parts=parts,
            moments=moments,
            placement=header.get("placement", "output"),
            tokens=header.get("tokens"),
            **{name: header[name] for name in ("dim", "width", "tower", "checksum", "count")},
        )

    def check_tower(self, view: Tower) -> None:
        """Checks that these bases were fitted on this very tower.

        Args:
            view: the view of the tower.

        Raises:
            ValueError: another tower, or the same one with other weights.
        """
        mine = (self.layout.layers, self.layout.heads, self.width, self.dim)
        theirs = (view.layout.layers, view.layout.heads, view.width, view.dim)
        if mine != theirs:
            raise ValueError(
                "these bases are of another tower: (layers, heads, width, output dimension) is "
                f"{mine} in the bases and {theirs} in the tower"
            )
        found = towers.checksum(view.module)
        if found != self.checksum:
            raise ValueError(
                f"these bases were fitted on a tower with other weights (checksum {self.checksum[:12]}, "
                f"this tower has {found[:12]}); fit bases for this tower"
            )


def _checked_contents(path: str | os.PathLike, tensors: dict[str, Tensor], header: dict) -> UnitLayout:
    """The layout.

    A ValueError unless the tensors are those that :meth:`SpectralBases.save` writes for this header.
    """
    layers, heads, dim, width = (header[name] for name in ("layers", "heads", "dim", "width"))
    if not (0 < layers <= 10_000 and 0 < heads <= 10_000 and layers * heads <= 10**6):
        raise ValueError(f"{path} claims {layers} layers of {heads} heads; make it again")
    layout = UnitLayout(layers, heads, header.get("pool", False))
    stream = header.get("placement", "output") == "stream"
    check_placement(header.get("placement", "output"), header.get("tokens"))
    kinds = header["kinds"]
    if len(set(kinds)) < len(kinds) or set(kinds) - {*layout.kinds, OUTPUT} or not kinds:
        raise ValueError(f"{path} holds bases of {', '.join(kinds)[:60]}; make it again")
    exact, any_width = (torch.float64,), (torch.float32, torch.float64)
    for kind in kinds:
        span = layout.span(kind) if kind != OUTPUT else slice(0, 1)
        units, space = span.stop - span.start, width if stream and kind != OUTPUT else dim
        forms = {
            "mean": (exact, units, space),
            "components": (any_width, None, space),
            "variance": (exact, None),
            "total_variance": (exact, units),
            "offsets": ((torch.int64,), units + 1),
        }
        check_shapes(path, tensors, {f"{kind}.{name}": form for name, form in forms.items()})
        offsets, count = tensors[f"{kind}.offsets"], len(tensors[f"{kind}.components"])
        falls = int(offsets[0]) != 0 or int(offsets[-1]) != count or bool((offsets.diff() < 0).any())
        if falls or len(tensors[f"{kind}.variance"]) != count:
            raise ValueError(f"{path} counts its components of kind {kind} wrongly; make it again")
        if header["moments"]:
            check_shapes(path, tensors, {f"{kind}.moments.mean": (exact, units, None)})
            size = tensors[f"{kind}.moments.mean"].shape[1]
            rows = tensors.get(f"{kind}.moments.rows")
            shared = units if rows is None or len(rows) != 1 else 1
            constant = (exact, units, space) if stream and kind != OUTPUT else (exact, space)
            forms = {
                "scatter": (exact, units, size, size),
                "rows": (exact, shared, size, space),
                "constant": constant,
            }
            check_shapes(path, tensors, {f"{kind}.moments.{name}": form for name, form in forms.items()})
    return layout


_MOMENT_TENSORS = ("mean", "scatter", "rows", "constant")


def _take(part: KindBases, sizes: list[int]) -> KindBases:
    """The first sizes[u] components of each unit."""
    rows = torch.cat([torch.arange(part.run(u).start, part.run(u).start + k) for u, k in enumerate(sizes)])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.tensor(sizes).cumsum(0)])
    return replace(part, components=part.components[rows], variance=part.variance[rows], offsets=offsets)


def from_moments(like: SpectralBases, moments: dict[str, Moments]) -> SpectralBases:
    """Bases like these (tower, placement) from the moments of every kind."""
    parts = {kind: principal(one) for kind, one in moments.items()}
    return replace(like, count=next(iter(moments.values())).count, parts=parts, moments=moments)


def check_placement(placement: str, tokens: str | None) -> None:
    """Raises ValueError for a placement that is none, or tokens where no token is adapted."""
    if placement not in PLACEMENTS:
        raise ValueError(f"placement must be one of {', '.join(PLACEMENTS)}; got {placement!r}")
    if placement == "output" and tokens is not None:
        raise ValueError(f'tokens={tokens!r} belongs to placement="stream"; the output has none')
