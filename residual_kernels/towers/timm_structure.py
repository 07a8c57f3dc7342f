"""Which timm towers have exact units? Their structure is compared with the parts that the view knows."""

from torch import nn

from residual_kernels.towers.foreign import Foreign
from residual_kernels.towers.norm import norm_of
from residual_kernels.towers.plain_linear import COMPUTED, no_norm, objection
from residual_kernels.towers.view import UnsupportedTowerError
from residual_kernels.towers.wrappers import around

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


def _refuse(reason: str) -> UnsupportedTowerError:
    return UnsupportedTowerError(f"this tower has no exact units here: {reason}; {SUPPORTED}")


def _parts(module: nn.Module) -> set[str]:
    """Names of a module's own children and parameters that are there and do something."""
    children = {name for name, child in module.named_children() if not isinstance(child, nn.Identity)}
    return children - COMPUTED | {name for name, _ in module.named_parameters(recurse=False)}


def check_trunk(trunk: Foreign) -> None:
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
    shapes = {(b.attn.num_heads, tuple(b.attn.proj.weight.shape), is_post_norm(b)) for b in trunk.blocks}
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
    if reads_qkv(attn) and (why := objection(attn.qkv)) is not None:
        raise _refuse(f"qkv of attention in block {index} {why}")
    if is_post_norm(block) and norm_of(block.norm1) is None:
        raise _refuse(f"the norm behind attention of block {index} is {type(block.norm1).__name__}")


def is_post_norm(block: Foreign) -> bool:
    """Whether norms stand behind the branches: timm registers a block's parts in the order in which they
    run."""
    names = [name for name, _ in block.named_children()]
    return names.index("attn") < names.index("norm1")


def check_pooling(trunk: Foreign) -> None:
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
            raise _refuse(f"the final norm {name} {no_norm(norm, 'neither LayerNorm nor an RMS norm')}")
    if pooler is None and all(not isinstance(norm, nn.Identity) for norm in norms.values()):
        raise _refuse("it normalises twice, before and after pooling")


def check_head(tower: Foreign, trunk: Foreign) -> None:
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


def reads_qkv(attn: Foreign) -> bool:
    """Whether the attention reads the weight of `qkv` instead of calling it: EVA and BEiT,
    whose biases are apart."""
    return getattr(attn, "q_bias", None) is not None and not getattr(attn, "qkv_bias_separate", False)
