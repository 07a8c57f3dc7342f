"""How alike are two heads?

The normalised spectral cosine: between heads, between data sets, between towers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from residual_kernels.analysis import compiled
from residual_kernels.bases.principal import KindBases
from residual_kernels.bases.spectral_bases import SpectralBases

WEIGHTS = ("explained_variance", "singular", "eigenvalues", "uniform")
PAIR_BYTES = 32 * 2**20  # of cosine matrices at a time


def _weights(part: KindBases, unit: int, weights: str, count: int) -> Tensor:
    """[count] weights of one unit's first components by falling variance, zeros past its last."""
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}; got {weights!r}")
    variance = part.variance[part.run(unit)][:count]
    match weights:
        case "explained_variance":
            value = part.ratio(unit)[:count]
        case "singular":
            value = variance.sqrt()
        case "eigenvalues":
            value = variance
        case "uniform":
            value = torch.ones_like(variance)
    return torch.cat([value, value.new_zeros(count - len(value))])


def _components(part: KindBases, unit: int, count: int) -> Tensor:
    kept = part.components[part.run(unit)][:count]
    return torch.cat([kept, kept.new_zeros(count - len(kept), kept.shape[1])])


def _greedy(cosines: Tensor) -> Tensor:
    """l2 norm of the entries [P] that a greedy one-to-one matching takes from each matrix of [P, a, b]
    (overwritten).

    Each step takes the largest entry left and strikes its row and column.
    """
    if cosines.dtype == torch.float64 and compiled.runs(cosines):
        return compiled.greedy_squares(cosines).sqrt()
    pairs, rows, columns = cosines.shape
    every = torch.arange(pairs, device=cosines.device)
    best, place = cosines.max(2)  # of every row; looked up again only where the column it lay in is struck
    total = cosines.new_zeros(pairs)
    for _ in range(min(rows, columns)):
        value, row = best.max(1)
        column = place[every, row]
        total += value.square()
        best[every, row] = -1
        cosines[every, :, column] = -1
        pair, stale = ((place == column[:, None]) & (best >= 0)).nonzero(as_tuple=True)
        best[pair, stale], place[pair, stale] = cosines[pair, stale].max(1)
    return total.sqrt()


def _normalised(cosines: Tensor, weights_a: Tensor, weights_b: Tensor) -> Tensor:
    """The measure [P] for cosines [P, a, b] and weights [P, a], [P, b]; 0 where a unit is constant."""
    shared = min(weights_a.shape[1], weights_b.shape[1])
    best = (weights_a[:, :shared] * weights_b[:, :shared]).square().sum(1).sqrt()
    matched = _greedy(cosines.abs().mul_(weights_a[:, :, None]).mul_(weights_b[:, None, :]))
    return torch.where(best > 0, matched / best.clamp_min(torch.finfo(best.dtype).tiny), 0.0)


def spectral_cosine(
    bases_a: SpectralBases,
    unit_a,
    bases_b: SpectralBases,
    unit_b,
    *,
    weights: str = "explained_variance",
    components: int | tuple[int, int] | None = None,
) -> float:
    """Normalised spectral cosine of two units, in [0, 1]: 1 for equal spectra, 0 for orthogonal ones.

    Multiply |cos| of every pair of components by their weights. Match components one to one, greedily, from
    the largest entry down. The measure is the l2 norm of the matched entries over the l2 norm of the products
    of weights in order.

    Args:
        bases_a, bases_b: of one tower on two data sets, or of two towers with one output space; may be the
            same object.
        unit_a, unit_b: layout index, row or (layer, head).
        weights: "explained_variance", "singular" (values), "eigenvalues", or "uniform".
        components: compare the first so many of each, or (of a, of b); all by default.

    Returns:
        The measure; 0 where a unit is constant.

    Raises:
        ValueError: bases of two output spaces, or unknown weights.

    Source: Basile et al., TMLR 2025 (arXiv 2411.00246).
    """
    _same_space(bases_a, bases_b)
    (part_a, a), (part_b, b) = bases_a._find(unit_a), bases_b._find(unit_b)
    limit = components if isinstance(components, tuple) else (components, components)
    count_a, count_b = (
        _count(part, [unit], most) for part, unit, most in ((part_a, a, limit[0]), (part_b, b, limit[1]))
    )
    cosines = _components(part_a, a, count_a) @ _components(part_b, b, count_b).T
    value = _normalised(
        cosines[None],
        _weights(part_a, a, weights, count_a)[None],
        _weights(part_b, b, weights, count_b)[None],
    )
    return float(value)


