"""Peers that read the model's output alone: LP++, Tip-Adapter (-F), GDA, ProKeR and CLIP-Adapter,
after their papers.

Nobody has validation images. What a paper searches on them is chosen here by folds of the user's own labels,
the same folds for everybody; with one label per class there are no folds to speak of, and the paper's fixed
values stand, or the model where there are none. Learning rates that a paper fixes for towers hundreds of
times this size are those of :data:`benchmarks.suite.rates.RATES`, found on tasks outside the suite.
"""

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import residual_kernels as rk
from benchmarks.peers.on_outputs import train_adamw
from benchmarks.peers.tasks import Fitted, Split
from benchmarks.suite.rates import RATES
from benchmarks.suite.tasks import SuiteTask
from residual_kernels.train.folds import FOLDS, folds_of

Fit = Callable[[SuiteTask, Split, rk.ZeroShotHead, int], Fitted]


def _features(split: Split) -> Tensor:
    return F.normalize(split.units.output, dim=1)


def _by_output(head: rk.ZeroShotHead, parameters: int, more: Callable[[Tensor], Tensor]) -> Fitted:
    """The text's logits, plus what a method adds to them."""

    @torch.no_grad()
    def logits(split: Split) -> Tensor:
        return head(split.units.output) + more(_features(split))

    return Fitted(logits, parameters)


def folds(train: Split, seed: int) -> Tensor | None:
    """Fold numbers [N] of the labelled images, or None where a class has only one."""
    smallest = int(train.labels.bincount().min())
    if smallest < 2:
        return None
    return folds_of(train.labels, min(FOLDS, smallest), seed).long()


def _best(tried: Iterable[tuple[Any, Tensor]], labels: Tensor) -> Any:
    """The setting whose held-out logits have the best accuracy, then the least loss; the first of equals."""

    def score(logits: Tensor) -> tuple[int, float]:
        return int((logits.argmax(1) == labels).sum()), -float(F.cross_entropy(logits, labels))

    best, found = None, None
    for setting, logits in tried:
        here = score(logits)
        if best is None or here > best:
            best, found = here, setting
    return found


def base(task: SuiteTask, train: Split, head: rk.ZeroShotHead, seed: int) -> Fitted:
    """The model as it is."""
    return Fitted(lambda split: head(split.units.output), 0)


def lp_plus_plus(task: SuiteTask, train: Split, head: rk.ZeroShotHead, seed: int) -> Fitted:
    """Class weights w_k + alpha_k t_k, steps from Lipschitz constants, 300 epochs: nothing to tune
    (Huang et al. 2024).

    The authors keep the epoch of best validation accuracy; without validation images it is the last one.
    """
    features, labels = _features(train), train.labels
    text = F.normalize(head.class_vectors, dim=0)
    cosines = features @ text
    own = F.one_hot(labels, text.shape[1]).float()
    weight = nn.Parameter(own.T @ features)
    bias = nn.Parameter(torch.zeros(text.shape[1]))
    alpha = (250 * ((own * cosines).sum(0) / own.sum(0)).mean()).repeat(text.shape[1]).requires_grad_()
    optimizer = torch.optim.SGD(
        [weight, bias],
        4 * len(labels) / float(torch.linalg.eigvalsh(features.T @ features)[-1]),
        momentum=0.9,
    )
    step = len(labels) / (4 * float(cosines.square().sum(0).max()))
    for epoch in range(1, 301):
        optimizer.zero_grad()
        alpha.grad = None
        F.cross_entropy(features @ weight.T + bias + alpha * cosines, labels).backward()
        optimizer.step()
        if epoch % 10 == 0:
            alpha.data.sub_(cast(Tensor, alpha.grad), alpha=step)

    @torch.no_grad()
    def logits(split: Split) -> Tensor:
        f = _features(split)
        return f @ weight.T + bias + alpha * (f @ text)

    return Fitted(logits, weight.numel() + bias.numel() + alpha.numel())


