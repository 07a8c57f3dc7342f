"""The whole story in one run, offline: a small CLIP misreads real handwritten digits,
then learns to read them.

Digits are scikit-learn's 1,797 scans, in thirds by a fixed seed: the weights are fitted on the first,
everything is chosen on the second, and the last is read once, at the end. Bases come from drawings, never
from digits.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from residual_kernels import extras, train
from residual_kernels.adapters.methods import ENERGY, build
from residual_kernels.adapters.residual import ResiDual
from residual_kernels.adapters.tower_adapter import TowerAdapter
from residual_kernels.analysis.ends import words_for_ends
from residual_kernels.analysis.weights import WeightReading, component_ends, read_weights
from residual_kernels.analysis.words import TextDictionary
from residual_kernels.bases.pca import fit_bases
from residual_kernels.bundled import load_bundled
from residual_kernels.bundled.drawings import DIGITS, drawn_images
from residual_kernels.units.cache import UnitCache, encode
from residual_kernels.zeroshot import ZeroShotHead

TEMPLATES = ("the number {}", "the digit {}", "a handwritten {}", "a blurry {}")
SPLIT_SEED = 0
DRAWINGS, DRAWINGS_SEED = 3000, 2411
BATCH = 256
SHOWN = 10  # images at each end of a component
# Learning rates tried for each method, in units of its default; the best on validation is kept.
RATES = {
    "coarse": (1.0, 0.3, 0.1),
    "fine": (1.0, 0.3, 0.1),
    "full": (1.0, 0.3, 0.1),
    "output": (1.0, 10.0, 100.0),
    "linear": (1.0, 10.0, 100.0),
}


@dataclass(frozen=True)
class Demo:
    """Numbers and pictures of one run; `rows` are dicts of method, accuracy, parameters, seconds
    (and more)."""

    rows: list[dict]
    summary: str
    pictures: list[Path]
    test_images: int
    seconds: float


def digit_images() -> tuple[list[Image.Image], Tensor]:
    """scikit-learn's handwritten digits as 32 x 32 pictures, white on black, and their labels [1797]."""
    data = extras.need("sklearn.datasets", "demo", "reading the handwritten digits").load_digits()
    grey = np.clip(data.images * (255 / 16), 0, 255).astype(np.uint8)
    images = [
        Image.fromarray(scan).resize((32, 32), Image.Resampling.BICUBIC).convert("RGB") for scan in grey
    ]
    return images, torch.from_numpy(data.target)


