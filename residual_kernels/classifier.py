"""The whole job in one object: encode, fit bases, let the methods compete, and label new images.

    classifier = rk.Classifier(model, preprocess, tokenizer).fit("photos/train")
    classifier.predict("new-photos/")

It follows scikit-learn's conventions, so that it can be cross-validated and put in a pipeline.
"""

import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from residual_kernels import extras
from residual_kernels.adapters.folder import AdapterFolder, save_adapter
from residual_kernels.adapters.tower_adapter import TowerAdapter
from residual_kernels.bases.pca import fit_bases
from residual_kernels.train import TuneResult, predict, tune
from residual_kernels.units.cache import UnitCache, encode
from residual_kernels.zeroshot import ZeroShotHead

KINDS = ("head", "mlp")  # units whose components may be weighted


class Classifier:
    """A CLIP-like model, fitted to labelled images, that labels new ones.

    `fit` never leaves the model worse than it was, as far as its labels can tell: the untouched model
    competes, and wins where nothing is better by one standard error.

    Args:
        model: an open_clip or transformers model with an image tower. Its weights are not changed; they are
            frozen while an adapter is fitted to it.
        preprocess: PIL image -> tensor [3, H, W], the model's own.
        tokenizer: the model's own. Without one, class vectors are the mean embeddings of each class's images.
        class_names: what the classes are called in prompts: {label: words}. Labels themselves by default.
        templates: prompts with one {} for the class name.
        candidates: of :func:`residual_kernels.tune`; all that apply by default.
        batch_size: images that go through the tower at once.
        workers: processes that read images.
        cache: a folder that keeps the encoded training images, so that an interrupted `fit` resumes.

    Attributes (after `fit`):
        classes_: the labels, sorted; columns of `predict_proba` are in this order. adapter_: the winner, a
        module that stands where the image tower stood. head_: its class vectors. result_: the
        :class:`TuneResult`: what every candidate reached and why the winner won; None after `load`.
    """

    _estimator_type = "classifier"
    classes_: np.ndarray
    adapter_: TowerAdapter
    head_: ZeroShotHead
    result_: TuneResult | None
    _base_head: ZeroShotHead | None

    def __init__(
        self,
        model: nn.Module,
        preprocess: Callable,
        tokenizer: Callable | None = None,
        *,
        class_names: dict[Any, str] | None = None,
        templates: Sequence[str | Callable[[str], str]] = ("a photo of a {}.",),
        candidates: Sequence[str] | None = None,
        batch_size: int = 64,
        workers: int = 0,
        cache: str | os.PathLike | None = None,
    ):
        self.model, self.preprocess, self.tokenizer = model, preprocess, tokenizer
        self.class_names, self.templates, self.candidates = class_names, templates, candidates
        self.batch_size, self.workers, self.cache = batch_size, workers, cache

    def _check_model(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise ValueError(
                f"Classifier takes (model, preprocess, tokenizer); model is a {type(self.model).__name__}, "
                "not a module"
            )
        if not callable(self.preprocess):
            raise ValueError(f"preprocess must be callable, PIL image -> tensor; got {self.preprocess!r}")

    def fit(self, X: Any, y: Iterable | None = None) -> "Classifier":
        """Fits the model to labelled images.

        Args:
            X: a folder of class folders (or anything that :func:`open_images` reads), or a sequence of PIL
                images, a uint8 array [N, H, W, 3], or preprocessed images [N, 3, H, W].
            y: [N] a label for each image: integers, text or another sortable type. Left out for a folder,
                which has its own.

        Returns:
            This classifier, fitted.

        Raises:
            ValueError: no labels, fewer than two classes, or images that cannot be read (named).
        """
        self._check_model()
        images, labels = self._images(X), None if y is None else _labels(y)
        if labels is None:
            if getattr(images, "class_names", None) is None:
                raise ValueError(
                    "fit needs a label for each image: give y, or a folder of class folders "
                    "(y should be a 1d array)"
                )
            classes, numbers = np.asarray(images.class_names), images.labels
        else:
            if len(labels) != len(images):
                raise ValueError(f"X has {len(images)} images but y has {len(labels)} labels")
            classes, found = np.unique(labels, return_inverse=True)
            numbers = torch.as_tensor(found).reshape(-1)
        if len(classes) < 2:
            raise ValueError(
                f"fit needs at least two classes; got {len(classes)} class{'es' * (len(classes) != 1)}"
            )
        self._release()
        tower = _tower(self.model)
        data = _Labelled(images, numbers)
        train = encode(tower, self._loader(data), self.cache, KINDS, class_names=list(map(str, classes)))
        head = self._head(classes, train)
        tuned = tune(tower, fit_bases(tower, train, KINDS), head, train, candidates=self.candidates)
        self.classes_, self.result_ = classes, tuned
        self.adapter_, self.head_ = tuned.adapter, tuned.head
        self._base_head = None if tuned.head is head else head  # a fit may move class vectors
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The label of each image.

        Args:
            X: images, as in `fit`, or a folder without class folders.

        Returns:
            [N] labels, of the type of the labels that `fit` saw.

        Raises:
            ValueError: not fitted, or an image cannot be read.
        """
        labels = self._predicted(X).labels.cpu().numpy()
        return self.classes_[labels]

    def predict_proba(self, X: Any) -> np.ndarray:
        """The probability of each class for each image.

        Args:
            X: images, as in `predict`.

        Returns:
            [N, K] float64, columns in the order of `classes_`; rows sum to one.

        Raises:
            ValueError: not fitted, or an image cannot be read.
        """
        return self._predicted(X).probabilities.double().cpu().numpy()

    def score(self, X: Any, y: Iterable | None = None) -> float:
        """The share of images that are labelled right.

        Args:
            X, y: as in `fit`.

        Returns:
            The accuracy, in [0, 1].

        Raises:
            ValueError: no labels, or not fitted.
        """
        images = self._images(X)
        if y is None:
            if getattr(images, "class_names", None) is None:
                raise ValueError("score needs a label for each image: give y, or a folder of class folders")
            y = np.asarray(images.class_names)[images.labels.numpy()]
        return float(np.mean(self.predict(images) == _labels(y)))

    def save(self, path: str | os.PathLike) -> None:
        """Writes adapter, class vectors and labels to a folder, which `residual-kernels eval` reads too.

        The model is not part of it.

        Args:
            path: the folder.

        Raises:
            ValueError: not fitted.
        """
        self._check_fitted()
        save_adapter(
            self.adapter_,
            path,
            head=self.head_,
            base_head=self._base_head,
            class_names=list(map(str, self.classes_)),
        )

    def push(
        self,
        repo_id: str,
        *,
        task: str,
        tower: str,
        accuracy: float | None = None,
        card: dict[str, Any] | None = None,
        private: bool | None = None,
        token: str | None = None,
    ) -> str:
        """Pushes adapter, class vectors, labels and a model card to the Hugging Face hub.

        The model is not part of it.

        Args:
            repo_id: "name/repository"; made when it is not there.
            task, tower: for the card: what it labels, and which model it belongs to ("open_clip ViT-B-16,
                openai").
            accuracy: measured on images that were not fitted to, in [0, 1]; `score` gives it.
            card: further metadata of the card (license, datasets, language ...).
            private, token: as in huggingface_hub.

        Returns:
            The address of the commit.

        Raises:
            ValueError: not fitted, or an accuracy outside [0, 1]; before anything is sent.
        """
        self._check_fitted()
        from residual_kernels.adapters.hub import push_adapter  # loads the hub's client

        return push_adapter(
            self.adapter_,
            repo_id,
            task=task,
            tower=tower,
            accuracy=accuracy,
            head=self.head_,
            base_head=self._base_head,
            class_names=list(map(str, self.classes_)),
            card=card,
            private=private,
            token=token,
        )

    @classmethod
    def pull(
        cls,
        repo_id: str,
        model: nn.Module,
        preprocess: Callable,
        tokenizer: Callable | None = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        **options: Any,
    ) -> "Classifier":
        """The classifier that :meth:`push` put on the Hugging Face hub, around its model.

        Args:
            repo_id: "name/repository".
            model: the one that it was fitted on.
            preprocess, tokenizer, options: as for the constructor.
            revision, token: as in huggingface_hub.

        Returns:
            A fitted classifier; `result_` is None.

        Raises:
            ValueError: it was fitted on another model, or holds no class vectors.
        """
        from residual_kernels.adapters.hub import HubAdapter  # loads the hub's client

        kept = HubAdapter.from_pretrained(repo_id, tower=_tower(model), revision=revision, token=token)
        loaded = cls(model, preprocess, tokenizer, **options)
        return loaded._restored(repo_id, kept.adapter, kept.head, kept.base_head, kept.class_names)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        model: nn.Module,
        preprocess: Callable,
        tokenizer: Callable | None = None,
        **options: Any,
    ) -> "Classifier":
        """The classifier in a folder, around the model that it was fitted on. Labels come back as text.

        Args:
            path: a folder that :meth:`save` or `residual-kernels fit` wrote.
            model, preprocess, tokenizer, options: as for the constructor.

        Returns:
            A fitted classifier; `result_` is None.

        Raises:
            FileNotFoundError: there is no adapter. ValueError: it was fitted on another model, or holds no
                class vectors.
        """
        loaded = cls(model, preprocess, tokenizer, **options)
        folder = AdapterFolder.open(path)
        _check_head(path, folder.head)  # before the model's flags are touched
        return loaded._restored(
            path, folder.adapter(_tower(model)), folder.head, folder.base_head, folder.class_names
        )

    def _restored(
        self,
        place: str | os.PathLike,
        adapter: TowerAdapter,
        head: ZeroShotHead | None,
        base_head: ZeroShotHead | None,
        class_names: Sequence[str] | None,
    ) -> "Classifier":
        try:
            self.head_ = _check_head(place, head)
        except ValueError:
            adapter.detach()
            raise
        self.adapter_, self._base_head, self.result_ = adapter, base_head, None
        self.classes_ = np.asarray(class_names or self.head_.class_names)
        return self

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments of the constructor, by name (scikit-learn's convention).

        Args:
            deep: has no effect: no argument is an estimator.

        Returns:
            name -> value.
        """
        return {name: getattr(self, name) for name in _parameters(type(self))}

    def set_params(self, **params: Any) -> "Classifier":
        """Sets arguments of the constructor, by name (scikit-learn's convention).

        Args:
            params: name=value.

        Returns:
            This classifier.

        Raises:
            ValueError: the constructor has no argument of that name.
        """
        unknown = sorted(set(params) - set(_parameters(type(self))))
        if unknown:
            raise ValueError(
                f"Classifier has no parameter {unknown[0]!r}; it has {', '.join(_parameters(type(self)))}"
            )
        for name, value in params.items():
            setattr(self, name, value)
        return self

    def __sklearn_clone__(self) -> "Classifier":
        """An unfitted classifier around the same model: adapters of several may live on one tower."""
        return type(self)(**self.get_params())

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "adapter_")

    def __sklearn_tags__(self) -> Any:
        utils = extras.need("sklearn.utils", "demo", "scikit-learn's cross-validation")
        return utils.Tags(
            estimator_type="classifier",
            target_tags=utils.TargetTags(required=True),
            classifier_tags=utils.ClassifierTags(),
            input_tags=utils.InputTags(two_d_array=False),
        )

    def __repr__(self) -> str:
        name = type(self.model).__name__
        if not hasattr(self, "adapter_"):
            return f"Classifier({name}, not fitted)"
        winner = "loaded" if self.result_ is None else self.result_.winner
        return f"Classifier({name}, {len(self.classes_)} classes, {winner})"

    def _check_fitted(self) -> None:
        if not hasattr(self, "adapter_"):
            raise _of_sklearn("NotFittedError", ValueError)(
                "this Classifier is not fitted; call fit or load first"
            )

    def _predicted(self, X: Any):
        self._check_fitted()
        return predict(self.adapter_, self.head_, self._loader(_Unlabelled(self._images(X))))

    def _head(self, classes: np.ndarray, train: UnitCache) -> ZeroShotHead:
        words = {} if self.class_names is None else self.class_names
        names = [
            str(words.get(label.item() if hasattr(label, "item") else label, label)) for label in classes
        ]
        if self.tokenizer is None:
            return ZeroShotHead.from_prototypes(train.output, train.labels, names)
        return ZeroShotHead.from_text(self.model, self.tokenizer, names, self.templates)

    def _images(self, X: Any) -> Any:
        """X as something with a length whose items are preprocessed images
        (and labels, of a folder of classes)."""
        if isinstance(X, (str, os.PathLike)):
            from residual_kernels.data.images import open_images  # loads Pillow

            return open_images(X, self.preprocess, labelled=None)
        if isinstance(X, (Dataset, Tensor)):
            return X
        if not hasattr(X, "__len__") or not hasattr(X, "__getitem__"):
            raise ValueError(
                "images must be a folder, a sequence of PIL images, a uint8 array [N, H, W, 3] or "
                f"preprocessed images [N, 3, H, W]; got {type(X).__name__}"
            )
        return _Pictures(X, self.preprocess)

    def _loader(self, data: Dataset) -> DataLoader:
        return DataLoader(data, self.batch_size, num_workers=self.workers)

    def _release(self) -> None:
        """Detaches the adapter of an earlier fit, so that the tower is the plain one again."""
        adapter: TowerAdapter | None = self.__dict__.pop("adapter_", None)
        if adapter is not None:
            adapter.detach()


def _labels(y: Any) -> np.ndarray:
    """The labels [N] of images, as an array."""
    labels = np.asarray(y if hasattr(y, "__array__") or hasattr(y, "__len__") else list(y))
    if labels.ndim == 2 and labels.shape[1] == 1:
        kind = _of_sklearn("DataConversionWarning", UserWarning)
        message = "A column-vector y was passed when a 1d array was expected; its one column is used"
        warnings.warn(message, kind, stacklevel=3)
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise ValueError(f"y should be a 1d array, one label for each image; its shape is {labels.shape}")
    if labels.dtype.kind in "fc":
        if not np.isfinite(labels).all():
            raise ValueError(f"y holds {labels[~np.isfinite(labels)][0]}, which is no label")
        if (labels != np.round(labels)).any():
            raise ValueError(
                f"Unknown label type: y is continuous (it holds {labels[labels != np.round(labels)][0]}); "
                "labels are integers or text"
            )
    return labels


def _of_sklearn(name: str, otherwise: type) -> Any:
    """An exception of scikit-learn for callers who have loaded it; it is a subclass of `otherwise`."""
    return getattr(sys.modules.get("sklearn.exceptions"), name, otherwise)


def _check_head(place: str | os.PathLike, head: ZeroShotHead | None) -> ZeroShotHead:
    if head is None:
        raise ValueError(f"{place} holds an adapter without class vectors; save it with head=")
    return head


def _tower(model: nn.Module) -> nn.Module:
    from residual_kernels.data.models import image_tower  # loads the hub's client

    return image_tower(model)


def _parameters(cls: Any) -> list[str]:
    return [name for name in inspect.signature(cls.__init__).parameters if name != "self"]


class _Pictures(Dataset):
    """PIL images, or arrays of pixels, preprocessed when they are asked for."""

    def __init__(self, pictures: Sequence, preprocess: Callable):
        self.pictures, self.preprocess = pictures, preprocess

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Tensor:
        picture = self.pictures[index]
        if isinstance(picture, np.ndarray):
            from PIL import Image

            picture = Image.fromarray(picture)
        elif not hasattr(picture, "convert"):
            raise ValueError(
                f"image {index} is a {type(picture).__name__}; give PIL images, a uint8 array [N, H, W, 3] "
                "or the path of a folder"
            )
        return self.preprocess(picture)


class _Unlabelled(Dataset):
    """The images of a data set without their labels."""

    def __init__(self, images: Any):
        self.images = images
        self.preprocess = getattr(images, "preprocess", None)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        item = self.images[index]
        return item[0] if isinstance(item, tuple) else item

    def fingerprint(self) -> str | None:
        """What tells these images from others, where the data set knows.

        The cache of an interrupted fit asks.
        """
        return self.images.fingerprint() if hasattr(self.images, "fingerprint") else None


class _Labelled(_Unlabelled):
    """The images of a data set with the numbers of their classes."""

    def __init__(self, images: Any, labels: Tensor):
        super().__init__(images)
        self.labels = labels

    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(index), int(self.labels[index])
