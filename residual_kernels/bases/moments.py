"""What does PCA need of the data? Sums and second moments of every unit, in one pass.

A unit's output is x_u = l_u M_u + const with only C+2 numbers l = (s*z, s, s*m), so the second moment of l is
all that PCA needs, whatever the output dimension D is. Sums run about the first batch's mean and end in
float64; moments of two passes, or of several processes, merge by Chan's update.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from residual_kernels import distributed, ops
from residual_kernels.towers import Tower
from residual_kernels.towers.edit import stream_maps, token_run


@dataclass(frozen=True)
class Moments:
    """Sums that PCA of one kind needs; float64. count rows, mean [R, C+2], scatter [R, C+2, C+2] about the
    mean; rows [R, C+2, D] (or [1, C+2, D], shared by all units) and constant [D] map l to the output space.
    In the stream C and the model width stand for C+2 and D, and constant is [R, width]."""

    count: int
    mean: Tensor
    scatter: Tensor
    rows: Tensor
    constant: Tensor

    def merge(self, other: "Moments") -> "Moments":
        """Moments of both sets of rows (Chan, Golub and LeVeque 1979)."""
        count = self.count + other.count
        delta = other.mean - self.mean
        outer = delta[:, :, None] * delta[:, None, :]
        return replace(
            self,
            count=count,
            mean=self.mean + delta * (other.count / count),
            scatter=self.scatter + other.scatter + outer * (self.count * other.count / count),
        )


class MomentSum:
    """Accumulates the moments of one kind over batches, about the first batch's mean."""

    def __init__(self, rows: Tensor, constant: Tensor):
        self.rows, self.constant = rows, constant
        self.count = 0
        self.shift: Tensor | None = None  # until the first rows; total and moment are about it
        self.total: Tensor
        self.moment: Tensor

    def about(self, z: Tensor, scale: Tensor | None, mean: Tensor | None) -> None:
        """Takes the mean of these rows for the provisional one, and does not count them."""
        total, _ = ops.unit_moments(z, scale, mean)
        self.shift = total / len(z)
        self.total = torch.zeros_like(total)
        self.moment = total.new_zeros(*total.shape, total.shape[1])

    def add(self, z: Tensor, scale: Tensor | None, mean: Tensor | None) -> None:
        if self.shift is None:
            self.about(z, scale, mean)
        total, moment = ops.unit_moments(z, scale, mean, self.shift)
        self.count += len(z)
        self.total += total
        self.moment += moment

    def moments(self) -> Moments:
        """Of the rows of all processes, which must come here together; at least one must have rows."""
        count, mean, scatter = self._own()
        if distributed.world() > 1:
            own, count = count, sum(distributed.gather(count))
            whole = distributed.add_up(own * mean) / count
            apart = mean - whole
            scatter = distributed.add_up(scatter + own * apart[:, :, None] * apart[:, None, :])
            mean = whole
        return Moments(count, mean, scatter, self.rows.cpu(), self.constant.cpu())

    def _own(self) -> tuple[int, Tensor, Tensor]:
        """Count, mean and scatter of this process's rows; zeros in the others' shape where it had none."""
        if self.shift is not None and self.count:
            offset = self.total / self.count
            scatter = self.moment - self.count * offset[:, :, None] * offset[:, None, :]
            found = self.count, (self.shift + offset).cpu(), scatter.cpu()
        shapes = distributed.gather(tuple(self.total.shape) if self.count else None)
        if self.count:
            return found
        units, size = next(shape for shape in shapes if shape is not None)
        zeros = torch.zeros(units, size, size, dtype=torch.float64)
        return 0, zeros[:, 0], zeros


class StreamMoments:
    """Accumulates the moments of every head in model width over tokens (a row is an image's token).

    An :data:`~residual_kernels.towers.edit.Edit` that looks and changes nothing. The rank is C here: there is
    no final norm, so l = (z, 1, 0) and its last two numbers do not vary.
    """

    def __init__(self, view: Tower, tokens: str):
        self.run = token_run(view, tokens)
        maps = [stream_maps(view, layer) for layer in range(view.layout.layers)]
        self.sums = [MomentSum(layer.A, layer.b) for layer in maps]

    def __call__(self, layer: int, z: Tensor, attended: Tensor) -> Tensor:
        self.sums[layer].add(z[:, self.run].flatten(0, 1), None, None)
        return attended

    @property
    def count(self) -> int:
        return self.sums[0].count

    def moments(self) -> Moments:
        layers = [one.moments() for one in self.sums]
        width = layers[0].rows.shape[1]  # C
        return Moments(
            count=layers[0].count,
            mean=torch.cat([layer.mean[:, :width] for layer in layers]),
            scatter=torch.cat([layer.scatter[:, :width, :width] for layer in layers]),
            rows=torch.cat([layer.rows for layer in layers]),
            constant=torch.cat([layer.constant for layer in layers]),
        )
