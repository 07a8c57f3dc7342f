"""What happens in a process that is forked from one that computes?

It goes on with one thread, and does not hang.
"""

import functools
import os

import torch


@functools.cache
def compute_alone_after_a_fork() -> None:
    """From now on a forked child computes with one thread. Called wherever this library begins to compute.

    The threads of PyTorch's OpenMP team do not exist in a child, and its first operator with several threads
    would wait for them for ever. A DataLoader's worker processes get one thread for the same reason.
    """
    if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
        os.register_at_fork(after_in_child=_compute_alone)


def _compute_alone() -> None:
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)
