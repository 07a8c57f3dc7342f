"""Which module computes? What is inside torch.compile, data parallelism, an EMA or a PeftModel."""

from typing import Any, cast

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from residual_kernels.towers.view import UnsupportedTowerError

# Wrappers that hold one model at `module`; torch's AveragedModel, timm's EMAs, DeepSpeed's engine. By name,
# because their libraries need not be loaded.
_HOLDERS = {"AveragedModel", "ModelEma", "ModelEmaV2", "ModelEmaV3", "DeepSpeedEngine"}


def inner(module: nn.Module) -> nn.Module:
    """The module that a wrapper calls; the module itself where it is none.

    Seen through are torch.compile, DataParallel, DistributedDataParallel, AveragedModel, timm's EMAs and PEFT
    models. Raises UnsupportedTowerError for FSDP1, which keeps no weights to read.
    """
    while (wrapped := _wrapped(module)) is not None:
        module = wrapped
    return module


def _wrapped(module: nn.Module) -> nn.Module | None:
    modules, kind = module._modules, type(module)
    if "_orig_mod" in modules:
        return modules["_orig_mod"]
    if "_fsdp_wrapped_module" in modules:
        raise UnsupportedTowerError(
            f"{kind.__name__} (FSDP1) flattens its module's weights, so that there are none to make units "
            "of; use fully_shard (FSDP2), or decompose the tower before it is wrapped"
        )
    if isinstance(module, DataParallel | DistributedDataParallel) or kind.__name__ in _HOLDERS:
        return modules["module"]
    if hasattr(kind, "get_base_model"):  # a PeftModel
        return cast(Any, module).get_base_model()
    if hasattr(kind, "inject_adapter") and "model" in modules:  # a tuner of PEFT's, without its PeftModel
        return modules["model"]
    return None


def around(module: nn.Module) -> str | None:
    """What wraps one part of a tower, so that its parts are not where they were; None where nothing does."""
    modules = module._modules
    if "_orig_mod" in modules:
        return "torch.compile (give the whole tower to it, or use module.compile(), which wraps nothing)"
    if "_fsdp_wrapped_module" in modules:
        return "FSDP1 (use fully_shard, FSDP2, or decompose the tower before it is wrapped)"
    if hasattr(module, "base_layer") or "modules_to_save" in modules:  # peft's, the second a trained copy
        return f"a tuner ({type(module).__module__}); call merge_and_unload() on the model first"
    return None
