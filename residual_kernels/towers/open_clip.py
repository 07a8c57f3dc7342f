"""Exact units of open_clip's own VisionTransformer (and of any module built the same way).

Blocks are run here, by structure, with `scaled_dot_product_attention`, for both of open_clip's attentions:
`nn.MultiheadAttention` and its own `Attention`, which share parameter names. z leaves at the pooled token only. Nothing
is hooked, swapped or written: the tower is read.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from residual_kernels.towers import Terms, UnitLayout, UnitMaps, UnsupportedTowerError, check_kinds
from residual_kernels.towers.stream import Edit, OutProjection, stream_maps

SUPPORTED = (
    "supported are pre-norm ViTs of open_clip's own VisionTransformer with class-token or average pooling: 54 of its "
    "configurations, such as ViT-B-32, ViT-L-14 or ViT-bigG-14"
)
# Average pooling after the norm needs every token's z until the last layer's statistics are known; images are taken
# in groups so that these stay within this many bytes.
TOKEN_BYTES = 256 * 2**20

_BLOCK_PARTS = {"ln_1", "attn", "ln_attn", "ls_1", "ln_2", "mlp", "ls_2"}
_ATTENTION_PARTS = {"out_proj", "ln_q", "ln_k", "ln_inner", "attn_drop", "out_drop"}


def _refuse(reason: str) -> UnsupportedTowerError:
    return UnsupportedTowerError(f"this tower has no exact units here: {reason}; {SUPPORTED}")


def _check_structure(tower: nn.Module) -> None:
    kind = type(tower).__name__
    if hasattr(tower, "visual"):
        raise UnsupportedTowerError(
            f"{kind} is a whole CLIP model; pass its image tower, model.visual, or use attach(model, ...)"
        )
    if hasattr(tower, "trunk"):
        raise _refuse(f"{kind} wraps a timm trunk ({type(tower.trunk).__name__})")
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
    if getattr(tower, "attn_pool", None) is not None:
        raise _refuse("it pools by attention (attn_pool, as CoCa does), so a head's share has no short form")
    if tower.pool_type not in ("tok", "avg"):
        raise _refuse(f"pool_type is {tower.pool_type!r}: there is no pooled embedding to decompose")
    if not isinstance(tower.ln_post, nn.LayerNorm):
        raise _refuse(f"the final norm ln_post is {type(tower.ln_post).__name__}, not LayerNorm")
    for index, block in enumerate(tower.transformer.resblocks):
        _check_block(index, block)


def _check_block(index: int, block: nn.Module) -> None:
    extra = {name for name, _ in block.named_children()} - _BLOCK_PARTS
    lacking = {"ln_1", "attn", "ln_2", "mlp"} - {name for name, _ in block.named_children()}
    if extra or lacking:
        found = ", ".join(sorted(extra or lacking))
        raise _refuse(f"block {index} {'has unknown parts' if extra else 'lacks'} {found}")
    if not isinstance(getattr(block, "ln_attn", nn.Identity()), nn.Identity):
        raise _refuse(f"block {index} normalises after attention (ln_attn), so it is not pre-norm")
    attn = block.attn
    extra = {name for name, _ in attn.named_children()} - _ATTENTION_PARTS
    if extra:
        raise _refuse(f"attention of block {index} has unknown parts {', '.join(sorted(extra))}")
    if getattr(attn, "in_proj_weight", None) is None or not isinstance(attn.out_proj, nn.Linear):
        raise _refuse(
            f"attention of block {index} has no in_proj_weight, or an out_proj that is not nn.Linear"
        )
    if getattr(attn, "bias_k", None) is not None or getattr(attn, "add_zero_attn", False):
        raise _refuse(f"attention of block {index} adds keys of its own (bias_k or add_zero_attn)")
    if getattr(attn, "logit_scale", None) is not None:
        raise _refuse(f"attention of block {index} is scaled cosine attention")


def _head_inputs(attn: nn.Module, x: Tensor, pooled_only: bool) -> Tensor:
    """What attention feeds to its output projection: [N, tokens, width], or [N, 1, width] for the class token alone."""
    rows, tokens, width = x.shape
    queries = 1 if pooled_only else tokens
    weight, bias = attn.in_proj_weight, attn.in_proj_bias
    if pooled_only:
        q = F.linear(x[:, :1], weight[:width], None if bias is None else bias[:width])
        kv = F.linear(x, weight[width:], None if bias is None else bias[width:])
        k, v = kv.chunk(2, dim=-1)
    else:
        q, k, v = F.linear(x, weight, bias).chunk(3, dim=-1)
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


def _block(
    block: nn.Module, x: Tensor, pooled_only: bool, edit: Callable[[Tensor, Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """One pre-norm block: the stream after it, the head inputs z and the MLP's term, each [N, tokens or 1, width]."""
    z = _head_inputs(block.attn, block.ln_1(x), pooled_only)
    attended = F.linear(z, block.attn.out_proj.weight, block.attn.out_proj.bias)
    attended = block.ls_1(attended) if hasattr(block, "ls_1") else attended
    if edit is not None:
        attended = edit(z.unflatten(2, (block.attn.num_heads, -1)), attended)
    x = (x[:, :1] if pooled_only else x) + attended
    mlp = block.mlp(block.ln_2(x))
    mlp = block.ls_2(mlp) if hasattr(block, "ls_2") else mlp
    return x + mlp, z, mlp


