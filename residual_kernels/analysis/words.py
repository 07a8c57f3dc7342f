"""What words describe a head, or one of its components?

SOMP, OMP and TextSpan over a dictionary of text embeddings.

A unit's data enter as `rows` in an orthonormal `frame` of its span, and atoms are projected instead of
residuals: the residual of x against chosen atoms has the same products with an atom as x has with the atom's
own residual. Every criterion but "l1" needs second moments alone, so it needs bases and no data at all.
"""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from residual_kernels.analysis.reading import coordinates
from residual_kernels.bases.principal import KindBases
from residual_kernels.bases.spectral_bases import SpectralBases
from residual_kernels.bundled.captions import prompt
from residual_kernels.bundled.vocabulary import ATTRIBUTES, DIGITS, LETTERS, PATTERNS, PHOTOS, SHAPES
from residual_kernels.data.user_text import check_lengths, read_text
from residual_kernels.units.cache import UnitCache
from residual_kernels.units.source import cache_of
from residual_kernels.zeroshot import ZeroShotHead

CRITERIA = ("l1", "std")
PRODUCT_BYTES = 32 * 2**20  # of products of rows and atoms at a time
TRIED = 64  # atoms whose l1 norms are taken together


@dataclass(frozen=True)
class TextDictionary:
    """Words (or phrases) and their text embeddings.

    Args:
        words: W of them.
        vectors: [W, D], not zero; kept in float64, with length one.

    Raises:
        ValueError: not one vector per word, or vectors that are zero or not finite.
    """

    words: tuple[str, ...]
    vectors: Tensor = field(repr=False)

    def __post_init__(self):
        if self.vectors.ndim != 2 or len(self.vectors) != len(self.words) or not len(self.words):
            raise ValueError(
                f"a dictionary needs one vector per word; got {len(self.words)} words and "
                f"{tuple(self.vectors.shape)}"
            )
        vectors = self.vectors.detach().cpu().double()
        norms = vectors.norm(dim=1, keepdim=True)
        if not vectors.isfinite().all() or not (norms > 0).all():
            raise ValueError("a dictionary's vectors must be finite and not zero")
        object.__setattr__(self, "vectors", vectors / norms)

    def __len__(self) -> int:
        return len(self.words)

    @classmethod
    def from_words(
        cls,
        model: nn.Module,
        tokenizer: Callable,
        words: Iterable[str],
        templates: Sequence[str | Callable[[str], str]] = ("{}",),
    ) -> "TextDictionary":
        """Words encoded by a model's text tower, as :meth:`ZeroShotHead.from_text` encodes classes.

        Args:
            model, tokenizer: as there.
            words: W words or phrases; repeated ones count once.
            templates: prompts that each word goes through.

        Returns:
            The dictionary, with vectors [W, D] of length one.

        Raises:
            ValueError: there are no words.
        """
        words = tuple(dict.fromkeys(words))
        if not words:
            raise ValueError("a dictionary needs at least one word")
        return cls(words, ZeroShotHead.from_text(model, tokenizer, words, templates).class_vectors.T)

    @classmethod
    def from_file(
        cls, model: nn.Module, tokenizer: Callable, path: str | os.PathLike, templates=("{}",)
    ) -> "TextDictionary":
        """The words of a text file, one word or phrase per line.

        Blank lines and lines that begin with # are skipped.

        Args:
            model, tokenizer, templates: as in :meth:`from_words`.
            path: the file.

        Returns:
            The dictionary.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is a folder, holds no words, or is not text.
        """
        lines = [line.strip() for line in read_text(path, "words").splitlines()]
        words = [line for line in lines if line and not line.startswith("#")]
        if not words:
            raise ValueError(f"{path} holds no words; write one word per line")
        check_lengths(words, str(path))
        return cls.from_words(model, tokenizer, words, templates)

    @classmethod
    def bundled(cls, model: nn.Module, tokenizer: Callable) -> "TextDictionary":
        """The words that the bundled model knows: a phrase for each attribute in its captions.

        Args:
            model, tokenizer: those of :func:`residual_kernels.load_bundled`.

        Returns:
            The dictionary.
        """
        return cls.from_words(model, tokenizer, bundled_phrases())