def thirds(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of the train, validation and test thirds."""
    order = torch.from_numpy(np.random.default_rng(SPLIT_SEED).permutation(count))
    size = count // 3
    return order[:size], order[size : 2 * size], order[2 * size :]


def _batches(images: list[Image.Image], preprocess: Callable, labels: Tensor | None = None):
    for start in range(0, len(images), BATCH):
        batch = torch.stack([preprocess(image) for image in images[start : start + BATCH]])
        yield batch if labels is None else (batch, labels[start : start + BATCH])


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """These fits are so small that handing their products to several threads costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _fit_best(
    adapter: TowerAdapter,
    head: ZeroShotHead,
    training: UnitCache,
    validation: UnitCache,
    rates: Sequence[float],
) -> tuple[TowerAdapter, train.FitResult, float]:
    """The fit with the best validation accuracy (then loss) over learning rates, tried at once;
    seconds are of all."""
    fits = train.fit_many(
        adapter, head, training, validation, lrs=[adapter.default_lr * rate for rate in rates]
    )
    return adapter, fits.put(adapter, fits.best()), max(result.seconds for result in fits.results)


def _component_ends(
    fine: ResiDual,
    learned: WeightReading,
    cache: UnitCache,
    images: Sequence[Image.Image],
    dictionary: TextDictionary,
):
    """The figure of the component that moves embeddings farthest."""
    from residual_kernels import figures

    component = learned[int(learned.effect.abs().argmax())]
    ends = component_ends(fine, cache, [component.index], SHOWN)
    words = words_for_ends(fine, cache, dictionary, [component])[component.index]
    sides = (ends.high, ends.high_values, words[0]), (ends.low, ends.low_values, words[1])
    high, low = (
        figures.End(
            images=[images[int(cache.ids[row])] for row in rows[0].tolist()],
            values=values[0].tolist(),
            classes=[DIGITS[label] for label in cache.truth[rows[0]].tolist()],
            words=[word for word, _ in end],
        )
        for rows, values, end in sides
    )
    unit = component.unit
    where = f"layer {unit.layer}, head {unit.head}, component {component.place}"
    weight = f"{component.weight:.2f}".replace("-", "−")
    title = f"The component that moves embeddings farthest: {where}, weight {weight} (1 is unchanged)"
    return figures.component_ends(title, high, low)


def run(folder: str | Path, say: Callable[[str], None] = lambda text: None) -> Demo:
    """Runs the story, writes its pictures to `folder`, and returns its numbers. About a minute on 2 cores."""
    extras.need("matplotlib", "demo", "drawing the demonstration's pictures")
    from residual_kernels import figures
    from residual_kernels.demo import overview

    start = time.perf_counter()
    folder = Path(folder)
    model, preprocess, tokenizer = load_bundled()
    tower = model.visual

    say("encoding handwritten digits")
    images, labels = digit_images()
    cache = encode(tower, _batches(images, preprocess, labels), kinds=("head", "mlp"), class_names=DIGITS)
    training, validation, test = (cache.subset(rows) for rows in thirds(len(cache)))

    say("drawing images and fitting principal components on them")
    drawings = drawn_images(DRAWINGS, DRAWINGS_SEED)
    every = fit_bases(tower, _batches(drawings, preprocess), kinds=("head", "mlp"))
    head = ZeroShotHead.from_text(model, tokenizer, DIGITS, TEMPLATES)

    fitted = {}
    with _one_thread():
        for method, rates in RATES.items():
            say(f"fitting {method}")
            adapter = build(method, tower, every, init="ones")
            fitted[method] = _fit_best(adapter, head, training, validation, rates)

    say("reading the test third")
    base = head(test.output)
    hits = {"base": base.argmax(1) == test.labels}
    rows = [
        {"method": "base", "accuracy": float(hits["base"].double().mean()), "parameters": 0, "seconds": 0.0}
    ]
    for name, (adapter, result, seconds) in fitted.items():
        found = train.predict(adapter, head, test)
        hits[name] = found.labels == test.labels
        rows.append(
            {
                "method": name,
                "accuracy": float(hits[name].double().mean()),
                "parameters": result.parameters,
                "seconds": seconds,
                "validation_accuracy": result.val_accuracy,
            }
        )

    say("drawing pictures")
    dictionary = TextDictionary.bundled(model, tokenizer)
    class_words = TextDictionary.from_words(model, tokenizer, [TEMPLATES[0].format(name) for name in DIGITS])
    anchored = cast(ResiDual, build("anchored", tower, every))
    with _one_thread():
        train.fit(anchored, head, training, validation)
    fine = cast(ResiDual, fitted["fine"][0])
    after = train.predict(fine, head, test).labels
    learned = read_weights(fine, test)
    heads = fine.layout.select("head")
    drawn = {
        "overview": overview.draw(anchored, head, test, images, preprocess, class_words),
        "overview-dark": overview.draw(anchored, head, test, images, preprocess, class_words, dark=True),
        "accuracy": figures.accuracy_bars(rows),
        "weights": figures.unit_map(
            fine.layout,
            {unit.index: learned.unit_weight(unit) for unit in heads},
            "Learned weight per head (number of components)",
            centre=1.0,
            form="{:.1f}",
            below={unit.index: len(learned.of(unit)) for unit in heads},
        ),
        "spectra": figures.spectra_and_counts(every.of("head"), ENERGY),
        "digits": figures.rereadings(
            [images[i] for i in test.ids.tolist()], test.truth, base.argmax(1), after
        ),
        "component": _component_ends(fine, learned, test, images, dictionary),
    }
    paths = [path for name, one in drawn.items() for path in figures.save(one, folder, name, ("png",))]
    accuracy = {row["method"]: row for row in rows}
    summary = (
        f"The untouched model reads {accuracy['base']['accuracy']:.1%} of the digits; with "
        f"{accuracy['fine']['parameters']:,} learned numbers (fine) {accuracy['fine']['accuracy']:.1%}, "
        f"with {accuracy['full']['parameters']:,} (full) {accuracy['full']['accuracy']:.1%}; a linear "
        f"layer of {accuracy['linear']['parameters']:,} reaches {accuracy['linear']['accuracy']:.1%}. "
        "Pictures:"
    )
    return Demo(rows, summary, paths, len(test), time.perf_counter() - start)
