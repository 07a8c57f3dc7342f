"""Who wins when methods are fitted to the same labels? Each is judged on images that it was not fitted to."""

import logging
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from residual_kernels.adapters.methods import METHODS, build
from residual_kernels.adapters.residual import ResiDual
from residual_kernels.adapters.tower_adapter import TowerAdapter
from residual_kernels.bases.spectral_bases import SpectralBases
from residual_kernels.train.batches import AdapterRows
from residual_kernels.train.choice import Judge, Judged, accuracy_error, best_of, standard_error
from residual_kernels.train.config import ConvexConfig
from residual_kernels.train.convex import indexed, opened
from residual_kernels.train.evaluation import logits_of
from residual_kernels.train.logistic import Objective, Targets
from residual_kernels.train.path import FINE
from residual_kernels.train.problem import ConvexProblem, Form, Labels, is_linear, labels_of
from residual_kernels.train.stacked import stacked
from residual_kernels.train.unseen import class_folds, judged_by_classes
from residual_kernels.units.cache import UnitCache
from residual_kernels.zeroshot import ZeroShotHead

log = logging.getLogger(__name__)
BASE, VECTORS, PROBE, STREAM = "base", "anchored + class vectors", "probe", "stream"
LEAST = 20  # below which nothing is chosen by them: with 8 images the best of five candidates won by chance


@dataclass(frozen=True)
class Candidate:
    """What one candidate reached on images that it was not fitted to.

    `loss` in nats at its best temperature; `error` the standard error of its loss's difference from the
    untouched model's; `freedom` the strength chosen for it, 0 where it stays as it is; `note` says what
    became of it.
    """

    name: str
    numbers: int
    accuracy: float
    loss: float
    error: float
    freedom: float
    seconds: float
    note: str = ""


@dataclass
class Competitor:
    """One candidate while it is decided: what was judged of it, and how it is made.

    `theta` [P] is what the objective learned; None where the candidate stays as it starts, or has no
    objective.
    """

    name: str
    numbers: int
    judged: Judged
    freedom: float
    seconds: float
    adapter: TowerAdapter
    objective: Objective | None = None
    theta: Tensor | None = None
    head: ZeroShotHead | None = None  # with class vectors already moved


