"""How is a fitted adapter kept? One folder, the same for Python, the command line and the hub.

It holds a JSON config that says what the adapter is, a safetensors file of what it learned, and where it has
them: the bases it rests on (or a reference to them, which is their fingerprint and how many components of
each unit were kept), the head that reads it, and what the classes are called in the data. The tower is not in
it. Loading checks that tower and bases are the ones the adapter was fitted on before anything is touched.
"""

import hashlib
import inspect
import os
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from torch import Tensor, nn

from residual_kernels import towers
from residual_kernels.adapters.methods import METHODS
from residual_kernels.adapters.stream import StreamResiDual
from residual_kernels.adapters.tower_adapter import TowerAdapter
from residual_kernels.bases.spectral_bases import WHAT as BASES_WHAT
from residual_kernels.bases.spectral_bases import SpectralBases
from residual_kernels.file_sets import FileSet, checked_entry, is_member
from residual_kernels.files import SCHEMA, Head, load_tensors, read_json
from residual_kernels.ops.packing import wide
from residual_kernels.schema import Count
from residual_kernels.zeroshot import ZeroShotHead

CONFIG, WEIGHTS, BASES = "adapter.json", "weights.safetensors", "bases.safetensors"
HEAD, CLASSES = "head.safetensors", "classes.json"  # its classifier, and the names of classes in the data
BASE_HEAD = "base-head.safetensors"  # how the model alone is read, where the adapter's head is another
MEMBERS = (WEIGHTS, BASES, HEAD, BASE_HEAD, CLASSES)
CLASSES_WHAT = "list of class folders"
WHAT = "adapter"
KEPT = "kept."  # tensors of the weights file that say how many components of each unit a reference takes
Option = str | int | float | bool | None | list[int] | list[str]


class Classes(Head):
    """What `classes.json` holds."""

    folders: list[str]


class Reference(TypedDict):
    """Bases that lie elsewhere."""

    fingerprint: str
    count: Count
    where: str | None


class _Config(TypedDict):
    options: dict[str, Option]
    checksum: str
    weights_sha256: str
    bases_sha256: str | None


class Config(Head, _Config, TypedDict("_Class", {"class": str}), total=False):
    """What `adapter.json` holds; the first version did not name its files."""

    files: dict[str, dict[str, str]]
    bases_reference: Reference | None
    method: str | None


_CLASSES = {method.adapter.__name__: method.adapter for method in METHODS.values()}


