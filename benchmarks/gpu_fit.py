"""Steps of a fit a second on a GPU: the library's step modes beside compiled plain torch on the same
coefficients.

The tower is timm's or open_clip's with random weights, whichever is installed; its values do not change the
time. What the library needs beyond torch for a fit (schedulefree, safetensors) may be missing on a bare
machine: the part then says which package, and compiled plain torch is timed alone.
"""

import importlib
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.gpu_clock import Bench

IMAGES, CLASSES, BATCH = 2048, 100, 64
SECONDS = 20.0  # that one way of fitting may take


def missing() -> str | None:
    """The first package that a fit lacks here."""
    for name in ("safetensors", "schedulefree"):
        try:
            importlib.import_module(name)
        except ImportError:
            return name
    return None


def tower_of(tiny: bool) -> nn.Module | None:
    """An image tower with random weights, or None where neither library is installed."""
    try:
        timm = importlib.import_module("timm")
    except ImportError:
        timm = None
    if timm is not None:
        if tiny:
            return timm.models.VisionTransformer(
                img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=16
            )
        return timm.create_model("vit_base_patch16_clip_224", num_classes=512)
    try:
        open_clip = importlib.import_module("open_clip")
    except ImportError:
        return None
    return open_clip.create_model("ViT-B-16").visual


class Plain(nn.Module):
    """The same step in plain torch: y = (c * weight) @ basis + rest, cross-entropy of the cosine logits."""

    def __init__(self, c: Tensor, rest: Tensor, basis: Tensor, head: Tensor, labels: Tensor):
        super().__init__()
        self.c, self.rest, self.basis, self.head, self.labels = c, rest, basis, head, labels

    def forward(self, rows: Tensor, weight: Tensor) -> Tensor:
        y = (self.c[rows] * weight) @ self.basis + self.rest[rows]
        return F.cross_entropy(100.0 * F.normalize(y, dim=-1) @ self.head, self.labels[rows])


def plain(bench: Bench, components: int, dim: int, images: int) -> float | None:
    """Steps a second of compiled plain torch with fused AdamW."""

    def random(*size: int) -> Tensor:
        return torch.randn(*size, device=bench.device)

    labels = torch.randint(CLASSES, (images,), device=bench.device)
    loss = Plain(
        random(images, components),
        random(images, dim),
        random(components, dim),
        F.normalize(random(dim, CLASSES), dim=0),
        labels,
    )
    compiled = loss if bench.tiny else torch.compile(loss)
    weight = torch.ones(components, device=bench.device, requires_grad=True)
    optimizer = torch.optim.AdamW([weight], lr=0.01, fused=None if bench.tiny else True)
    orders = torch.stack([torch.randperm(images)[:BATCH] for _ in range(50)]).to(bench.device)

    def steps() -> None:
        for rows in orders:
            optimizer.zero_grad()
            compiled(rows, weight).backward()
            optimizer.step()

    return rate(bench, steps, len(orders))


def rate(bench: Bench, steps, count: int) -> float | None:
    """Steps a second of a function that takes `count` of them; None in a tiny run."""
    steps()
    if bench.tiny:
        return None
    torch.cuda.synchronize()
    before, taken = time.perf_counter(), 0
    while taken == 0 or time.perf_counter() - before < SECONDS / 4:
        steps()
        torch.cuda.synchronize()
        taken += count
    return taken / (time.perf_counter() - before)


def fit(bench: Bench) -> None:
    """The part `fit`: steps a second by mode."""
    images, size = (32, 16) if bench.tiny else (IMAGES, 224)
    lacks, tower = missing(), tower_of(bench.tiny)
    components, dim = (40, 16) if bench.tiny else (4000, 512)
    rates: dict[str, float | None] = {}
    if lacks is not None or tower is None:
        print(f"fit: left out, the package {lacks or 'timm'} is not installed; plain torch alone", flush=True)
    else:
        import residual_kernels as rk

        tower = tower.to(bench.device).eval()
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(min(images, 512), 3, size, size, generator=generator)
        batches = pixels.split(64)
        bases = rk.fit_bases(tower, batches, kinds=("head",)).truncate(energy=0.9)
        few = rk.encode(tower, batches, kinds=("head",))
        chosen = torch.randint(len(few), (images,), generator=generator)
        cache = few.subset(chosen)
        labels = torch.randint(min(CLASSES, images), (images,), generator=generator)
        dim = cache.output.shape[1]
        names = list(map(str, range(CLASSES)))
        head = rk.ZeroShotHead(torch.randn(dim, CLASSES, generator=generator), names).to(bench.device)
        components = len(rk.ResiDual(tower, bases).weight)
        for step in ("eager",) if bench.tiny else ("eager", "compiled", "graph", "fused"):
            if bench.late():
                print(f"fit {step}: time ran out", flush=True)
                break

            def steps(step=step, epochs=2):
                adapter = rk.ResiDual(tower, bases)
                rk.fit(
                    adapter,
                    head,
                    cache,
                    labels=labels,
                    solver="adamw",
                    lr=0.1,
                    epochs=epochs,
                    patience=epochs,
                    batch_size=BATCH,
                    step=step,
                )

            rates[step] = rate(bench, steps, 2 * -(-images // BATCH))
            note(bench, step, rates[step], components)
    rates["plain torch compiled"] = plain(bench, components, dim, images)
    note(bench, "plain torch compiled", rates["plain torch compiled"], components)
    best = max(
        (value for name, value in rates.items() if value and name != "plain torch compiled"), default=None
    )
    rival = rates["plain torch compiled"]
    bench.aim(
        "fit: our best step mode over compiled plain torch",
        best / rival if best and rival else None,
        1.0,
        at_least=True,
    )


def note(bench: Bench, provider: str, value: float | None, components: int) -> None:
    """A row of the table: seconds of a step, and steps a second in words."""
    bench.add(
        provider,
        None if value is None else 1 / value,
        operator="fit",
        shape="ViT-B/16",
        components=components,
        N=BATCH,
        dtype="float32",
        mode="step",
    )
    if value is not None:
        print(f"fit {provider}: {value:.0f} steps a second", flush=True)
