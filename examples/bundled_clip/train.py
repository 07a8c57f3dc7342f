"""Make the bundled CLIP from nothing: vocabulary, drawings, contrastive training, weights, curve.

    python examples/bundled_clip/train.py --photos cifar10.zip     # weights into residual_kernels/bundled/
    python examples/bundled_clip/train.py --steps 200 --pool 5000 --out /tmp/try
    python examples/bundled_clip/train.py --tower map --minutes 20 --out build/map --photos cifar10.zip

The zip holds train/<class>/*.jpg (and test/<class>/*.jpg, read only to measure). Weights are written every
few minutes, each time whole; the optimiser is schedule-free, so whatever was written last is usable. The
second command is a quick look; the third trains an image tower of another shape (towers.py).
"""

from __future__ import annotations

import argparse
import collections
import gzip
import hashlib
import itertools
import json
import math
import os
import tempfile
import time
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
import towers
from evaluate import HELD_OUT_SEED, as_input, read_photos, zero_shot
from open_clip import CLIP
from safetensors.torch import save
from schedulefree import AdamWScheduleFree

from residual_kernels import bundled
from residual_kernels.bundled import build_tokenizer
from residual_kernels.bundled.captions import caption
from residual_kernels.bundled.drawings import DIGITS, LETTERS, draw

HERE = Path(__file__).resolve().parent
TRAIN_SEED = 0
PIECE = 32  # images in one piece of work
CONFIG = {
    "model_cfg": {
        "embed_dim": 128,
        "vision_cfg": {
            "image_size": 32,
            "patch_size": 8,
            "width": 128,
            "head_width": 16,
            "layers": 6,
            "mlp_ratio": 4.0,
        },
        "text_cfg": {"context_length": 24, "vocab_size": 0, "width": 128, "heads": 4, "layers": 3},
    },
    "preprocess_cfg": {
        "size": 32,
        "mode": "RGB",
        "mean": [0.45, 0.45, 0.45],
        "std": [0.3, 0.3, 0.3],
        "interpolation": "bicubic",
        "resize_mode": "squash",
        "fill_color": 0,
    },
}


def build_vocabulary(path: Path, labels: np.ndarray, texts: int = 60_000) -> None:
    """Byte-pair merges over the captions themselves, until every word of theirs is one token."""
    rng = np.random.default_rng(TRAIN_SEED)
    counts: collections.Counter[str] = collections.Counter()
    for row in rng.integers(len(labels), size=texts):
        counts.update(caption(labels[row], rng)[0].replace(".", " .").split())
    counts.update([*DIGITS, *LETTERS])
    words = {(*word[:-1], word[-1] + "</w>"): count for word, count in sorted(counts.items())}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: collections.Counter[tuple[str, str]] = collections.Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        words = {_merge(word, best): count for word, count in words.items()}
    text = "\n".join(["#version: residual_kernels bundled clip", *map(" ".join, merges)])
    _write(path, gzip.compress(text.encode(), mtime=0))


def _merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    for piece in word:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return tuple(merged)


def draw_pool(n: int, processes: int, cache: Path) -> tuple[np.ndarray, np.ndarray]:
    """The first `n` training drawings; kept in `cache`, since they depend on nothing but their number."""
    source = b"".join(file.read_bytes() for file in sorted(Path(bundled.__file__).parent.glob("*.py")))
    file = cache / f"drawings-{n}-{hashlib.sha256(source).hexdigest()[:12]}.npz"
    if file.exists():
        with np.load(file) as saved:
            return saved["images"], saved["labels"]
    chunk = 2000
    starts = range(0, n, chunk)
    with ProcessPoolExecutor(processes) as workers:
        sizes = [min(chunk, n - start) for start in starts]
        parts = list(workers.map(draw, sizes, [TRAIN_SEED] * len(sizes), starts))
    images, labels = (np.concatenate(column) for column in zip(*parts, strict=True))
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=cache, suffix=".npz", delete=False) as handle:
        np.savez(handle, images=images, labels=labels)
    os.replace(handle.name, file)
    return images, labels


