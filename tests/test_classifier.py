"""rk.Classifier: the whole job in one object, by scikit-learn's conventions."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

import residual_kernels as rk
from residual_kernels.demo import DIGITS, digit_images

WORDS = dict(enumerate(DIGITS))


@pytest.fixture(scope="module")
def parts():
    return rk.load_bundled()


@pytest.fixture(scope="module")
def digits():
    """Pictures and labels of 300 training and 300 test digits."""
    pictures, labels = digit_images()
    return pictures[:300], labels[:300].numpy(), pictures[900:1200], labels[900:1200].numpy()


@pytest.fixture(scope="module")
def fitted(parts, digits):
    return rk.Classifier(*parts, class_names=WORDS, templates=("the number {}",)).fit(digits[0], digits[1])


def test_it_labels_new_images_better_than_the_model(fitted, digits):
    _, _, pictures, labels = digits
    assert fitted.classes_.tolist() == list(range(10))
    probabilities = fitted.predict_proba(pictures)
    assert probabilities.shape == (300, 10)
    assert np.allclose(probabilities.sum(1), 1)
    assert (fitted.classes_[probabilities.argmax(1)] == fitted.predict(pictures)).all()
    assert fitted.predict(pictures).dtype == labels.dtype
    assert fitted.score(pictures, labels) > 0.9
    assert fitted.result_.winner in repr(fitted)


def test_folders_arrays_and_tensors_are_the_same_images(fitted, parts, digits, tmp_path):
    pictures = digits[2][:12]
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number:02d}.png")
    expected = fitted.predict(pictures)
    assert (fitted.predict(tmp_path) == expected).all()
    assert (fitted.predict(np.stack([np.asarray(p) for p in pictures])) == expected).all()
    assert (fitted.predict(torch.stack([parts[1](p) for p in pictures])) == expected).all()


def test_a_folder_of_classes_needs_no_labels(parts, digits, tmp_path):
    pictures, labels = digits[:2]
    for number, (picture, label) in enumerate(zip(pictures[:120], labels[:120], strict=True)):
        if label > 2:
            continue
        folder = tmp_path / DIGITS[label]
        folder.mkdir(exist_ok=True)
        picture.save(folder / f"{number}.png")
    classifier = rk.Classifier(*parts, candidates=("anchored",)).fit(tmp_path)
    assert classifier.classes_.tolist() == ["one", "two", "zero"]
    assert classifier.score(tmp_path) > 0.9
    assert set(classifier.predict(tmp_path)) <= {"one", "two", "zero"}


def test_saved_class_vectors_are_the_fit_s_and_the_model_s_own(parts, digits, tmp_path):
    """The command eval needs both, so that "before" is the untouched model's."""
    from residual_kernels.adapters.folder import AdapterFolder

    names = ["base", "anchored + class vectors"]
    both = rk.Classifier(
        *rk.load_bundled(), class_names=WORDS, templates=("the number {}",), candidates=names
    )
    both.fit(digits[0], digits[1])
    assert both.result_.winner == names[1]
    both.save(tmp_path)
    folder = AdapterFolder.open(tmp_path)
    own = rk.ZeroShotHead.from_text(parts[0], parts[2], DIGITS, ("the number {}",))
    assert torch.allclose(folder.base_head.class_vectors, own.class_vectors)
    assert not torch.allclose(folder.head.class_vectors, own.class_vectors, atol=1e-3)


def test_saved_and_loaded_it_gives_the_same_probabilities(fitted, parts, digits, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    fitted.save(tmp_path)
    loaded = rk.Classifier.load(tmp_path, *rk.load_bundled())
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert loaded.classes_.tolist() == [str(i) for i in range(10)]
    assert np.array_equal(loaded.predict_proba(digits[2][:20]), fitted.predict_proba(digits[2][:20]))


def test_without_a_tokenizer_classes_are_the_means_of_their_images(parts, digits):
    model, preprocess, _ = parts
    classifier = rk.Classifier(model, preprocess, candidates=("anchored",)).fit(
        digits[0][:100], digits[1][:100]
    )
    assert classifier.score(digits[2][:100], digits[3][:100]) > 0.7


def test_scikit_learn_cross_validates_and_clones_it(parts, digits):
    from sklearn.base import clone, is_classifier
    from sklearn.model_selection import cross_val_score

    classifier = rk.Classifier(*parts, class_names=WORDS, candidates=("anchored",))
    assert is_classifier(classifier)
    copied = clone(classifier)
    assert copied is not classifier
    assert copied.get_params() == classifier.get_params()
    scores = cross_val_score(classifier, digits[0][:90], digits[1][:90], cv=3, error_score="raise")
    assert scores.shape == (3,)
    assert scores.min() > 0.7
    assert not hasattr(classifier, "adapter_")  # the folds fitted clones


def test_parameters_by_name(parts):
    classifier = rk.Classifier(*parts).set_params(batch_size=7)
    assert classifier.get_params()["batch_size"] == 7
    with pytest.raises(ValueError, match="no parameter 'batchsize'"):
        classifier.set_params(batchsize=7)


def test_what_cannot_be_is_said(parts, digits):
    classifier = rk.Classifier(*parts)
    picture = Image.new("RGB", (32, 32))
    with pytest.raises(ValueError, match="not fitted"):
        classifier.predict([picture])
    with pytest.raises(ValueError, match="2 images but y has 1 labels"):
        classifier.fit([picture, picture], ["a"])
    with pytest.raises(ValueError, match="at least two classes; got 1"):
        classifier.fit([picture, picture], ["a", "a"])
    with pytest.raises(ValueError, match="give y"):
        classifier.fit([picture, picture])


def test_fitting_again_starts_from_the_plain_tower(parts, digits):
    classifier = rk.Classifier(*parts, class_names=WORDS, candidates=("anchored",))
    first = classifier.fit(digits[0][:60], digits[1][:60]).predict_proba(digits[2][:5])
    again = classifier.fit(digits[0][:60], digits[1][:60]).predict_proba(digits[2][:5])
    assert np.array_equal(first, again)


def test_what_is_no_image_and_no_model_is_said(parts, digits, fitted):
    model, preprocess, tokenizer = parts
    with pytest.raises(ValueError, match="images must be a folder, a sequence of PIL images.*got NoneType"):
        fitted.predict(None)
    with pytest.raises(ValueError, match="image 0 is a str; give PIL images"):
        fitted.predict(["a.png", "b.png"])
    with pytest.raises(ValueError, match="takes .model, preprocess, tokenizer.; model is a Compose"):
        rk.Classifier(preprocess, model, tokenizer).fit(digits[0], digits[1])
    with pytest.raises(ValueError, match="preprocess must be callable"):
        rk.Classifier(model, None, tokenizer).fit(digits[0], digits[1])


def test_a_prediction_is_one_line(fitted, parts, digits):
    found = rk.predict(fitted.adapter_, fitted.head_, torch.stack([parts[1](p) for p in digits[2][:50]]))
    said = repr(found)
    assert said.startswith("Prediction(50 images, 10 classes; ")
    assert len(said) < 200
    counts = [int(n) for n in re.findall(r": (\d+)", said)]
    assert counts == sorted(counts, reverse=True)
