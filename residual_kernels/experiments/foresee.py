"""Will a sweep's plan run, and what will it cost?

Names are looked up in the libraries' registers; costs estimated.
"""

import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from residual_kernels.adapters.methods import METHODS
from residual_kernels.data import downloads, prompts
from residual_kernels.data import models as sources
from residual_kernels.data.images.decode import image_endings
from residual_kernels.data.images.torchvision_sets import check_classes, part_option, torchvision_class
from residual_kernels.data.user_text import user_path
from residual_kernels.experiments.sweep_plan import SweepPlan, TowerSpec

KNOWN, UNKNOWN, OPEN = "known", "unknown", "not known offline"
HELD_OUT = 0.2

# Images of data sets by name, as their publishers state them; a local folder is counted. tanganke/... are
# the numbers of the hub's data set cards, and for SUN397 of its first official partition, 397 classes of 50
# images in each part.
IMAGES = {
    "torchvision:cifar10@train": 50_000,
    "torchvision:cifar10@test": 10_000,
    "torchvision:cifar100@train": 50_000,
    "torchvision:cifar100@test": 10_000,
    "torchvision:mnist@train": 60_000,
    "torchvision:mnist@test": 10_000,
    "torchvision:svhn@train": 73_257,
    "torchvision:svhn@test": 26_032,
    "torchvision:gtsrb@train": 26_640,
    "torchvision:gtsrb@test": 12_630,
    "torchvision:dtd@train": 1_880,
    "torchvision:dtd@val": 1_880,
    "torchvision:dtd@test": 1_880,
    "torchvision:imagenet@train": 1_281_167,
    "torchvision:imagenet@val": 50_000,
    "torchvision:stanfordcars@train": 8_144,
    "torchvision:stanfordcars@test": 8_041,
    "hf:tanganke/stanford_cars@train": 8_144,
    "hf:tanganke/stanford_cars@test": 8_041,
    "hf:tanganke/eurosat@train": 21_600,
    "hf:tanganke/eurosat@test": 2_700,
    "hf:tanganke/sun397@train": 19_850,
    "hf:tanganke/sun397@test": 19_850,
    "hf:tanganke/resisc45@train": 18_900,
    "hf:tanganke/resisc45@test": 6_300,
}


@dataclass(frozen=True)
class Name:
    """One name of a plan: what it names, the verdict (known, unknown, or not known offline), and why."""

    what: str
    name: str
    verdict: str
    why: str = ""


def check(plan: SweepPlan) -> list[Name]:
    """Every model, data set, prompt and class-name table of a plan, looked up without a network.

    open_clip's, timm's and torchvision's names are in registers that come with the libraries. The hub's are
    not: such a name is known where its files are on this machine, and otherwise only its form can be checked.
    """
    found = [_checked("model", tower.label, partial(_tower, tower)) for tower in plan.towers]
    for data in plan.data:
        for part in ("train", "val", "test"):
            source = getattr(data, part)
            if source is not None:
                found.append(_checked(f"{data.name}, {part}", source, partial(_data, source)))
        if data.templates is not None:
            given = data.templates
            found.append(_checked(f"{data.name}, templates", given, partial(_templates, given)))
        if data.class_names is not None:
            given = data.class_names
            found.append(_checked(f"{data.name}, class names", given, partial(_class_names, given)))
    if plan.bases is not None:
        found.append(_checked("bases", plan.bases, partial(_data, plan.bases, labelled=False)))
    return found


def _checked(what: str, name: str, look: Callable[[], str | None]) -> Name:
    """`look` says what is not known, or None, and raises ValueError or ImportError where the name is
    wrong."""
    try:
        why = look()
    except (ValueError, ImportError) as error:
        return Name(what, name, UNKNOWN, str(error))
    return Name(what, name, KNOWN if why is None else OPEN, why or "")


def _tower(tower: TowerSpec) -> str | None:
    if tower.model == sources.BUNDLED:
        return None
    if tower.model.startswith(sources.TRANSFORMERS):
        return _on_the_hub(tower.model.removeprefix(sources.TRANSFORMERS), "transformers", ["config.json"])
    import open_clip

    models = open_clip.list_models()
    if tower.model not in models:
        raise ValueError(f"open_clip has no model {tower.model!r}; {sources.nearest(tower.model, models)}")
    trunk = open_clip.get_model_config(tower.model).get("vision_cfg", {}).get("timm_model_name")
    if trunk:
        import timm

        if not timm.is_model(trunk):
            raise ValueError(
                f"{tower.model} needs timm's {trunk}, which this timm ({timm.__version__}) lacks"
            )
    tags = open_clip.list_pretrained_tags_by_model(tower.model)
    if tower.pretrained is None:
        raise ValueError(f"say which weights of {tower.model}: pretrained: {', '.join(tags[:4]) or 'none'}")
    if tower.pretrained != "none" and tower.pretrained not in tags:
        if not user_path(tower.pretrained).is_file():
            raise ValueError(
                f"{tower.model} has no weights {tower.pretrained!r} and no such file exists; "
                f"{sources.nearest(tower.pretrained, tags)}"
            )
    return None


