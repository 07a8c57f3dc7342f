"""What is a unit's share of an embedding that is pooled by attention?

Linear, once the attention weights are given.

Pooling head h weighs the normalised tokens by a_ht, so a term raw_ut of the stream, normalised with s_t and
gamma, adds
    v_u = concat_h( V_h (gamma o sum_t a_ht s_t raw_ut) ) O
to the pooled vector; means, beta and the pooler's own biases are dealt out as everywhere else. Every pooling
head weighs the tokens differently, so v_u has full rank: there is no short form, and x_u itself is handed
out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from residual_kernels.towers.blocks import whole
from residual_kernels.towers.edit import stream_maps
from residual_kernels.towers.norm import Norm
from residual_kernels.towers.view import Tower


@dataclass(frozen=True)
class AttentionPooler:
    """An attention pooling as tensors, read anew from its module at every call.

    query: [heads, head width], of the one pooled query, after its projection and norms. key, value, out:
    weight and bias (or None) of the three projections; `key_norm` is applied to keys per head.
    """

    query: Tensor
    key: tuple[Tensor, Tensor | None]
    value: tuple[Tensor, Tensor | None]
    out: tuple[Tensor, Tensor | None]
    key_norm: nn.Module | None = None

    @property
    def heads(self) -> int:
        return len(self.query)

    def weights(self, tokens: Tensor) -> Tensor:
        """a [N, heads, T] for normalised tokens [N, T, width], float32 or better."""
        keys = F.linear(tokens, *self.key).unflatten(2, (self.heads, -1))  # [N, T, heads, head width]
        keys = keys if self.key_norm is None else self.key_norm(keys)
        scores = torch.einsum("nthc,hc->nht", keys, self.query.to(keys.dtype)) * self.query.shape[1] ** -0.5
        return scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1)

    def fold(self, maps: Tensor) -> Tensor:
        """G [R, C, heads, head width]: what V makes of coordinates whose maps to the stream are [R, C,
        width]."""
        value = self.value[0].to(maps.dtype)
        return (maps.flatten(0, 1) @ value.T).unflatten(0, maps.shape[:2]).unflatten(2, (self.heads, -1))

    def values(self, x: Tensor) -> Tensor:
        """V_h x_h [..., heads, head width] of one stream vector per pooling head, [..., heads, width].

        No bias.
        """
        value = self.value[0].to(x.dtype).unflatten(0, (self.heads, -1))
        return torch.einsum("...hw,hvw->...hv", x, value)

    def project(self, values: Tensor, bias: bool = False) -> Tensor:
        """concat_h(values_h) O [..., width]; with `bias` the biases of V and O are in it."""
        flat = values.flatten(-2)
        weight, shift = self.out[0].to(flat.dtype), self.out[1]
        if bias and self.value[1] is not None:
            flat = flat + self.value[1].to(flat.dtype)
        return F.linear(flat, weight, shift.to(flat.dtype) if bias and shift is not None else None)


class PooledTower(Tower, Protocol):
    """A view of a tower that pools by attention, as far as :func:`attended` reads it."""

    span: slice

    @property
    def norm(self) -> Norm: ...

    @property
    def outer_norm(self) -> Norm: ...

    def pooler(self) -> AttentionPooler: ...

    def pool_mlp(self, pooled: Tensor) -> Tensor: ...

    def projection(self) -> tuple[Tensor | None, Tensor | None]: ...


def multihead_pooler(attn: nn.MultiheadAttention, query: Tensor) -> AttentionPooler:
    """Of a torch attention whose one query is `query` [width of the queries], before its projection."""
    if attn.in_proj_weight is None:
        q, k, v = attn.q_proj_weight, attn.k_proj_weight, attn.v_proj_weight
    else:
        q, k, v = attn.in_proj_weight.chunk(3)
    biases = (None,) * 3 if attn.in_proj_bias is None else attn.in_proj_bias.chunk(3)
    projected = F.linear(query, q, biases[0]).unflatten(0, (attn.num_heads, -1))
    out = (attn.out_proj.weight, attn.out_proj.bias)
    return AttentionPooler(projected, (k, biases[1]), (v, biases[2]), out)


def attended(view: PooledTower, x: Tensor, terms: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    """x_u of every kind [N, R, D], from the stream after the last block and what all its tokens left, the
    terms of each kind."""
    pooler, tokens = view.pooler(), view.norm.module(x)[:, view.span]
    weights = pooler.weights(tokens)  # [N, heads, T]
    wide = weights.dtype
    scale, mean = view.norm.statistics(x[:, view.span])
    gamma, beta = (t.to(wide) for t in view.norm.constants(view.width, x))
    scaled = weights * scale[:, None]

    total = pooler.project(pooler.values(torch.einsum("nht,ntw->nhw", weights, tokens.to(wide))), bias=True)
    mlp = view.pool_mlp(total.to(x.dtype)).to(wide) if view.layout.pool else torch.zeros_like(total)
    outer_scale, outer_mean = view.outer_norm.statistics(total + mlp)
    outer_gamma, outer_beta = (t.to(wide) for t in view.outer_norm.constants(total.shape[1], x))
    P, p = (None if t is None else whole(t).to(wide) for t in view.projection())

    def out(v: Tensor) -> Tensor:
        """What the norm behind the pooler and the projection make of a part of the pooled vector."""
        v = v * outer_scale.reshape(-1, *[1] * (v.ndim - 1)) * outer_gamma
        return v if P is None else v @ P

    # What belongs to no unit (means, betas, biases) is dealt out in equal shares; the MLP behind the pooler
    # takes none.
    level = torch.einsum("nht,nt->nh", scaled, mean)
    common = pooler.project(pooler.values(beta - gamma * level[..., None]), bias=True) - outer_mean[:, None]
    common = out(common) + (outer_beta if P is None else outer_beta @ P) + (0 if p is None else p)
    share = 2 * view.layout.layers + 1

    z = {}
    for kind, of_kind in terms.items():
        if kind == "pool":
            units = out(mlp)[:, None]
        elif kind == "head":
            units = _heads(view, pooler, of_kind, scaled, gamma, out) + common[:, None] / (
                share * view.layout.heads
            )
        else:
            mixed = torch.cat([torch.einsum("nht,ntrw->nrhw", scaled.to(t.dtype), t) for t in of_kind], dim=1)
            units = out(pooler.project(pooler.values(mixed.to(wide) * gamma))) + common[:, None] / share
        z[kind] = units.to(x.dtype)
    return z


def _heads(
    view: PooledTower,
    pooler: AttentionPooler,
    coordinates: list[Tensor],
    scaled: Tensor,
    gamma: Tensor,
    out: Callable[[Tensor], Tensor],
) -> Tensor:
    """x_u of all heads without the common part, layer by layer: [N, L*H, D]."""
    mass = scaled.sum(-1)[:, None, :, None]  # [N, 1, pooling heads, 1]
    made = []
    for layer, z in enumerate(coordinates):
        maps = stream_maps(view, layer)
        A, b = maps.A.to(gamma.dtype) * gamma, maps.b.to(gamma.dtype) * gamma
        mixed = torch.einsum("nht,ntrc->nrhc", scaled.to(z.dtype), z).to(gamma.dtype)
        values = torch.einsum("nrhc,rchv->nrhv", mixed, pooler.fold(A))
        biases = pooler.values(b[:, None, :].expand(-1, pooler.heads, -1))  # [H, pooling heads, head width]
        made.append(out(pooler.project(values + mass * biases)))
    return torch.cat(made, dim=1)