class Contest:
    """The images, the folds and everything that was judged on them."""

    def __init__(
        self,
        base: TowerAdapter,
        bases: SpectralBases,
        head: ZeroShotHead,
        train: UnitCache | Iterable,
        val: UnitCache | Iterable | None,
        config: ConvexConfig,
        seed: int,
        labels: Tensor | None,
        val_labels: Tensor | None,
        built: list[TowerAdapter],
    ):
        self.built = built
        tower = base.tower
        self.tower, self.bases, self.head, self.config, self.seed = tower, bases, head, config, seed
        self.probe_competes = False
        kinds = [kind for kind in METHODS["anchored"].kinds if kind in bases.kinds]
        first = ResiDual(tower, bases.of(*kinds), "all")
        built.append(first)
        self.adapters: dict[str, ResiDual] = {"anchored": first}
        self.train = indexed(first, train, labels is None, head.class_names)
        self.val = None if val is None else indexed(first, val, val_labels is None, head.class_names)
        sizes = [len(head.class_names)]
        own = labels_of(self.train, None if labels is None else [labels], sizes, "labels")
        self.outside: Labels | None = None
        if self.val is not None:
            given = None if val_labels is None else [val_labels]
            self.outside = labels_of(self.val, given, sizes, "val_labels")
        self.problem = ConvexProblem.of(config, own, head.class_names, [seed], self.outside)
        self.rows = opened(first, self.train, self.val, config)  # of the anchored forms, which share them
        of_tower = self.problem.path(Form(first, with_components=False), head, *self.rows).base()
        self.entries = [Competitor(BASE, 0, of_tower, 0.0, 0.0, base)]
        self.images = int((self.problem.fold[0] >= 0).sum()) if self.outside is None else self.outside.count

    def add(self, name: str) -> None:
        """Fits and judges one candidate."""
        start = time.perf_counter()
        form_name = "anchored" if name in (VECTORS, PROBE) else name
        if form_name not in self.adapters:
            made = build(form_name, self.tower, self.bases, init="ones")
            self.built.append(made)
            if not is_linear(made):
                raise ValueError(f"{form_name} is not linear in its weight, so no convex fit can judge it")
            self.adapters[form_name] = made
        adapter = self.adapters[form_name]
        rows = self.rows if form_name == "anchored" else opened(adapter, self.train, self.val, self.config)
        path = self.problem.path(
            Form(adapter, with_components=name != PROBE),
            self.head,
            *rows,
            class_vectors=name in (VECTORS, PROBE),
        )
        objective, (found,) = path.objective, path.run()
        judged, freedom = found.base, 0.0
        if found.chosen is not None:
            freedom, judged = found.candidates[found.chosen]
        theta = None if found.solution is None else found.solution.theta
        numbers = objective.shape.components + objective.shape.vectors
        entry = Competitor(name, numbers, judged, freedom, 0.0, adapter, objective, theta)
        if name == VECTORS and self._outdone(judged):
            self._stack(entry, adapter, rows)
        entry.seconds = time.perf_counter() - start
        self.entries.append(entry)
        log.info("tune: %s has loss %.4f and accuracy %.4f", name, entry.judged.loss, entry.judged.accuracy)

    def add_by_classes(self) -> None:
        """The anchored form, with the strength that is best on classes which the fit had not seen."""
        start = time.perf_counter()
        adapter = self.adapters["anchored"]
        form, labels = Form(adapter), self.problem.labels.numbers[0]
        labels = torch.where(self.problem.fold[0] >= 0, labels, -1)
        fold = class_folds(len(self.head.class_names), self.config.folds, self.seed)
        base, tried = judged_by_classes(form, self.head, self.rows[0], labels, fold, self.config.freedoms)
        self.entries[0].judged = base
        chosen = best_of(base, [judged for _, judged in tried])
        entry = Competitor("anchored", adapter.weight.numel(), base, 0.0, 0.0, adapter)
        if chosen is not None:
            entry.freedom, entry.judged = tried[chosen]
            path = self.problem.path(form, self.head, *self.rows)
            zero = path.like.new_zeros(1, path.objective.shape.size)
            entry.objective = path.objective
            entry.theta = path._fit([(0, -1, entry.freedom)], zero, FINE, 600).theta[0]
        entry.seconds = time.perf_counter() - start
        self.entries.append(entry)

    def _outdone(self, joint: Judged) -> bool:
        """Whether the joint fit does worse than one of the two that it holds:
        then their product is in the way."""
        alone = [one.judged.loss for one in self.entries if one.name in ("anchored", PROBE)]
        return joint.loss >= min(alone, default=-math.inf)

    def _stack(
        self, entry: Competitor, adapter: ResiDual, rows: tuple[AdapterRows, AdapterRows | None]
    ) -> None:
        """Class vectors first, then components, where the folds say that this is better than both
        together."""
        found = stacked(self.problem, Form(adapter), self.head, *rows, self.config.freedoms)
        if found is not None and (not entry.freedom or found.judged.loss < entry.judged.loss):
            entry.judged, entry.freedom, entry.head = found.judged, found.freedom, found.head
            entry.objective, entry.theta = found.objective, found.theta

    def add_stream(
        self, bases: SpectralBases, train: UnitCache | Iterable, val: UnitCache | Iterable, seed: int
    ) -> None:
        """The stream form by AdamW, judged on the same validation images."""
        from residual_kernels.train import fit

        start = time.perf_counter()
        adapter = build(STREAM, self.tower, bases)
        self.built.append(adapter)
        fit(adapter, self.head, train, val, seed=seed)
        logits, labels = logits_of(adapter, self.head, val, labelled=True)
        known = None if self.outside is None else self.outside.numbers[0]
        if labels is None or known is None or not torch.equal(labels, known):
            raise ValueError("val must give the same images in the same order every time it is read")
        targets = Targets(labels[None])
        judge = Judge(1, len(logits), targets, logits)
        judge.add(0, logits, logits.new_ones(len(logits)), 0, slice(0, len(logits)))
        seconds = time.perf_counter() - start
        self.entries.append(
            Competitor(STREAM, adapter.weight.numel(), judge.judged(0), 1.0, seconds, adapter)
        )

    def winner(self) -> tuple[Competitor, str]:
        """The simplest candidate within one standard error of the best, and why."""
        base, *others = self.entries
        rivals = [
            base,
            *(one for one in others if one.freedom and (one.name != PROBE or self.probe_competes)),
        ]
        best = min(rivals, key=lambda one: one.judged.loss)
        chosen = next(
            one
            for one in rivals
            if one is best or one.judged.loss - best.judged.loss <= standard_error(one.judged, best.judged)
        )
        if chosen.judged.accuracy < base.judged.accuracy:
            chosen = base
        where = f"{self.images} {'held-out training' if self.val is None else 'validation'} images"
        if self.images < LEAST:
            return base, (
                f"{where} are too few to choose by ({LEAST} are needed), so the model stays as it is; name "
                "a method to fit it all the same."
            )
        if chosen is base:
            return base, (
                f"Nothing is better than the model by one standard error on {where}, so the model stays as "
                "it is."
            )
        gain = f"{base.judged.accuracy:.4f} -> {chosen.judged.accuracy:.4f} on {where}"
        if chosen is best:
            return chosen, f"{chosen.name} is best, and by more than one standard error: {gain}."
        return (
            chosen,
            f"{chosen.name} is the simplest within one standard error of the best, {best.name}: {gain}.",
        )

    def about_probe(self, winner: Competitor) -> str | None:
        probe = next((one for one in self.entries if one.name == PROBE), None)
        if probe is None or probe is winner or probe.freedom == 0:
            return None
        gain = probe.judged.accuracy - winner.judged.accuracy
        error = accuracy_error(probe.judged, winner.judged)
        if gain <= error:
            return None
        return (
            f"A linear probe labels more images right: {probe.judged.accuracy:.4f} against "
            f"{winner.judged.accuracy:.4f}, with {probe.numbers:,} numbers that know these classes alone; to "
            'have it, ask for the method "probe".'
        )

    def made(self, winner: Competitor) -> tuple[TowerAdapter, ZeroShotHead]:
        """The winner as an adapter with its weights, and its head."""
        objective = winner.objective
        if objective is None or winner.theta is None:
            return winner.adapter, self.head
        theta = winner.theta[None]
        adapter, head = self.entries[0].adapter, self.head
        moved = objective.vectors(theta)
        if winner.head is not None:
            head = winner.head
        elif moved is not None:
            vectors = self.head.class_vectors + moved[0].to(self.head.class_vectors)
            head = ZeroShotHead(vectors, self.head.class_names, float(self.head.logit_scale))
        if objective.shape.components:
            adapter = winner.adapter
            with torch.no_grad():
                adapter.weight.copy_(1 + objective.delta(theta)[0])
            adapter.fitted = True
        return adapter, head

    def table(self, winner: Competitor) -> list[Candidate]:
        base = self.entries[0]
        rows = []
        for one in self.entries:
            if one is winner:
                note = "the winner"
            elif one is base:
                note = ""
            elif one.freedom == 0:
                note = "not better than its start by one standard error"
            elif one.name == PROBE and not self.probe_competes:
                note = "reported, not chosen: it knows these classes alone"
            elif one.judged.loss < winner.judged.loss:
                note = "better by less than one standard error, and less simple"
            else:
                note = "not better than the winner"
            error = standard_error(base.judged, one.judged)
            rows.append(
                Candidate(
                    one.name,
                    one.numbers,
                    one.judged.accuracy,
                    one.judged.loss,
                    error,
                    one.freedom,
                    one.seconds,
                    note,
                )
            )
        return rows