@dataclass
class OpenClipTower:
    """The :class:`~residual_kernels.towers.Tower` view of an open_clip VisionTransformer."""

    module: nn.Module
    name: str = "open_clip.VisionTransformer"
    class_token: bool = True
    prefix: int = 1

    def __post_init__(self):
        _check_structure(self.module)
        blocks = self.module.transformer.resblocks
        self.width = self.module.ln_post.normalized_shape[0]
        heads = blocks[0].attn.num_heads
        self.head_width = self.width // heads
        self.layout = UnitLayout(len(blocks), heads)
        self.dim = self.width if self.module.proj is None else self.module.proj.shape[1]

    @property
    def norm_before_pooling(self) -> bool:
        return self.module.pool_type == "avg" and not self.module.final_ln_after_pool

    def constant_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that the maps are made of: a trained copy of them would not match the maps."""
        names = {"ln_post.weight", "ln_post.bias", "proj"}
        found = {name: p for name, p in self.module.named_parameters() if name in names}
        for index, block in enumerate(self.module.transformer.resblocks):
            prefix = f"transformer.resblocks.{index}"
            for name, p in block.named_parameters():
                if name.startswith("attn.out_proj.") or name == "ls_1.gamma":
                    found[f"{prefix}.{name}"] = p
        return found

    @torch.no_grad()
    def maps(self, kind: str, units: Sequence[int] | None = None) -> UnitMaps:
        """Constants of one kind, float64 on the tower's device; of some of its units (counted from 0) or of all."""
        norm, layers, heads = self.module.ln_post, self.layout.layers, self.layout.heads
        device = self.module.conv1.weight.device
        eye = torch.eye(self.width, dtype=torch.float64, device=device)
        P = eye if self.module.proj is None else self.module.proj.double()
        gamma = P.new_ones(self.width) if norm.weight is None else norm.weight.double()
        beta = P.new_zeros(self.width) if norm.bias is None else norm.bias.double()
        folded = gamma[:, None] * P  # [width, D]
        share = 2 * layers + 1
        if units is None:
            span = self.layout.span(kind)
            units = range(span.stop - span.start)
        if kind != "head":
            A = folded.expand(len(units), -1, -1)
            b = P.new_zeros(len(units), self.dim)
        else:
            layers_of = [divmod(unit, heads) for unit in units]
            each = {
                layer: stream_maps(self, layer) for layer in dict.fromkeys(layer for layer, _ in layers_of)
            }
            A = torch.stack([each[layer].A[head] for layer, head in layers_of]) @ folded
            b = torch.stack([each[layer].b[head] for layer, head in layers_of]) @ folded
            share *= heads
        return UnitMaps(A=A, b=b, g=gamma @ P, e=beta @ P, share=share)

    def out_projection(self, layer: int) -> OutProjection:
        """The parameters that make the layer's term of the stream from the z of its heads."""
        block = self.module.transformer.resblocks[layer]
        gamma = getattr(getattr(block, "ls_1", None), "gamma", None)
        return OutProjection(block.attn.out_proj.weight, block.attn.out_proj.bias, gamma)

    def check_mode(self) -> None:
        """Raises ValueError when the tower would drop patches at random, so that its units were not repeatable."""
        dropout = getattr(self.module, "patch_dropout", None)
        if self.module.training and getattr(dropout, "prob", 0.0) > 0:
            raise ValueError(
                "this tower is in training mode and drops patches at random; call .eval() on it first"
            )

    def check_images(self, images: Tensor) -> None:
        """Raises ValueError for images this tower cannot take: rank, size, dtype, device, NaN or Inf."""
        height, width = self.module.image_size
        if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3:
            shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"images must be a tensor [N, 3, {height}, {width}]; got {shape}")
        if not len(images):
            raise ValueError("this batch holds no images, and the tower cannot run on none")
        if images.shape[2:] != (height, width):
            raise ValueError(
                f"this tower takes images of {height} x {width} pixels; got {images.shape[2]} x {images.shape[3]}; "
                "resize them (the tower's preprocess does)"
            )
        weight = self.module.conv1.weight
        if images.device != weight.device:
            raise ValueError(
                f"images are on {images.device} but the tower is on {weight.device}; move one of them"
            )
        if not images.is_floating_point():
            raise ValueError(
                f"images have dtype {images.dtype}; use the preprocess of the model (floating point)"
            )
        if images.dtype != weight.dtype and not torch.is_autocast_enabled(images.device.type):
            raise ValueError(
                f"images are {images.dtype} but the tower is {weight.dtype}; cast them with images.to({weight.dtype})"
            )

    def terms(
        self, images: Tensor, kinds: Iterable[str], edit: Edit | None = None, every_token: bool = False
    ) -> Terms:
        """Runs the tower on images [N, 3, H, W] and collects z of `kinds`, s, m and the output.

        `edit` changes what attention adds to the stream, so that later layers see it; with `every_token` the last block
        computes all tokens even where the output depends on one. Gradients flow to images and parameters as in the
        tower itself; gradient checkpointing is honoured.
        """
        kinds = check_kinds(kinds) if kinds else ()
        self.check_images(images)
        if not self.norm_before_pooling:
            return self._terms(images, kinds, edit, every_token)
        patches = self.module.positional_embedding.shape[0]
        per_image = patches * self.width * (2 * self.layout.layers + 1) * images.element_size()
        group = max(1, TOKEN_BYTES // per_image)
        parts = [self._terms(part, kinds, edit, every_token) for part in images.split(group)]
        if len(parts) == 1:
            return parts[0]
        return Terms(
            z={kind: torch.cat([part.z[kind] for part in parts]) for kind in parts[0].z},
            scale=torch.cat([part.scale for part in parts]),
            mean=torch.cat([part.mean for part in parts]),
            output=torch.cat([part.output for part in parts]),
            tokens=None if parts[0].tokens is None else torch.cat([part.tokens for part in parts]),
        )

    def _terms(self, images: Tensor, kinds: tuple[str, ...], edit: Edit | None, every_token: bool) -> Terms:
        tower = self.module
        class_token = tower.pool_type == "tok"
        keep_tokens = self.norm_before_pooling  # z of every token until s_t is known

        def pooled(x: Tensor) -> Tensor:
            if class_token:
                return x[:, 0]
            return x[:, 1:] if keep_tokens else x[:, 1:].mean(dim=1)

        x = tower._embeds(images)
        collected = {"emb": [pooled(x)], "head": [], "mlp": []}
        blocks = tower.transformer.resblocks
        recompute = tower.transformer.grad_checkpointing and torch.is_grad_enabled()
        for index, block in enumerate(blocks):
            # Nothing reads the other tokens after the last block unless the tower returns them.
            last = class_token and index == len(blocks) - 1 and not (tower.output_tokens or every_token)
            change = None if edit is None else partial(edit, index)
            if recompute:
                x, z, mlp = checkpoint(_block, block, x, last, change, use_reentrant=False)
            else:
                x, z, mlp = _block(block, x, last, change)
            if "head" in kinds:
                collected["head"].append(pooled(z))
            if "mlp" in kinds:
                collected["mlp"].append(pooled(mlp))

        final = pooled(x)
        precise = final.to(torch.promote_types(final.dtype, torch.float32))
        variance, mean = torch.var_mean(precise, dim=-1, correction=0)
        scale = (variance + tower.ln_post.eps).rsqrt()
        if keep_tokens:
            share = scale / scale.sum(1, keepdim=True)  # [N, tokens]
            mean = (share * mean).sum(1)
            scale = scale.mean(1)
            collected = {
                kind: [torch.einsum("nt,ntw->nw", share.to(part.dtype), part) for part in parts]
                for kind, parts in collected.items()
            }
        z = {}
        for kind in kinds:
            stacked = torch.stack(collected[kind], dim=1)  # [N, layers or 1, width]
            z[kind] = stacked.unflatten(2, (-1, self.head_width)).flatten(1, 2) if kind == "head" else stacked

        pooled_out, tokens = self._finish(x, final)
        output = pooled_out if tower.proj is None else pooled_out @ tower.proj
        return Terms(
            z=z, scale=scale, mean=mean, output=output, tokens=tokens if tower.output_tokens else None
        )

    def _finish(self, x: Tensor, final: Tensor) -> tuple[Tensor, Tensor | None]:
        """Pooled embedding after the final norm and, where the tower returns them, its tokens."""
        tower = self.module
        if tower.output_tokens:
            return tower._pool(x)
        normed = tower.ln_post(final)
        return (normed.mean(dim=1) if self.norm_before_pooling else normed), None
