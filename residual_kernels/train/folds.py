"""How are training labels split into folds? Every class as evenly as it goes, by a seed."""

import torch
from torch import Tensor

FOLDS = 5


def folds_of(labels: Tensor, folds: int, seed: int) -> Tensor:
    """Fold numbers [N] int16 of labels [N]; each class, and all images, are spread as evenly as they can be.

    A class with fewer images than folds is missing where it is held out: what a fit makes of a class that it
    never saw counts then.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    by_class = order[labels[order].argsort(stable=True)]
    found = torch.empty(len(labels), dtype=torch.int16)
    found[by_class] = (torch.arange(len(labels)) % folds).to(torch.int16)
    return found
