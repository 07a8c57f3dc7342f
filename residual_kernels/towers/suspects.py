"""What stands there?

Whatever about a module is not as its library made it: hooks, patches, subclasses, tuners.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from types import FunctionType
from typing import Any, cast

from torch import nn
from torch.nn import functional
from torch.nn.modules import module as everywhere
from torch.nn.utils import parametrize

from residual_kernels.towers.watch import FUNCTIONS, registered_attentions

_HOMES = ("torch", "open_clip", "timm", "transformers", "residual_kernels")
# Whose functions are no patches.
_LIBRARIES = (
    *_HOMES,
    "peft",
    "accelerate",
    "typing",
    "abc",
    "huggingface_hub",
)
_MOST = 3  # findings that a message names


def kind(module: nn.Module) -> str:
    """The class of a module, and where it is from when that is not one of the known libraries."""
    found = type(module)
    home = found.__module__.partition(".")[0]
    return found.__name__ if home in _HOMES else f"{found.__name__} of {found.__module__}"


# Where modules keep the probability with which they drop something while they train.
_RATES = ("p", "drop_prob", "prob", "dropout", "attention_dropout", "dropout_prob")


def dropping(tower: nn.Module) -> str | None:
    """Which parts are in training mode and drop something at random, in words; None where none is."""
    found = [
        name
        for name, part in tower.named_modules()
        if part.training
        and any(isinstance(rate := getattr(part, key, None), float) and rate > 0 for key in _RATES)
    ]
    if not found:
        return None
    more = f" and {len(found) - _MOST} more" if len(found) > _MOST else ""
    verb = "is" if len(found) == 1 else "are"
    drop = "drops" if len(found) == 1 else "drop"
    return f"{', '.join(found[:_MOST])}{more} {verb} in training mode and {drop} at random"


def inside(block: nn.Module, blocks: Sequence[nn.Module]) -> str:
    """ ", where ..." with what is unusual in one of a tower's blocks."""
    usual = Counter((name, type(part)) for other in blocks for name, part in other.named_modules())
    found = []
    for name, part in block.named_modules():
        others = {k: n for (at, k), n in usual.items() if at == name and k is not type(part)}
        common = max(others, key=lambda k: others[k], default=None)
        if common is not None and others[common] > usual[name, type(part)]:
            found.append(f"{_called(name)} is {kind(part)}, where other blocks have {common.__name__}")
    found += [each for each in _unusual(block.named_modules()) if not any(each in other for other in found)]
    return _sentence(found, kind(block))


def outside(tower: nn.Module, blocks: Iterable[nn.Module], beside: Iterable[nn.Module] = ()) -> str:
    """ ", where ..." with what is unusual in a tower outside its blocks, and in modules beside it."""
    inner = {part for block in blocks for part in block.modules()}
    around = [(f"the {type(part).__name__}", part) for part in beside]
    found = _unusual([*((name, part) for name, part in tower.named_modules() if part not in inner), *around])
    return _sentence(found, kind(tower))


def _sentence(found: list[str], known: str) -> str:
    for_all = (everywhere._global_forward_hooks, everywhere._global_forward_pre_hooks)
    found += [
        f"a hook stands on all modules ({_function(hook)})" for hooks in for_all for hook in hooks.values()
    ]
    replaced = {name: vars(functional)[name] for name in FUNCTIONS}
    found += [
        f"torch.nn.functional.{name} was replaced by {_function(value)}"
        for name, value in replaced.items()
        if (getattr(value, "__module__", None) or "torch").partition(".")[0] != "torch"
    ]
    found += [
        f"attention function {name!r} of transformers is {_function(value)}"
        for table in registered_attentions()
        for name, value in table.items()
        if (getattr(value, "__module__", None) or "torch").partition(".")[0] not in _LIBRARIES
    ]
    found = list(dict.fromkeys(found))
    if not found:
        return f", where nothing unusual is seen: {known} computes something that is not known here"
    more = f" (and {len(found) - _MOST} more)" if len(found) > _MOST else ""
    return f", where {'; '.join(found[:_MOST])}{more}"


def _called(name: str) -> str:
    return name or "the module itself"


def _unusual(modules: Iterable[tuple[str, nn.Module]]) -> list[str]:
    found = []
    for name, part in modules:
        attributes, home = vars(part), type(part).__module__.partition(".")[0]
        if ".quantized" in type(part).__module__ or ".quantization" in type(part).__module__:
            found.append(f"{_called(name)} is quantised ({type(part).__module__}.{type(part).__name__})")
        if hasattr(part, "base_layer"):
            found.append(
                f"{_called(name)} is a tuner's layer ({type(part).__module__}.{type(part).__name__})"
            )
        elif home not in _HOMES and home != "peft":
            found.append(f"{_called(name)} is {kind(part)}")
        else:
            found += [
                f"{owner.__name__}.{method} was replaced by {_function(value)}"
                for owner in type(part).__mro__
                for method, value in vars(owner).items()
                if isinstance(value, FunctionType) and value.__module__.partition(".")[0] not in _LIBRARIES
            ]
        if "_hf_hook" in attributes:
            found.append(
                f"accelerate has put a hook on {_called(name)} ({type(attributes['_hf_hook']).__name__})"
            )
        else:
            patched = [
                key for key, value in attributes.items() if callable(value) and hasattr(type(part), key)
            ]
            found += [
                f"{key} of {_called(name)} was replaced by {_function(attributes[key])}" for key in patched
            ]
        hooks = [*attributes["_forward_hooks"].values(), *attributes["_forward_pre_hooks"].values()]
        found += [f"a hook stands on {_called(name)} ({_function(hook)})" for hook in hooks]
        if parametrize.is_parametrized(part):
            found.append(
                f"{_called(name)} is parametrised ({', '.join(cast(nn.ModuleDict, part.parametrizations))})"
            )
    return found


def _function(value: Any) -> str:
    name = getattr(value, "__qualname__", type(value).__qualname__)
    return f"{name} of {getattr(value, '__module__', type(value).__module__)}"
