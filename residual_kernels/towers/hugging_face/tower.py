"""Exact units of transformers' image towers: CLIP, SigLIP, BLIP, ViT,
DINOv2 and whatever is built the same way.

A transformers model returns more than an embedding, and a CLIP's projection lies outside its vision model. So
the tower is an :class:`ImageTower`, which is made of the model's own modules and returns the embedding alone;
a whole model may be given wherever a tower is asked for. transformers is not imported here: models are told
by their parts, whose names have changed over its versions.
"""

import inspect
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from residual_kernels.towers.foreign import Foreign
from residual_kernels.towers.layout import UnitLayout
from residual_kernels.towers.norm import Norm
from residual_kernels.towers.plain_linear import objection
from residual_kernels.towers.pooling import AttentionPooler, multihead_pooler
from residual_kernels.towers.transformer import ATTENTION, BlockEdit, TransformerTower
from residual_kernels.towers.view import OutProjection, UnsupportedTowerError
from residual_kernels.towers.wrappers import around
from residual_kernels.towers.wrappers import inner as inside

LOOKED_FOR = "vision_model or embeddings (transformers' CLIP, SigLIP, BLIP, ViT, DINOv2)"
SUPPORTED = (
    "supported are CLIPModel, CLIPVisionModelWithProjection, SiglipModel, BlipForImageTextRetrieval, "
    "ViTModel, Dinov2Model, classifiers around these two, and models built the same way"
)

_WHOLE = {  # what may stand beside the vision model of a whole model
    "visual_projection",
    "vision_proj",
    "text_model",
    "text_projection",
    "text_encoder",
    "text_proj",
    "itm_head",
}
_PROJECTIONS = ("visual_projection", "vision_proj")
_LAYERS = ("encoder.layers", "encoder.layer", "layers")
_PRE_NORM = ("pre_layrnorm", "pre_layernorm")
_FINAL_NORM = ("post_layernorm", "layernorm")
_NORM_1 = ("layer_norm1", "layernorm_before", "norm1")
_NORM_2 = ("layer_norm2", "layernorm_after", "norm2")
_ATTENTION = ("self_attn", "attention")
_QKV = (("q_proj", "attention.query"), ("k_proj", "attention.key"), ("v_proj", "attention.value"))
_OUT = ("out_proj", "o_proj", "projection", "output.dense")
_BLOCK_PARTS = {
    *_NORM_1,
    *_NORM_2,
    *_ATTENTION,
    "mlp",
    "intermediate",
    "output",
    "layer_scale1",
    "layer_scale2",
    "drop_path",
    "dropout",
}
_ATTENTION_PARTS = {  # and those of its parts `attention` and `output`
    *_OUT[:3],
    "dropout",
    "qkv",
    "q_proj",
    "k_proj",
    "v_proj",
    "attention",
    "output",
    "query",
    "key",
    "value",
    "dense",
}
_POOLER_PARTS = {"attention", "layernorm", "mlp"}  # beside the parameter `probe`