def _on_the_hub(name: str, library: str, files: list[str], kind: str = "model") -> str | None:
    if user_path(name).is_dir():
        return None
    if importlib.util.find_spec(library) is None:
        raise ValueError(f"hf: names are read by the library {library}, which is not installed")
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"hf:{name} is no folder here and no name the hub can have: {error}") from error
    if kind == "model" and downloads.on_this_machine(name, files):
        return None
    return "well formed; the hub alone knows whether it exists"


def _data(source: str, labelled: bool = True) -> str | None:
    scheme, _, rest = source.partition(":")
    name, _, part = rest.partition("@")
    if scheme == "torchvision":
        made = torchvision_class(name)
        if labelled:
            check_classes(made)
        part_option(made, part or None)
        return None
    if scheme == "hf":
        return _on_the_hub(name, "datasets", [], "dataset")
    if not _exists(user_path(source)):
        raise ValueError(f"no such file or folder: {source}")
    return None


def _exists(path: Path) -> bool:
    """Whether a folder, a zip, a folder in a zip, or the first of several shards is there."""
    if path.exists() or any(parent.suffix == ".zip" and parent.is_file() for parent in path.parents):
        return True
    return "{" in path.name and path.parent.is_dir()


def _templates(source: str) -> None:
    prompts.templates(source, "")


def _class_names(source: str) -> None:
    if source.startswith(prompts.TABLE):
        if prompts.table_of_names(source.removeprefix(prompts.TABLE)) is None:
            raise ValueError(f"clip_benchmark has no such table as {source}, or is not installed")
    elif not user_path(source).is_file():
        raise ValueError(f"no such file: {source}")


# --- what it costs ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TowerSize:
    """A vision transformer's sizes, from its configuration: what an estimate needs."""

    layers: int
    width: int
    tokens: int
    dim: int

    @property
    def flop(self) -> float:
        """Of one image: products with weights, and attention."""
        return self.layers * (24 * self.tokens * self.width**2 + 4 * self.tokens**2 * self.width)

    def cached(self, kinds: tuple[str, ...], element: int) -> int:
        """Bytes of one image in a cache."""
        per_kind = {"emb": 1, "head": self.layers, "mlp": self.layers, "pool": 1}
        return sum(per_kind[kind] * self.width for kind in kinds) * element + 4 * self.dim + 8


@dataclass(frozen=True)
class CellCost:
    """An estimate for one tower on one data set (or on the images of the bases);
    None where something is not known."""

    tower: str
    data: str
    images: int | None
    hours: float | None
    bytes: int | None
    why: str = ""


# Of towers on the hub, as their cards state them: BLIP reads 384 pixels, DINOv2's processor crops to 224.
SHAPES = {
    "hf:Salesforce/blip-itm-large-flickr": TowerSize(24, 1024, 577, 256),
    "hf:google/vit-large-patch16-224": TowerSize(24, 1024, 197, 1024),
    "hf:facebook/dinov2-large": TowerSize(24, 1024, 257, 1024),
}


def shape_of(tower: TowerSpec) -> TowerSize | None:
    """The sizes of a tower whose configuration is on this machine; None where it is not,
    or is no plain transformer."""
    if tower.model == sources.BUNDLED:
        return TowerSize(6, 128, 17, 128)
    if tower.model in SHAPES:
        return SHAPES[tower.model]
    if tower.model.startswith(sources.TRANSFORMERS):
        return _shape_of_transformers(tower.model.removeprefix(sources.TRANSFORMERS))
    import open_clip

    config = open_clip.get_model_config(tower.model) or {}
    vision = config.get("vision_cfg", {})
    if not isinstance(vision.get("layers"), int) or "patch_size" not in vision:
        return None
    side = vision.get("image_size", 224) // vision["patch_size"]
    return TowerSize(vision["layers"], vision.get("width", 768), side**2 + 1, config["embed_dim"])


