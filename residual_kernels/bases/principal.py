"""What are the principal components of units whose moments are known?"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from residual_kernels.bases.moments import Moments

# A unit whose variance is below this share of what its map and coordinates could give is constant up to
# rounding.
CONSTANT = 1e-24
GROUP_BYTES = 2**22  # of units factorised together: what one step leaves is in cache for the next


@dataclass(frozen=True)
class KindBases:
    """Bases of all units of one kind, float64: mean [R, D], components [sum K_u, D] (orthonormal rows within
    a unit), variance [sum K_u] (eigenvalues, falling within a unit), total_variance [R], offsets [R+1]
    int64."""

    mean: Tensor
    components: Tensor
    variance: Tensor
    total_variance: Tensor
    offsets: Tensor

    def run(self, unit: int) -> slice:
        return slice(int(self.offsets[unit]), int(self.offsets[unit + 1]))

    def units(self, start: int, stop: int) -> "KindBases":
        """The bases of a run of units."""
        run = slice(int(self.offsets[start]), int(self.offsets[stop]))
        return KindBases(
            mean=self.mean[start:stop],
            components=self.components[run],
            variance=self.variance[run],
            total_variance=self.total_variance[start:stop],
            offsets=self.offsets[start : stop + 1] - self.offsets[start],
        )

    def ratio(self, unit: int) -> Tensor:
        variance, total = self.variance[self.run(unit)], self.total_variance[unit]
        return torch.zeros_like(variance) if total == 0 else variance / total


def _fix_signs(components: Tensor) -> None:
    """The entry of largest magnitude (the first of equals) of every row becomes positive, in place."""
    pivot = components.abs().argmax(-1, keepdim=True)
    components.mul_(components.gather(-1, pivot).sign())


def principal(moments: Moments) -> KindBases:
    """Eigen-decomposition of every unit's covariance (over n - 1) in the output space."""
    (units, size), dim = moments.mean.shape, moments.rows.shape[2]
    # All that a unit can span: fewer images leave directions without variance, kept for `full`.
    kept = min(size, dim)
    components = torch.empty(units, kept, dim, dtype=torch.float64)
    variance = torch.empty(units, kept, dtype=torch.float64)
    covariance = moments.scatter / (moments.count - 1)
    group = max(1, GROUP_BYTES // (8 * size * dim))
    shared = torch.linalg.qr(moments.rows.transpose(1, 2)) if len(moments.rows) == 1 else None

    inference = torch.is_inference_mode_enabled()  # a mode of the calling thread alone

    @torch.inference_mode(inference)
    def factorise(start: int) -> None:
        part = slice(start, start + group)
        Q, T = shared or torch.linalg.qr(moments.rows[part].transpose(1, 2))
        short = T @ covariance[part] @ T.transpose(1, 2)
        values, vectors = torch.linalg.eigh((short + short.transpose(1, 2)) / 2)  # rising
        variance[part] = values.flip(-1).clamp_min(0)
        falling = vectors.flip(-1).transpose(1, 2)
        torch.bmm(falling, Q.transpose(1, 2).expand(len(falling), -1, -1), out=components[part])
        _fix_signs(components[part])

    # One matrix is too small for several cores, so each core takes groups of its own, with one thread of
    # torch for each. Groups are cut by shape, so what is found does not depend on who does it.
    cores = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as workers:
            list(workers.map(factorise, range(0, units, group)))
    finally:
        torch.set_num_threads(cores)  # threads that begin after the last worker take over its number
    coordinates = covariance.diagonal(dim1=1, dim2=2).sum(1) + moments.mean.square().sum(1)
    total = variance.sum(1)
    constant = total <= CONSTANT * torch.linalg.vector_norm(moments.rows, dim=(1, 2)).square() * coordinates
    variance[constant], total[constant] = 0.0, 0.0
    return KindBases(
        mean=(moments.mean[:, None, :] @ moments.rows).squeeze(1) + moments.constant,
        components=components.flatten(0, 1),
        variance=variance.flatten(),
        total_variance=total,
        offsets=torch.arange(units + 1) * kept,
    )
