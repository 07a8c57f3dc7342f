"""residual_kernels: one learned number per principal component of each attention head makes a CLIP-like model
better at your own task (ResiDual, Basile et al., TMLR 2025), exact and fast.

Importing the package loads none of its rooms; a public name loads its own when it is first used (PEP 562).
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from residual_kernels import _moved

__version__ = "0.2.0"
_moved.register()

if TYPE_CHECKING:
    from residual_kernels import analysis, ops
    from residual_kernels.adapters import export
    from residual_kernels.adapters.adapter_set import AdapterSet
    from residual_kernels.adapters.attach import attach
    from residual_kernels.adapters.folder import AdapterFolder, load_adapter, save_adapter
    from residual_kernels.adapters.hub import pull_adapter, push_adapter
    from residual_kernels.adapters.methods import METHODS, build
    from residual_kernels.adapters.residual import (
        CoarseHeads,
        OutputLinear,
        OutputSpectral,
        ResiDual,
        StreamResiDual,
    )
    from residual_kernels.bases.pca import fit_bases
    from residual_kernels.bases.spectral_bases import SpectralBases
    from residual_kernels.bundled import load_bundled
    from residual_kernels.classifier import Classifier
    from residual_kernels.towers import UnitLayout, UnsupportedTowerError
    from residual_kernels.train import evaluate, fit, fit_many, predict, tune
    from residual_kernels.units.cache import UnitCache, encode
    from residual_kernels.units.decomposition import Decomposition, decompose
    from residual_kernels.zeroshot import ZeroShotHead

_HOMES = {  # public name -> the module that defines it
    "AdapterFolder": "adapters.folder",
    "AdapterSet": "adapters.adapter_set",
    "Classifier": "classifier",
    "CoarseHeads": "adapters.residual",
    "Decomposition": "units.decomposition",
    "METHODS": "adapters.methods",
    "OutputLinear": "adapters.residual",
    "OutputSpectral": "adapters.residual",
    "ResiDual": "adapters.residual",
    "StreamResiDual": "adapters.stream",
    "build": "adapters.methods",
    "SpectralBases": "bases.spectral_bases",
    "UnitCache": "units.cache",
    "UnitLayout": "towers",
    "UnsupportedTowerError": "towers",
    "ZeroShotHead": "zeroshot",
    "attach": "adapters.attach",
    "decompose": "units.decomposition",
    "encode": "units.cache",
    "evaluate": "train",
    "fit": "train",
    "fit_bases": "bases.pca",
    "fit_many": "train",
    "load_adapter": "adapters.folder",
    "load_bundled": "bundled",
    "predict": "train",
    "pull_adapter": "adapters.hub",
    "push_adapter": "adapters.hub",
    "save_adapter": "adapters.folder",
    "tune": "train",
}
_ROOMS = {"analysis": "analysis", "export": "adapters.export", "ops": "ops"}
__all__ = [
    "METHODS",
    "AdapterFolder",
    "AdapterSet",
    "Classifier",
    "CoarseHeads",
    "Decomposition",
    "OutputLinear",
    "OutputSpectral",
    "ResiDual",
    "SpectralBases",
    "StreamResiDual",
    "UnitCache",
    "UnitLayout",
    "UnsupportedTowerError",
    "ZeroShotHead",
    "analysis",
    "attach",
    "build",
    "decompose",
    "encode",
    "evaluate",
    "export",
    "fit",
    "fit_bases",
    "fit_many",
    "load_adapter",
    "load_bundled",
    "ops",
    "predict",
    "pull_adapter",
    "push_adapter",
    "save_adapter",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    elif name in _ROOMS:
        value = importlib.import_module(f"{__name__}.{_ROOMS[name]}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    setattr(sys.modules[__name__], name, value)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