def similarity_matrix(
    bases_a: SpectralBases,
    bases_b: SpectralBases | None = None,
    *,
    kind: str = "head",
    weights: str = "explained_variance",
    components: int | None = None,
) -> Tensor:
    """:func:`spectral_cosine` of every unit of a kind with every other.

    Args:
        bases_a: one set of bases.
        bases_b: another one, of the same output space; `bases_a` itself by default.
        kind: of the units.
        weights, components: as in :func:`spectral_cosine`.

    Returns:
        [R_a, R_b] float64. Of one set with itself it is symmetric, with ones on the diagonal (0 for a
        constant unit).

    Raises:
        ValueError: as :func:`spectral_cosine`.
    """
    found = similarity_matrices(bases_a, bases_b, kind=kind, weights=(weights,), components=components)
    return found[weights]


def similarity_matrices(
    bases_a: SpectralBases,
    bases_b: SpectralBases | None = None,
    *,
    kind: str = "head",
    weights: Sequence[str] = WEIGHTS,
    components: int | None = None,
) -> dict[str, Tensor]:
    """:func:`similarity_matrix` for several weightings, from the same cosines: weighting -> [R_a, R_b]."""
    other = bases_a if bases_b is None else bases_b
    _same_space(bases_a, other)
    compared = []
    for bases in (bases_a, other):
        if kind not in bases.parts:
            raise ValueError(f"these bases hold {', '.join(bases.parts)}, not {kind}")
        compared.append(bases.parts[kind])
    sizes = [_count(part, range(len(part.mean)), components) for part in compared]
    phis = [
        torch.stack([_components(part, unit, size) for unit in range(len(part.mean))])
        for part, size in zip(compared, sizes, strict=True)
    ]
    scales = {
        name: [
            torch.stack([_weights(part, unit, name, size) for unit in range(len(part.mean))])
            for part, size in zip(compared, sizes, strict=True)
        ]
        for name in weights
    }
    results = {name: torch.zeros(len(phis[0]), len(phis[1]), dtype=torch.float64) for name in weights}
    block = max(1, PAIR_BYTES // (8 * sizes[0] * sizes[1]))
    # A symmetric matrix needs its upper half.
    first = [a if bases_b is None else 0 for a in range(len(phis[0]))]
    pairs = [(a, b) for a in range(len(phis[0])) for b in range(first[a], len(phis[1]))]
    for start in range(0, len(pairs), block):
        rows, columns = map(torch.tensor, zip(*pairs[start : start + block], strict=True))
        cosines = []  # of the components of b with those of a
        for a in rows.unique().tolist():
            run = columns[rows == a]
            stack = phis[1][int(run[0]) : int(run[-1]) + 1]
            cosines.append((stack.flatten(0, 1) @ phis[0][a].T).view(len(run), sizes[1], sizes[0]))
        whole = torch.cat(cosines)
        for name, (of_a, of_b) in scales.items():
            results[name][rows, columns] = _normalised(whole, of_b[columns], of_a[rows])
    if bases_b is None:
        return {name: result.triu() + result.triu(1).T for name, result in results.items()}
    return results


def _same_space(a: SpectralBases, b: SpectralBases) -> None:
    if a.dim != b.dim:
        raise ValueError(
            f"these bases lie in output spaces of {a.dim} and {b.dim} dimensions; compare bases of one space"
        )


def _count(part: KindBases, units, limit: int | None) -> int:
    if limit is not None and limit < 1:
        raise ValueError(f"components must be at least 1; got {limit}")
    most = max(part.run(unit).stop - part.run(unit).start for unit in units)
    return most if limit is None else min(limit, most)