def augment(images: np.ndarray, is_photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shift by a pixel (photographs by up to four, half of them mirrored), brightness, contrast; uint8."""
    out = np.empty_like(images)
    for i, image in enumerate(images):
        reach = 4 if is_photo[i] else 1
        padded = np.pad(
            image, ((reach, reach), (reach, reach), (0, 0)), mode="reflect" if is_photo[i] else "edge"
        )
        y, x = rng.integers(2 * reach + 1, size=2)
        moved = padded[y : y + images.shape[1], x : x + images.shape[2]]
        out[i] = moved[:, ::-1] if is_photo[i] and rng.random() < 0.5 else moved
    gain = rng.uniform(0.88, 1.12, (len(images), 1, 1, 1)).astype(np.float32)
    shift = rng.uniform(-10, 10, (len(images), 1, 1, 1)).astype(np.float32)
    return np.clip(out * gain + shift, 0, 255).astype(np.uint8)


def matches(labels: np.ndarray, mentioned: np.ndarray) -> torch.Tensor:
    """[images, captions]: is everything that the caption mentions true of the image?"""
    wanted = mentioned[None]
    return torch.from_numpy(((wanted < 0) | (wanted == labels[:, None])).all(-1)).float()


def clip_loss(logits: torch.Tensor, match: torch.Tensor) -> torch.Tensor:
    """CLIP's symmetric cross-entropy; each row's target is spread evenly over all its true partners."""
    to_text = F.cross_entropy(logits, match / match.sum(1, keepdim=True))
    to_image = F.cross_entropy(logits.T, match.T / match.T.sum(1, keepdim=True))
    return 0.5 * (to_text + to_image)


def encode_text(model: CLIP, tokens: torch.Tensor) -> torch.Tensor:
    """`model.encode_text(tokens)` without the work on the padding behind the longest caption."""
    length = int(tokens.argmax(1).max()) + 1
    tokens = tokens[:, :length]
    x = model.token_embedding(tokens) + model.positional_embedding[:length]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    return x[torch.arange(len(x)), tokens.argmax(1)] @ model.text_projection


def forward_backward(
    model: CLIP, images: torch.Tensor, tokens: torch.Tensor, match: torch.Tensor, workers: Executor
) -> float:
    """One step's loss; its gradients are added to the model's.

    The batch runs through the towers in pieces that the workers pick up as they come free, one thread each.
    On a shared machine that beats splitting every matrix product, where all wait for the slowest each time.
    """
    pieces = [workers.submit(model.encode_image, piece) for piece in images.split(PIECE)]
    pieces += [workers.submit(encode_text, model, piece) for piece in tokens.split(3 * PIECE)]
    raw = [piece.result() for piece in pieces]
    leaves = [piece.detach().requires_grad_() for piece in raw]
    n = len(images.split(PIECE))
    image_features, text_features = (
        F.normalize(torch.cat(part), dim=-1) for part in (leaves[:n], leaves[n:])
    )
    loss = clip_loss(model.logit_scale.exp() * image_features @ text_features.T, match)
    loss.backward()
    for done in [workers.submit(piece.backward, leaf.grad) for piece, leaf in zip(raw, leaves, strict=True)]:
        done.result()
    return loss.item()


def save_weights(model: torch.nn.Module, path: Path) -> None:
    """float16 safetensors, written whole or not at all."""
    tensors = {
        name: tensor.detach().half().contiguous().clone() for name, tensor in model.state_dict().items()
    }
    _write(path, save(tensors, metadata={"format": "pt"}))


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def plot_curve(points: list[dict], path: Path) -> None:
    """Loss and zero-shot accuracy against training steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    steps = [p["step"] for p in points]
    left.plot(steps, [p["loss"] for p in points])
    left.set(xlabel="step", ylabel="contrastive loss (mean since the last point)")
    for name in ("which digit", "which letter", "which shape", "which pattern", "colour"):
        right.plot(steps, [p["drawn"].get(name, math.nan) for p in points], label=f"drawn: {name}")
    right.plot(
        steps, [p["photographs"].get("which photo", math.nan) for p in points], label="photographs: class"
    )
    right.set(xlabel="step", ylabel="zero-shot accuracy, held out", ylim=(0, 1))
    right.legend(fontsize=7)
    figure.tight_layout()
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=110)
    plt.close(figure)
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, help="ImageFolder in a zip: train/<class>/*, test/<class>/*")
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "residual_kernels" / "bundled")
    parser.add_argument(
        "--curve", type=Path, help="folder of curve.json and curve.png (default: beside this script)"
    )
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "bundled_clip")
    parser.add_argument(
        "--tower", choices=towers.NAMES, default=towers.BUNDLED, help="shape of the image tower"
    )
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop earlier, after this long")
    parser.add_argument("--batch", type=int, default=192)
    parser.add_argument("--pool", type=int, default=160_000, help="how many different drawings")
    parser.add_argument("--photo-share", type=float, default=0.2)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--warmup", type=int, default=300)
    parser.add_argument("--save-minutes", type=float, default=4.0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    if args.tower != towers.BUNDLED and args.out == parser.get_default("out"):
        parser.error("the package holds the bundled tower alone: give --out FOLDER for another one")
    args.out.mkdir(parents=True, exist_ok=True)
    curve = args.curve or (HERE if args.out.name == "bundled" else args.out)

    images, labels = draw_pool(args.pool, args.threads, args.cache)
    held_out = draw(2000, seed=HELD_OUT_SEED)
    photos = read_photos(args.photos, "train") if args.photos else None
    held_photos = read_photos(args.photos, "test") if args.photos else None
    print(f"{len(images)} drawings, {len(photos[0]) if photos else 0} photographs", flush=True)

    vocabulary = args.out / "bpe_vocab.txt.gz"
    build_vocabulary(vocabulary, np.concatenate([labels, photos[1]]) if photos else labels)
    config = json.loads(json.dumps(CONFIG))
    tokenizer = build_tokenizer(config, vocabulary)
    config["model_cfg"]["text_cfg"]["vocab_size"] = tokenizer.vocab_size
    if args.tower != towers.BUNDLED:
        config["tower"] = args.tower
    _write(args.out / "config.json", (json.dumps(config, indent=2) + "\n").encode())

    torch.manual_seed(TRAIN_SEED)
    torch.set_num_threads(1)  # the work is shared out in pieces instead: see forward_backward
    rng = np.random.default_rng(TRAIN_SEED)
    model = towers.build(config, args.tower)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = AdamWScheduleFree(
        [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=args.lr,
        warmup_steps=args.warmup,
        betas=(0.95, 0.98),
    )
    n_photos = round(args.batch * args.photo_share) if photos else 0
    is_photo = np.arange(args.batch) < n_photos

    def next_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Normalised images, caption tokens, and which caption is true of which image."""
        chosen = rng.integers(len(images), size=args.batch - n_photos)
        batch, truth = images[chosen], labels[chosen]
        if photos:
            chosen = rng.integers(len(photos[0]), size=n_photos)
            batch, truth = (
                np.concatenate([photos[0][chosen], batch]),
                np.concatenate([photos[1][chosen], truth]),
            )
        texts, mentioned = zip(*(caption(row, rng) for row in truth), strict=True)
        pixels = as_input(augment(batch, is_photo, rng), config)
        return pixels, tokenizer(list(texts)), matches(truth, np.stack(mentioned))

    points: list[dict] = []
    begin, last_save, losses = time.time(), time.time(), []
    workers = ThreadPoolExecutor(args.threads, initializer=torch.set_num_threads, initargs=(1,))
    batch = next_batch()
    model.train()
    optimizer.train()
    for step in range(1, args.steps + 1):
        upcoming = workers.submit(next_batch)
        optimizer.zero_grad()
        loss = forward_backward(model, *batch, workers)
        batch = upcoming.result()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            cast(torch.Tensor, model.logit_scale).clamp_(0, math.log(100))
        losses.append(loss)

        seconds = time.time() - begin
        over = step == args.steps or seconds > 60 * args.minutes
        if step % 25 == 0:
            print(f"step {step} loss {np.mean(losses[-25:]):.3f} {seconds / step:.2f} s/step", flush=True)
        if over or time.time() - last_save > 60 * args.save_minutes:
            model.eval()
            optimizer.eval()
            save_weights(model, args.out / "clip.safetensors")
            point: dict[str, object] = {
                "step": step,
                "minutes": round(seconds / 60, 1),
                "loss": round(float(np.mean(losses)), 4),
            }
            point["drawn"] = zero_shot(model, tokenizer, config, *held_out)
            point["photographs"] = zero_shot(model, tokenizer, config, *held_photos) if held_photos else {}
            points.append(point)
            settings = {
                k: v for k, v in vars(args).items() if isinstance(v, int | float) and math.isfinite(v)
            }
            report = {"settings": settings, "points": points}
            _write(curve / "curve.json", (json.dumps(report, indent=1) + "\n").encode())
            plot_curve(points, curve / "curve.png")
            print(json.dumps(point), flush=True)
            last_save, losses = time.time(), []
            model.train()
            optimizer.train()
        if over:
            break


if __name__ == "__main__":
    main()