def save_adapter(
    adapter: TowerAdapter,
    path: str | os.PathLike,
    *,
    head: ZeroShotHead | None = None,
    base_head: ZeroShotHead | None = None,
    class_names: Sequence[str] | None = None,
    bases: bool | str | os.PathLike = True,
) -> None:
    """Writes an adapter to the folder `path`: config, weights and, where it has them, its bases and its head.

    Args:
        adapter: of any method (:data:`rk.METHODS`).
        path: a folder. At every instant it holds the old adapter whole or the new one whole, even if the
            process is killed. Files that are not the adapter's are left alone.
        head: its classifier. With it the folder is all that the commands `eval`, `predict` and `report` need.
        base_head: how the untouched model is read, for "before" and "after"; `head` itself by default. A fit
            that moved class vectors has both.
        class_names: what the classes are called in the data (the folders of images), in the order of their
            labels; the head's own names by default.
        bases: True keeps them in the folder, components in the tower's precision (float32 or better), so that
            the adapter needs nothing else. False keeps a reference: their fingerprint and the number of
            components of each unit, some kilobytes; :func:`load_adapter` is then given the bases. The path of
            a file that :meth:`SpectralBases.save` wrote is a reference that also says where they lie (it is
            checked here).

    Raises:
        ValueError: the module is no adapter, its tower has been trained since its bases were fitted, the head
            or the names do not fit, or the file holds other bases.
        FileExistsError: a file, or an `adapter.json` of another program, is in the way.

    A loaded adapter gives the outputs of the saved one, bit for bit. Only a reference from a float64 tower to
    a file with components in float32 (the default of :meth:`SpectralBases.save`) rounds them, by 6e-8.
    """
    from residual_kernels import __version__

    if type(adapter).__name__ not in _CLASSES:
        raise ValueError(f"save_adapter keeps {', '.join(_CLASSES)}; got {type(adapter).__name__}")
    if adapter.merged:
        raise ValueError("this adapter is merged into its tower; unmerge it, save it, and merge it again")
    checksum = adapter.tower_checksum()
    if adapter.bases is not None and adapter.bases.checksum != checksum:
        raise ValueError(
            "the tower has been trained since its bases were fitted (or a weight average moved it beyond "
            "rounding), and an adapter does not hold the tower; keep the whole module's state_dict "
            "instead, or average adapter.trainable() alone"
        )
    _check_classes(adapter.dim, head, class_names)
    if base_head is not None:
        if head is None or base_head.class_names != head.class_names:
            raise ValueError("base_head must have the classes of head; give both, with the same class names")
        _check_classes(adapter.dim, base_head, class_names)
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file; name a folder for the adapter")
    learned = {name: p for name, p in adapter.named_parameters() if not name.startswith("tower.")}
    reference: Reference | None = None
    kept: dict[str, Tensor] = {}
    if bases is not True:
        reference, kept = _reference(adapter, path, bases)
    with FileSet(path, CONFIG, MEMBERS, _read_files) as files:
        stored = None
        if adapter.bases is not None and reference is None:
            tensors, described = adapter.bases.contents(dtype=wide(next(adapter.tower.parameters()).dtype))
            stored = files.add_tensors(BASES, tensors, BASES_WHAT, described)["sha256"]
        header = files.add_tensors(WEIGHTS, {**learned, **kept}, WHAT, {})
        if head is not None:
            files.add_tensors(HEAD, *head.contents())
        if base_head is not None:
            files.add_tensors(BASE_HEAD, *base_head.contents())
        if class_names is not None:
            files.add_json(CLASSES, {"schema": SCHEMA, "what": CLASSES_WHAT, "folders": list(class_names)})
        files.publish(
            {
                "schema": SCHEMA,
                "what": WHAT,
                "version": __version__,
                "class": type(adapter).__name__,
                "method": adapter.method,
                "options": adapter.options(),
                "tower": adapter._view.name,
                "checksum": checksum,
                "shapes": {name: list(p.shape) for name, p in learned.items()},
                "parameters": sum(p.numel() for p in learned.values()),
                "weights_sha256": header["sha256"],
                "bases_sha256": stored,
                "bases_reference": reference,
            }
        )


def load_adapter(
    tower: nn.Module, path: str | os.PathLike, *, bases: SpectralBases | str | os.PathLike | None = None
) -> TowerAdapter:
    """The adapter in the folder `path`, around `tower`.

    For its head and class names see :class:`AdapterFolder`.

    Args:
        tower: the image tower that it was fitted on, with the same weights.
        path: a folder that :func:`save_adapter` wrote.
        bases: for an adapter that keeps its bases by reference: the bases, or the path of their file. They
            may hold more kinds and components than it took. Left out, they are read from where the adapter
            says they lie.

    Returns:
        The adapter, with the learned weights.

    Raises:
        FileNotFoundError: there is no adapter.
        ValueError: a file is damaged, or the tower or the bases are others. The tower is then unchanged.
    """
    return AdapterFolder.open(path).adapter(tower, bases=bases)


