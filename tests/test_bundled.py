"""The bundled model: loads offline, says what it is asked, and its drawings are what their labels say."""

from __future__ import annotations

import socket

import numpy as np
import pytest
import torch
from PIL import Image

from residual_kernels import bundled
from residual_kernels.bundled.captions import caption, prompt
from residual_kernels.bundled.drawings import ATTRIBUTES, COLUMN, DIGITS, PHOTOS, draw, drawn_images, record
from residual_kernels.bundled.glyphs import FONTS, font_path


@pytest.fixture(scope="module")
def loaded():
    return bundled.load_bundled()


def test_model_is_finite_and_repeatable(loaded):
    model, preprocess, tokenizer = loaded
    images = torch.stack([preprocess(image) for image in drawn_images(5, seed=11)])
    assert images.shape == (5, 3, 32, 32)
    texts = tokenizer(["the number seven", "a photo of a dog"])
    with torch.no_grad():
        image_features, text_features = model.encode_image(images), model.encode_text(texts)
        again = bundled.load_bundled()[0].encode_image(images)
    assert image_features.shape == (5, 128)
    assert text_features.shape == (2, 128)
    assert image_features.isfinite().all()
    assert text_features.isfinite().all()
    assert torch.equal(image_features, again)
    assert not model.training
    assert next(model.parameters()).dtype == torch.float32
    assert model.visual.preprocess_cfg["size"] == (32, 32)
    assert 0 < model.logit_scale.exp() <= 100.1
    heads = model.visual.transformer.resblocks[0].attn.num_heads
    assert model.visual.transformer.layers >= 6
    assert heads >= 4


def test_loading_leaves_the_random_state_alone():
    before = torch.random.get_rng_state()
    bundled.load_bundled()
    assert torch.equal(before, torch.random.get_rng_state())


def test_no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("load_bundled opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    bundled.load_bundled()


def test_tokenizer_round_trip(loaded):
    tokenizer = loaded[2]
    rng = np.random.default_rng(3)
    for label in draw(60, seed=12).labels:
        text, _ = caption(label, rng)
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens).strip() == text.replace(".", " .")
        assert len(tokens) == len(text.replace(".", " .").split())  # one token a word
        assert len(tokens) + 2 <= tokenizer.context_length
    assert tokenizer(["a photo of the number 7"] * 2).shape == (2, tokenizer.context_length)
    assert tokenizer.decode(tokenizer.encode("unheard-of wörds")).strip() == "unheard - of wörds"


def test_files_are_small():
    size = sum(path.stat().st_size for path in bundled.FOLDER.iterdir() if path.is_file())
    assert size < 12e6


def test_drawings_depend_on_seed_and_index_alone():
    images, labels = draw(40, seed=5)
    assert images.shape == (40, 32, 32, 3)
    assert images.dtype == np.uint8
    assert labels.shape == (40, len(ATTRIBUTES))
    assert labels.dtype == np.int8
    later = draw(10, seed=5, start=30)
    assert np.array_equal(later.images, images[30:])
    assert np.array_equal(later.labels, labels[30:])
    assert not np.array_equal(draw(40, seed=6).images, images)
    assert all(isinstance(image, Image.Image) for image in drawn_images(3, seed=5))
    assert np.array_equal(np.asarray(drawn_images(3, seed=5)[2]), images[2])


def test_drawings_cover_every_attribute():
    labels = draw(1200, seed=8).labels
    for name, values in ATTRIBUTES.items():
        seen = {values[i] for i in np.unique(labels[:, COLUMN[name]]) if i >= 0}
        expected = set(values) - {"photo", *PHOTOS}
        assert seen == (set() if name == "light" else expected), name


def test_drawings_of_chosen_kinds():
    assert set(draw(30, 1, kinds=("digit",)).labels[:, COLUMN["kind"]]) == {0}
    with pytest.raises(ValueError, match="kinds"):
        draw(3, 1, kinds=("photo",))
    with pytest.raises(ValueError, match="n=-1"):
        draw(-1, 1)


def test_captions_say_only_what_is_true():
    rng = np.random.default_rng(0)
    for label in draw(300, seed=9).labels:
        text, mentioned = caption(label, rng)
        assert text
        assert ((mentioned < 0) | (mentioned == label)).all()
        if mentioned[COLUMN["colour"]] >= 0:
            colour = record(label)["colour"]
            assert colour in text or (colour == "grey" and "gray" in text)


def test_fonts_are_there():
    assert len(FONTS) >= 15
    assert all(font_path(name).is_file() for name in FONTS)


def test_reads_fresh_digits_zero_shot(loaded):
    model, _, tokenizer = loaded
    images, labels = draw(400, seed=77, kinds=("digit",))
    mean, std = (torch.tensor(model.visual.preprocess_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std
    with torch.no_grad():
        image_features = model.encode_image(pixels, normalize=True)
        words = model.encode_text(
            tokenizer([prompt("what", word, "digit") for word in DIGITS]), normalize=True
        )
    guess = (image_features @ words.T).argmax(1).numpy()
    assert (guess == labels[:, COLUMN["what"]]).mean() > 0.75  # measured 0.85, chance is 0.1
