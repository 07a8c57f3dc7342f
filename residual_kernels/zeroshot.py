"""How is an embedding read? Class vectors from text or prototypes, and logits by the angle to them."""

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from residual_kernels.files import Head, check_shapes, load_tensors, save_tensors
from residual_kernels.towers.hugging_face.text import TextSide, has_text_side
from residual_kernels.units.cache import UnitCache
from residual_kernels.units.checks import checked_labels, repetition, whole_numbers

WHAT = "zero-shot head"
ALIKE = 0.9999  # the cosine from which two class vectors are called nearly equal
MANY = 2000  # more classes than this are not all compared with each other, but for equal ones


class HeadHeader(Head):
    """What a head's file says beside its tensors."""

    class_names: list[str]


class ZeroShotHead(nn.Module):
    """logits = normalise(y) @ class_vectors * exp(logit_scale): [N, D] -> [N, K].

    Args:
        class_vectors: [D, K], one column per class.
        class_names: K names.
        logit_scale: natural logarithm of the scale; 0.0 for none.

    Raises:
        ValueError: vectors of another shape, or with NaN or Inf.

    Warns where names repeat, and where two class vectors are equal or nearly so (cosine above 0.9999; among
    more than 2,000 classes only equal ones are looked for). The prompts "Turkey" and "turkey" give such
    vectors.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021.
    """

    class_vectors: Tensor
    logit_scale: Tensor

    def __init__(self, class_vectors: Tensor, class_names: Sequence[str], logit_scale: float = 0.0):
        super().__init__()
        if class_vectors.ndim != 2 or class_vectors.shape[1] != len(class_names):
            raise ValueError(
                f"class_vectors must be [D, K] with a column for each of the {len(class_names)} class names; "
                f"got {tuple(class_vectors.shape)}"
            )
        if not class_vectors.isfinite().all():
            raise ValueError("class_vectors hold NaN or Inf")
        self.class_names = tuple(class_names)
        self.register_buffer("class_vectors", class_vectors.detach().clone())
        self.register_buffer("logit_scale", torch.tensor(float(logit_scale), dtype=class_vectors.dtype))
        if (repeated := repetition(self.class_names)) is not None:
            _warn(f"{repeated}: what is predicted for them cannot be told apart by name")
        if alike := self.alike() if len(self.class_names) <= MANY else self._equal():
            _warn(f"{_told(alike)}: images cannot be told apart by them; reword or merge these classes")

    def forward(self, y: Tensor) -> Tensor:
        """The logits of embeddings.

        Args:
            y: [..., D]; their length has no effect.

        Returns:
            [..., K], in the wider dtype of y and the class vectors.

        Raises:
            ValueError: the embeddings have another dimension than the class vectors.
        """
        if y.shape[-1] != len(self.class_vectors):
            raise ValueError(
                f"embeddings have {y.shape[-1]} numbers but the class vectors {len(self.class_vectors)}: "
                "they come from two different models"
            )
        wide = y.to(torch.promote_types(y.dtype, self.class_vectors.dtype))
        return (
            F.normalize(wide, dim=-1)
            @ self.class_vectors.to(wide.dtype)
            * self.logit_scale.to(wide.dtype).exp()
        )

    def extra_repr(self) -> str:
        names = ", ".join(map(repr, self.class_names[:3])) + (", ..." if len(self.class_names) > 3 else "")
        scale = "meta" if self.logit_scale.is_meta else f"{float(self.logit_scale):.4g}"
        return f"K={len(self.class_names)} ({names}), D={len(self.class_vectors)}, logit_scale={scale}"

    @classmethod
    def from_text(
        cls,
        model: nn.Module,
        tokenizer: Callable,
        class_names: Sequence[str],
        templates: Sequence[str | Callable[[str], str]] = ("a photo of a {}.",),
        *,
        logit_scale: float | None = None,
    ) -> "ZeroShotHead":
        """A head with open_clip's own class vectors, made from text.

        A class vector is the mean over templates of normalised text embeddings, normalised again.

        Args:
            model: an open_clip model, or a transformers CLIPModel, SiglipModel or BlipForImageTextRetrieval.
            tokenizer: its tokenizer; of a transformers model its tokenizer or processor.
            class_names: K names, in the order of the labels.
            templates: prompts with one ``{}`` for the name, or callables that take it.
            logit_scale: natural logarithm of the scale; the model's own by default, or 0 where it has none
                (transformers' BLIP dropped its own, which began at log(1 / 0.07)).

        Returns:
            A head with class vectors [D, K].

        Raises:
            ValueError: empty or repeated names, a template without a place for the name, a model without a
                text side, or a text tower whose embeddings have another width than the image tower's.

        Warns where a prompt is cut at the context length, and where two class vectors are equal or nearly so.
        SigLIP's logit_bias is the same for every class, so it changes neither labels nor softmax and is left
        out. Add it to the logits for sigmoid probabilities.

        Source: the zero-shot classifier of Radford et al., 2021, as open_clip computes it.
        """
        from open_clip import build_zero_shot_classifier

        class_names, templates = tuple(class_names), tuple(templates)
        if not class_names or not templates:
            raise ValueError("class_names and templates must not be empty")
        if (repeated := repetition(class_names)) is not None:
            raise ValueError(repeated)
        blank = [t for t in templates if isinstance(t, str) and "{}" not in t]
        if blank:
            raise ValueError(f'templates need a "{{}}" where the class name goes; got {blank[0]!r}')
        encoder: nn.Module | TextSide = model
        if has_text_side(model):
            encoder = side = TextSide(model, tokenizer)
            tokenizer = side.tokenize
        elif not hasattr(model, "encode_text"):
            raise ValueError(
                f"{type(model).__name__} embeds no text; use ZeroShotHead.from_prototypes on images of "
                "each class"
            )
        device = next(model.parameters()).device
        modes = {module: module.training for module in model.modules()}
        model.eval()
        try:
            # all callables, as open_clip decides by the first template; other braces are text
            callables = [t if callable(t) else (lambda name, t=t: t.replace("{}", name)) for t in templates]
            if (cut := _cut(tokenizer, class_names, callables)) is not None:
                _warn(f"the prompt {cut}, so its end is not read; shorten template or name")
            vectors = build_zero_shot_classifier(
                encoder, tokenizer, list(class_names), callables, device=device
            )
        finally:
            for module, mode in modes.items():
                module.training = mode
        width = getattr(getattr(model, "visual", None), "output_dim", len(vectors))
        if width != len(vectors):
            raise ValueError(
                f"the text tower embeds into {len(vectors)} numbers but the image tower into {width}"
            )
        if logit_scale is None:
            own = getattr(model, "logit_scale", None)
            logit_scale = 0.0 if own is None else float(own.detach())
        return cls(vectors, class_names, logit_scale)

    def alike(self, limit: float = ALIKE) -> list[tuple[str, str, float]]:
        """Pairs of classes whose vectors are equal or nearly so.

        Args:
            limit: the cosine above which a pair is reported.

        Returns:
            (name, name, cosine) of each pair, nearest first.
        """
        vectors = self.class_vectors.detach()
        directions = F.normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=0)
        found = []
        for start in range(0, len(self.class_names), 1024):  # not all pairs of 20,000 classes at once
            near = directions[:, start : start + 1024].T @ directions
            for row, column in (near > limit).nonzero().tolist():
                if start + row < column:
                    found.append(
                        (self.class_names[start + row], self.class_names[column], float(near[row, column]))
                    )
        return sorted(found, key=lambda pair: -pair[2])

    def _equal(self) -> list[tuple[str, str, float]]:
        """The same of classes whose vectors are equal, number for number:
        it takes no time for 20,000 classes."""
        first: dict[bytes, str] = {}
        found = []
        rows = self.class_vectors.detach().T.float().cpu().contiguous().numpy()
        for name, row in zip(self.class_names, rows, strict=True):
            other = first.setdefault(row.tobytes(), name)
            if other is not name:
                found.append((other, name, 1.0))
        return found

    @classmethod
    def from_prototypes(
        cls,
        embeddings: Tensor | UnitCache,
        labels: Tensor | None = None,
        class_names: Sequence[str] | None = None,
    ) -> "ZeroShotHead":
        """Class vectors for towers without text: the mean output embedding of each class; no logit scale.

        Args:
            embeddings: [N, D] of labelled images, or a UnitCache, which brings labels and class names too.
            labels: [N] int64, counted from 0.
            class_names: K names in the order of the labels; the cache's own, or numbers, by default.

        Returns:
            A head with class vectors [D, K].

        Raises:
            ValueError: there are no labels, one is out of range, or a class has no image.
        """
        if not isinstance(embeddings, Tensor):
            labels, class_names = embeddings.labels, class_names or embeddings.class_names
            embeddings = embeddings.output
        if labels is None:
            raise ValueError("prototypes need labels; encode (images, labels) batches, or give labels")
        labels = whole_numbers(labels)
        if not len(embeddings):
            raise ValueError("prototypes need images: a prototype is a mean over at least one")
        count = len(class_names) if class_names is not None else int(labels.max()) + 1
        names = tuple(class_names) if class_names is not None else tuple(map(str, range(count)))
        labels = checked_labels(labels, len(embeddings), names)
        sizes = torch.bincount(labels, minlength=count)
        empty = [names[k] for k in (sizes == 0).nonzero().flatten().tolist()]
        if empty:
            raise ValueError(f"no image of class {', '.join(empty)}: a prototype is a mean over at least one")
        sums = torch.zeros(count, embeddings.shape[1], dtype=embeddings.dtype)
        sums.index_add_(0, labels, embeddings.detach().cpu())
        return cls((sums / sizes[:, None]).T, names)

    def save(self, path: str | os.PathLike) -> None:
        """Writes class vectors, names and scale to one safetensors file, atomically.

        Args:
            path: the file.
        """
        save_tensors(path, *self.contents())

    def contents(self) -> tuple[dict[str, Tensor], str, dict[str, list[str]]]:
        """What :meth:`save` writes.

        Returns:
            (tensors by name, kind of the file, header).
        """
        tensors = {"class_vectors": self.class_vectors, "logit_scale": self.logit_scale}
        return tensors, WHAT, {"class_names": list(self.class_names)}

    @classmethod
    def load(cls, path: str | os.PathLike, *, sha256: str | None = None) -> "ZeroShotHead":
        """The head that :meth:`save` wrote.

        Args:
            path: the file.
            sha256: a checksum; with it, the file must be the very one that has it.

        Returns:
            The head.

        Raises:
            FileNotFoundError: there is no file. ValueError: it is damaged, or another one.
        """
        tensors, header = load_tensors(path, WHAT, HeadHeader)
        if sha256 is not None and header["sha256"] != sha256:
            raise ValueError(f"{path} is another head than the one asked for (another checksum)")
        wide = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
        forms = {"class_vectors": (wide, None, len(header["class_names"])), "logit_scale": (wide,)}
        check_shapes(path, tensors, forms)
        return cls(tensors["class_vectors"], header["class_names"], float(tensors["logit_scale"]))


def _warn(message: str) -> None:
    """A warning at the line that called this file."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename == __file__:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _told(alike: Sequence[tuple[str, str, float]]) -> str:
    pairs = ", ".join(f"{a!r} and {b!r} (cosine {near:.6f})" for a, b, near in alike[:3])
    more = f" and {len(alike) - 3} more pairs" if len(alike) > 3 else ""
    return f"the class vectors of {pairs}{more} are equal or nearly so"


def _cut(
    tokenizer: Callable, class_names: Sequence[str], templates: Sequence[Callable[[str], str]]
) -> str | None:
    """The first prompt that fills the context length, so that words behind it are not read;
    None where all fit."""
    for template in templates:
        prompt = max((template(name) for name in class_names), key=len)
        whole, longer = _tokens(tokenizer([prompt])), _tokens(tokenizer([f"{prompt} and so on"]))
        if whole.shape == longer.shape and torch.equal(whole, longer):
            return f"{prompt[:60]!r} ... fills or exceeds the {whole.shape[-1]} tokens of the context"
    return None


def _tokens(found: Any) -> Tensor:
    return found if isinstance(found, Tensor) else torch.as_tensor(found["input_ids"])
