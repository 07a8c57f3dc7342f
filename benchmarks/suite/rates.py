"""Learning rates of the peers that train by AdamW, found on two tasks outside the suite.

Their papers fix rates for towers hundreds of times this size. Here each method's rate is the one of best
accuracy, averaged over letters as edge drawings and grey photographs, 16 labels per class:

    python -m benchmarks.suite.rates --photographs cifar10.zip
"""

import argparse
import statistics
from pathlib import Path

import numpy as np
import torch

RATES = {"Tip-Adapter-F": 1e-3, "CLIP-Adapter": 1e-3, "LoRA": 3e-3, "CLIP-SVD": 3e-3, "fine-tuning": 3e-5}
TRIED = {
    "Tip-Adapter-F": (1e-4, 1e-3, 1e-2),
    "CLIP-Adapter": (1e-4, 1e-3, 1e-2),
    "LoRA": (3e-4, 1e-3, 3e-3),
    "CLIP-SVD": (1e-3, 3e-3, 1e-2),
    "fine-tuning": (3e-5, 1e-4, 3e-4),
}


def development(archive: Path | None) -> list:
    """Tasks for choosing rates, none of the suite's."""
    import residual_kernels as rk
    from benchmarks.suite import pictures, tasks

    model, _, tokenizer = rk.load_bundled()

    def made(name, names, templates, train, test):
        head = rk.ZeroShotHead.from_text(model, tokenizer, names, templates)
        parts = tasks.encoded(train), tasks.encoded(test)
        return tasks.SuiteTask(name, model.visual, names, head, tasks._bases(None), *parts)

    def letters(each, seed):
        images, labels = pictures._drawn(("letter",), "what", pictures.LETTERS, each, seed)
        return pictures.edges(images), labels

    found = [
        made(
            "letters as edges",
            pictures.LETTERS,
            tasks._asked("what", "letter"),
            letters(16, 201),
            letters(40, 202),
        )
    ]
    if archive is not None:
        images, labels = pictures.photographs(archive, "test", 400)
        grey = np.repeat(images.mean(3, keepdims=True), 3, 3).astype(np.uint8)
        place = np.arange(len(labels)) % 400
        parts = [(grey[rows], labels[rows]) for rows in ((place >= 250) & (place < 270), place >= 300)]
        found.append(made("grey photographs", pictures.PHOTOS, tasks._asked("what", "photo"), *parts))
    return found


def main() -> None:
    from benchmarks.suite.rates import RATES  # the one that methods read: this file runs under another name
    from benchmarks.suite.run import METHODS
    from benchmarks.suite.tasks import few

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photographs", type=Path)
    parser.add_argument("--methods", nargs="+", choices=TRIED, default=list(TRIED))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = development(arguments.photographs)
    for name in arguments.methods:
        for rate in TRIED[name]:
            RATES[name] = rate
            accuracies = []
            for task in found:
                train = few(task.train, 16, 0)
                logits = METHODS[name].fit(task, train, task.head(train), 0).logits(task.test)
                accuracies.append(float((logits.argmax(1) == task.test.labels).float().mean()))
            text = " ".join(f"{one:.3f}" for one in accuracies)
            print(f"{name:14s} {rate:7g}  mean {statistics.fmean(accuracies):.4f}  ({text})", flush=True)


if __name__ == "__main__":
    main()
