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

from residual_kernels.towers.foreign import Foreign, Submodule
from residual_kernels.towers.layout import UnitLayout
from residual_kernels.towers.norm import Norm, known_norm, norm_of
from residual_kernels.towers.plain_linear import objection
from residual_kernels.towers.pooling import AttentionPooler
from residual_kernels.towers.transformer import (
    ATTENTION,
    AVERAGE,
    FIRST,
    NORMED_AVERAGE,
    BlockEdit,
    TransformerTower,
)
from residual_kernels.towers.view import OutProjection, UnsupportedTowerError, registered_name
from residual_kernels.towers.wrappers import around

LOOKED_FOR = (
    "forward_features and forward_head, or a trunk that has them (timm's towers, open_clip's TimmModel)"
)
SUPPORTED = (
    "supported are timm's ViTs with one residual stream (vit, deit, beit, eva, dinov2, dinov3, siglip, "
    "pe, vitamin ...) with class-token, average or attention pooling and a linear head or none"
)

_TRUNK_PARTS = {
    "patch_embed",
    "pos_drop",
    "patch_drop",
    "norm_pre",
    "rope",
    "shared_rel_pos",
    "rel_pos_bias",
    "blocks",
    "norm",
    "attn_pool",
    "fc_norm",
    "head_drop",
    "head",
    "head_dist",
}
_BLOCK_PARTS = {
    "norm1",
    "attn",
    "ls1",
    "drop_path1",
    "norm2",
    "mlp",
    "ls2",
    "drop_path2",
    "gamma_1",
    "gamma_2",
}
_ATTENTION_PARTS = {
    "qkv",
    "q_proj",
    "k_proj",
    "v_proj",
    "q_norm",
    "k_norm",
    "attn_drop",
    "norm",
    "gate",
    "proj",
    "proj_drop",
    "rel_pos",
    "q_bias",
    "v_bias",
    "relative_position_bias_table",
}
_POOLER_PARTS = {"latent", "q", "kv", "q_norm", "k_norm", "proj", "proj_drop", "norm", "mlp"}


def recognises(tower: nn.Module) -> bool:
    """Whether `tower` is of this family, supported or not."""
    trunk = getattr(tower, "trunk", tower)
    return hasattr(trunk, "forward_features") and hasattr(trunk, "forward_head")


def _refuse(reason: str) -> UnsupportedTowerError:
    return UnsupportedTowerError(f"this tower has no exact units here: {reason}; {SUPPORTED}")


def _parts(module: nn.Module) -> set[str]:
    """Names of a module's own children and parameters that are there and do something."""
    children = {name for name, child in module.named_children() if not isinstance(child, nn.Identity)}
    return children | {name for name, _ in module.named_parameters(recurse=False)}


def _check_trunk(trunk: Foreign) -> None:
    kind = type(trunk).__name__
    stages = [name for name in ("stages", "layers", "layer1", "stages_0") if hasattr(trunk, name)]
    if stages:
        raise _refuse(
            f"{kind} is hierarchical ({stages[0]}): its stages change the stream's width and resolution, "
            "so no residual stream runs from its embedding to its output"
        )
    if not hasattr(trunk, "patch_embed") or not isinstance(
        getattr(trunk, "blocks", None), nn.Sequential | nn.ModuleList
    ):
        raise _refuse(f"{kind} lacks patch_embed, or blocks in a row")
    tokens = {"cls_token", "reg_token", "dist_token", "pos_embed"}
    if unknown := _parts(trunk) - _TRUNK_PARTS - tokens:
        raise _refuse(f"{kind} has unknown parts {', '.join(sorted(unknown))}")
    for index, block in enumerate(trunk.blocks):
        _check_block(index, block)
    shapes = {(b.attn.num_heads, tuple(b.attn.proj.weight.shape), _is_post_norm(b)) for b in trunk.blocks}
    if len(shapes) != 1:
        raise _refuse(f"{kind} has blocks of different shapes ({len(shapes)} kinds)")


def _check_block(index: int, block: Foreign) -> None:
    attn: Foreign = getattr(block, "attn", block)
    if (wrapped := around(block) or around(attn)) is not None:
        raise _refuse(f"block {index} is wrapped by {wrapped}")
    parts = _parts(block)
    if lacking := {"norm1", "attn", "norm2", "mlp"} - {name for name, _ in block.named_children()}:
        raise _refuse(
            f"block {index} ({type(block).__name__}) lacks {', '.join(sorted(lacking))}: parallel branches "
            "are not taken apart"
        )
    if unknown := parts - _BLOCK_PARTS:
        raise _refuse(f"block {index} has unknown parts {', '.join(sorted(unknown))}")
    attn = block.attn
    if unknown := _parts(attn) - _ATTENTION_PARTS:
        raise _refuse(
            f"attention of block {index} ({type(attn).__name__}) has unknown parts "
            f"{', '.join(sorted(unknown))}"
        )
    if getattr(attn, "qkv", None) is None and getattr(attn, "q_proj", None) is None:
        raise _refuse(f"attention of block {index} has neither qkv nor q_proj")
    if (why := objection(attn.proj)) is not None:
        raise _refuse(f"proj of attention in block {index} {why}")
    if _reads_qkv(attn) and (why := objection(attn.qkv)) is not None:
        raise _refuse(f"qkv of attention in block {index} {why}")
    if _is_post_norm(block) and norm_of(block.norm1) is None:
        raise _refuse(f"the norm behind attention of block {index} is {type(block.norm1).__name__}")


