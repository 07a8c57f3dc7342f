"""Where is the image tower of a transformers model?

Its parts are found by their names, checked, and made one module.
"""

import inspect
import weakref
from typing import Any

from torch import Tensor, nn

from residual_kernels.towers.foreign import Foreign
from residual_kernels.towers.plain_linear import COMPUTED, no_norm, objection
from residual_kernels.towers.view import UnsupportedTowerError
from residual_kernels.towers.wrappers import around
from residual_kernels.towers.wrappers import inner as inside

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
LAYERS = ("encoder.layers", "encoder.layer", "layers")
_PRE_NORM = ("pre_layrnorm", "pre_layernorm")
_FINAL_NORM = ("post_layernorm", "layernorm")
NORM_1 = ("layer_norm1", "layernorm_before", "norm1")
NORM_2 = ("layer_norm2", "layernorm_after", "norm2")
SELF_ATTENTION = ("self_attn", "attention")
QKV = (("q_proj", "attention.query"), ("k_proj", "attention.key"), ("v_proj", "attention.value"))
OUT = ("out_proj", "o_proj", "projection", "output.dense")
_BLOCK_PARTS = {
    *NORM_1,
    *NORM_2,
    *SELF_ATTENTION,
    "mlp",
    "intermediate",
    "output",
    "layer_scale1",
    "layer_scale2",
    "drop_path",
    "dropout",
}
_ATTENTION_PARTS = {  # and those of its parts `attention` and `output`
    *OUT[:3],
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


def first_of(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    """The first of these parts that `module` has."""
    for name in names:
        found: Any = module
        for step in name.split("."):
            found = getattr(found, step, None)
        if isinstance(found, nn.Module):
            return found
    return None


def part_of(module: nn.Module, names: tuple[str, ...]) -> Foreign:
    """:func:`first_of` of a module that has passed the check, so that there is one."""
    return first_of(module, names)


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def refusal(reason: str) -> UnsupportedTowerError:
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
        embeddings: Foreign = self.embeddings
        places: tuple[Foreign, ...] = (
            embeddings,
            getattr(embeddings, "patch_embeddings", None),
            getattr(embeddings, "config", None),
        )
        size = next(place.image_size for place in places if hasattr(place, "image_size"))
        return (size, size) if isinstance(size, int) else tuple(size)

    def embed(self, images: Tensor) -> Tensor:
        """The stream before the first block, [N, tokens, width]."""
        x = self.embeddings(images)
        if not isinstance(x, Tensor):
            raise refusal(f"its embeddings give {type(x).__name__} instead of the stream")
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
    tower = _towers.get(model)
    if tower is None or tower.parts() != parts:
        tower = _towers[model] = ImageTower(**parts)
    _sources[tower] = weakref.ref(model), weakref.ref(vision_model(model))
    return tower


def source_of(tower: ImageTower) -> tuple[Foreign | None, Foreign | None]:
    """(the whole model, its vision model) that a tower is of;
    no whole model while an adapter stands in it."""
    model, source = (found() for found in _sources.get(tower, (lambda: None, lambda: None)))
    return model if model is not None and source is not None and _in_place(model, source) else None, source


def _in_place(model: Foreign, source: nn.Module) -> bool:
    """Whether a whole model's vision model is this one, and no adapter."""
    standing = (
        getattr(model, name, None) for name in ("vision_model", getattr(model, "base_model_prefix", "") or "")
    )
    parts = [inside(part) for part in standing if isinstance(part, nn.Module)]
    return model is source or any(part is source for part in parts)


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
    inner = inside(inner)  # a LoRA, or torch.compile, may stand around it alone
    extra = _children(model) - allowed
    if extra:
        raise refusal(
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
        "embeddings": first_of(inner, ("embeddings",)),
        "pre_norm": first_of(inner, _PRE_NORM),
        "layers": first_of(inner, LAYERS),
        "norm": first_of(inner, _FINAL_NORM),
        "pooler": first_of(inner, ("head",)),
        "projection": first_of(model, _PROJECTIONS),
    }
    if isinstance(found["projection"], nn.Identity):  # taken off
        found["projection"] = None
    lacking = [name for name in ("embeddings", "layers", "norm") if found[name] is None]
    extra = _children(inner) - {"embeddings", "encoder", "layers", "pooler", "head", *_PRE_NORM, *_FINAL_NORM}
    if lacking or extra:
        named = ", ".join(lacking or sorted(extra))
        raise refusal(f"the vision model of {kind} {'lacks' if lacking else 'has unknown parts'} {named}")
    check_parts(kind, found)
    if found["projection"] is not None and hasattr(model, "visual_projection") and found["pre_norm"] is None:
        raise refusal(f"{kind} normalises its class token twice (BlipForImageTextRetrieval does not)")
    return found


def check_parts(kind: str, found: dict[str, Foreign]) -> None:
    """Refuses parts of an ImageTower that units cannot be made of."""
    if found["projection"] is not None and (why := objection(found["projection"])) is not None:
        raise refusal(f"the projection of {kind} {why}")
    if not isinstance(found["norm"], nn.LayerNorm):
        raise refusal(f"the final norm of {kind} {no_norm(found['norm'], 'not LayerNorm')}")
    if found["pooler"] is not None:
        if not hasattr(found["pooler"], "probe") or _children(found["pooler"]) != _POOLER_PARTS:
            raise refusal(f"{kind} pools in a way that is not known here (head)")
    elif getattr(getattr(found["embeddings"], "cls_token", None), "shape", (1, 1))[1] > 1:
        raise refusal(f"{kind} has several class tokens and averages them")
    elif not has_class_token(found["embeddings"]):
        raise refusal(f"{kind} has no class token, and no pooling that is known here")
    _check_embeddings(kind, found["embeddings"])
    for index, layer in enumerate(found["layers"]):
        _check_layer(index, layer)
    attentions = [part_of(layer, SELF_ATTENTION) for layer in found["layers"]]
    if len({(heads_of(attn), part_of(attn, OUT).in_features) for attn in attentions}) > 1:
        raise refusal(f"{kind} has layers with other heads than the first, as pruned ones have")


def has_class_token(embeddings: Foreign) -> bool:
    return any(hasattr(embeddings, name) for name in ("class_embedding", "cls_token"))


def _check_embeddings(kind: str, embeddings: Foreign) -> None:
    parameters = inspect.signature(embeddings.forward).parameters.values()
    more = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD][1:]
    if more:
        raise refusal(f"{kind} embeds more than images ({', '.join(more)})")
    stems = [part for part in embeddings.modules() if isinstance(part, nn.Conv2d)]
    if not stems or stems[0].in_channels != 3:
        raise refusal(f"{kind} has no patches of colour images in its embeddings")
    if hasattr(embeddings, "random_masking"):
        raise refusal(f"{kind} drops patches at random (random_masking)")


def _check_layer(index: int, layer: Foreign) -> None:
    if (wrapped := around(layer)) is not None:
        raise refusal(f"block {index} is wrapped by {wrapped}")
    extra = _children(layer) - _BLOCK_PARTS - COMPUTED
    extra |= {name for name, _ in layer.named_parameters(recurse=False)}
    if extra:
        raise refusal(f"block {index} has unknown parts {', '.join(sorted(extra))}")
    needed = {"norm 1": NORM_1, "norm 2": NORM_2, "attention": SELF_ATTENTION, "mlp": ("mlp", "output.dense")}
    lacking = [name for name, names in needed.items() if first_of(layer, names) is None]
    if lacking:
        raise refusal(f"block {index} lacks {', '.join(lacking)}")
    attn = part_of(layer, SELF_ATTENTION)
    inside = [
        part
        for part in (attn, first_of(attn, ("attention",)), first_of(attn, ("output",)))
        if part is not None
    ]
    extra = set().union(*(_children(part) for part in inside)) - _ATTENTION_PARTS - COMPUTED
    if extra:
        raise refusal(f"attention of block {index} has unknown parts {', '.join(sorted(extra))}")
    out = first_of(attn, OUT)
    if out is None or not (hasattr(attn, "qkv") or first_of(attn, QKV[0])):
        raise refusal(f"attention of block {index} has no output projection, or no q_proj or qkv")
    if (why := objection(out)) is not None:
        raise refusal(f"the output projection of block {index} {why}")


def query_module(attn: Foreign) -> Foreign:
    """The part of an attention that holds its settings."""
    return getattr(attn, "attention", attn)


def heads_of(attn: Foreign) -> int:
    settings = query_module(attn)
    return settings.num_heads if hasattr(settings, "num_heads") else settings.num_attention_heads