BETAS = torch.linspace(0.5, 12.0, 20).tolist()
ALPHAS = torch.linspace(0.1, 10.0, 20).tolist()
TIP = (1.0, 5.5)  # alpha and beta that the authors start from


def _reads(features: Tensor, keys: Tensor, values: Tensor, beta: float, other: Tensor | None) -> Tensor:
    """exp(-beta (1 - f . keys)) values; `other` [n, m] says which keys a row may read."""
    affinity = torch.exp(beta * (features @ keys.T - 1))
    return (affinity if other is None else affinity * other) @ values


@torch.no_grad()
def _searched(head, train: Split, keys: Tensor, values: Tensor, fold: Tensor | None) -> tuple[float, float]:
    """alpha and beta by folds: an image reads the keys of other folds alone."""
    if fold is None:
        return TIP
    features, text = _features(train), head(train.units.output)
    other = (fold[:, None] != fold[None, :]).float()

    def tried():
        for beta in BETAS:
            read = _reads(features, keys, values, beta, other)
            for alpha in ALPHAS:
                yield (alpha, beta), text + alpha * read

    return _best(tried(), train.labels)


def tip_adapter(task: SuiteTask, train: Split, head: rk.ZeroShotHead, seed: int) -> Fitted:
    """The labelled outputs are the keys of a cache; nothing is trained (Zhang et al. 2022)."""
    keys = _features(train)
    values = F.one_hot(train.labels, len(head.class_names)).float()
    alpha, beta = _searched(head, train, keys, values, folds(train, seed))
    return _by_output(head, 0, lambda f: alpha * _reads(f, keys, values, beta, None))


def tip_adapter_f(task: SuiteTask, train: Split, head: rk.ZeroShotHead, seed: int) -> Fitted:
    """The same with the keys trained from there: AdamW, eps 1e-4, cosine, batch 256,
    alpha and beta as searched.

    The authors search alpha and beta again after training, on validation images; an image's own trained key
    would flatter such a search here.
    """
    keys = _features(train).clone().requires_grad_()
    values = F.one_hot(train.labels, len(head.class_names)).float()
    alpha, beta = _searched(head, train, keys.detach(), values, folds(train, seed))
    features, text = _features(train), head(train.units.output).detach()
    train_adamw(
        [keys],
        lambda rows: F.cross_entropy(
            text[rows] + alpha * _reads(features[rows], keys, values, beta, None), train.labels[rows]
        ),
        len(train.labels),
        seed,
        lr=RATES["Tip-Adapter-F"],
        epochs=20,
        batch=256,
    )
    trained = keys.detach()
    return _by_output(head, trained.numel(), lambda f: alpha * _reads(f, trained, values, beta, None))


def clip_adapter(task: SuiteTask, train: Split, head: rk.ZeroShotHead, seed: int) -> Fitted:
    """A bottleneck of D/4 on the output, mixed back in by a ratio (Gao et al.
    2021): 0.2 or 0.6 by folds, else 0.2."""
    features, labels = _features(train), train.labels
    fold = folds(train, seed)
    ratio = 0.2
    if fold is not None:

        def tried():
            for one in (0.2, 0.6):
                logits = torch.empty(len(labels), len(head.class_names))
                for number in fold.unique().tolist():
                    held = fold == number
                    embed, _ = _bottleneck(features[~held], labels[~held], head, seed, one, epochs=50)
                    with torch.no_grad():
                        logits[held] = head(embed(features[held]))
                yield one, logits

        ratio = _best(tried(), labels)
    embed, numbers = _bottleneck(features, labels, head, seed, ratio, epochs=100)

    @torch.no_grad()
    def logits(split: Split) -> Tensor:
        return head(embed(_features(split)))

    return Fitted(logits, numbers)


