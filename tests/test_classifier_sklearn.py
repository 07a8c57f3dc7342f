"""rk.Classifier under scikit-learn's own checks of an estimator (`check_estimator`).

The checks give rows of numbers, not images. Here a row is repeated into the pixels of an image, and
scikit-learn's own validation reads the rows. Everything after that is the classifier's.
"""

import numpy as np
import pytest
import torch
from sklearn.exceptions import DataConversionWarning, NotFittedError
from sklearn.utils.estimator_checks import check_estimator
from sklearn.utils.validation import validate_data

import residual_kernels as rk

SIDE = 32  # pixels of the bundled model's images
EXPECTED = {
    "check_estimators_overwrite_params": "the model is a parameter, and fit freezes it: its flags change",
    "check_methods_subset_invariance": "float32 matrix products differ in the last bits between batch sizes",
}


class OfRows(rk.Classifier):
    """A classifier of images that are rows of numbers."""

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = True
        return tags

    def fit(self, X, y=None):
        return super().fit(_pixels(validate_data(self, X)), y)

    def predict(self, X):
        self._check_fitted()
        return super().predict(_pixels(validate_data(self, X, reset=False)))

    def predict_proba(self, X):
        self._check_fitted()
        return super().predict_proba(_pixels(validate_data(self, X, reset=False)))

    def score(self, X, y=None):
        return float((self.predict(X) == y).mean())


def _pixels(rows):
    """[N, F] numbers as images [N, 3, SIDE, SIDE]."""
    wanted = 3 * SIDE**2
    rows = torch.as_tensor(rows.astype("float32"))
    return rows.repeat(1, wanted // rows.shape[1] + 1)[:, :wanted].reshape(-1, 3, SIDE, SIDE)


# some checks give noise, whose classes are alike; and the package does not need scikit-learn's base class
@pytest.mark.filterwarnings("ignore:the class vectors of", "ignore:Estimator OfRows does not inherit")
def test_it_passes_the_checks_of_scikit_learn():
    model, preprocess, _ = rk.load_bundled()
    estimator = OfRows(model, preprocess, candidates=("base", "anchored"))
    results = check_estimator(estimator, expected_failed_checks=EXPECTED, on_fail=None, on_skip=None)
    failed = {one["check_name"]: str(one["exception"]) for one in results if one["status"] == "failed"}
    assert failed == {}
    assert {one["check_name"] for one in results if one["status"] == "xfail"} == set(EXPECTED)
    passed = {one["check_name"] for one in results if one["status"] == "passed"}
    assert {"check_fit_idempotent", "check_classifiers_train", "check_no_attributes_set_in_init"} <= passed


@pytest.mark.filterwarnings("ignore:the class vectors of")  # black images
def test_labels_are_one_column_of_classes():
    model, preprocess, _ = rk.load_bundled()
    classifier = rk.Classifier(model, preprocess, candidates=("base",))
    images = torch.zeros(4, 3, SIDE, SIDE)
    with pytest.raises(ValueError, match=r"y should be a 1d array.*shape is \(4, 2\)"):
        classifier.fit(images, np.eye(2).repeat(2, 0))
    with pytest.raises(ValueError, match=r"y is continuous \(it holds 0.5\); labels are integers or text"):
        classifier.fit(images, [0.5, 1, 2, 1])
    with pytest.warns(DataConversionWarning, match="its one column is used"):
        classifier.fit(images, [["a"], ["b"], ["a"], ["b"]])
    assert classifier.classes_.tolist() == ["a", "b"]
    assert rk.Classifier(model, preprocess).fit(images, iter("abab")).classes_.tolist() == ["a", "b"]
    with pytest.raises(NotFittedError, match="call fit or load first"):
        rk.Classifier(model, preprocess).predict(images)