def bundled_phrases() -> tuple[str, ...]:
    """A phrase for every value of every attribute that the bundled model's captions speak of."""
    kinds = {"digit": DIGITS, "letter": LETTERS, "shape": SHAPES, "pattern": PATTERNS, "photo": PHOTOS}
    kind_of = {value: kind for kind, values in kinds.items() for value in values}
    phrases = (
        prompt(attribute, value, kind_of.get(value, ""))
        for attribute, values in ATTRIBUTES.items()
        for value in values
    )
    return tuple(re.sub(r"\ba (?=[aeiou]\w)", "an ", phrase) for phrase in phrases)


@dataclass(frozen=True)
class Description:
    """Words for a unit or a component, in the order in which they were chosen.

    Attributes:
        words: the words.
        chosen: their places in the dictionary.
        weights: their strengths; for a component signed, with the sign of the end that a word belongs to.
        explained: the share of the variance that lies in the span of the words so far.
    """

    words: tuple[str, ...]
    chosen: tuple[int, ...]
    weights: tuple[float, ...]
    explained: tuple[float, ...]


def _describe(
    dictionary: TextDictionary, chosen: list[int], weights: Tensor, explained: Tensor
) -> Description:
    return Description(
        words=tuple(dictionary.words[index] for index in chosen),
        chosen=tuple(chosen),
        weights=tuple(weights.tolist()),
        explained=tuple(explained.tolist()),
    )


def _check(dictionary: TextDictionary, count: int, dim: int) -> None:
    if dictionary.vectors.shape[1] != dim:
        raise ValueError(
            f"the dictionary's vectors have {dictionary.vectors.shape[1]} numbers but the units {dim}: "
            "encode it with the model whose units these are"
        )
    if not 1 <= count <= min(len(dictionary), dim):
        raise ValueError(
            f"count must lie between 1 and {min(len(dictionary), dim)} (words in the dictionary, "
            f"dimensions); got {count}"
        )


