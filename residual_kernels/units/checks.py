"""Can this input be used? What a loader yields, its labels, and the units of a cache are checked here."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def check_finite(images: Tensor, first: int = 0) -> None:
    """Raises ValueError naming the images (counted from `first`) that hold NaN or Inf."""
    if images.sum().isfinite():  # a sum may overflow, so it only raises suspicion
        return
    bad = (~images.isfinite().flatten(1).all(1)).nonzero().flatten()
    if len(bad):
        named = ", ".join(str(first + int(index)) for index in bad[:8])
        raise ValueError(
            f"{len(bad)} of the images hold NaN or Inf: index {named}{' ...' if len(bad) > 8 else ''}"
        )


def check_finite_units(tensors: Iterable[Tensor], rows: Tensor) -> None:
    """Raises ValueError naming the cached `rows` [n] whose values, a row per leading index,
    hold NaN or Inf."""
    for tensor in tensors:
        if tensor.numel() and not tensor.sum().isfinite():  # a sum may overflow, so it only raises suspicion
            bad = (~tensor.isfinite().reshape(len(tensor), -1).all(1)).nonzero().flatten().tolist()
            if bad:
                named = ", ".join(str(int(rows[index])) for index in bad[:8])
                raise ValueError(
                    f"the units of {len(bad)} cached images hold NaN or Inf: row {named}"
                    f"{' ...' if len(bad) > 8 else ''}; encode them again or leave them out with subset"
                )


def parts_of(batch: Any) -> tuple[Any, Any]:
    """(images, labels or None) of what a loader yields: images, (images, labels, ...),
    or transformers' mapping."""
    if isinstance(batch, Mapping):
        if "pixel_values" not in batch:
            raise ValueError(
                "a batch that is a mapping needs its images under 'pixel_values'; got "
                f"{', '.join(map(str, batch))}"
            )
        return batch["pixel_values"], batch.get("labels")
    return (batch[0], batch[1]) if isinstance(batch, list | tuple) else (batch, None)


def whole_numbers(labels: Any, name: str = "labels") -> Tensor:
    """Labels as int64 on the CPU; a ValueError for names, and for numbers that are not whole."""
    try:
        found = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:  # torch's words for strings, by where they stand
        given = labels[0] if isinstance(labels, Sequence) and len(labels) else labels
        shown = repr(given) if isinstance(given, str) else type(given).__name__
        raise ValueError(
            f"{name} are whole numbers that count classes from 0; got {shown}: give the place of each name "
            "in the list of class names"
        ) from error
    if found.is_floating_point() or found.is_complex():
        plain = found if found.is_floating_point() else found.abs() * float("nan")
        broken = found[~plain.isfinite() | (plain != plain.round())]
        if len(broken):
            raise ValueError(f"{name} are whole numbers that count classes from 0; got {broken[0].item()}")
    return found.to("cpu", torch.int64)


def checked_labels(labels: Any, images: int, class_names: Sequence[str] | None = None) -> Tensor:
    """Labels of a batch as int64 on the CPU.

    A ValueError for another number of them, or for values out of range.
    """
    labels = whole_numbers(labels)
    if labels.shape != (images,):
        raise ValueError(f"a batch has {images} images but labels of shape {tuple(labels.shape)}")
    if not images:
        return labels
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (class_names is not None and high >= len(class_names)):
        limit = "" if class_names is None else f", but there are {len(class_names)} classes"
        raise ValueError(f"labels run from {low} to {high}{limit}; they count from 0")
    return labels


def check_range(labels: Tensor, classes: int) -> None:
    """Raises ValueError unless labels lie in [0, classes)."""
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"labels run from {int(labels.min())} to {int(labels.max())}, but the head has {classes} classes"
        )


def check_names(head: Sequence[str], data: Sequence[str] | None, *, sure: bool = True) -> None:
    """Raises ValueError where a head's classes are others than the data's, or in another order,
    with the pairing shown.

    Names that differ in case, spaces, dashes and underscores alone are the same; bare numbers name nothing.
    Where it is not `sure` that the data's names are meant to be a head's (a data set of another library),
    names that have nothing in common are passed.
    """
    if data is None or _numbers(head) or _numbers(data):
        return
    ours, theirs = [_plain(name) for name in head], [_plain(name) for name in data]
    if ours[: len(theirs)] == theirs:  # a head may know more classes, behind those of the data
        return
    common = set(ours) & set(theirs)
    if not (sure or common):
        return
    differ = [k for k in range(max(len(ours), len(theirs))) if ours[k : k + 1] != theirs[k : k + 1]]
    pairs = "; ".join(f"{k} is {_at(head, k)} in the head and {_at(data, k)} in the data" for k in differ[:3])
    more = "; ..." if len(differ) > 3 else ""
    if len(common) == len(ours) == len(theirs):
        raise ValueError(
            f"the head has the data's classes in another order, so {len(differ)} of {len(ours)} classes "
            f"are read as others: {pairs}{more}. Make the head with the data's names in the data's order"
        )
    raise ValueError(
        f"the head's classes are not the data's: {pairs}{more}. If they are the same classes by other "
        "names, in the same order, say so: data.class_names = head.class_names"
    )


def repetition(names: Sequence[str]) -> str | None:
    """Which class names stand more than once, and where; None where all differ."""
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(name, []).append(place)
    found = [f"{name!r} ({', '.join(map(str, where))})" for name, where in places.items() if len(where) > 1]
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f"class names repeat: {', '.join(found[:3])}{more}" if found else None


def _plain(name: str) -> str:
    return " ".join(str(name).casefold().replace("_", " ").replace("-", " ").split())


def _numbers(names: Sequence[str]) -> bool:
    return all(str(name).strip().isdigit() for name in names)


def _at(names: Sequence[str], k: int) -> str:
    return repr(names[k]) if k < len(names) else "absent"


def names_of(loader: Any) -> tuple[Sequence[str] | None, bool]:
    """(class names of the data set that a loader reads or None, whether the data set is one of this
    library)."""
    data = getattr(loader, "dataset", loader)
    while (inner := getattr(data, "dataset", None)) is not None and not hasattr(data, "class_names"):
        data = inner  # a Subset
    ours = getattr(data, "class_names", None)
    found = ours if ours is not None else getattr(data, "classes", None)
    named = isinstance(found, list | tuple) and all(isinstance(name, str) for name in found)
    return (found if named else None), ours is not None
