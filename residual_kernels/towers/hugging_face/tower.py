"""Exact units of transformers' image towers: CLIP, SigLIP, BLIP, ViT,
DINOv2 and whatever is built the same way.

A transformers model returns more than an embedding, and a CLIP's projection lies outside its vision model. So
the tower is an :class:`ImageTower`, which is made of the model's own modules and returns the embedding alone;
a whole model may be given wherever a tower is asked for. transformers is not imported here: models are told
by their parts, whose names have changed over its versions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from residual_kernels.towers.foreign import Foreign
from residual_kernels.towers.hugging_face.image_tower import (
    LAYERS,
    NORM_1,
    NORM_2,
    OUT,
    QKV,
    SELF_ATTENTION,
    ImageTower,
    check_parts,
    first_of,
    has_class_token,
    heads_of,
    image_tower,
    part_of,
    query_module,
    refusal,
    source_of,
)
from residual_kernels.towers.layout import UnitLayout
from residual_kernels.towers.norm import Norm
from residual_kernels.towers.pooling import AttentionPooler, multihead_pooler
from residual_kernels.towers.transformer import ATTENTION, BlockEdit, TransformerTower
from residual_kernels.towers.view import OutProjection
from residual_kernels.towers.wrappers import inner as inside

LOOKED_FOR = "vision_model or embeddings (transformers' CLIP, SigLIP, BLIP, ViT, DINOv2)"


def recognises(tower: nn.Module) -> bool:
    """Whether `tower` is of this family, supported or not."""
    if isinstance(tower, ImageTower) or isinstance(getattr(tower, "vision_model", None), nn.Module):
        return True
    inner = getattr(tower, getattr(tower, "base_model_prefix", None) or "", tower)
    return any(isinstance(getattr(part, "embeddings", None), nn.Module) for part in (tower, inner))


def _head_inputs(attn: Foreign, x: Tensor, first_only: bool) -> Tensor:
    """What attention feeds to its output projection: [N, tokens or 1, H, C]."""
    asking, heads = x[:, :1] if first_only else x, heads_of(attn)
    if hasattr(attn, "qkv") and not (first_only and type(attn.qkv) is nn.Linear):
        q, k, v = attn.qkv(x).chunk(3, dim=-1)
        q = q[:, :1] if first_only else q
    elif hasattr(attn, "qkv"):
        weights = attn.qkv.weight.chunk(3)
        biases = (None, None, None) if attn.qkv.bias is None else attn.qkv.bias.chunk(3)
        rows = zip((asking, x, x), weights, biases, strict=True)
        q, k, v = (F.linear(row, weight, bias) for row, weight, bias in rows)
    else:
        q, k, v = (part_of(attn, names)(row) for names, row in zip(QKV, (asking, x, x), strict=True))
    attn = query_module(attn)
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    chosen = getattr(getattr(attn, "config", None), "_attn_implementation", None) or "sdpa"
    scale = getattr(attn, "scaling", getattr(attn, "scale", q.shape[-1] ** -0.5))
    if chosen == "eager":
        share = (q @ k.transpose(-1, -2) * scale).softmax(
            -1, dtype=torch.promote_types(q.dtype, torch.float32)
        )
        return (share.to(q.dtype) @ v).transpose(1, 2)
    if chosen == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS[chosen](attn, q, k, v, None, scaling=scale, dropout=0.0)[0]


def _rate(dropout: nn.Module | float | None) -> float:
    """The probability of a dropout that is a module, a number, or absent."""
    if isinstance(dropout, nn.Module):
        return getattr(dropout, "p", getattr(dropout, "drop_prob", 0.0)) or 0.0
    return dropout or 0.0


def _mlp(layer: Foreign, x: Tensor) -> Tensor:
    return layer.mlp(x) if hasattr(layer, "mlp") else layer.output.dense(layer.intermediate(x))


class HuggingFaceTower(TransformerTower):
    """The :class:`~residual_kernels.towers.Tower` view of the image tower of a transformers model."""

    module: Foreign

    name = "transformers.ImageTower"

    def __init__(self, module: nn.Module):
        tower: Foreign = image_tower(module)
        self.module = tower
        if isinstance(inside(module), ImageTower):  # its parts may have changed since it was made of them
            check_parts("this model", tower.parts())
        attn = part_of(tower.layers[0], SELF_ATTENTION)
        self.width = tower.norm.normalized_shape[0]
        self.layout = UnitLayout(len(tower.layers), heads_of(attn), pool=tower.pooler is not None)
        self.head_width = part_of(attn, OUT).in_features // self.layout.heads
        self.dim = self.width if tower.projection is None else tower.projection.out_features
        if tower.pooler is not None:
            self.pooling, self.span, self.head_width = ATTENTION, slice(None), self.dim
        embeddings = tower.embeddings
        registers = getattr(embeddings, "register_tokens", None)
        distilled = getattr(embeddings, "distillation_token", None) is not None
        self.class_token = has_class_token(embeddings)
        self.prefix = self.class_token + distilled + (0 if registers is None else registers.shape[1])

    @property
    def stem_weight(self) -> Tensor:
        return self._stem.weight

    @property
    def _stem(self) -> nn.Conv2d:
        return next(part for part in self.module.embeddings.modules() if isinstance(part, nn.Conv2d))

    @property
    def image_size(self) -> tuple[int, int] | None:
        return self.module.image_size

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.module.layers

    @property
    def norm(self) -> Norm:
        return Norm(self.module.norm)

    def pooler(self) -> AttentionPooler:
        return multihead_pooler(self.module.pooler.attention, self.module.pooler.probe[0, 0])

    def pool_mlp(self, pooled: Tensor) -> Tensor:
        return self.module.pooler.mlp(self.module.pooler.layernorm(pooled))

    def projection(self) -> tuple[Tensor | None, Tensor | None]:
        layer = self.module.projection
        return (None, None) if layer is None else (layer.weight.T, layer.bias)

    def out_projection(self, layer: int) -> OutProjection:
        out = part_of(part_of(self.module.layers[layer], SELF_ATTENTION), OUT)
        gamma = getattr(getattr(self.module.layers[layer], "layer_scale1", None), "lambda1", None)
        return OutProjection(out.weight, out.bias, gamma)

    def constant_parameters(self) -> dict[str, nn.Parameter]:
        folded = {
            id(p)
            for part in (self.module.norm, self.module.projection)
            if part is not None
            for p in part.parameters()
        }
        for (
            layer
        ) in self.module.layers:  # parameters of the modules: a parametrised weight is computed from them
            out, scale = part_of(part_of(layer, SELF_ATTENTION), OUT), getattr(layer, "layer_scale1", None)
            for part in (out, scale):
                folded |= set() if part is None else {id(p) for p in part.parameters()}
        return {name: p for name, p in self.module.named_parameters() if id(p) in folded}

    @property
    def recomputes(self) -> bool:
        # as transformers does: per layer, and only in training mode
        layers = self.module.layers
        return self.module.training and any(
            getattr(layer, "gradient_checkpointing", False) for layer in layers
        )

    def drops(self) -> list[str]:
        return []

    def inexact(self) -> list[str]:
        found = []
        for layer in self.module.layers:
            settings = query_module(part_of(layer, SELF_ATTENTION))
            if any(
                _rate(getattr(settings, name, 0.0))
                for name in ("dropout", "attention_dropout", "dropout_prob")
            ):
                found.append("dropout of attention weights")
            if _rate(first_of(layer, ("dropout", "output.dropout"))):
                found.append("dropout of hidden states")
            if _rate(getattr(layer, "drop_path", None)):
                found.append("drop path")
        return list(dict.fromkeys(found))

    def own(self, images: Tensor) -> Tensor:
        tower = self.module
        model, source = source_of(tower)
        if source is None or first_of(source, LAYERS) is not tower.layers:
            return super().own(images)
        if model is not None and hasattr(model, "get_image_features"):
            features = model.get_image_features(pixel_values=images)
            return getattr(features, "pooler_output", features)
        output = source(pixel_values=images)
        if not hasattr(output, "last_hidden_state"):
            raise refusal(f"{type(source).__name__} gives {type(output).__name__} instead of an embedding")
        # Then its tokens are, and the first is the embedding.
        normed = tower.pre_norm is None and tower.pooler is None
        pooled = output.last_hidden_state[:, 0] if normed else output.pooler_output
        return pooled if tower.projection is None else tower.projection(pooled)

    def beside(self) -> list[nn.Module]:
        model, source = source_of(self.module)
        within = set(self.module.modules())
        found = [] if source is None else [part for part in source.modules() if part not in within]
        return found if model is None or model is source else [model, *found]

    def afresh(self) -> TransformerTower:
        model, source = source_of(self.module)
        if model is None or source is None:
            return super().afresh()
        fresh = HuggingFaceTower(model)
        if fresh.module is not self.module:
            ours, theirs = self.module.parts(), fresh.module.parts()
            other = [name for name in ours if ours[name] is not theirs[name]]
            raise refusal(f"{type(model).__name__} has other parts than it had ({', '.join(other)})")
        return fresh

    def token_count(self, images: Tensor) -> int:
        stem = self._stem
        height, width = (size // step for size, step in zip(images.shape[2:], stem.stride, strict=True))
        return self.prefix + height * width

    def embed(self, images: Tensor) -> tuple[Tensor, None]:
        return self.module.embed(images), None

    def block(
        self, index: int, x: Tensor, context: None, first_only: bool, edit: BlockEdit | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        layer = self.module.layers[index]
        attn = part_of(layer, SELF_ATTENTION)
        z = _head_inputs(attn, part_of(layer, NORM_1)(x), first_only)
        attended = part_of(attn, OUT)(z.flatten(2))
        attended = layer.layer_scale1(attended) if hasattr(layer, "layer_scale1") else attended
        if edit is not None:
            attended = edit(z, attended)
        x = (x[:, :1] if first_only else x) + attended
        mlp = _mlp(layer, part_of(layer, NORM_2)(x))
        mlp = layer.layer_scale2(mlp) if hasattr(layer, "layer_scale2") else mlp
        return x + mlp, z, mlp

    def finish(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        tokens = None
        if self.returns_tokens:  # last_hidden_state: CLIP's own is not normed, the others' is
            tokens = self.module.norm(x) if self.module.pre_norm is None else x
        return self.module.pool(x), tokens