def _is_post_norm(block: Foreign) -> bool:
    """Whether norms stand behind the branches: timm registers a block's parts in the order in which they
    run."""
    names = [name for name, _ in block.named_children()]
    return names.index("attn") < names.index("norm1")


def _check_pooling(trunk: Foreign) -> None:
    pooler, pool = getattr(trunk, "attn_pool", None), trunk.global_pool
    if pooler is not None:
        if unknown := _parts(pooler) - _POOLER_PARTS or {"latent", "kv"} - _parts(pooler):
            raise _refuse(
                f"its attention pooling ({type(pooler).__name__}) has or lacks {', '.join(sorted(unknown))}"
            )
        read = [pooler.kv, *([] if isinstance(pooler.proj, nn.Identity) else [pooler.proj])]
        if whys := [why for why in map(objection, read) if why is not None]:
            raise _refuse(f"a layer of its attention pooling {whys[0]}")
        if pooler.latent_len != 1 or pooler.pool not in ("token", "avg"):
            raise _refuse(f"its attention pooling has {pooler.latent_len} latents, pooled by {pooler.pool!r}")
    elif pool not in ("token", "avg"):
        reason = "there is no pooled embedding to decompose" if not pool else "a maximum is no sum"
        raise _refuse(f"its pooling is {pool!r}: {reason}")
    norms = {name: getattr(trunk, name, nn.Identity()) for name in ("norm", "fc_norm")}
    for name, norm in norms.items():
        if norm_of(norm) is None:
            raise _refuse(
                f"the final norm {name} is {type(norm).__name__}, neither LayerNorm nor an RMS norm"
            )
    if pooler is None and all(not isinstance(norm, nn.Identity) for norm in norms.values()):
        raise _refuse("it normalises twice, before and after pooling")


def _check_head(tower: Foreign, trunk: Foreign) -> None:
    if not isinstance(trunk.head, nn.Identity) and (why := objection(trunk.head)) is not None:
        raise _refuse(f"its head {why}")
    if hasattr(trunk, "head_dist") and not (
        isinstance(trunk.head, nn.Identity) and isinstance(trunk.head_dist, nn.Identity)
    ):
        raise _refuse(
            "two classifiers read two tokens (head, head_dist); reset_classifier(0) makes it an embedding"
        )
    if tower is not trunk:
        outer = {name: part for name, part in tower.head.named_children() if not isinstance(part, nn.Dropout)}
        if set(outer) - {"proj"}:
            found = ", ".join(f"{name} ({type(part).__name__})" for name, part in outer.items())
            raise _refuse(f"its head is not linear: {found}")
        if outer and (why := objection(outer["proj"])) is not None:
            raise _refuse(f"proj of its head {why}")


def _rotate(attn: Foreign, x: Tensor, rope: Tensor | None, like: Tensor) -> Tensor:
    """Rotary position embedding of queries or keys [N, H, tokens, C], as timm applies it:
    not to prefix tokens."""
    if rope is None:
        return x
    from timm.layers import apply_rot_embed_cat

    prefix = attn.num_prefix_tokens
    turned = apply_rot_embed_cat(x[:, :, prefix:], rope, half=getattr(attn, "rotate_half", False))
    return torch.cat([x[:, :, :prefix], turned], dim=2).type_as(like)


def _reads_qkv(attn: Foreign) -> bool:
    """Whether the attention reads the weight of `qkv` instead of calling it: EVA and BEiT,
    whose biases are apart."""
    return getattr(attn, "q_bias", None) is not None and not getattr(attn, "qkv_bias_separate", False)


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
    if not _reads_qkv(attn) and not (first_only and type(attn.qkv) is nn.Linear):
        called = attn.qkv(x) + bias if apart else attn.qkv(x)
        q, k, v = called.chunk(3, dim=-1)
        return (q[:, :1] if first_only else q), k, v
    weight = attn.qkv.weight
    if not first_only:
        q, k, v = F.linear(x, weight, bias).chunk(3, dim=-1)
        return q, k, v
    size = len(weight) // 3
    q = F.linear(first, weight[:size], None if bias is None else bias[:size])
    k, v = F.linear(x, weight[size:], None if bias is None else bias[size:]).chunk(2, dim=-1)
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
        _check_trunk(trunk)
        _check_pooling(trunk)
        _check_head(module, trunk)
        self.module = module
        self.name = f"timm.{type(trunk).__name__}"
        attn = trunk.blocks[0].attn
        self.post_norm = _is_post_norm(trunk.blocks[0])
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
