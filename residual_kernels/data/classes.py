"""Are two data sets' classes the same? One rule: by name; some may be absent, a foreign one is refused."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.utils.data import Dataset

from residual_kernels.data.user_text import normal, some


def positions(names: Sequence[str] | None, known: Sequence[str], source: object, of: str) -> list[int]:
    """Where each of a data set's classes stands among the known ones.

    Args:
        names: the class folders of the data set.
        known: the class folders that labels shall count.
        source: what messages call the data set.
        of: what knows the classes: "the adapter", "the training images".

    Raises ValueError where the data set has no class names or has classes that are not known.
    """
    if names is None:
        raise ValueError(f"{source} holds no class names; name a folder of class folders, or a cache of one")
    places = {normal(name): number for number, name in enumerate(known)}
    foreign = [name for name in names if normal(name) not in places]
    if foreign:
        raise ValueError(
            f"{source} has classes that {of} was not fitted to: {some(foreign)}; it knows "
            f"{some(known)} (some of them may be absent)"
        )
    return [places[normal(name)] for name in names]


class Labelled(Protocol):
    """Images that are counted, each with its label."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Relabelled(Dataset):
    """Images with their labels renumbered: label k becomes numbers[k]."""

    def __init__(self, images: Labelled, numbers: list[int]):
        self.images, self.numbers = images, numbers

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[index]
        return image, self.numbers[label]