@dataclass(frozen=True)
class AdapterFolder:
    """What a folder that :func:`save_adapter` wrote holds, read and verified as one.

    Attributes:
        path: the folder.
        config: what `adapter.json` says.
        weights: what the adapter learned, by parameter name, on the CPU.
        bases: its own bases; None where it keeps a reference, or rests on none.
        head: its classifier, or None.
        base_head: how the untouched model is read: `head`, unless the fit moved class vectors.
        class_names: what the classes are called in the data, in the order of their labels; the head's own
            names where nothing else was said, None without a head.
    """

    path: Path
    config: Config
    weights: dict[str, Tensor] = field(repr=False)
    bases: SpectralBases | None = field(repr=False)
    head: ZeroShotHead | None
    base_head: ZeroShotHead | None
    class_names: tuple[str, ...] | None
    _kept: dict[str, Tensor] = field(repr=False)  # of a reference: how many components of each unit, by kind

    @classmethod
    def open(cls, path: str | os.PathLike) -> "AdapterFolder":
        """Reads a folder that :func:`save_adapter` or `residual-kernels fit` wrote.

        Args:
            path: the folder.

        Returns:
            What it holds, with every checksum verified.

        Raises:
            FileNotFoundError: there is no adapter.
            ValueError: a file is damaged.
        """
        path = Path(path)
        while True:
            config = _config(path)
            try:
                return cls._read(path, config)
            except (ValueError, FileNotFoundError):
                if _config(path) == config:  # otherwise another process has just saved a new one here
                    raise

    @classmethod
    def _read(cls, path: Path, config: Config) -> "AdapterFolder":
        files = _members(path)
        place, _ = files[WEIGHTS]
        stored, header = load_tensors(place, WHAT)
        if header["sha256"] != config["weights_sha256"]:
            raise ValueError(f"{place} is not the file that {CONFIG} names; save the adapter again")
        kept = {name.removeprefix(KEPT): size for name, size in stored.items() if name.startswith(KEPT)}
        if any(size.ndim != 1 or size.dtype != torch.int32 for size in kept.values()):
            raise ValueError(f"{path} is damaged: its component counts are wrong; save the adapter again")
        bases = head = base_head = names = None
        if config["bases_sha256"] is not None:
            if BASES not in files:
                raise ValueError(f"{path / CONFIG} names no file of bases; save the adapter again")
            bases = SpectralBases.load(files[BASES][0], sha256=config["bases_sha256"])
        if HEAD in files:
            place, sha256 = files[HEAD]
            head = ZeroShotHead.load(place, sha256=sha256)
            base_head = head
            names = head.class_names
        if BASE_HEAD in files:
            place, sha256 = files[BASE_HEAD]
            base_head = ZeroShotHead.load(place, sha256=sha256)
            if head is None or base_head.class_names != head.class_names:
                raise ValueError(f"{place} has other classes than the head beside it; save the adapter again")
        if CLASSES in files:
            place, sha256 = files[CLASSES]
            names = tuple(read_json(place, CLASSES_WHAT, Classes)["folders"])
            if sha256 is not None and hashlib.sha256(place.read_bytes()).hexdigest() != sha256:
                raise ValueError(f"{place} is not the file that {CONFIG} names; save the adapter again")
            if head is not None and len(names) != len(head.class_names):
                raise ValueError(
                    f"{place} names {len(names)} classes, but the head beside it has "
                    f"{len(head.class_names)}; save the adapter again"
                )
        weights = {name: value for name, value in stored.items() if not name.startswith(KEPT)}
        return cls(path, config, weights, bases, head, base_head, names, kept)

    def adapter(
        self, tower: nn.Module, *, bases: SpectralBases | str | os.PathLike | None = None
    ) -> TowerAdapter:
        """The adapter around a tower, as :func:`load_adapter` returns it.

        Args:
            tower: the image tower that it was fitted on, with the same weights.
            bases: for an adapter that keeps its bases by reference: the bases, or the path of their file.

        Returns:
            The adapter, with the learned weights.

        Raises:
            ValueError: the tower or the bases are others. The tower is then unchanged.
        """
        cls, options = _CLASSES[self.config["class"]], self.config["options"]
        arguments = _arguments(cls)
        found = towers.checksum(towers.view(tower).module)
        if found != self.config["checksum"]:
            raise ValueError(
                "this adapter was fitted on a tower with other weights "
                f"(checksum {self.config['checksum'][:12]}, this tower has {found[:12]})"
            )
        own = self.bases if self.bases is not None and bases is None else self._referred(bases)
        needs_bases = "bases" in arguments and arguments["bases"].default is inspect.Parameter.empty
        if own is None and needs_bases:
            raise ValueError(
                f"a {cls.__name__} rests on bases, but {self.path / CONFIG} names none; save the adapter "
                "again"
            )
        given = {} if own is None else {"bases": own}
        try:
            adapter = cast(Any, cls)(tower, **options, **given)  # each class has options of its own
        except TypeError as error:  # an option of another type, or bases where none belong
            raise ValueError(
                f"{self.path / CONFIG} has options that do not fit {cls.__name__}: {error}"
            ) from error
        expected = {
            name: list(p.shape) for name, p in adapter.named_parameters() if not name.startswith("tower.")
        }
        shapes = {name: list(value.shape) for name, value in self.weights.items()}
        if adapter.options() != options or expected != shapes:
            adapter.detach()
            raise ValueError(
                f"{self.path} holds other options or shapes than this tower and these bases need: "
                f"{adapter.options()}, {expected}"
            )
        with torch.no_grad():
            for name, value in self.weights.items():
                adapter.get_parameter(name).copy_(value)
        if (method := self.config.get("method")) is not None:
            adapter.method = method
        return adapter

    def _referred(self, given: SpectralBases | str | os.PathLike | None) -> SpectralBases | None:
        """The bases, verified, of an adapter without its own: those given, or those it points to, or None."""
        reference = self.config.get("bases_reference")
        if reference is None:
            if given is not None:
                raise ValueError(f"the adapter at {self.path} holds its own bases; omit the argument bases")
            return None
        if isinstance(given, SpectralBases):
            return _referred(given, reference, self._kept, "the argument bases")
        where = Path(given) if given is not None else None
        if where is None and reference["where"]:
            where = self.path / reference["where"]
        if where is None or not where.is_file():
            said = "" if where is None else f", and there is no file at {where}"
            raise FileNotFoundError(
                f"the adapter at {self.path} keeps its bases by reference{said}; give load_adapter(..., "
                f"bases=) the bases fitted on {reference['count']} images that it was made with"
            )
        return _referred(SpectralBases.load(where), reference, self._kept, str(where))


