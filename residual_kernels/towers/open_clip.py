"""Exact units of open_clip's own VisionTransformer (and of any module built the same way).

Blocks are run here, by structure, with `scaled_dot_product_attention`, for both of open_clip's attentions:
`nn.MultiheadAttention` and its own `Attention`, which share parameter names. z leaves at the pooled token
only. Nothing is hooked, swapped or written: the tower is read.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn
from torch.nn import functional as F

from residual_kernels.ops import onednn
from residual_kernels.towers.foreign import Foreign, Submodule
from residual_kernels.towers.layout import UnitLayout
from residual_kernels.towers.norm import Norm
from residual_kernels.towers.plain_linear import COMPUTED, no_norm, not_numbers, objection
from residual_kernels.towers.pooling import AttentionPooler, multihead_pooler
from residual_kernels.towers.transformer import (
    ATTENTION,
    AVERAGE,
    NORMED_AVERAGE,
    BlockEdit,
    TransformerTower,
)
from residual_kernels.towers.view import OutProjection, UnsupportedTowerError, registered_name
from residual_kernels.towers.wrappers import around

LOOKED_FOR = "conv1 and transformer.resblocks (open_clip's own VisionTransformer)"
SUPPORTED = (
    "supported are pre-norm ViTs of open_clip's own VisionTransformer with class-token, average or attention "
    "pooling: all 56 of its configurations, such as ViT-B-32, ViT-L-14, ViT-bigG-14 or coca_ViT-L-14"
)

_BLOCK_PARTS = {"ln_1", "attn", "ln_attn", "ls_1", "ln_2", "mlp", "ls_2"}
_ATTENTION_PARTS = {"out_proj", "ln_q", "ln_k", "ln_inner", "attn_drop", "out_drop"}


def recognises(tower: nn.Module) -> bool:
    """Whether `tower` is of this family, supported or not."""
    return hasattr(tower, "resblocks") or (hasattr(tower, "conv1") and not hasattr(tower, "forward_features"))


def _refuse(reason: str) -> UnsupportedTowerError:
    return UnsupportedTowerError(f"this tower has no exact units here: {reason}; {SUPPORTED}")


def _check_structure(tower: Foreign) -> None:
    kind = type(tower).__name__
    if hasattr(tower, "layer1"):
        raise _refuse(
            f"{kind} is a convolutional network (layer1 ... layer4 instead of residual attention blocks)"
        )
    needed = (
        "conv1",
        "class_embedding",
        "positional_embedding",
        "ln_pre",
        "transformer",
        "ln_post",
        "proj",
        "_embeds",
    )
    missing = [name for name in needed if not hasattr(tower, name)]
    if missing or not hasattr(tower.transformer, "resblocks"):
        raise _refuse(f"{kind} lacks {', '.join(missing) or 'transformer.resblocks'}")
    if getattr(tower, "attn_pool_contrastive", None) is not None:
        raise _refuse("it pools twice by attention, with no norm between (attn_pool_contrastive)")
    if getattr(tower, "attn_pool", None) is not None and tower.pool_type != "tok":
        raise _refuse(f"it pools by attention and then by {tower.pool_type!r} over the pooler's queries")
    if tower.pool_type not in ("tok", "avg"):
        raise _refuse(f"pool_type is {tower.pool_type!r}: there is no pooled embedding to decompose")
    if tower.proj is not None and (why := not_numbers(tower.proj)) is not None:
        raise _refuse(f"proj {why}")
    if not isinstance(tower.ln_post, nn.LayerNorm):
        raise _refuse(f"the final norm ln_post {no_norm(tower.ln_post, 'not LayerNorm')}")
    for index, block in enumerate(tower.transformer.resblocks):
        _check_block(index, block)


def _check_block(index: int, block: Foreign) -> None:
    attn: Foreign = getattr(block, "attn", block)
    if (wrapped := around(block) or around(attn)) is not None:
        raise _refuse(f"block {index} is wrapped by {wrapped}")
    extra = {name for name, _ in block.named_children()} - _BLOCK_PARTS - COMPUTED
    lacking = {"ln_1", "attn", "ln_2", "mlp"} - {name for name, _ in block.named_children()}
    if extra or lacking:
        found = ", ".join(sorted(extra or lacking))
        raise _refuse(f"block {index} {'has unknown parts' if extra else 'lacks'} {found}")
    if not isinstance(getattr(block, "ln_attn", nn.Identity()), nn.Identity):
        raise _refuse(f"block {index} normalises after attention (ln_attn), so it is not pre-norm")
    attn = block.attn
    extra = {name for name, _ in attn.named_children()} - _ATTENTION_PARTS - COMPUTED
    if extra:
        raise _refuse(f"attention of block {index} has unknown parts {', '.join(sorted(extra))}")
    out = attn.out_proj
    if getattr(attn, "in_proj_weight", None) is None:
        raise _refuse(f"attention of block {index} has no in_proj_weight")
    if (why := objection(out)) is not None:
        raise _refuse(f"out_proj of block {index} {why}")
    if (why := not_numbers(attn.in_proj_weight)) is not None:
        raise _refuse(f"in_proj_weight of block {index} {why}")
    if getattr(attn, "bias_k", None) is not None or getattr(attn, "add_zero_attn", False):
        raise _refuse(f"attention of block {index} adds keys of its own (bias_k or add_zero_attn)")
    if getattr(attn, "logit_scale", None) is not None:
        raise _refuse(f"attention of block {index} is scaled cosine attention")


def _head_inputs(attn: Foreign, x: Tensor, first_only: bool) -> Tensor:
    """What attention feeds to its output projection: [N, tokens, width],
    or [N, 1, width] for the class token alone."""
    rows, tokens, width = x.shape
    queries = 1 if first_only else tokens
    weight, bias = attn.in_proj_weight, attn.in_proj_bias
    if first_only:
        q = onednn.linear(x[:, :1], weight[:width], None if bias is None else bias[:width])
        kv = onednn.linear(x, weight[width:], None if bias is None else bias[width:])
        k, v = kv.chunk(2, dim=-1)
    else:
        q, k, v = onednn.linear(x, weight, bias).chunk(3, dim=-1)
    q = q.reshape(rows, queries, attn.num_heads, -1).transpose(1, 2)
    k = k.reshape(rows, tokens, attn.num_heads, -1).transpose(1, 2)
    v = v.reshape(rows, tokens, attn.num_heads, -1).transpose(1, 2)
    if hasattr(attn, "ln_q"):
        q, k = attn.ln_q(q), attn.ln_k(k)
    out = F.scaled_dot_product_attention(q, k, v)
    if getattr(attn, "head_scale", None) is not None:
        out = out * attn.head_scale
    out = out.transpose(1, 2).reshape(rows, queries, width)
    return attn.ln_inner(out) if hasattr(attn, "ln_inner") else out


class _Block(Protocol):
    """What is read of a block that has passed the check; `ls_1` and `ls_2` where it has LayerScale."""

    ln_1: Submodule
    attn: Foreign
    ln_2: Submodule
    mlp: Submodule


class OpenClipTower(TransformerTower):
    """The :class:`~residual_kernels.towers.Tower` view of an open_clip VisionTransformer."""

    module: Foreign
    name = "open_clip.VisionTransformer"

    def __init__(self, module: Foreign):
        _check_structure(module)
        self.module = module
        blocks = module.transformer.resblocks
        self.width = len(module.class_embedding)
        self.layout = UnitLayout(len(blocks), blocks[0].attn.num_heads)
        self.head_width = self.width // self.layout.heads
        self.dim = module.ln_post.normalized_shape[0] if module.proj is None else module.proj.shape[1]
        if module.attn_pool is not None:
            self.pooling, self.span, self.head_width = ATTENTION, slice(None), self.dim
        elif module.pool_type == "avg":
            self.pooling = AVERAGE if module.final_ln_after_pool else NORMED_AVERAGE

    @property
    def returns_tokens(self) -> bool:  # type: ignore[override]  # the model's own flag
        return self.module.output_tokens

    @property
    def stem_weight(self) -> Tensor:
        return self.module.conv1.weight

    @property
    def image_size(self) -> tuple[int, int]:
        return self.module.image_size

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.module.transformer.resblocks

    @property
    def norm(self) -> Norm:
        return Norm(self.module.ln_post if self.module.attn_pool is None else self.module.attn_pool.ln_k)

    def pooler(self) -> AttentionPooler:
        pool = self.module.attn_pool
        return multihead_pooler(pool.attn, pool.ln_q(pool.query[:1])[0])

    @property
    def outer_norm(self) -> Norm:
        return Norm(self.module.ln_post)

    def projection(self) -> tuple[Tensor | None, None]:
        return self.module.proj, None

    def out_projection(self, layer: int) -> OutProjection:
        block: _Block = self.module.transformer.resblocks[layer]
        gamma = getattr(getattr(block, "ls_1", None), "gamma", None)
        return OutProjection(block.attn.out_proj.weight, block.attn.out_proj.bias, gamma)

    def constant_parameters(self) -> dict[str, nn.Parameter]:
        names = {"ln_post.weight", "ln_post.bias", "proj"}
        found = {name: p for name, p in self.module.named_parameters() if registered_name(name) in names}
        for index, block in enumerate(self.module.transformer.resblocks):
            prefix = f"transformer.resblocks.{index}"
            for name, p in block.named_parameters():
                if name.startswith("attn.out_proj.") or registered_name(name) == "ls_1.gamma":
                    found[f"{prefix}.{name}"] = p
        return found

    @property
    def recomputes(self) -> bool:
        return self.module.transformer.grad_checkpointing

    def drops(self) -> list[str]:
        dropout = getattr(self.module, "patch_dropout", None)
        return ["patches"] if getattr(dropout, "prob", 0.0) > 0 else []

    def token_count(self, images: Tensor) -> int:
        return self.module.positional_embedding.shape[0]

    def embed(self, images: Tensor) -> tuple[Tensor, None]:
        return self.module._embeds(images), None

    def block(
        self, index: int, x: Tensor, context: None, first_only: bool, edit: BlockEdit | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        block: _Block = self.module.transformer.resblocks[index]
        z = _head_inputs(block.attn, block.ln_1(x), first_only)
        attended = onednn.linear(z, block.attn.out_proj.weight, block.attn.out_proj.bias)
        attended = block.ls_1(attended) if hasattr(block, "ls_1") else attended
        z = z.unflatten(2, (self.layout.heads, -1))
        if edit is not None:
            attended = edit(z, attended)
        x = (x[:, :1] if first_only else x) + attended
        mlp = block.mlp(block.ln_2(x))
        mlp = block.ls_2(mlp) if hasattr(block, "ls_2") else mlp
        return x + mlp, z, mlp

    def finish(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        tower = self.module
        pooled, tokens = tower._pool(x)
        output = pooled if tower.proj is None else pooled @ tower.proj
        return output, tokens if tower.output_tokens else None
