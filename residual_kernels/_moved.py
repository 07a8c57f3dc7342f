"""Modules of version 0.1 by their old names: `import residual_kernels.images` still works,
with a DeprecationWarning.

Only the names of modules are kept here. Public names (`rk.ResiDual`, `rk.ops.spectral_reweight`) never moved.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings

_PACKAGE = __name__.rpartition(".")[0]
_NEW = {  # old module -> where its names are now, both below the package
    "adapter": "adapters.folder",
    "adapter_set": "adapters.adapter_set",
    "analysis.overview": "analysis.summary",
    "backends": "ops.backends",
    "bench": "experiments.bench",
    "cache": "units.cache",
    "cache.encoding": "units.cache.encoding",
    "cache.folder": "units.cache.resume",
    "cache.loading": "units.loader",
    "cache.shards": "units.cache.shards",
    "cache.unit_cache": "units.cache.unit_cache",
    "decomposition": "units.decomposition",
    "doctor": "cli.doctor",
    "export": "adapters.export",
    "hub": "adapters.hub",
    "images": "data.images",
    "images.base": "data.images.dataset",
    "images.files": "data.images.image_folder",
    "images.named": "data.images.named",
    "images.shards": "data.images.webdataset",
    "images.unreadable": "data.images.unreadable",
    "inject": "adapters.attach",
    "merge": "adapters.fold",
    "methods": "adapters.methods",
    "modules": "adapters.residual",
    "moments": "bases.moments",
    "ops.plan": "ops.explained",
    "ops.triton_backend": "ops.triton.backend",
    "ops.triton_fold": "ops.triton.fold",
    "ops.triton_routes": "ops.triton.routes",
    "ops.triton_spectral_reweight": "ops.triton.forward",
    "ops.triton_spectral_reweight_backward": "ops.triton.backward",
    "ops.triton_unit_moments": "ops.triton.unit_moments",
    "pca": "bases.pca",
    "prompts": "data.prompts",
    "reference": "ops.reference",
    "shapes": "experiments.shapes",
    "sources": "data.models",
    "stream": "adapters.stream",
    "sweep": "experiments.sweep",
    "towers.attention_pool": "towers.pooling",
    "towers.base": "towers.view",
    "towers.standing_in": "towers.hugging_face.stand_in",
    "towers.stream": "towers.edit",
    "towers.text": "towers.hugging_face.text",
    "wrapping": "adapters.tower_adapter",
}


class _OldNames(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers for the old names alone, after every ordinary finder has been asked."""

    def find_spec(self, fullname, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != _PACKAGE or name not in _NEW:
            return None
        # a package, so that old names below an old name are found here too
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        new = f"{_PACKAGE}.{_NEW[spec.name.partition('.')[2]]}"
        warnings.warn(f"{spec.name} is now {new}", DeprecationWarning, stacklevel=3)
        module = types.ModuleType(spec.name, f"The old name of {new}.")
        target = importlib.import_module(new)

        def from_target(name: str) -> object:
            if name.startswith("__"):  # above all __path__, by which Python would load the files twice
                raise AttributeError(f"module {spec.name!r} has no attribute {name!r}")
            return getattr(target, name)

        vars(module).update(__getattr__=from_target, __dir__=lambda: dir(target))
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing: names are looked up in the new module when they are asked for."""


def register() -> None:
    """Makes the old names importable; once, however often it is called."""
    if not any(isinstance(finder, _OldNames) for finder in sys.meta_path):
        sys.meta_path.append(_OldNames())