def _check_classes(dim: int, head: ZeroShotHead | None, class_names: Sequence[str] | None) -> None:
    """Raises ValueError for a head that cannot read the adapter, or names that are not its classes'."""
    if head is not None:
        if not isinstance(head, ZeroShotHead):
            raise ValueError(f"head must be a ZeroShotHead; got {type(head).__name__}")
        if len(head.class_vectors) != dim:
            raise ValueError(
                f"this head takes embeddings of {len(head.class_vectors)} numbers, but the adapter "
                f"gives {dim}"
            )
    if class_names is None:
        return
    if isinstance(class_names, str) or not all(isinstance(name, str) for name in class_names):
        raise ValueError(f"class_names must be several names, such as ['cat', 'dog']; got {class_names!r}")
    repeated = sorted({name for name in class_names if list(class_names).count(name) > 1})
    if repeated:
        raise ValueError(f"class_names repeat: {', '.join(repeated)}")
    if head is not None and len(class_names) != len(head.class_names):
        raise ValueError(
            f"class_names has {len(class_names)} names, but the head has {len(head.class_names)} classes"
        )


def _read_files(index: Path) -> dict[str, dict[str, str]]:
    """The files that a config names, by plain name; those of the first version had plain names alone."""
    config = read_json(index, WHAT, Config)
    files = config.get("files")
    if files is None:
        checksums = {WEIGHTS: config["weights_sha256"], BASES: config["bases_sha256"]}
        files = {name: {"name": name, "sha256": sha} for name, sha in checksums.items() if sha is not None}
    if WEIGHTS not in files or set(files) - set(MEMBERS):
        raise ValueError(f"{index} names the files {str(list(files))[:100]}; save the adapter again")
    return {name: checked_entry(name, entry) for name, entry in files.items()}