def _bottleneck(features: Tensor, labels: Tensor, head, seed: int, ratio: float, *, epochs: int):
    dim = features.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = nn.Sequential(
            nn.Linear(dim, dim // 4, bias=False), nn.ReLU(), nn.Linear(dim // 4, dim, bias=False), nn.ReLU()
        )

    def embed(f: Tensor) -> Tensor:
        return ratio * layers(f) + (1 - ratio) * f

    train_adamw(
        list(layers.parameters()),
        lambda rows: F.cross_entropy(head(embed(features[rows])), labels[rows]),
        len(labels),
        seed,
        lr=RATES["CLIP-Adapter"],
        epochs=epochs,
        batch=256,
    )
    return embed, sum(p.numel() for p in layers.parameters())


def _discriminant(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor] | None:
    """Weights [D, K] and offsets [K] of Gaussian discriminants with one covariance,
    shrunk as in the paper."""
    present = labels.unique()
    means = torch.stack([features[labels == k].mean(0) for k in present])
    centred = features - means[torch.searchsorted(present, labels)]
    covariance = centred.T.cov()
    trace, dim = float(covariance.trace()), features.shape[1]
    if not trace > 1e-9:
        return None
    inverse = dim * torch.linalg.pinv((len(features) - 1) * covariance + trace * torch.eye(dim))
    weight, offset = features.new_zeros(dim, classes), features.new_zeros(classes)
    weight[:, present] = inverse @ means.T
    offset[present] = -(means @ inverse * means).sum(1) / 2
    return weight, offset


def gda(task: SuiteTask, train: Split, head: rk.ZeroShotHead, seed: int) -> Fitted:
    """The text's logits plus alpha times Gaussian discriminants (Wang et al.
    2024), alpha in 1e-4 ... 1e4 by folds."""
    features, labels, classes = _features(train), train.labels, len(head.class_names)
    fold, found = folds(train, seed), _discriminant(features, labels, classes)
    if fold is None or found is None:  # one image a class has no covariance
        return base(task, train, head, seed)
    text, read = head(train.units.output), torch.zeros(len(labels), classes)
    for number in fold.unique().tolist():
        held = fold == number
        apart = _discriminant(features[~held], labels[~held], classes)
        if apart is not None:
            read[held] = features[held] @ apart[0] + apart[1]
    alpha = _best(((10.0**power, text + 10.0**power * read) for power in range(-4, 5)), labels)
    weight, offset = found
    return _by_output(head, 0, lambda f: alpha * (f @ weight + offset))


PROKER_BETAS = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
PROKER_LAMBDAS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


def _kernel(a: Tensor, b: Tensor, beta: float) -> Tensor:
    return torch.exp(beta * (a @ b.T - 1))


def proker(task: SuiteTask, train: Split, head: rk.ZeroShotHead, seed: int) -> Fitted:
    """Kernel ridge regression of what the cosines with the text leave over (Bendou et al. 2025), by folds."""
    features, labels = _features(train), train.labels
    text = F.normalize(head.class_vectors, dim=0)
    left = F.one_hot(labels, text.shape[1]).float() - features @ text
    fold = folds(train, seed)
    if fold is None:
        return base(task, train, head, seed)

    def solved(rows: Tensor, beta: float, strength: float) -> Tensor:
        kernel = _kernel(features[rows], features[rows], beta)
        return torch.linalg.solve(kernel / strength + torch.eye(int(rows.sum())), left[rows])

    def tried():
        for beta in PROKER_BETAS:
            for strength in PROKER_LAMBDAS:
                logits = features @ text
                for number in fold.unique().tolist():
                    held = fold == number
                    logits[held] += _kernel(features[held], features[~held], beta) @ solved(
                        ~held, beta, strength
                    )
                yield (beta, strength), logits

    beta, strength = _best(tried(), labels)
    dual = solved(torch.ones(len(labels), dtype=torch.bool), beta, strength)

    @torch.no_grad()
    def logits(split: Split) -> Tensor:
        f = _features(split)
        return f @ text + _kernel(f, features, beta) @ dual

    return Fitted(logits, 0)