def _shape_of_transformers(name: str) -> TowerSize | None:
    if importlib.util.find_spec("transformers") is None:
        return None
    import transformers

    try:
        with downloads.without_network():
            config = transformers.AutoConfig.from_pretrained(
                str(user_path(name)) if user_path(name).is_dir() else name,
                local_files_only=True,
                trust_remote_code=False,  # by default it asks on standard input
            )
    except (OSError, ValueError):
        return None
    vision = getattr(config, "vision_config", config)
    names = ("num_hidden_layers", "hidden_size", "patch_size")
    sizes = [size for size in (getattr(vision, name, None) for name in names) if isinstance(size, int)]
    if len(sizes) < len(names):
        return None
    layers, width, patch = sizes
    side = getattr(vision, "image_size", 224) // patch
    return TowerSize(layers, width, side**2 + 1, getattr(config, "projection_dim", width))


def speed(device: torch.device, seconds: float = 0.5) -> float:
    """FLOP a second of a square float32 product on this device, measured."""
    a = torch.randn(1024, 1024, device=device)
    count, start = 0, 0.0
    for warm in (True, False):
        start = time.perf_counter()
        count = 0
        while count < 2 or (not warm and time.perf_counter() - start < seconds):
            a @ a
            count += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return count * 2 * 1024**3 / (time.perf_counter() - start)


TOWER_SHARE = 0.5  # of a product's speed that a whole tower reaches, about


def estimate(plan: SweepPlan, flop_a_second: float) -> list[CellCost]:
    """Hours and bytes of a plan on a machine of this speed, a row for each tower on each data set.

    Hours count encoding and the fits by AdamW, bytes the caches in the output folder. Images of data sets
    that are neither local nor in :data:`IMAGES` are not known, nor are sizes of towers whose configuration is
    not here.
    """
    kinds = tuple(dict.fromkeys(kind for name in plan.methods for kind in METHODS[name].kinds))
    element = {"float32": 4}.get(plan.dtype, 2)
    found = []
    for tower in plan.towers:
        shape = shape_of(tower)
        for name, splits in _splits(plan):
            counts = {split: images_of(source) for split, source in splits.items()}
            known = [count for count in counts.values() if count is not None]
            images = sum(known) if len(known) == len(counts) else None
            if shape is None or images is None:
                lacking = [splits[split] for split, count in counts.items() if count is None]
                why = "the tower's sizes" if shape is None else f"images in {', '.join(lacking)}"
                found.append(CellCost(tower.label, name, images, None, None, why))
                continue
            work = images * shape.flop / TOWER_SHARE
            if "train" in splits:
                train = (counts["train"] or 0) * (1.0 if "val" in splits else 1 - HELD_OUT)
                work += _fits(plan, shape, train)
            hours = work / flop_a_second / 3600
            found.append(CellCost(tower.label, name, images, hours, images * shape.cached(kinds, element)))
    return found


def _splits(plan: SweepPlan) -> Iterator[tuple[str, dict[str, str]]]:
    if plan.bases is not None:
        yield "(bases)", {"bases": plan.bases}
    for data in plan.data:
        given = {part: getattr(data, part) for part in ("train", "val", "test")}
        yield data.name, {part: source for part, source in given.items() if source is not None}


def _fits(plan: SweepPlan, shape: TowerSize, train: float) -> float:
    """FLOP of all fits: three products [N, J] x [J, D] an epoch, the coefficients once."""
    rows = train if plan.shots is None else min(train, plan.shots * 100)
    heads = shape.layers * (shape.width + 2 * max(1, shape.width // 64))
    sizes = {"fine": heads // 2, "anchored": heads + shape.layers * shape.dim}
    sizes["full"] = sizes["anchored"]
    total = 0.0
    for method in plan.methods:
        if METHODS[method].runs_the_tower:
            total += 3 * plan.epochs * rows * shape.flop / TOWER_SHARE * plan.seeds * len(plan.rates)
        elif method != "base":
            size = sizes.get(method, shape.dim)
            total += 6 * plan.epochs * rows * size * shape.dim * plan.seeds * len(plan.rates)
    return total


def images_of(source: str) -> int | None:
    """How many images a source holds: stated for a data set by name, counted in a local folder; None:
    not known."""
    key = source.lower()
    if key in IMAGES:
        return IMAGES[key]
    path = user_path(source)
    if not path.is_dir():
        return None
    endings = image_endings()
    return sum(file.suffix.lower() in endings for file in path.rglob("*") if file.is_file())
