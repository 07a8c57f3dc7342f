"""What can be learned on the output alone? The baselines that read nothing of a tower but its embedding."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from residual_kernels.adapters.fold import Fold, MergedOutput
from residual_kernels.adapters.tower_adapter import TowerAdapter
from residual_kernels.adapters.unit_adapter import check_arguments, initial_weight, kept_start
from residual_kernels.adapters.unit_sum import (
    SpectralConstants,
    SpectralForm,
    at_least_float32,
    tower_itself,
)
from residual_kernels.bases.spectral_bases import OUTPUT, SpectralBases
from residual_kernels.ops.packing import wide
from residual_kernels.towers import Terms


class OutputSpectral(TowerAdapter):
    """y = Phi^T diag(weight) Phi (output - mu): the tower's output as one unit (a baseline).

    All its components are kept.

    Args:
        tower: an image tower that :func:`residual_kernels.decompose` supports.
        bases: fitted on this very tower by :func:`fit_bases`; only the output's own basis is read.
        init: "ones", "normal" (N(1, 1) with `seed`) or a tensor [D].
        seed: random seed of init="normal".
        backend: which implementation computes the operator; see :mod:`residual_kernels.ops.backends`.

    Raises:
        ValueError: the bases are of another tower, or the tower is wrapped already.

    `weight` [D], at least float32, is the only trainable tensor.
    """

    method = "output"
    folds_tower = False
    default_lr = 1e-3
    bases: SpectralBases

    def __init__(
        self,
        tower: nn.Module,
        bases: SpectralBases,
        *,
        init: str | Tensor = "ones",
        seed: int = 0,
        backend: str = "auto",
    ):
        check_arguments(tower, bases, backend=backend)
        super().__init__(tower)
        like = next(self.tower.parameters())
        self.bases = replace(bases, parts={OUTPUT: bases.parts[OUTPUT]}, moments=None)
        self.spectral = SpectralConstants(None, bases.parts[OUTPUT], like, backend)
        self.weight = initial_weight(len(self.spectral.basis), init, seed, like)
        self._start = kept_start(init), seed
        self.freeze()

    def _initial(self) -> list[Tensor]:
        return [initial_weight(len(self.weight), *self._start, self.weight)]

    def component_weight(self, weight: Tensor | None = None) -> Tensor:
        return self.weight if weight is None else weight

    def constants(self) -> dict[str, nn.Module]:
        """The module that `weight` is applied to, by name."""
        return {"spectral": self.spectral}

    def _centred(self) -> list[Tensor]:
        return [self.bases.parts[OUTPUT].mean[0]]

    def _embed(self, terms: Terms) -> Tensor:
        return self.spectral(terms.output[:, None, :], None, None, self.weight)

    def features(self, terms: Terms) -> dict[str, Tensor]:
        return self.spectral.features(terms.output[:, None, :], None, None)

    def from_features(self, features: dict[str, Tensor], weights: Sequence[Tensor]) -> Tensor:
        return self.spectral.from_features(features, weights[0])

    def spectral_form(self) -> SpectralForm:
        return SpectralForm(("c",), (self.spectral.basis,), None, 0.0, self.spectral.backend)

    def merge(self) -> nn.Module:
        fold = Fold(self.dim, self.weight.device)
        fold.add_spectral(self.spectral, self.weight)
        return MergedOutput(self.tower, fold.rows[0].T, fold.b + fold.e)


class OutputIdentity(TowerAdapter):
    """y = the tower's own output: an adapter that is the model, and learns nothing.

    It measures what the others start from by the same code, and stands for them where none is better.
    """

    method = "base"
    weights_on = "nothing"
    folds_tower = False

    def __init__(self, tower: nn.Module):
        check_arguments(tower, None)
        super().__init__(tower)
        self.freeze()

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return tower_itself(self._view, images, self.collect, None)

    def _embed(self, terms: Terms) -> Tensor:
        return terms.output

    def features(self, terms: Terms) -> dict[str, Tensor]:
        return {"output": terms.output.to(wide(terms.output.dtype))}

    def from_features(self, features: dict[str, Tensor], weights: Sequence[Tensor] = ()) -> Tensor:
        return features["output"]

    def merge(self) -> nn.Module:
        eye = torch.eye(self.dim, device=self.device)
        return MergedOutput(self.tower, eye, torch.zeros_like(eye[0]))


class OutputLinear(TowerAdapter):
    """y = W output + b: a torch.nn.Linear(D, D) on the tower's output (a baseline).

    Args:
        tower: an image tower that :func:`residual_kernels.decompose` supports.
        seed: random seed of torch's default initialisation.

    Raises:
        ValueError: the tower is wrapped already.
    """

    method = "linear"
    folds_tower = False
    default_lr = 1e-3

    def __init__(self, tower: nn.Module, *, seed: int = 0):
        check_arguments(tower, None)
        super().__init__(tower)
        like = next(self.tower.parameters())
        self._seed = seed
        self.linear = self._drawn()
        self.linear.to(device=like.device, dtype=wide(like.dtype))
        self.freeze()

    def _drawn(self) -> nn.Linear:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            return nn.Linear(self.dim, self.dim)

    def _initial(self) -> list[Tensor]:
        return list(self._drawn().parameters())

    def _apply(self, fn, recurse=True):
        self.tower._apply(fn)
        self.linear._apply(at_least_float32(fn))
        return self

    def _embed(self, terms: Terms) -> Tensor:
        return self.linear(terms.output.to(self.linear.weight.dtype))

    def features(self, terms: Terms) -> dict[str, Tensor]:
        return {"output": terms.output.to(self.linear.weight.dtype)}

    def from_features(self, features: dict[str, Tensor], weights: Sequence[Tensor]) -> Tensor:
        weight, bias = weights
        return features["output"] @ weight.mT + bias.unsqueeze(-2)

    def merge(self) -> nn.Module:
        return MergedOutput(self.tower, self.linear.weight.detach(), self.linear.bias.detach())
