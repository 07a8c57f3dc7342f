"""What is the operator under the transforms of ``torch.func``? The operator again, of other operands.

Forward mode: y is linear in weight, and affine in each of z, scale and mean alone. vmap: rows do not know of
one another, so a batch of weights is more tasks, and a batch of rows more rows. Only gradients that a batch
does not share so (dweight of each of its rows, dz of each of its weights) are computed one by one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Dims = Sequence[int | None]  # where each operand has its batch; None where it has none


def derivative(
    apply: Callable[..., Tensor],
    operands: Sequence[Tensor | None],
    tangents: Sequence[Tensor | None],
    pack: Any,
) -> Tensor:
    """The derivative of y along `tangents` of z, scale, mean and weight; `operands` end in weight_index."""
    z, scale, mean, weight, index = operands
    values = {"z": z, "scale": scale, "mean": mean}

    def along(name: str, direction: Tensor, **fixed: Tensor | None) -> Tensor:
        """y(direction) - y(0) in one of the operands."""
        held = {**values, **fixed}
        like = values[name]
        assert like is not None  # it has a tangent
        there, here = {**held, name: direction.to(like.dtype)}, {**held, name: torch.zeros_like(like)}
        return apply(*there.values(), weight, index, pack) - apply(*here.values(), weight, index, pack)

    z_t, scale_t, mean_t, weight_t = tangents
    terms = []
    if weight_t is not None and weight is not None:
        terms.append(apply(z, scale, mean, weight_t.to(weight.dtype), index, pack))
    if z_t is not None:
        terms.append(along("z", z_t, mean=None))
    if scale_t is not None:
        terms.append(along("scale", scale_t))
    if mean_t is not None:
        terms.append(along("mean", mean_t))
    return sum(terms[1:], terms[0])


def reweight(
    apply: Callable[..., Tensor], batch: int, dims: Dims, operands: Sequence[Tensor | None], pack: Any
) -> tuple[Tensor, int]:
    """(y, its batch dimension) of z, scale, mean, weight [T, J] and weight_index, with `dims` batched.

    `apply(z, scale, mean, weight, weight_index, pack)` is the operator, which may be under another vmap.
    """
    z, scale, mean, weight, index = (
        x if x is None or dim is None else x.movedim(dim, 0) for x, dim in zip(operands, dims, strict=True)
    )
    assert z is not None and weight is not None  # noqa: PT018  (only the others may be absent)
    own_weights = dims[3] is not None
    tasks = weight.shape[-2]
    if own_weights and all(dim is None for dim in (*dims[:3], dims[4])) and index is None:
        y = apply(z, scale, mean, weight.flatten(0, 1), None, pack)
        return y.unflatten(0, (batch, tasks)), 0

    def rows(x: Tensor | None, dim: int | None) -> Tensor | None:
        """[batch * N, ...] of what every row has."""
        return None if x is None else (x if dim is not None else x.expand(batch, *x.shape)).flatten(0, 1)

    count = z.shape[0] if dims[0] is None else z.shape[1]
    flat = [rows(x, dim) for x, dim in zip((z, scale, mean), dims[:3], strict=True)]
    chosen = rows(index, dims[4])
    if not own_weights:
        y = apply(*flat, weight, chosen, pack)
        return (y.unflatten(1, (batch, count)), 1) if index is None else (y.unflatten(0, (batch, count)), 0)
    own = torch.arange(batch, device=z.device).repeat_interleave(count) * tasks  # where a row's weights begin
    if chosen is None:
        each = [apply(*flat, weight.flatten(0, 1), own + task, pack) for task in range(tasks)]
        return torch.stack([y.unflatten(0, (batch, count)) for y in each], dim=1), 0
    return apply(*flat, weight.flatten(0, 1), own + chosen, pack).unflatten(0, (batch, count)), 0


def gradients(
    apply: Callable[..., Sequence[Tensor]],
    batch: int,
    dims: Dims,
    operands: Sequence[Tensor | None],
    pack: Any,
    wanted: Sequence[bool],
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """(gradients, their batch dimensions) of dy, z, scale, mean, weight and weight_index; `dims` have one.

    `apply(dy, z, scale, mean, weight, weight_index, pack, wanted)` gives the `wanted` ones of dweight, dz,
    dscale and dmean.
    """
    alone = [dim is None for dim in dims]
    dy, weight = operands[0], operands[4]
    if list(wanted) == [True, False, False, False] and alone == [False, True, True, True, False, True]:
        assert dy is not None and weight is not None  # noqa: PT018  (they are batched)
        dy, weight = dy.movedim(dims[0] or 0, 0), weight.movedim(dims[4] or 0, 0)
        if operands[5] is None:  # weights on the same rows: tasks
            shape = weight.shape[:2]
            (dweight,) = apply(dy.flatten(0, 1), *operands[1:4], weight.flatten(0, 1), None, pack, wanted)
            return (dweight.unflatten(0, shape),), (0,)
    each = []
    for place in range(batch):
        chosen = [
            x if x is None or dim is None else x.select(dim, place)
            for x, dim in zip(operands, dims, strict=True)
        ]
        each.append(apply(*chosen, pack, wanted))
    return tuple(torch.stack(found) for found in zip(*each, strict=True)), (0,) * len(each[0])