def _first(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    """The first of these parts that `module` has."""
    for name in names:
        found: Any = module
        for step in name.split("."):
            found = getattr(found, step, None)
        if isinstance(found, nn.Module):
            return found
    return None


def _part(module: nn.Module, names: tuple[str, ...]) -> Foreign:
    """:func:`_first` of a module that has passed the check, so that there is one."""
    return _first(module, names)


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _refuse(reason: str) -> UnsupportedTowerError:
    return UnsupportedTowerError(f"this tower has no exact units here: {reason}; {SUPPORTED}")


class ImageTower(nn.Module):
    """The image side of a transformers model as one module: images [N, 3, H, W] -> embeddings [N, D].

    Its parts are the model's own modules, not copies, so both train, move and load together. The embedding is
    the class token behind the final norm (``last_hidden_state[:, 0]``, CLIP's ``pooler_output``), then the
    projection where the model has one: ``get_image_features`` of a CLIP. SigLIP's is what attention pooling
    (`pooler`) makes of all tokens.
    """

    def __init__(
        self,
        embeddings: nn.Module,
        pre_norm: nn.Module | None,
        layers: nn.ModuleList,
        norm: nn.Module,
        pooler: nn.Module | None,
        projection: nn.Module | None,
    ):
        super().__init__()
        self.embeddings, self.pre_norm, self.layers = embeddings, pre_norm, layers
        self.norm, self.pooler, self.projection = norm, pooler, projection

    def parts(self) -> dict[str, nn.Module | None]:
        """What it was made of, by the names of its arguments."""
        names = ("embeddings", "pre_norm", "layers", "norm", "pooler", "projection")
        return {name: getattr(self, name) for name in names}

    # The mode is the parts': the model that they belong to does not know this module.
    training = property(lambda self: self.embeddings.training, lambda self, mode: None)

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width of its images; None where it interpolates its positions to any size."""
        if "interpolate_pos_encoding" not in inspect.signature(self.embeddings.forward).parameters:
            return None
        held: Foreign = self.embeddings
        places: tuple[Foreign, ...] = (
            held,
            getattr(held, "patch_embeddings", None),
            getattr(held, "config", None),
        )
        size = next(place.image_size for place in places if hasattr(place, "image_size"))
        return (size, size) if isinstance(size, int) else tuple(size)

    def embed(self, images: Tensor) -> Tensor:
        """The stream before the first block, [N, tokens, width]."""
        x = self.embeddings(images)
        if not isinstance(x, Tensor):
            raise _refuse(f"its embeddings give {type(x).__name__} instead of the stream")
        return x if self.pre_norm is None else self.pre_norm(x)

    def pool(self, x: Tensor) -> Tensor:
        """The embedding, from the stream after the last block."""
        pooled = self.norm(x[:, 0]) if self.pooler is None else self.pooler(self.norm(x))
        return pooled if self.projection is None else self.projection(pooled)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images)
        for layer in self.layers:
            asked = inspect.signature(layer.forward).parameters
            x = layer(
                x, **{name: None for name in ("attention_mask", "causal_attention_mask") if name in asked}
            )
            x = x[0] if isinstance(x, tuple) else x
        return self.pool(x)


_towers: "weakref.WeakKeyDictionary[nn.Module, ImageTower]" = weakref.WeakKeyDictionary()
# The model that a tower's parts are of and its vision model, for the check against their own forward. A copy
# of a tower has none.
_sources: "weakref.WeakKeyDictionary[ImageTower, tuple[weakref.ref, weakref.ref]]" = (
    weakref.WeakKeyDictionary()
)


def image_tower(model: nn.Module) -> ImageTower:
    """The :class:`ImageTower` of a transformers model.

    The same object at every call while the model's parts stay.

    `model` is a whole model (CLIPModel, BlipForImageTextRetrieval), a vision model with or without its
    projection (CLIPVisionModelWithProjection, ViTModel, Dinov2Model), or an image classifier around one.
    Raises UnsupportedTowerError with the reason where its embedding is not the normed class token.
    """
    model = inside(model)
    if isinstance(model, ImageTower):
        return model
    parts = _parts(model)
    held = _towers.get(model)
    if held is None or held.parts() != parts:
        held = _towers[model] = ImageTower(**parts)
    _sources[held] = weakref.ref(model), weakref.ref(vision_model(model))
    return held


def _source(tower: ImageTower) -> tuple[Foreign | None, Foreign | None]:
    """(the whole model, its vision model) that a tower is of;
    no whole model while an adapter stands in it."""
    model, source = (held() for held in _sources.get(tower, (lambda: None, lambda: None)))
    return model if model is not None and source is not None and _in_place(model, source) else None, source


def _in_place(model: Foreign, source: nn.Module) -> bool:
    """Whether a whole model's vision model is this one, and no adapter."""
    held = (
        getattr(model, name, None) for name in ("vision_model", getattr(model, "base_model_prefix", "") or "")
    )
    return model is source or any(part is source for part in held)


def vision_model(model: Foreign) -> Foreign:
    """The part of a transformers model that has the embeddings and the blocks.

    The model itself where it has them.
    """
    kind, inner = type(model).__name__, getattr(model, "vision_model", None)
    allowed = _WHOLE | {"vision_model"}
    if inner is None and not hasattr(model, "embeddings"):
        prefix = getattr(model, "base_model_prefix", "")
        inner, allowed = getattr(model, prefix, None), {prefix, "classifier"}
    if inner is None:
        return model
    extra = _children(model) - allowed
    if extra:
        raise _refuse(
            f"{kind} has more than an embedding behind its vision model ({', '.join(sorted(extra))}); "
            "its vision model alone may be given instead"
        )
    if hasattr(inner, "residual"):
        raise UnsupportedTowerError(
            f"a {type(inner.residual).__name__} is attached to this model already; detach it first"
        )
    return inner


def _parts(model: nn.Module) -> dict[str, Foreign]:
    """What an ImageTower is made of; refuses what it does not know."""
    inner, kind = vision_model(model), type(model).__name__
    found: dict[str, Foreign] = {
        "embeddings": _first(inner, ("embeddings",)),
        "pre_norm": _first(inner, _PRE_NORM),
        "layers": _first(inner, _LAYERS),
        "norm": _first(inner, _FINAL_NORM),
        "pooler": _first(inner, ("head",)),
        "projection": _first(model, _PROJECTIONS),
    }
    if isinstance(found["projection"], nn.Identity):  # taken off
        found["projection"] = None
    lacking = [name for name in ("embeddings", "layers", "norm") if found[name] is None]
    extra = _children(inner) - {"embeddings", "encoder", "layers", "pooler", "head", *_PRE_NORM, *_FINAL_NORM}
    if lacking or extra:
        named = ", ".join(lacking or sorted(extra))
        raise _refuse(f"the vision model of {kind} {'lacks' if lacking else 'has unknown parts'} {named}")
    _check_parts(kind, found)
    if found["projection"] is not None and hasattr(model, "visual_projection") and found["pre_norm"] is None:
        raise _refuse(f"{kind} normalises its class token twice (BlipForImageTextRetrieval does not)")
    return found


def _check_parts(kind: str, found: dict[str, Foreign]) -> None:
    """Refuses parts of an ImageTower that units cannot be made of."""
    if found["projection"] is not None and (why := objection(found["projection"])) is not None:
        raise _refuse(f"the projection of {kind} {why}")
    if not isinstance(found["norm"], nn.LayerNorm):
        raise _refuse(f"the final norm of {kind} is {type(found['norm']).__name__}, not LayerNorm")
    if found["pooler"] is not None:
        if not hasattr(found["pooler"], "probe") or _children(found["pooler"]) != _POOLER_PARTS:
            raise _refuse(f"{kind} pools in a way that is not known here (head)")
    elif getattr(getattr(found["embeddings"], "cls_token", None), "shape", (1, 1))[1] > 1:
        raise _refuse(f"{kind} has several class tokens and averages them")
    elif not _has_class_token(found["embeddings"]):
        raise _refuse(f"{kind} has no class token, and no pooling that is known here")
    _check_embeddings(kind, found["embeddings"])
    for index, layer in enumerate(found["layers"]):
        _check_layer(index, layer)
    attentions = [_part(layer, _ATTENTION) for layer in found["layers"]]
    if len({(_heads(attn), _part(attn, _OUT).in_features) for attn in attentions}) > 1:
        raise _refuse(f"{kind} has layers with other heads than the first, as pruned ones have")


def _has_class_token(embeddings: Foreign) -> bool:
    return any(hasattr(embeddings, name) for name in ("class_embedding", "cls_token"))


def _check_embeddings(kind: str, embeddings: Foreign) -> None:
    parameters = inspect.signature(embeddings.forward).parameters.values()
    more = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD][1:]
    if more:
        raise _refuse(f"{kind} embeds more than images ({', '.join(more)})")
    stems = [part for part in embeddings.modules() if isinstance(part, nn.Conv2d)]
    if not stems or stems[0].in_channels != 3:
        raise _refuse(f"{kind} has no patches of colour images in its embeddings")
    if hasattr(embeddings, "random_masking"):
        raise _refuse(f"{kind} drops patches at random (random_masking)")


