"""Exact units of timm's ViTs, alone or as the trunk of open_clip's TimmModel.

One structure covers VisionTransformer, Eva (EVA01, EVA02, PE, DINOv3), Beit and VisionTransformerRelPos:
`patch_embed` (of whatever convolutions), `blocks` of norm1, attn, norm2, mlp, and a head. Attention is
written out here, because z is what enters its `proj`; everything else is timm's own code. Nothing is hooked,
swapped or written: the tower is read.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from residual_kernels.ops import onednn
from residual_kernels.towers.foreign import Foreign, Submodule
from residual_kernels.towers.layout import UnitLayout
from residual_kernels.towers.norm import Norm, known_norm, norm_of
from residual_kernels.towers.pooling import AttentionPooler
from residual_kernels.towers.timm_structure import (
    check_head,
    check_pooling,
    check_trunk,
    is_post_norm,
    reads_qkv,
)
from residual_kernels.towers.transformer import (
    ATTENTION,
    AVERAGE,
    FIRST,
    NORMED_AVERAGE,
    BlockEdit,
    TransformerTower,
)
from residual_kernels.towers.view import OutProjection, registered_name

LOOKED_FOR = (
    "forward_features and forward_head, or a trunk that has them (timm's towers, open_clip's TimmModel)"
)


def recognises(tower: nn.Module) -> bool:
    """Whether `tower` is of this family, supported or not."""
    trunk = getattr(tower, "trunk", tower)
    return hasattr(trunk, "forward_features") and hasattr(trunk, "forward_head")


def _rotate(attn: Foreign, x: Tensor, rope: Tensor | None, like: Tensor) -> Tensor:
    """Rotary position embedding of queries or keys [N, H, tokens, C], as timm applies it:
    not to prefix tokens."""
    if rope is None:
        return x
    from timm.layers import apply_rot_embed_cat

    prefix = attn.num_prefix_tokens
    turned = apply_rot_embed_cat(x[:, :, prefix:], rope, half=getattr(attn, "rotate_half", False))
    return torch.cat([x[:, :, :prefix], turned], dim=2).type_as(like)


def _queries_keys_values(attn: Foreign, x: Tensor, first_only: bool) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [N, tokens, ...] before they are split into heads;
    with `first_only` q of the first token alone."""
    first = x[:, :1] if first_only else x
    if getattr(attn, "qkv", None) is None:
        return attn.q_proj(first), attn.k_proj(x), attn.v_proj(x)
    bias = getattr(attn.qkv, "bias", None)
    apart = getattr(attn, "q_bias", None) is not None
    if apart:  # EVA and BEiT keep the biases apart; keys have none
        bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    if not reads_qkv(attn) and not (first_only and type(attn.qkv) is nn.Linear):
        called = attn.qkv(x) + bias if apart else attn.qkv(x)
        q, k, v = called.chunk(3, dim=-1)
        return (q[:, :1] if first_only else q), k, v
    weight = attn.qkv.weight
    if not first_only:
        q, k, v = onednn.linear(x, weight, bias).chunk(3, dim=-1)
        return q, k, v
    size = len(weight) // 3
    q = onednn.linear(first, weight[:size], None if bias is None else bias[:size])
    k, v = onednn.linear(x, weight[size:], None if bias is None else bias[size:]).chunk(2, dim=-1)
    return q, k, v


def _head_inputs(
    attn: Foreign, x: Tensor, rope: Tensor | None, bias: Tensor | None, first_only: bool
) -> Tensor:
    """What attention feeds to its output projection: [N, tokens, H*C],
    or [N, 1, H*C] for the first token alone."""
    rows, heads = x.shape[0], attn.num_heads  # len() would fix the batch size of an exported graph
    q, k, v = _queries_keys_values(attn, x, first_only)
    q = q.reshape(rows, q.shape[1], heads, -1).transpose(1, 2)
    width = q.shape[-1]
    k = k.reshape(rows, k.shape[1], -1, width).transpose(1, 2)
    v = v.reshape(rows, v.shape[1], -1, width).transpose(1, 2)
    if hasattr(attn, "q_norm"):
        q, k = attn.q_norm(q), attn.k_norm(k)
    k = _rotate(attn, k, rope, v)
    q = q.type_as(v) if first_only else _rotate(attn, q, rope, v)
    if k.shape[1] != heads:  # grouped queries
        k, v = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (k, v))
    if getattr(attn, "rel_pos", None) is not None:
        bias = attn.rel_pos.get_bias()
    elif getattr(attn, "relative_position_bias_table", None) is not None:
        bias = attn._get_rel_pos_bias() if bias is None else attn._get_rel_pos_bias() + bias
    if bias is not None and first_only:
        bias = bias[..., :1, :]
    drop = attn.attn_drop.p if attn.training else 0.0
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=drop)
    out = out.transpose(1, 2).flatten(2)
    out = attn.norm(out) if hasattr(attn, "norm") else out
    if getattr(attn, "gate", None) is not None:
        out = out * attn.gate(x[:, :1] if first_only else x).sigmoid()
    return out