def _members(path: Path) -> dict[str, tuple[Path, str | None]]:
    """(file, its checksum where the config says it) of everything the adapter in the folder `path` is made
    of."""
    files = {name: (path / one["name"], one["sha256"]) for name, one in _read_files(path / CONFIG).items()}
    found: dict[str, tuple[Path, str | None]] = dict(files)
    if "files" not in read_json(path / CONFIG, WHAT):  # the first version did not name these two
        found |= {name: (path / name, None) for name in (HEAD, CLASSES) if (path / name).is_file()}
    return found


def _reference(
    adapter: TowerAdapter, path: Path, where: bool | str | os.PathLike
) -> tuple[Reference, dict[str, Tensor]]:
    """What the config says of bases that lie elsewhere, and the number of components kept of each unit."""
    if adapter.bases is None:
        raise ValueError(f"this {type(adapter).__name__} uses no bases; omit the argument bases")
    sizes = {kind: part.offsets.diff() for kind, part in adapter.bases.parts.items()}
    reference: Reference = {
        "fingerprint": adapter.bases.fingerprint(),
        "count": adapter.bases.count,
        "where": None,
    }
    if not isinstance(where, bool):
        file = Path(where).resolve()
        if file.parent == path.resolve() and is_member(BASES, file.name):
            raise ValueError(
                f"{file} is where a self-contained adapter keeps its own bases; name a file outside of {path}"
            )
        _referred(SpectralBases.load(file), reference, sizes, str(where))
        reference["where"] = Path(os.path.relpath(file, path.resolve())).as_posix()
    return reference, {f"{KEPT}{kind}": size.to(torch.int32) for kind, size in sizes.items()}


def _referred(
    bases: SpectralBases, reference: Reference, sizes: dict[str, Tensor], name: str
) -> SpectralBases:
    """`bases` truncated as the reference says; a ValueError when they are not those it was made of."""
    advice = "give the bases (whole or truncated less) that it was fitted with"
    try:
        kept = bases.keep({kind: size.tolist() for kind, size in sizes.items()})
    except ValueError as error:
        raise ValueError(f"{name} does not hold the bases of this adapter: {error}; {advice}") from error
    if kept.fingerprint() != reference["fingerprint"]:
        raise ValueError(f"{name} holds other bases than this adapter rests on (another checksum); {advice}")
    return kept


def _arguments(cls: type[TowerAdapter]) -> Mapping[str, inspect.Parameter]:
    """What a class is made with, besides itself."""
    arguments = dict(inspect.signature(cls.__init__).parameters)
    del arguments["self"]
    return arguments


def _config(path: Path) -> Config:
    index = path / CONFIG
    if not index.is_file():
        raise FileNotFoundError(f"no adapter at {path} ({CONFIG} is missing)")
    config = read_json(index, WHAT, Config)
    if config["class"] == "ResiDual" and config["options"].get("placement") == "stream":
        # of 0.1, which had one class for both
        options = {name: value for name, value in config["options"].items() if name != "placement"}
        config |= {"class": StreamResiDual.__name__, "options": options}
    cls = _CLASSES.get(config["class"])
    if cls is None:
        raise ValueError(
            f"{index} names the class {reprlib.repr(config['class'])}; known are {', '.join(_CLASSES)}"
        )
    if (method := config.get("method")) is not None and (
        method not in METHODS or METHODS[method].adapter is not cls
    ):
        theirs = ", ".join(name for name, known in METHODS.items() if known.adapter is cls)
        raise ValueError(
            f"{index} names the method {reprlib.repr(method)}; those of class {cls.__name__} are {theirs}"
        )
    options, arguments = config["options"], _arguments(cls)
    if set(options) - (set(arguments) - {"tower", "bases"}):
        raise ValueError(f"{index} has unknown options {reprlib.repr(options)}; save the adapter again")
    if config.get("bases_reference") is not None and config["bases_sha256"] is not None:
        raise ValueError(f"{index} has both bases and a reference to bases; save the adapter again")
    return config