def _check_layer(index: int, layer: Foreign) -> None:
    if (wrapped := around(layer)) is not None:
        raise _refuse(f"block {index} is wrapped by {wrapped}")
    extra = _children(layer) - _BLOCK_PARTS
    extra |= {name for name, _ in layer.named_parameters(recurse=False)}
    if extra:
        raise _refuse(f"block {index} has unknown parts {', '.join(sorted(extra))}")
    needed = {"norm 1": _NORM_1, "norm 2": _NORM_2, "attention": _ATTENTION, "mlp": ("mlp", "output.dense")}
    lacking = [name for name, names in needed.items() if _first(layer, names) is None]
    if lacking:
        raise _refuse(f"block {index} lacks {', '.join(lacking)}")
    attn = _part(layer, _ATTENTION)
    inside = [
        part for part in (attn, _first(attn, ("attention",)), _first(attn, ("output",))) if part is not None
    ]
    extra = set().union(*(_children(part) for part in inside)) - _ATTENTION_PARTS
    if extra:
        raise _refuse(f"attention of block {index} has unknown parts {', '.join(sorted(extra))}")
    out = _first(attn, _OUT)
    if out is None or not (hasattr(attn, "qkv") or _first(attn, _QKV[0])):
        raise _refuse(f"attention of block {index} has no output projection, or no q_proj or qkv")
    if (why := objection(out)) is not None:
        raise _refuse(f"the output projection of block {index} {why}")


