"""residual_kernels: one learned number per principal component of each attention head makes a CLIP-like model better at
your own task (ResiDual, Basile et al., TMLR 2025), exact and fast."""

from residual_kernels import analysis, export, ops
from residual_kernels.adapter import load_adapter, save_adapter
from residual_kernels.adapter_set import AdapterSet
from residual_kernels.bases import SpectralBases
from residual_kernels.bundled import load_bundled
from residual_kernels.cache import UnitCache, encode
from residual_kernels.decomposition import Decomposition, decompose
from residual_kernels.hub import pull_adapter, push_adapter
from residual_kernels.inject import attach
from residual_kernels.modules import CoarseHeads, OutputLinear, OutputSpectral, ResiDual
from residual_kernels.pca import fit_bases
from residual_kernels.towers import UnitLayout, UnsupportedTowerError
from residual_kernels.train import evaluate, fit, fit_many, predict
from residual_kernels.zeroshot import ZeroShotHead

__version__ = "0.1.0"
__all__ = [
    "AdapterSet",
    "CoarseHeads",
    "Decomposition",
    "OutputLinear",
    "OutputSpectral",
    "ResiDual",
    "SpectralBases",
    "UnitCache",
    "UnitLayout",
    "UnsupportedTowerError",
    "ZeroShotHead",
    "analysis",
    "attach",
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
]
