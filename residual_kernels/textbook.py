"""ResiDual in plain PyTorch, to be read from top to bottom.

Decompose a CLIP image tower, find components, fit weights. Nothing here is fast or small in memory, and the
library does not use it: the tests hold the library to it. `weights` is the state dict of an open_clip image
tower with a class token (``model.visual.state_dict()``); N images, L layers, H heads, U = 1 + LH + L units, D
output dimensions, K_u components of unit u.

    units = decompose(weights, images, heads=8)  # [N, U, D]; units.sum(1) is the tower's output
    means, components = principal_components(units[:, 1:49], 0.90)  # of the 48 heads of six layers
    weight = fit(units[:, 1:49], labels, class_vectors, logit_scale, means, components)
    embedding = reweight(units[:, 1:49], means, components, weight)  # [N, D]
"""

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = dict[str, Tensor]


def norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    """The layer norm `name`."""
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    """The linear layer whose parameters are called `name` + "weight" and "bias"."""
    return F.linear(x, weights[f"{name}weight"], weights[f"{name}bias"])


def stream_terms(weights: Weights, images: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the tower.

    What each unit adds to the class token: embedding [N, 1, W], heads [N, LH, W], MLPs [N, L, W].
    """
    kernel = weights["conv1.weight"]
    patches = F.conv2d(images, kernel, stride=kernel.shape[-1]).flatten(2).mT
    token = weights["class_embedding"].expand(len(images), 1, -1)
    x = norm(weights, "ln_pre", torch.cat([token, patches], dim=1) + weights["positional_embedding"])
    embedding, of_heads, of_mlps = x[:, :1], [], []
    for layer in range(sum(name.endswith("attn.in_proj_weight") for name in weights)):
        block = f"transformer.resblocks.{layer}."
        qkv = linear(weights, block + "attn.in_proj_", norm(weights, block + "ln_1", x))
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        z = F.scaled_dot_product_attention(q, k, v)  # [N, H, tokens, C]
        # [W, H, C]: a slice for each head
        out = weights[block + "attn.out_proj.weight"].unflatten(1, (heads, -1))
        attention = torch.einsum("nhtc,whc->nthw", z, out) + weights[block + "attn.out_proj.bias"] / heads
        x = x + attention.sum(2)
        hidden = F.gelu(linear(weights, block + "mlp.c_fc.", norm(weights, block + "ln_2", x)))
        mlp = linear(weights, block + "mlp.c_proj.", hidden)
        x = x + mlp
        of_heads.append(attention[:, 0])
        of_mlps.append(mlp[:, 0])
    return embedding, torch.cat(of_heads, dim=1), torch.stack(of_mlps, dim=1)


def decompose(weights: Weights, images: Tensor, heads: int) -> Tensor:
    """The output as a sum of units, [N, U, D]: the embedding, the heads layer by layer, the MLPs.

    The final norm is linear once its scale s and mean m are known, so each unit goes through it and the
    projection P by itself: x_u = s (raw_u * gamma) P + (beta - s m gamma) P / share_u, where the 1 / share_u
    add up to one.
    """
    embedding, of_heads, of_mlps = stream_terms(weights, images, heads)
    terms = 2 * of_mlps.shape[1] + 1  # the embedding, and an attention and an MLP for each layer
    share = torch.tensor([1.0] + [float(heads)] * of_heads.shape[1] + [1.0] * of_mlps.shape[1]) * terms
    raw = torch.cat([embedding, of_heads, of_mlps], dim=1)
    whole = raw.sum(1)
    s = (whole.var(1, unbiased=False) + 1e-5).rsqrt()[:, None, None]
    m = whole.mean(1)[:, None, None]
    gamma, beta = weights["ln_post.weight"], weights["ln_post.bias"]
    constant = (beta - s * m * gamma) / share.to(raw)[:, None]
    return (s * raw * gamma + constant) @ weights["proj"]


def principal_components(units: Tensor, energy: float = 1.0) -> tuple[Tensor, list[Tensor]]:
    """Of units [N, U, D]: their means [U, D], and for each the first components [K_u, D] by falling variance.

    K_u is the smallest number of components that explain more than `energy` of the variance.
    """
    means, components = units.mean(0), []
    for u in range(units.shape[1]):
        variance, vectors = torch.linalg.eigh(torch.cov(units[:, u].T))
        share = variance.flip(0).clamp_min(0).cumsum(0) / variance.clamp_min(0).sum()
        components.append(vectors.T.flip(0)[: int((share <= energy).sum()) + 1])
    return means, components


def coefficients(units: Tensor, means: Tensor, components: list[Tensor]) -> Tensor:
    """c = Phi_u (x_u - mu_u) of all components, [N, J]."""
    return torch.cat([(units[:, u] - means[u]) @ phi.T for u, phi in enumerate(components)], dim=1)


def reweight(units: Tensor, means: Tensor, components: list[Tensor], weight: Tensor) -> Tensor:
    """The method: y = sum over units of Phi_u^T diag(weight_u) Phi_u (x_u - mu_u), [N, D], for weight [J]."""
    return (coefficients(units, means, components) * weight) @ torch.cat(components)


def logits(embedding: Tensor, class_vectors: Tensor, logit_scale: float) -> Tensor:
    """Zero-shot classification by the angle to class vectors [D, K] of length one: [N, K]."""
    return F.normalize(embedding, dim=1) @ class_vectors * torch.tensor(logit_scale).exp()


def fit(
    units: Tensor,
    labels: Tensor,
    class_vectors: Tensor,
    logit_scale: float,
    means: Tensor,
    components: list[Tensor],
    *,
    lr: float = 0.8,
    epochs: int = 30,
    batch_size: int = 64,
    seed: int = 0,
) -> Tensor:
    """The weight [J] that classifies the images best: cross-entropy, schedule-free AdamW,
    from a start at one."""
    import schedulefree

    c, basis = coefficients(units, means, components), torch.cat(components)
    weight = torch.ones(len(basis), dtype=c.dtype, requires_grad=True)
    optimizer = schedulefree.AdamWScheduleFree([weight], lr=lr)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        optimizer.train()
        for rows in torch.randperm(len(c), generator=generator).split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(
                logits((c[rows] * weight) @ basis, class_vectors, logit_scale), labels[rows]
            ).backward()
            optimizer.step()
        optimizer.eval()
    return weight.detach()
