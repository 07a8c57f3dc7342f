"""How is a block run that is read rather than called? As its own forward would be: recomputed, sharded."""

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_STEP = "_residual_kernels_step"


def run_block(block: nn.Module, step: Callable, *args: Any, recompute: bool = False) -> Any:
    """``step(*args)`` with what stands around the block's forward: gradient checkpointing and FSDP2's hooks.

    `recompute` asks for gradient checkpointing. Parameters of a block that `fully_shard` has sharded are
    gathered for the step and for its backward, and freed again after each.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # absent: nobody has sharded anything
    sharded = fsdp is not None and isinstance(block, fsdp.FSDPModule)
    if recompute:
        plain = step

        def step(*args: Any) -> Any:
            return checkpoint(plain, *args, use_reentrant=False)

    if not sharded:
        return step(*args)
    # fsdp wraps a method of the block's; the step becomes one for as long as it runs
    setattr(block, _STEP, step)
    fsdp.register_fsdp_forward_method(block, _STEP)
    try:
        return getattr(block, _STEP)(*args)
    finally:
        delattr(block, _STEP)


def whole(value: Tensor) -> Tensor:
    """All of a parameter, gathered from the processes where FSDP2 has sharded it
    (which all of them must then ask)."""
    gather = getattr(value, "full_tensor", None)
    return value if gather is None else gather()
