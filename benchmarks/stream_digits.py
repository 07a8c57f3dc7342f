"""Does it help to reweight heads inside the tower? fine and stream, at several tokens, on handwritten digits.

    python -m benchmarks.stream_digits [--json FILE]

The demo's own split, templates and drawings for bases. Every variant tries the learning rates below and keeps
the one that is best on the validation third (accuracy, then loss); the test third is read once, at the end.
"""

import argparse
import json
import time

import torch

import residual_kernels as rk
from residual_kernels.bundled.drawings import DIGITS, drawn_images
from residual_kernels.demo import DRAWINGS_SEED, TEMPLATES, digit_images, thirds

DRAWINGS = 600
RATES = {"fine": (0.8, 0.24, 0.08), "stream": (0.3, 0.1, 0.03)}
EPOCHS = 30
VARIANTS = ("fine", "stream all", "stream class", "stream patches", "stream all, last 2 layers")


def adapter_of(variant, tower, bases):
    if variant == "fine":
        return rk.ResiDual(tower, bases["output"].truncate(energy=0.90))
    tokens = variant.split(",")[0].split()[1]
    depth = rk.decompose(tower, torch.zeros(1, 3, *tower.image_size)).layout.layers
    layers = range(depth - 2, depth) if "last" in variant else None
    kept = bases[tokens].truncate(energy=0.90)
    return rk.ResiDual(tower, kept, placement="stream", layers=layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--variants", nargs="*", default=VARIANTS, choices=VARIANTS)
    arguments = parser.parse_args()
    model, preprocess, tokenizer = rk.load_bundled()
    tower = model.visual
    pictures, labels = digit_images()
    images = torch.stack([preprocess(picture) for picture in pictures])
    parts = [torch.utils.data.TensorDataset(images[rows], labels[rows]) for rows in thirds(len(images))]
    train, val, test = (
        torch.utils.data.DataLoader(
            part, batch_size=64, shuffle=shuffled, generator=torch.Generator().manual_seed(0)
        )
        for part, shuffled in zip(parts, (True, False, False), strict=True)
    )
    drawings = torch.stack([preprocess(drawing) for drawing in drawn_images(DRAWINGS, DRAWINGS_SEED)]).split(
        100
    )
    bases = {"output": rk.fit_bases(tower, drawings)}
    bases |= {
        tokens: rk.fit_bases(tower, drawings, placement="stream", tokens=tokens)
        for tokens in ("all", "class", "patches")
    }
    head = rk.ZeroShotHead.from_text(model, tokenizer, DIGITS, TEMPLATES)
    cached = [rk.encode(tower, loader, kinds=("head",)) for loader in (train, val)]
    rows = []
    for variant in arguments.variants:
        start, best = time.perf_counter(), None
        placement = variant.split()[0]
        for rate in RATES[placement]:
            adapter = adapter_of(variant, tower, bases)
            data = cached if variant == "fine" else (train, val)
            result = rk.fit(adapter, head, *data, lr=rate, epochs=arguments.epochs)
            loss = result.history[result.best_epoch].val_loss
            assert loss is not None  # there are validation images
            print(
                f"  {variant}, lr {rate}: validation {result.val_accuracy:.4f}, loss {loss:.4f}", flush=True
            )
            if best is None or (result.val_accuracy, -loss) > best[0]:
                best = (result.val_accuracy, -loss), adapter, rate
            else:
                adapter.detach()
        assert best is not None  # RATES has one at least
        (accuracy, _), adapter, rate = best
        rows.append(
            {
                "variant": variant,
                "parameters": len(adapter.weight),
                "rate": rate,
                "validation": accuracy,
                "test": rk.evaluate(adapter, head, test).accuracy,
                "seconds": time.perf_counter() - start,
            }
        )
        adapter.detach()
    print(f"{'variant':28} {'numbers':>8} {'rate':>6} {'validation':>10} {'test':>7} {'seconds':>8}")
    for row in rows:
        print(
            f"{row['variant']:28} {row['parameters']:8,} {row['rate']:6} {row['validation']:10.4f} "
            f"{row['test']:7.4f} {row['seconds']:8.1f}"
        )
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=2)


if __name__ == "__main__":
    main()