def recognises(tower: nn.Module) -> bool:
    """Whether `tower` is of this family, supported or not."""
    if isinstance(tower, ImageTower) or isinstance(getattr(tower, "vision_model", None), nn.Module):
        return True
    inner = getattr(tower, getattr(tower, "base_model_prefix", None) or "", tower)
    return any(isinstance(getattr(part, "embeddings", None), nn.Module) for part in (tower, inner))


def _asking(attn: Foreign) -> Foreign:
    """The part of an attention that holds its settings."""
    return getattr(attn, "attention", attn)


def _heads(attn: Foreign) -> int:
    held = _asking(attn)
    return held.num_heads if hasattr(held, "num_heads") else held.num_attention_heads


def _head_inputs(attn: Foreign, x: Tensor, first_only: bool) -> Tensor:
    """What attention feeds to its output projection: [N, tokens or 1, H, C]."""
    asking, heads = x[:, :1] if first_only else x, _heads(attn)
    if hasattr(attn, "qkv") and not (first_only and type(attn.qkv) is nn.Linear):
        q, k, v = attn.qkv(x).chunk(3, dim=-1)
        q = q[:, :1] if first_only else q
    elif hasattr(attn, "qkv"):
        weights = attn.qkv.weight.chunk(3)
        biases = (None, None, None) if attn.qkv.bias is None else attn.qkv.bias.chunk(3)
        rows = zip((asking, x, x), weights, biases, strict=True)
        q, k, v = (F.linear(row, weight, bias) for row, weight, bias in rows)
    else:
        q, k, v = (_part(attn, names)(row) for names, row in zip(_QKV, (asking, x, x), strict=True))
    attn = _asking(attn)
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
            _check_parts("this model", tower.parts())
        attn = _part(tower.layers[0], _ATTENTION)
        self.width = tower.norm.normalized_shape[0]
        self.layout = UnitLayout(len(tower.layers), _heads(attn), pool=tower.pooler is not None)
        self.head_width = _part(attn, _OUT).in_features // self.layout.heads
        self.dim = self.width if tower.projection is None else tower.projection.out_features
        if tower.pooler is not None:
            self.pooling, self.span, self.head_width = ATTENTION, slice(None), self.dim
        embeddings = tower.embeddings
        registers = getattr(embeddings, "register_tokens", None)
        distilled = getattr(embeddings, "distillation_token", None) is not None
        self.class_token = _has_class_token(embeddings)
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
        held = self.module.projection
        return (None, None) if held is None else (held.weight.T, held.bias)

    def out_projection(self, layer: int) -> OutProjection:
        out = _part(_part(self.module.layers[layer], _ATTENTION), _OUT)
        gamma = getattr(getattr(self.module.layers[layer], "layer_scale1", None), "lambda1", None)
        return OutProjection(out.weight, out.bias, gamma)

    def constant_parameters(self) -> dict[str, nn.Parameter]:
        held = {
            id(p)
            for part in (self.module.norm, self.module.projection)
            if part is not None
            for p in part.parameters()
        }
        for (
            layer
        ) in self.module.layers:  # parameters of the modules: a parametrised weight is computed from them
            out, scale = _part(_part(layer, _ATTENTION), _OUT), getattr(layer, "layer_scale1", None)
            for part in (out, scale):
                held |= set() if part is None else {id(p) for p in part.parameters()}
        return {name: p for name, p in self.module.named_parameters() if id(p) in held}

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
            held = _asking(_part(layer, _ATTENTION))
            if any(
                _rate(getattr(held, name, 0.0)) for name in ("dropout", "attention_dropout", "dropout_prob")
            ):
                found.append("dropout of attention weights")
            if _rate(_first(layer, ("dropout", "output.dropout"))):
                found.append("dropout of hidden states")
            if _rate(getattr(layer, "drop_path", None)):
                found.append("drop path")
        return list(dict.fromkeys(found))

    def own(self, images: Tensor) -> Tensor:
        tower = self.module
        model, source = _source(tower)
        if source is None or _first(source, _LAYERS) is not tower.layers:
            return super().own(images)
        if model is not None and hasattr(model, "get_image_features"):
            features = model.get_image_features(pixel_values=images)
            return getattr(features, "pooler_output", features)
        output = source(pixel_values=images)
        normed = (
            tower.pre_norm is None and tower.pooler is None
        )  # then its tokens are, and the first is the embedding
        pooled = output.last_hidden_state[:, 0] if normed else output.pooler_output
        return pooled if tower.projection is None else tower.projection(pooled)

    def beside(self) -> list[nn.Module]:
        model, source = _source(self.module)
        within = set(self.module.modules())
        found = [] if source is None else [part for part in source.modules() if part not in within]
        return found if model is None or model is source else [model, *found]

    def afresh(self) -> TransformerTower:
        model, source = _source(self.module)
        if model is None or source is None:
            return super().afresh()
        fresh = HuggingFaceTower(model)
        if fresh.module is not self.module:
            ours, theirs = self.module.parts(), fresh.module.parts()
            other = [name for name in ours if ours[name] is not theirs[name]]
            raise _refuse(f"{type(model).__name__} has other parts than it had ({', '.join(other)})")
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
        attn = _part(layer, _ATTENTION)
        z = _head_inputs(attn, _part(layer, _NORM_1)(x), first_only)
        attended = _part(attn, _OUT)(z.flatten(2))
        attended = layer.layer_scale1(attended) if hasattr(layer, "layer_scale1") else attended
        if edit is not None:
            attended = edit(z, attended)
        x = (x[:, :1] if first_only else x) + attended
        mlp = _mlp(layer, _part(layer, _NORM_2)(x))
        mlp = layer.layer_scale2(mlp) if hasattr(layer, "layer_scale2") else mlp
        return x + mlp, z, mlp

    def finish(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        tokens = None
        if self.returns_tokens:  # last_hidden_state: CLIP's own is not normed, the others' is
            tokens = self.module.norm(x) if self.module.pre_norm is None else x
        return self.module.pool(x), tokens
