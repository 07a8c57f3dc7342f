"""What is a unit cache?

Everything a fit needs of every image and nothing more, in memory or mapped from disk.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from residual_kernels import display, towers
from residual_kernels.forks import compute_alone_after_a_fork
from residual_kernels.towers import Terms
from residual_kernels.units.cache.shards import MANIFEST, Shards, read_manifest, shard_files
from residual_kernels.units.checks import check_finite_units

SMALL = ("scale", "mean", "output")


HELD_OUT = 0.2  # of the training images, where a data set has no part for validation


class UnitCache:
    """Encoded images: what a fit needs of every image, and nothing more. Made by :func:`encode`.

    A cache that :meth:`load` opened is mapped: its z, scale, mean and output stay on disk, and rows are read
    when they are asked for. It holds 16 bytes per image (labels and ids) and at most 1 GiB of mapped shards
    in memory, so caches larger than memory can be fitted.

    Attributes:
        z: kind -> [N, R, C] in the cache's dtype. Of a mapped cache, z[kind] reads all rows into memory: use
            `terms` or `batches` for parts.
        scale, mean: [N], s and m of the final norm, at least float32. A mapped cache reads them whole when
            they are first asked for, and keeps them.
        output: [N, D], the tower's output, at least float32; read as scale and mean are.
        labels: [N] int64, or None.
        ids: [N] int64, the position of each image in the data that it came from.
        checksum: of the tower that made it.
        class_names: names of the labels, or None.
    """

    def __init__(
        self,
        z: Mapping[str, Tensor],
        scale: Tensor,
        mean: Tensor,
        output: Tensor,
        labels: Tensor | None,
        ids: Tensor,
        checksum: str,
        class_names: Sequence[str] | None = None,
    ):
        self._z, self._scale, self._mean, self._output = z, scale, mean, output
        self._describe(labels, ids, checksum, class_names)

    def _describe(
        self, labels: Tensor | None, ids: Tensor, checksum: str, class_names: Sequence[str] | None
    ) -> None:
        compute_alone_after_a_fork()
        self.labels, self.ids, self.checksum = labels, ids, checksum
        self.class_names = None if class_names is None else tuple(class_names)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def truth(self) -> Tensor:
        """`labels`; raises ValueError where there are none."""
        if self.labels is None:
            raise ValueError("this needs labels; the cache holds only images")
        return self.labels

    def __repr__(self) -> str:
        shapes = ", ".join(f"{kind} {shape} {dtype}" for kind, (shape, dtype) in self._shapes().items())
        return f"UnitCache(images={len(self)}, {shapes or 'outputs only'}, labels={self.labels is not None})"

    def _repr_html_(self) -> str:
        facts = {
            "images": len(self),
            "labels": "yes" if self.labels is not None else "no",
            "classes": None if self.class_names is None else len(self.class_names),
            "tower": self.checksum[:12],
        }
        rows = [[kind, *shape, str(dtype)] for kind, (shape, dtype) in self._shapes().items()]
        return display.card("UnitCache", facts, ("kind", "units", "C", "dtype"), rows)

    def _shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {kind: (tuple(value.shape[1:]), value.dtype) for kind, value in self.z.items()}

    @property
    def z(self) -> Mapping[str, Tensor]:
        return self._z

    @property
    def scale(self) -> Tensor:
        return self._scale

    @property
    def mean(self) -> Tensor:
        return self._mean

    @property
    def output(self) -> Tensor:
        return self._output

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(self.z)

    @property
    def nbytes(self) -> int:
        """Bytes of z, scale, mean and output as they are stored: what `to(device)` takes there."""
        return sum(value.nbytes for value in (*self.z.values(), self.scale, self.mean, self.output))

    def _rows(
        self, rows: Tensor | slice, kinds: Iterable[str] | None = None
    ) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
        """(z, scale, mean, output) of some rows as they are stored; z of `kinds`, all by default."""
        z = {kind: self.z[kind][rows] for kind in (self.kinds if kinds is None else kinds)}
        return z, self.scale[rows], self.mean[rows], self.output[rows]

    def terms(
        self,
        rows: Tensor | slice,
        device: torch.device | str = "cpu",
        kinds: Iterable[str] | None = None,
    ) -> Terms:
        """The terms of some rows, for :meth:`TowerAdapter.from_units`; z is widened to the outputs' dtype.

        Args:
            rows: numbers [M], a mask [N] or a slice.
            device: where the terms are put.
            kinds: of z; all that the cache holds by default.

        Returns:
            Terms of M images.
        """
        return self._sent(*self._rows(rows, kinds), device)

    @staticmethod
    def _sent(
        z: dict[str, Tensor], scale: Tensor, mean: Tensor, output: Tensor, device: torch.device | str
    ) -> Terms:
        """Rows on a device, z widened to the outputs' dtype; nobody waits for the device."""

        def there(value: Tensor) -> Tensor:
            return value.to(device, non_blocking=torch.device(device).type != "cpu")

        wide = output.dtype  # widened where it arrives, so that the narrow dtype is what travels
        wider = {kind: there(value).to(wide) for kind, value in z.items()}
        return Terms(z=wider, scale=there(scale), mean=there(mean), output=there(output))

    def checked_terms(
        self, rows: Tensor | slice, device: torch.device | str, kinds: Iterable[str] | None, names: Tensor
    ) -> Terms:
        """:meth:`terms` of rows that must be finite.

        They are checked where they are stored, so no device is waited for.

        Args:
            rows, device, kinds: as in :meth:`terms`.
            names: [N], by which the error calls rows that are not finite.

        Returns:
            Terms of M images.

        Raises:
            ValueError: a row holds NaN or Inf.
        """
        z, scale, mean, output = self._rows(rows, kinds)
        check_finite_units((*z.values(), scale, mean, output), names[rows])
        return self._sent(z, scale, mean, output, device)

    def batches(self, size: int, device: torch.device | str = "cpu") -> Iterator[Terms]:
        """The terms of all rows, in order.

        Args:
            size: of a batch, at most.
            device: where the terms are put.

        Yields:
            Terms of at most `size` images.

        Raises:
            ValueError: a size below one.
        """
        if size < 1:
            raise ValueError(f"a batch holds at least one row; got size {size}")
        for start in range(0, len(self), size):
            yield self.terms(slice(start, start + size), device)

    def to(self, device: torch.device | str) -> "UnitCache":
        """This cache in the memory of a device, in its stored dtypes. Labels and ids stay on the CPU.

        Args:
            device: of z, scale, mean and output.

        Returns:
            A new cache.
        """
        z, scale, mean, output = self._rows(slice(None))
        return UnitCache(
            {kind: value.to(device) for kind, value in z.items()},
            scale.to(device),
            mean.to(device),
            output.to(device),
            self.labels,
            self.ids,
            self.checksum,
            self.class_names,
        )

    def subset(self, rows: Tensor) -> "UnitCache":
        """A cache of some rows.

        A subset of a cache in memory is a copy. A subset of a mapped cache holds the numbers of its rows.

        Args:
            rows: numbers [M] or a mask [N].

        Returns:
            A new cache of M images.
        """
        z, scale, mean, output = self._rows(rows)
        labels = None if self.labels is None else self.labels[rows]
        return UnitCache(z, scale, mean, output, labels, self.ids[rows], self.checksum, self.class_names)

    def split(self, part: float, seed: int = 0) -> "tuple[UnitCache, UnitCache]":
        """Two caches: the other images, and a share drawn at random, which can serve for validation.

        Args:
            part: the share, in (0, 1).
            seed: random seed of the draw.

        Returns:
            (the others, `part` of the images).

        Raises:
            ValueError: either would be empty.
        """
        count = round(part * len(self))
        if not 0 < count < len(self):
            raise ValueError(
                f"{part} of {len(self)} images leaves nothing on one side; give validation images"
            )
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.subset(order[count:].sort().values), self.subset(order[:count].sort().values)

    def check(self, tower: nn.Module, kinds: Iterable[str]) -> None:
        """Checks that this cache was made by this very tower and holds the kinds.

        Args:
            tower: an image tower.
            kinds: that are needed.

        Raises:
            ValueError: another tower, or a kind is missing.
        """
        missing = [kind for kind in kinds if kind not in self.kinds]
        if missing:
            raise ValueError(
                f"this cache holds no terms of kind {', '.join(missing)}; encode with kinds that include it"
            )
        found = towers.checksum(towers.view(tower).module)
        if found != self.checksum:
            raise ValueError(
                f"this cache was encoded by a tower with other weights (checksum {self.checksum[:12]}, "
                f"this tower has {found[:12]}); encode again"
            )

    @classmethod
    def load(cls, path: str | os.PathLike, *, verify: str = "full") -> "UnitCache":
        """Opens a cache folder. Its shards are mapped into memory, not read.

        Args:
            path: the folder that :func:`encode` wrote.
            verify: "full" reads every byte and compares the shards' checksums, at the speed of the disk or of
                SHA-256 on several cores. "size" compares the files' sizes and the checksums in their headers;
                this takes a moment and finds truncated, missing and exchanged shards, but no flipped bits.

        Returns:
            A mapped cache.

        Raises:
            FileNotFoundError: no cache there, an unfinished one, or a shard is missing.
            ValueError: a shard (named) is damaged or of another cache, or the manifest is.
        """
        if verify not in ("full", "size"):
            raise ValueError(f'verify must be "full" or "size"; got {verify!r}')
        path = Path(path)
        if not (path / MANIFEST).is_file():
            raise FileNotFoundError(f"no unit cache at {path} ({MANIFEST} is missing there)")
        manifest = read_manifest(path)
        if not manifest["complete"]:
            raise FileNotFoundError(
                f"the unit cache at {path} is not finished; encode into the same folder again, and it resumes"
            )
        run = manifest["run"]
        beyond = [file.name for index, file in shard_files(path).items() if index >= len(manifest["shards"])]
        if beyond:
            raise ValueError(f"{path} holds {beyond[0]}, which its manifest does not name; encode again")
        shards = Shards(path, manifest["shards"], run)
        shards.verify(verify)
        return MappedCache(shards, None, run["kinds"], run["checksum"], run["class_names"])


