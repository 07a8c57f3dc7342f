"""Does a layer's weight say what the layer computes? Only then can units be made of it."""

from torch import Tensor, nn
from torch.nn.utils import parametrize

from residual_kernels.towers.wrappers import around

# Tensors with a dispatch of their own that are numbers all the same: shards of them, or stand-ins for them.
_NUMBERS = {"DTensor", "FakeTensor", "FunctionalTensor"}
# Hooks that make a weight of other parameters just before the call, so that it is stale in between.
_MAKERS = {"WeightNorm", "SpectralNorm"}
# Where torch.nn.utils.parametrize keeps what computes a module's parameters; reading them computes them.
COMPUTED = {"parametrizations"}


def objection(module: nn.Module) -> str | None:
    """Why a module's `weight` and `bias` cannot stand for its call, as in "is ..."; None where they can.

    A plain nn.Linear can, and one that is parametrised, whose `weight` is the effective one. A layer of a
    tuner (LoRA), a quantised one, and one with a forward of its own cannot.
    """
    if (wrapped := around(module)) is not None:
        return f"is wrapped by {wrapped}"
    kind = type(module)
    if not isinstance(module, nn.Linear):
        return f"is {kind.__name__} of {kind.__module__}, not an nn.Linear"
    if "forward" in vars(module) and "_hf_hook" not in vars(module):
        return "has had its forward replaced"
    if kind.forward is not nn.Linear.forward and not parametrize.is_parametrized(module):
        return (
            f"is {kind.__name__} of {kind.__module__}, with a forward of its own: units need a plain "
            "nn.Linear"
        )
    if (why := not_numbers(module.weight)) is not None:
        return why
    makers = [type(hook).__name__ for hook in module._forward_pre_hooks.values()]
    if stale := [name for name in makers if name in _MAKERS]:
        return (
            f"makes its weight in a hook before each call ({stale[0]}); use "
            "torch.nn.utils.parametrizations instead, or remove the norm"
        )
    return None


def no_norm(module: nn.Module, expected: str) -> str:
    """How a module that should be a norm is none, as in "is Identity, not LayerNorm"."""
    if (wrapped := around(module)) is not None:
        return f"is wrapped by {wrapped}"
    return f"is {type(module).__name__}, {expected}"


def not_numbers(weight: Tensor) -> str | None:
    """Why a weight is no plain tensor of floating-point numbers, as in "is ..."; None where it is."""
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return (
            f"is quantised ({getattr(weight, 'dtype', type(weight).__name__)}); decompose the tower before "
            "that"
        )
    kind = type(weight)
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ and kind.__name__ not in _NUMBERS:
        return f"is quantised (its weight is a {kind.__name__}); decompose the tower before that"
    return None
