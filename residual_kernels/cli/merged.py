"""How a model with an adapter folded away is written, and read back to see that it gives the same."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from residual_kernels.adapters import export
from residual_kernels.data import models as sources
from residual_kernels.files import atomic_path, utf8_name, write_safetensors


def embedding(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def write_weights(
    clip: nn.Module, untouched: nn.Module, path: Path, images: Tensor, expected: Tensor
) -> float:
    """Writes the model's state_dict.

    The relative error of a model that has loaded it, without the adapter.
    """
    with atomic_path(path) as temporary:
        write_safetensors(temporary, clip.state_dict())
        with utf8_name(temporary) as named:
            untouched.load_state_dict(load_file(named))
        with torch.no_grad():
            found = embedding(sources.image_tower(untouched)(images))
        error = float((found.double() - expected.double()).norm() / expected.double().norm())
        allowed = max(export.AGREEMENT, 8 * torch.finfo(expected.dtype).eps)
        if not error <= allowed:
            raise RuntimeError(
                f"{path} would give other numbers than the adapter (relative error {error:.2g}, "
                f"{allowed:.0e} is allowed), so it was not written"
            )
    return error