def pursue(
    rows: Tensor, frame: Tensor, vectors: Tensor, count: int, criterion: str = "l1"
) -> tuple[list[int], Tensor, Tensor]:
    """Simultaneous orthogonal matching pursuit of X = rows @ frame over atoms.

    Repeat: the atom with the largest sum ("l1") or root of the sum of squares ("std", as X is centred) of its
    products with the residual's rows; then least squares on all atoms chosen so far. What is numerically in
    their span is not chosen again; fewer than `count` come back when nothing else is left.

    Args:
        rows: [n, r]; frame: [r, D] with orthonormal rows; vectors: [W, D].

    Returns:
        chosen (a list), the coefficients [n, k] of the last least squares, and the orthonormal directions [k,
        D] that the atoms added one by one.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}; got {criterion!r}")
    frame, left = frame.double(), vectors.double().clone()
    lengths = left.norm(dim=1)
    local = left @ frame.T  # [W, r]; both are atoms less their part in the span of those chosen
    moment = rows.double().T @ rows.double()
    chosen: list[int] = []
    directions: list[Tensor] = []
    first: float | None = None
    for _ in range(count):
        spent = left.norm(dim=1) <= 1e-8 * lengths
        root = ((local @ moment) * local).sum(1).clamp_min(0).sqrt()
        root[spent] = -1.0
        best = int(root.argmax()) if criterion == "std" else _largest_sum(rows, local, root)
        first = float(root[best]) if first is None else first
        if root[best] <= 1e-12 * first:
            break
        direction = left[best] / left[best].norm()
        for earlier in directions:  # once more: the first subtraction leaves roundings
            direction = direction - (direction @ earlier) * earlier
        direction = direction / direction.norm()
        chosen.append(best)
        directions.append(direction)
        products = left @ direction
        left -= torch.outer(products, direction)
        local -= torch.outer(products, frame @ direction)
        left[best], local[best] = 0.0, 0.0
    if not chosen:
        return [], rows.new_zeros(len(rows), 0), frame[:0]
    Q = torch.stack(directions)
    triangle = vectors[chosen].double() @ Q.T  # atoms = triangle @ Q, lower triangular
    inside = rows.double() @ (frame @ Q.T)  # [n, k]
    coefficients = torch.linalg.solve_triangular(triangle.tril(), inside, upper=False, left=False)
    return chosen, coefficients, Q


def _largest_sum(rows: Tensor, local: Tensor, root: Tensor) -> int:
    """The atom with the largest sum of |products| over rows, looking only where the Cauchy-Schwarz bound
    sum |t| <= sqrt(n) * (sum t^2)^(1/2) lets one be."""
    bound = root * (len(rows) ** 0.5 * (1 + 1e-6))
    order = bound.argsort(descending=True, stable=True)
    size = max(1, PRODUCT_BYTES // (TRIED * rows.dtype.itemsize))
    best, where = -1.0, int(order[0])
    for start in range(0, len(order), TRIED):
        part = order[start : start + TRIED]
        if float(bound[part[0]]) < best or float(root[part[0]]) <= 0:
            break
        atoms = local[part].to(rows.dtype).T
        sums = sum((block @ atoms).abs().sum(0, dtype=torch.float64) for block in rows.split(size))
        sums[root[part] <= 0] = -1.0
        value, place = sums.max(0)
        if float(value) > best:
            best, where = float(value), int(part[place])
    return where


def unit_words(
    bases: SpectralBases,
    dictionary: TextDictionary,
    unit,
    count: int = 5,
    *,
    method: str = "somp",
    criterion: str = "std",
    components: int | None = None,
    rank: int | None = None,
) -> Description:
    """Words for a unit, from its bases alone.

    Args:
        bases: of the model's image tower.
        dictionary: of the same model's text tower.
        unit: layout index, row or (layer, head).
        count: how many words, at most.
        method: "somp", or "textspan", which projects the dictionary onto the unit's leading directions and
            takes what is explained out of the words too.
        criterion: of "somp": "std", or "l1", which needs `components` here (over all images:
            :func:`words_of_units`).
        components: of "somp": describe the first so many components, each times its singular value squared;
            the unit's whole variance by default.
        rank: of "textspan": how many leading directions of the data, not centred; all that hold anything by
            default.

    Returns:
        A :class:`Description`; a constant unit has no words.

    Raises:
        ValueError: an unknown method or criterion, or an option that the method does not have.

    Source: SOMP as in Basile et al., TMLR 2025; TextSpan of Gandelsman et al., "Interpreting CLIP's Image
    Representation via Text-Based Decomposition", ICLR 2024.
    """
    part, index = bases._find(unit)
    _check(dictionary, count, bases.dim)
    if method == "textspan":
        return _text_span(part, index, bases.count, dictionary, count, rank)
    if method != "somp":
        raise ValueError(f'method must be "somp" or "textspan"; got {method!r}')
    if criterion == "l1" and components is None:
        raise ValueError('criterion "l1" needs components, or words_of_units with the images themselves')
    return _somp(part, index, bases.count, dictionary, count, components, criterion)


def _somp(
    part: KindBases,
    index: int,
    images: int,
    dictionary: TextDictionary,
    count: int,
    components: int | None,
    criterion: str,
) -> Description:
    frame, scatter = part.components[part.run(index)], part.variance[part.run(index)] * (images - 1)
    if components is None:
        rows = torch.diag(scatter.sqrt())
    else:
        if components < 1:
            raise ValueError(f"components must be at least 1; got {components}")
        rows = torch.diag(scatter)[:components]
    chosen, coefficients, Q = pursue(rows, frame, dictionary.vectors, count, criterion)
    held_ = (frame @ Q.T).square() * scatter[:, None]
    explained = held_.sum(0).cumsum(0) / (part.total_variance[index] * (images - 1)).clamp_min(1e-300)
    return _describe(dictionary, chosen, coefficients.norm(dim=0), explained)


def _text_span(
    part: KindBases, index: int, images: int, dictionary: TextDictionary, count: int, rank: int | None
) -> Description:
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1; got {rank}")
    phi, mean = part.components[part.run(index)], part.mean[index]
    deviations = (part.variance[part.run(index)] * (images - 1)).sqrt()
    # The data's own second moment about zero.
    data = torch.cat([deviations[:, None] * phi, images**0.5 * mean[None]])
    _, values, right = torch.linalg.svd(data, full_matrices=False)
    # a direction that holds nothing but rounding would still change the lengths of the projected atoms
    kept = int((values > values[0] * 1e-7).sum()) if values[0] > 0 else 0
    right = right[: kept if rank is None else min(rank, kept)]  # [rank, D]
    atoms = dictionary.vectors @ right.T
    rows = (deviations[:, None] * phi) @ right.T
    total = part.total_variance[index] * (images - 1)
    chosen, weights, explained = [], [], []
    for _ in range(min(count, len(right))):
        products = rows @ atoms.T
        root = products.square().sum(0).sqrt()
        best = int(root.argmax())
        atom = atoms[best].clone()
        square = float(atom.square().sum())
        if root[best] <= 1e-12 * total.sqrt() or square <= 1e-20:
            break
        chosen.append(best)
        weights.append(root[best])
        explained.append(root[best].square() / square / total)
        rows = rows - torch.outer(products[:, best] / square, atom)
        atoms = atoms - torch.outer(atoms @ atom / square, atom)
    if not chosen:
        return Description((), (), (), ())
    return _describe(dictionary, chosen, torch.stack(weights), torch.stack(explained).cumsum(0))


def component_words(
    bases: SpectralBases, dictionary: TextDictionary, unit, component: int, count: int = 5
) -> Description:
    """Words for one component by orthogonal matching pursuit: component = sum of weight * word + residual.

    Args:
        bases: that hold the component.
        dictionary: of the model whose bases these are.
        unit: layout index, row or (layer, head).
        component: its place in the unit, from 0 by falling variance.
        count: how many words.

    Returns:
        The words. A positive weight belongs to the end where coefficients are high, a negative one to the
        other.

    Raises:
        ValueError: a component that the unit does not keep, or a dictionary of another model.
    """
    part, index = bases._find(unit)
    _check(dictionary, count, bases.dim)
    phi = part.components[part.run(index)]
    if not 0 <= component < len(phi):
        raise ValueError(f"component {component} is outside the {len(phi)} that unit {unit} keeps")
    one = torch.ones(1, 1, dtype=torch.float64)
    chosen, coefficients, Q = pursue(one, phi[component][None], dictionary.vectors, count)
    explained = (Q @ phi[component]).square().cumsum(0)
    return _describe(dictionary, chosen, coefficients[0], explained)


def words_at_ends(
    bases: SpectralBases, dictionary: TextDictionary, unit, component: int, count: int = 5
) -> tuple[tuple[tuple[str, float], ...], tuple[tuple[str, float], ...]]:
    """The words nearest to both ends of a component, whether they fit or not:
    the nearest word may be far away.

    Args:
        bases, dictionary, unit, component: as in :func:`component_words`.
        count: words at each end.

    Returns:
        (low end, high end), each ((word, score), ...), nearest first. A score is the cosine of word and
        component, less the dictionary's mean cosine, so that what all words share (text lies far from images)
        belongs to neither end.

    Raises:
        ValueError: as :func:`component_words`.
    """
    part, index = bases._find(unit)
    _check(dictionary, count, bases.dim)
    phi = part.components[part.run(index)]
    if not 0 <= component < len(phi):
        raise ValueError(f"component {component} is outside the {len(phi)} that unit {unit} keeps")
    products = dictionary.vectors @ phi[component]
    products = products - products.mean()
    order = products.argsort(stable=True).tolist()
    low, high = (
        tuple((dictionary.words[i], float(products[i])) for i in places[:count])
        for places in (order, order[::-1])
    )
    return low, high


def words_of_units(
    tower: nn.Module,
    data: "UnitCache | Iterable",
    dictionary: TextDictionary,
    kind: str = "head",
    count: int = 5,
    *,
    units: Iterable | None = None,
    criterion: str = "l1",
    progress: Callable[[int], None] | None = None,
) -> list[Description]:
    """Words for every unit, by SOMP over images.

    Args:
        tower: the image tower, or an adapter around one.
        data: a UnitCache, or a loader, which is encoded in memory first.
        dictionary: of the same model.
        kind: of the units.
        count: words for each unit.
        units: some units only; all of the kind by default.
        criterion: what the next word maximises over images: "l1", the sum of |residual . word|, or "std".
        progress: called with 1 after each unit.

    Returns:
        A :class:`Description` per unit. Units are read in groups of bounded memory.
    """
    cache = cache_of(data, tower, (kind,))
    _check(dictionary, count, cache.output.shape[1])
    found = []
    for group in coordinates(tower, cache, kind, units):
        for position, rows in enumerate(group.points):
            frame = group.frame_of(position).cpu()
            chosen, coefficients, Q = pursue(rows, frame, dictionary.vectors, count, criterion)
            total = float(rows.square().sum(dtype=torch.float64))
            inside = (rows.double() @ (frame @ Q.T)).square().sum(0)
            explained = inside.cumsum(0) / total if total > 0 else inside
            found.append(_describe(dictionary, chosen, coefficients.norm(dim=0), explained))
            if progress is not None:
                progress(1)
    return found