def _scaled(block: Foreign, index: int, x: Tensor) -> Tensor:
    """LayerScale of one branch (1 attention, 2 MLP), kept as a module or as a parameter."""
    gamma = getattr(block, f"gamma_{index}", None)
    if gamma is not None:
        return gamma * x
    return getattr(block, f"ls{index}", nn.Identity())(x)


class _Block(Protocol):
    """What is read of a block that has passed the check;
    LayerScale stands at `ls1` or `gamma_1` where there is one."""

    norm1: Foreign
    attn: Foreign
    norm2: Submodule
    mlp: Submodule


class TimmTower(TransformerTower):
    """The :class:`~residual_kernels.towers.Tower` view of a timm ViT."""

    module: Foreign

    def __init__(self, module: Foreign):
        trunk: Foreign = getattr(module, "trunk", module)
        check_trunk(trunk)
        check_pooling(trunk)
        check_head(module, trunk)
        self.module = module
        self.name = f"timm.{type(trunk).__name__}"
        attn = trunk.blocks[0].attn
        self.post_norm = is_post_norm(trunk.blocks[0])
        self.width = attn.proj.out_features
        self.head_width = attn.proj.in_features // attn.num_heads + self.post_norm
        self.class_token, self.prefix = trunk.cls_token is not None, trunk.num_prefix_tokens
        widths = [linear.out_features for linear in self._linears()]
        self.dim = widths[-1] if widths else trunk.num_features
        pool = trunk.attn_pool if getattr(trunk, "attn_pool", None) is not None else None
        self.layout = UnitLayout(len(trunk.blocks), attn.num_heads, getattr(pool, "mlp", None) is not None)
        self._set_pooling(trunk, pool)

    def _set_pooling(self, trunk: Foreign, pool: Foreign) -> None:
        self.span = (
            slice(None)
            if getattr(trunk, "pool_include_prefix", pool is not None)
            else slice(self.prefix, None)
        )
        if pool is not None:
            self.pooling, self.head_width = ATTENTION, self.dim
        elif hasattr(trunk, "head_dist"):  # distilled DeiT: the mean of its two tokens
            self.pooling, self.span = NORMED_AVERAGE, slice(0, 2)
        elif trunk.global_pool == "token":
            self.pooling = FIRST
        else:
            self.pooling = NORMED_AVERAGE if isinstance(trunk.fc_norm, nn.Identity) else AVERAGE

    @property
    def trunk(self) -> Foreign:
        return getattr(self.module, "trunk", self.module)

    def _linears(self) -> Iterator[nn.Linear]:
        """The linear maps behind the pooled vector, in order."""
        if isinstance(self.trunk.head, nn.Linear):
            yield self.trunk.head
        if self.module is not self.trunk:
            yield from (part for part in self.module.head.children() if isinstance(part, nn.Linear))

    @property
    def stem_weight(self) -> Tensor:
        return next(self.trunk.patch_embed.parameters())

    @property
    def image_size(self) -> tuple[int, int] | None:
        embed = self.trunk.patch_embed
        return None if not embed.strict_img_size or embed.img_size is None else tuple(embed.img_size)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.trunk.blocks

    @property
    def norm(self) -> Norm:
        trunk = self.trunk
        outer = self.pooling != ATTENTION and isinstance(trunk.norm, nn.Identity)
        return known_norm(trunk.fc_norm if outer else trunk.norm)

    @property
    def outer_norm(self) -> Norm:
        return known_norm(self.trunk.fc_norm)

    def pooler(self) -> AttentionPooler:
        pool = self.trunk.attn_pool
        query = pool.q_norm(pool.q(pool.latent).unflatten(2, (pool.num_heads, -1)))[0, 0]
        key, value = pool.kv.weight.chunk(2)
        biases = (None, None) if pool.kv.bias is None else pool.kv.bias.chunk(2)
        eye = torch.eye(len(value), dtype=value.dtype, device=value.device)
        out = (pool.proj.weight, pool.proj.bias) if isinstance(pool.proj, nn.Linear) else (eye, None)
        return AttentionPooler(query, (key, biases[0]), (value, biases[1]), out, pool.k_norm)

    def pool_mlp(self, pooled: Tensor) -> Tensor:
        pool = self.trunk.attn_pool
        return pool.mlp(pool.norm(pooled))

    def projection(self) -> tuple[Tensor | None, Tensor | None]:
        P: Tensor | None = None
        p: Tensor | None = None
        for linear in self._linears():
            weight = linear.weight if P is None else linear.weight.double()
            if p is not None:
                p = p.double() @ weight.double().T
            P = weight.T if P is None else P.double() @ weight.T
            if linear.bias is not None:
                p = linear.bias if p is None else p + linear.bias.double()
        return P, p

    def out_projection(self, layer: int) -> OutProjection:
        block: _Block = self.trunk.blocks[layer]
        proj = block.attn.proj
        if self.post_norm:
            return OutProjection(proj.weight, proj.bias, norm=norm_of(block.norm1))
        gamma = getattr(block, "gamma_1", None)
        gamma = getattr(getattr(block, "ls1", None), "gamma", None) if gamma is None else gamma
        return OutProjection(proj.weight, proj.bias, gamma)

    def constant_parameters(self) -> dict[str, nn.Parameter]:
        of_block = {"attn.proj.weight", "attn.proj.bias", "ls1.gamma", "gamma_1"}
        of_block |= {"norm1.weight", "norm1.bias"} if self.post_norm else set()
        prefix = "" if self.module is self.trunk else "trunk."
        found = {}
        for name, p in self.module.named_parameters():
            part, _, rest = name.removeprefix(prefix).partition(".")
            if part == "blocks":
                wanted = registered_name(rest.partition(".")[2]) in of_block
            else:
                wanted = part in ("norm", "fc_norm", "head")
            if wanted:
                found[name] = p
        return found

    @property
    def recomputes(self) -> bool:
        return self.trunk.grad_checkpointing

    def drops(self) -> list[str]:
        found = []
        for module in self.module.modules():
            rate = module.p if isinstance(module, nn.Dropout) else getattr(module, "drop_prob", 0.0)
            if rate or getattr(module, "prob", 0.0):  # of patches
                found.append(f"parts ({type(module).__name__})")
        return list(dict.fromkeys(found))

    def unsteady(self) -> list[str]:
        found = super().unsteady()
        modules = list(self.module.modules())
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in modules):
            found.append("normalises by the batch")
        augmented = ("shift_coords", "jitter_coords", "rescale_coords")
        if any(getattr(module, name, None) for module in modules for name in augmented):
            found.append("moves its positions at random")
        return found

    def inexact(self) -> list[str]:
        trunk = self.trunk
        dropouts = [trunk.head_drop, *(block.attn.proj_drop for block in trunk.blocks)]
        dropouts += [] if self.module is trunk else self.module.head.children()
        paths = [
            getattr(block, name, None) for block in trunk.blocks for name in ("drop_path1", "drop_path2")
        ]
        found = ["dropout behind attention or the final norm"] * any(getattr(m, "p", 0.0) for m in dropouts)
        return found + ["drop path"] * any(getattr(path, "drop_prob", 0.0) for path in paths)

    def check_images(self, images: Tensor) -> None:
        super().check_images(images)
        embed = self.trunk.patch_embed
        if self.image_size is None and not embed.dynamic_img_pad:
            patch = tuple(embed.feat_ratio(as_scalar=False))
            if images.shape[2] % patch[0] or images.shape[3] % patch[1]:
                raise ValueError(
                    f"this tower takes images whose sides are multiples of {patch[0]} x {patch[1]} pixels; "
                    f"got {images.shape[2]} x {images.shape[3]}"
                )

    def token_count(self, images: Tensor) -> int:
        height, width = self.trunk.patch_embed.dynamic_feat_size(tuple(images.shape[2:]))
        return height * width + self.prefix

    def embed(self, images: Tensor) -> tuple[Tensor, Any]:
        trunk = self.trunk
        x, rope, bias = trunk.patch_embed(images), None, None
        if hasattr(trunk, "_pos_embed"):
            x = trunk._pos_embed(x)
            if isinstance(x, tuple):  # Eva, whose patch dropout is in there
                x, rope = x
            else:
                x = trunk.patch_drop(x)
            return trunk.norm_pre(x), (rope, bias)
        if trunk.cls_token is not None:
            x = torch.cat([trunk.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        if getattr(trunk, "pos_embed", None) is not None:
            x = x + trunk.pos_embed
        x = trunk.pos_drop(x) if hasattr(trunk, "pos_drop") else x
        if getattr(trunk, "shared_rel_pos", None) is not None:
            bias = trunk.shared_rel_pos.get_bias()
        elif getattr(trunk, "rel_pos_bias", None) is not None:
            bias = trunk.rel_pos_bias()
        return x, (rope, bias)

    def block(
        self, index: int, x: Tensor, context: Any, first_only: bool, edit: BlockEdit | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        block: _Block = self.trunk.blocks[index]
        rope, bias = context
        if rope is not None and getattr(self.trunk, "rope_mixed", False):
            rope = rope[index]
        z = _head_inputs(block.attn, x if self.post_norm else block.norm1(x), rope, bias, first_only)
        attended = block.attn.proj(z)
        z = z.unflatten(2, (self.layout.heads, -1))
        if self.post_norm:
            z = known_norm(block.norm1).coordinates(z, attended)
            attended = block.norm1(attended)
        else:
            attended = _scaled(block, 1, attended)
        if edit is not None:
            attended = edit(z, attended)
        x = (x[:, :1] if first_only else x) + attended
        mlp = block.norm2(block.mlp(x)) if self.post_norm else _scaled(block, 2, block.mlp(block.norm2(x)))
        return x + mlp, z, mlp

    def finish(self, x: Tensor) -> tuple[Tensor, None]:
        output = self.trunk.forward_head(self.trunk.norm(x))
        return (output if self.module is self.trunk else self.module.head(output)), None
