"""What does the bundled model know? Zero-shot accuracy, attribute by attribute.

python examples/bundled_clip/evaluate.py                       # freshly drawn images
python examples/bundled_clip/evaluate.py --photos cifar10.zip  # and the photographs of the zip's test half
"""

from __future__ import annotations

import argparse
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from residual_kernels.bundled import load_bundled
from residual_kernels.bundled.captions import prompt
from residual_kernels.bundled.drawings import ATTRIBUTES, COLUMN, PHOTOS, SIZE, draw

HELD_OUT_SEED = 1  # training draws from seed 0


def read_photos(archive: Path, half: str) -> tuple[np.ndarray, np.ndarray]:
    """Photographs `half`/<class>/* of an ImageFolder in a zip: uint8 [n, 32, 32, 3] and their label rows."""
    images, labels = [], []
    with zipfile.ZipFile(archive) as folder:
        for name in sorted(folder.namelist()):
            parts = name.split("/")
            if len(parts) < 3 or parts[-3] != half or parts[-2] not in PHOTOS or name.endswith("/"):
                continue
            image = (
                Image.open(io.BytesIO(folder.read(name)))
                .convert("RGB")
                .resize((SIZE, SIZE), Image.Resampling.BICUBIC)
            )
            images.append(np.asarray(image))
            labels.append(photo_label(images[-1], parts[-2]))
    if not images:
        raise ValueError(f"{archive} holds no {half}/<class>/ images of the classes {', '.join(PHOTOS)}")
    return np.stack(images), np.stack(labels)


def photo_label(image: np.ndarray, name: str) -> np.ndarray:
    """A photograph's label row: its class, and light and main colour where they are plain to see."""
    label = np.full(len(ATTRIBUTES), -1, np.int8)
    red, green, blue = image.reshape(-1, 3).mean(0)
    light = 0.3 * red + 0.59 * green + 0.11 * blue
    said = {"kind": "photo", "what": name}
    if light > 150 or light < 95:
        said["light"] = "bright" if light > 150 else "dark"
    if blue > red + 20 and blue > green + 5:
        said["colour"] = "blue"
    elif green > red + 8 and green > blue + 15:
        said["colour"] = "green"
    elif red > blue + 30 and red > green + 8:
        said["colour"] = "brown"
    for attribute, value in said.items():
        label[COLUMN[attribute]] = ATTRIBUTES[attribute].index(value)
    return label


def as_input(images: np.ndarray, config: dict) -> torch.Tensor:
    """uint8 [n, 32, 32, 3] to the model's normalised float32 [n, 3, 32, 32]."""
    cfg = config["preprocess_cfg"]
    mean, std = torch.tensor(cfg["mean"]).view(3, 1, 1), torch.tensor(cfg["std"]).view(3, 1, 1)
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std


@torch.no_grad()
def zero_shot(model, tokenizer, config: dict, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy of every attribute over the images it is said of; `what` is told apart within its kind."""
    features = torch.cat(
        [model.encode_image(as_input(part, config), normalize=True) for part in _parts(images)]
    )
    kinds, whats = labels[:, COLUMN["kind"]], labels[:, COLUMN["what"]]
    accuracy = {}

    def ask(name: str, truth: np.ndarray, rows: np.ndarray, texts: list[str]) -> None:
        words = model.encode_text(tokenizer(texts), normalize=True)
        guess = (features[torch.from_numpy(rows)] @ words.T).argmax(1).numpy()
        accuracy[name] = round(float((guess == truth).mean()), 4)

    for k, kind in enumerate(ATTRIBUTES["kind"]):
        rows = np.flatnonzero(kinds == k)
        if len(rows):
            values, truth = np.unique(whats[rows], return_inverse=True)
            ask(f"which {kind}", truth, rows, [prompt("what", ATTRIBUTES["what"][v], kind) for v in values])
    for attribute, words in ATTRIBUTES.items():
        rows = np.flatnonzero(labels[:, COLUMN[attribute]] >= 0)
        if attribute != "what" and len(np.unique(labels[rows, COLUMN[attribute]])) > 1:
            ask(
                attribute,
                labels[rows, COLUMN[attribute]],
                rows,
                [prompt(attribute, word) for word in words],
            )
    return accuracy


def _parts(images: np.ndarray, size: int = 500):
    return (images[i : i + size] for i in range(0, len(images), size))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--drawings", type=int, default=4000, help="how many images to draw")
    parser.add_argument("--photos", type=Path, help="ImageFolder in a zip with a test/ half")
    args = parser.parse_args()
    model, _, tokenizer = load_bundled()
    config = {"preprocess_cfg": model.visual.preprocess_cfg}
    result = {"drawn": zero_shot(model, tokenizer, config, *draw(args.drawings, seed=HELD_OUT_SEED))}
    if args.photos:
        result["photographs"] = zero_shot(model, tokenizer, config, *read_photos(args.photos, "test"))
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
