"""Can this input be used? What a loader yields, its labels, and the units of a cache are checked here."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def check_finite(images: Tensor, first: int = 0) -> None:
    """Raises ValueError naming the images (counted from `first`) that hold NaN or Inf."""
    bad = (~images.isfinite().flatten(1).all(1)).nonzero().flatten()
    if len(bad):
        named = ", ".join(str(first + int(index)) for index in bad[:8])
        raise ValueError(
            f"{len(bad)} of the images hold NaN or Inf: index {named}{' ...' if len(bad) > 8 else ''}"
        )


def check_finite_units(tensors: Iterable[Tensor], rows: Tensor) -> None:
    """Raises ValueError naming the cached `rows` [n] whose values, a row per leading index, hold NaN or Inf."""
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
    """(images, labels or None) of what a loader yields: images, (images, labels, ...), or transformers' mapping."""
    if isinstance(batch, Mapping):
        if "pixel_values" not in batch:
            raise ValueError(
                f"a batch that is a mapping needs its images under 'pixel_values'; got {', '.join(map(str, batch))}"
            )
        return batch["pixel_values"], batch.get("labels")
    return (batch[0], batch[1]) if isinstance(batch, list | tuple) else (batch, None)


def checked_labels(labels: Any, images: int, class_names: Sequence[str] | None = None) -> Tensor:
    """Labels of a batch as int64 on the CPU; a ValueError for another number of them, or for values out of range."""
    labels = torch.as_tensor(labels, dtype=torch.int64).cpu()
    if labels.shape != (images,):
        raise ValueError(f"a batch has {images} images but labels of shape {tuple(labels.shape)}")
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
