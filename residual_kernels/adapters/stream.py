"""How are heads reweighted inside the tower? Where they enter the residual stream, so that later layers see it.

At a token, head h of layer l adds x = h_lh to the stream (:mod:`residual_kernels.towers.edit`). It adds
x + Phi^T diag(weight - 1) Phi (x - mu) instead: weight = 1 changes nothing, to the bit.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from residual_kernels.adapters.unit_sum import SpectralConstants
from residual_kernels.bases.spectral_bases import SpectralBases
from residual_kernels.towers import Tower
from residual_kernels.towers.edit import Edit, check_layers, stream_maps, token_run


class StreamHeads(nn.Module):
    """Constants of the adapted layers' heads in model width, and the change they make to the stream.

    `layers` are those adapted, `tokens` says at which tokens; components run layer-major, and unit_offsets [R+1] counts
    every head of the tower, those of other layers with none.
    """

    def __init__(
        self,
        view: Tower,
        bases: SpectralBases,
        layers: Iterable[int] | None,
        tokens: str | None,
        like: Tensor,
        backend: str,
    ):
        super().__init__()
        self.layers = check_layers(view, layers)
        self.tokens = bases.tokens if tokens is None else tokens
        self._run = token_run(view, self.tokens)
        heads, part = view.layout.heads, bases.parts["head"]
        constants, offsets, self.sizes = {}, [torch.zeros(1, dtype=torch.int64)], []
        for layer in range(view.layout.layers):
            if layer in self.layers:
                held = part.units(layer * heads, (layer + 1) * heads)
                constants[str(layer)] = SpectralConstants(stream_maps(view, layer), held, like, backend)
                self.sizes.append(len(held.components))
                offsets.append(offsets[-1][-1] + held.offsets[1:])
            else:
                offsets.append(offsets[-1][-1].expand(heads))
        self.constants = nn.ModuleDict(constants)
        self.register_buffer("unit_offsets", torch.cat(offsets).to(like.device))

    def edit(self, weight: Tensor, weight_index: Tensor | None = None) -> Edit:
        """What a view is to call in every block, for weight [J], or [T, J] with an index [N] of the images' own."""
        less_one = dict(zip(self.layers, (weight - 1).split(self.sizes, dim=-1), strict=True))

        def change(layer: int, z: Tensor, attended: Tensor) -> Tensor:
            if layer not in less_one:
                return attended
            chosen = z[:, self._run]  # [N, tokens, H, C]
            if not chosen.shape[1]:  # "patches", and the last block computes the class token alone
                return attended
            rows = None if weight_index is None else weight_index.repeat_interleave(chosen.shape[1])
            delta = self.constants[str(layer)](chosen.flatten(0, 1), None, None, less_one[layer], rows)
            delta = delta.unflatten(0, chosen.shape[:2])
            if delta.shape == attended.shape:
                return attended + delta
            start, stop, _ = self._run.indices(attended.shape[1])
            pieces = (attended[:, :start], attended[:, start:stop] + delta, attended[:, stop:])
            return torch.cat(pieces, dim=1)

        return change
