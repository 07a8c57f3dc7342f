"""What is a row labelled, and how much does it count?

Label sets, a few shots of each class, weights of classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from residual_kernels.units.checks import check_range, whole_numbers
from residual_kernels.units.source import UnitSource


def label_table(
    source: UnitSource, given: Sequence[Tensor] | None, sets: int, sizes: Sequence[int], name: str
) -> Tensor:
    """Labels [L, N] of the label sets: those given, or the source's own; each checked against its head."""
    if given is None:
        if source.labels is None:
            raise ValueError("this needs labels; the cache holds only images")
        given = [source.labels]
    if len(given) != sets:
        raise ValueError(f"{name} must hold {sets} label sets; got {len(given)}")
    rows = []
    for number, labels in enumerate(given):
        labels = whole_numbers(labels, name)
        if labels.shape != (source.count,):
            raise ValueError(
                f"{name} must be [N] = ({source.count},), a label a row; got {tuple(labels.shape)}"
            )
        check_range(labels, sizes[number if len(sizes) > 1 else 0])
        rows.append(labels)
    return torch.stack(rows)


def shots_of(labels: Tensor, shots: int, seed: int, classes: Sequence[str]) -> Tensor:
    """Positions of `shots` images of each class, chosen by `seed`, in rising order."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for number, name in enumerate(classes):
        members = (labels == number).nonzero().flatten()
        if len(members) < shots:
            raise ValueError(f"class {name} has {len(members)} images, fewer than shots={shots}")
        chosen.append(members[torch.randperm(len(members), generator=generator)[:shots]])
    return torch.cat(chosen).sort().values


def weights_of_classes(class_weight: str | Tensor, labels: Tensor, sizes: Sequence[int]) -> Tensor:
    """[L, K] float64 for label sets [L, N] of `sizes` classes: given, or N / (classes present * images)."""
    classes = max(sizes)
    if isinstance(class_weight, str):
        if class_weight != "balanced":
            raise ValueError(f'class_weight must be "balanced", a tensor or None; got {class_weight!r}')
        counts = torch.stack([torch.bincount(row, minlength=classes) for row in labels])
        present = (counts > 0).sum(1, keepdim=True)
        return labels.shape[1] / (present * counts.clamp_min(1)).double()
    given = torch.as_tensor(class_weight)
    if given.shape != (classes,) or len(set(sizes)) > 1:
        raise ValueError(f"class_weight must be [K] = ({classes},) for every head; got {tuple(given.shape)}")
    if not (given.isfinite() & (given > 0)).all():
        raise ValueError("class_weight must be finite and above zero for every class")
    return given.detach().double().expand(len(labels), -1)