class MappedCache(UnitCache):
    """A cache on disk, or `rows` of it."""

    def __init__(self, shards: Shards, rows: Tensor | None, kinds, checksum, class_names, *, small=None):
        self._shards, self._chosen, self._kinds = shards, rows, tuple(kinds)
        self._kept: dict[str, Tensor] = {}
        if small is None:
            names = [name for name in ("labels", "ids") if name in shards.columns]
            small = shards.run(names, 0, len(shards))
            if len(shards.rows) == 1:  # a view of the mapping; these two are kept in memory
                small = {name: value.clone() for name, value in small.items()}
            _check_small(shards, small, class_names)
        self._describe(small.get("labels"), small["ids"], checksum, class_names)

    @property
    def kinds(self) -> tuple[str, ...]:
        return self._kinds

    @property
    def z(self) -> Mapping[str, Tensor]:
        return _MappedZ(self)

    @property
    def scale(self) -> Tensor:
        return self._whole("scale")

    @property
    def mean(self) -> Tensor:
        return self._whole("mean")

    @property
    def output(self) -> Tensor:
        return self._whole("output")

    def _whole(self, name: str) -> Tensor:
        if name not in self._kept:
            self._kept[name] = self._read([name], slice(None))[name].clone()
        return self._kept[name]

    def _shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        empty = {kind: self._shards.empty(f"z.{kind}", 0) for kind in self.kinds}
        return {kind: (tuple(value.shape[1:]), value.dtype) for kind, value in empty.items()}

    @property
    def nbytes(self) -> int:
        names = [*(f"z.{kind}" for kind in self.kinds), *SMALL]
        return self._shards.nbytes(names) * len(self) // len(self._shards)

    def _read(self, names: Sequence[str], rows: Tensor | slice) -> dict[str, Tensor]:
        """Columns of some rows, given by their numbers in this cache."""
        chosen = self._numbers(rows)
        if isinstance(chosen, slice):
            return self._shards.run(names, chosen.start, chosen.stop)
        return self._shards.gather(names, chosen)

    def _numbers(self, rows: Tensor | slice) -> Tensor | slice:
        """The rows' numbers in the shards: a slice where they follow on one another."""
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step == 1 and self._chosen is None:
                return slice(start, max(start, stop))
            numbers = torch.arange(start, stop, step)
        else:
            rows = torch.as_tensor(rows).cpu()
            numbers = rows.nonzero().flatten() if rows.dtype == torch.bool else rows.long()
            if len(rows) != len(self) and rows.dtype == torch.bool:
                raise IndexError(f"a mask of {len(rows)} rows, but this cache has {len(self)}")
            if len(numbers) and not -len(self) <= int(numbers.min()) <= int(numbers.max()) < len(self):
                raise IndexError(
                    f"rows run from {int(numbers.min())} to {int(numbers.max())}, but this cache has "
                    f"{len(self)}"
                )
            numbers = torch.where(numbers < 0, numbers + len(self), numbers)
        if self._chosen is not None:
            numbers = self._chosen[numbers]
        if len(numbers) and bool((numbers.diff() == 1).all()):
            return slice(int(numbers[0]), int(numbers[-1]) + 1)
        return numbers

    def _rows(
        self, rows: Tensor | slice, kinds: Iterable[str] | None = None
    ) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
        kinds = self.kinds if kinds is None else tuple(kinds)
        names = [f"z.{kind}" for kind in kinds]
        read = self._read([*names, *SMALL], rows)
        z = {kind: read[name] for kind, name in zip(kinds, names, strict=True)}
        return z, read["scale"], read["mean"], read["output"]

    def subset(self, rows: Tensor) -> "UnitCache":
        chosen = self._numbers(rows)
        if isinstance(chosen, slice):
            chosen = torch.arange(chosen.start, chosen.stop)
        small = {"ids": self.ids[rows]}
        if self.labels is not None:
            small["labels"] = self.labels[rows]
        return MappedCache(self._shards, chosen, self.kinds, self.checksum, self.class_names, small=small)


def _check_small(shards: Shards, small: dict[str, Tensor], class_names: Sequence[str] | None) -> None:
    """Raises ValueError for labels without a class, and for images that are not there."""
    labels = small.get("labels")
    known = None if class_names is None else len(class_names)
    if labels is not None and known is not None and not 0 <= int(labels.min()) <= int(labels.max()) < known:
        raise ValueError(
            f"{shards.folder} has labels from {int(labels.min())} to {int(labels.max())} for {known} "
            "classes; encode again"
        )
    if int(small["ids"].min()) < 0:
        raise ValueError(f"{shards.folder} has an image number below 0; encode again")


class _MappedZ(Mapping):
    """z of a mapped cache: reading an entry reads all its rows."""

    def __init__(self, cache: MappedCache):
        self._cache = cache

    def __getitem__(self, kind: str) -> Tensor:
        if kind not in self._cache.kinds:
            raise KeyError(kind)
        return self._cache._read([f"z.{kind}"], slice(None))[f"z.{kind}"]

    def __iter__(self) -> Iterator[str]:
        return iter(self._cache.kinds)

    def __len__(self) -> int:
        return len(self._cache.kinds)
