"""What does the convex fit minimise?

Multinomial logistic regression in delta = weight - 1, for T tasks at once.

    l[t,n,k] = (1 + s_t) base[n,k] + r[n] sum_j delta[t,j] c[n,j] (basis_j . v_k)  [+ r[n] f[n] . dV[t,:,k]]

base are the tower's own logits, f its embeddings, r[n] = exp(logit_scale) / |f[n]|, c cached coefficients.
The length of y only sets each image's temperature, never its label, so it is held at |f[n]|: logits are
linear in everything learned, and

    F_t = sum_n w[t,n] H(target[t,n], softmax l[t,n]) + alpha_t/2 |theta_t|^2 + kappa(s_t) (s_t - log(1 +
    s_t))

has one minimum. theta are the learned numbers in whitened coordinates: delta_j = theta_j / sd_j, where sd_j^2
is the variance of r c_j over the rows, so that alpha asks of a component in its own units. kappa counts
pseudo-images that hold the scale of the tower's logits at one: a Gamma prior on 1 + s, which keeps it above
zero. Few of them where s falls, as a tower far from home is too sure of itself; many where s rises, as a fit
to few images would be surer yet.

One evaluation is two products with the coefficients, [T*M,J] x [J,N] and [T*M,N] x [N,J], M = min(K, D) rows
a task: images and components run along memory. Nothing of size [N,J] is made, and rows come block by block,
so they need not fit in memory. A rough evaluation reads a bfloat16 copy of the coefficients, where there is
one: four times as fast on a processor that multiplies bfloat16, and near enough for fits that are only
judged.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from residual_kernels import distributed
from residual_kernels.ops.onednn import product

BLOCK_BYTES = 32 * 2**20  # of logits, and of reweighted class scores, that one product may make
VECTOR_PENALTY = 10.0
# Pseudo-images that hold the scale of the tower's logits where it falls, and where it rises.
KAPPA = (
    0.1,
    100.0,
)


@dataclass(frozen=True)
class Rows:
    """Some rows: their place among this process's rows (a run, or numbers [n]), coefficients [n, J_i] (one
    tensor for each kind of units), and the tower's output [n, D]; `narrow` are all coefficients [n, J] in
    bfloat16, or None. `fold` is the one that all of these rows are in, None where they are in several."""

    place: slice | Tensor
    coefficients: tuple[Tensor, ...]
    output: Tensor
    narrow: Tensor | None = None
    fold: int | None = None

    def pick(self, index: Tensor) -> "Rows":
        """Some of the rows; their place is not known any more, and `narrow` stays away."""
        coefficients = tuple(c.index_select(0, index) for c in self.coefficients)
        return Rows(slice(0, 0), coefficients, self.output.index_select(0, index))


class RowSource(Protocol):
    """Rows of this process in order, as often as asked: from memory, or read again each time."""

    def __len__(self) -> int: ...

    def blocks(self) -> Iterator[Rows]: ...


class ResidentRows:
    """Rows in memory, given to the products `size` at a time.

    `narrow` keeps a bfloat16 copy of the coefficients. With `fold` [N] a copy of all rows is kept, those of a
    fold together: then a fit is spared the products with the rows that it holds out.
    """

    def __init__(
        self,
        coefficients: Sequence[Tensor],
        output: Tensor,
        size: int = 4096,
        *,
        narrow: bool = False,
        fold: Tensor | None = None,
    ):
        self.coefficients, self.output, self.size = tuple(coefficients), output, size
        self.order: Tensor | None = None
        self.runs: list[tuple[int, int, int | None]] = [(0, len(output), None)]  # first, last + 1, fold
        if fold is not None:
            self.order = fold.argsort(stable=True)
            self.coefficients = tuple(c.index_select(0, self.order) for c in self.coefficients)
            self.output = output.index_select(0, self.order)
            numbers, counts = fold.unique(return_counts=True)
            ends = counts.cumsum(0).tolist()
            self.runs = list(zip([0, *ends], ends, numbers.tolist(), strict=False))
        self.narrow = None
        if narrow and self.coefficients:
            self.narrow = torch.cat([one.bfloat16() for one in self.coefficients], 1)

    def __len__(self) -> int:
        return len(self.output)

    def blocks(self) -> Iterator[Rows]:
        for first, stop, fold in self.runs:
            for start in range(first, stop, self.size):
                run = slice(start, min(start + self.size, stop))
                place = run if self.order is None else self.order[run]
                narrow = None if self.narrow is None else self.narrow[run]
                yield Rows(place, tuple(c[run] for c in self.coefficients), self.output[run], narrow, fold)


@dataclass(frozen=True)
class Readout:
    """How embeddings become logits: basis [J, D], class vectors [D, K] and exp(logit_scale)."""

    basis: Tensor
    vectors: Tensor
    scale: float

    @property
    def classes(self) -> int:
        return self.vectors.shape[1]

    def base(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """(base [n, K], r [n]) of the tower's outputs [n, D]; an output that is zero has no direction,
        and r = 0."""
        length = output.norm(dim=1)
        r = torch.where(length > torch.finfo(output.dtype).tiny, self.scale / length, 0)
        return r[:, None] * (output @ self.vectors), r


def _of_tasks(table: Tensor, number: Tensor, place: slice | Tensor) -> Tensor:
    """Lines `number` [T] of a table [L, N, ...] at some places, [T, n, ...]."""
    return table[number, place] if isinstance(place, slice) else table[number[:, None], place]


@dataclass(frozen=True)
class Targets:
    """What each row should be: labels [L, N] int64, or shares of every class [L, N, K],
    whose rows add to one.

    `smoothing` moves that much of every target to all classes alike. `weight` [L, N] counts rows, or None.
    """

    values: Tensor
    smoothing: float = 0.0
    weight: Tensor | None = None

    @property
    def shares(self) -> bool:
        return self.values.ndim == 3

    def losses(self, log_p: Tensor, which: Tensor, place: slice | Tensor) -> Tensor:
        """Cross-entropies [n, T] of log-probabilities [n, T, K]; task t has label set which[t]."""
        if self.shares:
            loss = -(_of_tasks(self.values, which, place).transpose(0, 1) * log_p).sum(-1)
        else:
            loss = -log_p.gather(-1, _of_tasks(self.values, which, place).T[..., None])[..., 0]
        return loss if not self.smoothing else (1 - self.smoothing) * loss - self.smoothing * log_p.mean(-1)

    def hits(self, chosen: Tensor, which: int, place: slice | Tensor) -> Tensor:
        """Whether a chosen class [n] is one that a row has a share in."""
        if self.shares:
            return self.values[which, place].gather(-1, chosen[:, None])[:, 0] > 0
        return chosen == self.values[which, place]

    def subtract(self, p: Tensor, which: Tensor, place: slice | Tensor) -> None:
        """p [n, T, K] less the targets, in place."""
        keep = 1 - self.smoothing
        if self.shares:
            p -= keep * _of_tasks(self.values, which, place).transpose(0, 1)
        else:
            index = _of_tasks(self.values, which, place).T[..., None]
            p.scatter_add_(-1, index, p.new_full((), -keep).expand(index.shape))
        if self.smoothing:
            p -= self.smoothing / p.shape[-1]


@dataclass(frozen=True)
class Tasks:
    """T fits side by side: label set, split and fold of each, and its penalty.

    `fold` [S, N] int16 numbers the folds of each of S splits; -1 is a row that this split leaves out
    altogether. A task fits the rows whose fold is not `held`; held = -1 fits all.
    """

    which: Tensor
    split: Tensor
    held: Tensor
    alpha: Tensor
    fold: Tensor

    def __len__(self) -> int:
        return len(self.which)

    def pick(self, index: Tensor | slice) -> "Tasks":
        return Tasks(self.which[index], self.split[index], self.held[index], self.alpha[index], self.fold)

    def counted(self, targets: Targets, place: slice | Tensor) -> Tensor:
        """Weights [n, T] of rows in each task's loss."""
        fold = _of_tasks(self.fold, self.split, place)
        mask = ((fold >= 0) & (fold != self.held[:, None])).T
        if targets.weight is None:
            return mask.to(self.alpha.dtype)
        return mask * _of_tasks(targets.weight, self.which, place).T


@dataclass(frozen=True)
class ThetaShape:
    """What is learned, in the order of theta [T, P]: J component weights; D*K of class vectors;
    the scale s."""

    components: int
    dim: int
    classes: int
    class_vectors: bool = False
    scale: bool = True

    @property
    def vectors(self) -> int:
        return self.dim * self.classes if self.class_vectors else 0

    @property
    def size(self) -> int:
        return self.components + self.vectors + self.scale


class Objective:
    """F_t and its gradient for T tasks; see the module's first lines.

    Args:
        rows: coefficients and outputs.
        readout: how embeddings become logits.
        targets: what each row should be.
        sd: [J] above zero, the unit in which alpha asks of each component.
        vector_variance: learn dV too, where f has this variance a coordinate; None does not. alpha asks
            VECTOR_PENALTY times as much of its entries, in units of that variance: they are many, and tell
            nothing of other classes.
        kappa: pseudo-images that hold the scale of the tower's logits where it falls, and where it rises;
            None does not learn it.
    """

    def __init__(
        self,
        rows: RowSource,
        readout: Readout,
        targets: Targets,
        sd: Tensor,
        *,
        vector_variance: float | None = None,
        kappa: tuple[float, float] | None = KAPPA,
    ):
        self.rows, self.readout, self.targets, self.sd = rows, readout, targets, sd
        self.kappa = (0.0, 0.0) if kappa is None else kappa
        components, dim = readout.basis.shape
        learns_vectors = vector_variance is not None
        self.shape = ThetaShape(components, dim, readout.classes, learns_vectors, kappa is not None)
        self.inner = readout.vectors if readout.classes > dim else None
        right = readout.basis if self.inner is not None else readout.basis @ readout.vectors
        self.right = (right / sd[:, None]).T.contiguous()  # [M, J]
        scores = right if self.inner is None else readout.basis @ readout.vectors
        centred = scores - scores.mean(1, keepdim=True)
        self.spread = centred.square().mean(1)  # [J]: how differently a component speaks to the classes
        self._bases: dict[int, tuple[Tensor, Tensor]] = {}
        self.vector_unit = 0.0
        if vector_variance is not None:
            tiny = torch.finfo(sd.dtype).tiny  # one image has no variance
            self.vector_unit = max(VECTOR_PENALTY * vector_variance, tiny) ** -0.5

    @property
    def is_narrow(self) -> bool:
        """Whether a rough evaluation reads bfloat16 coefficients."""
        return isinstance(self.rows, ResidentRows) and self.rows.narrow is not None

    # --- one theta ------------------------------------------------------------------------------------------

    def delta(self, theta: Tensor) -> Tensor:
        """weight - 1 [T, J] at the tower's own scale: what is learned, over 1 + s."""
        delta = theta[:, : self.shape.components] / self.sd
        return delta / (1 + theta[:, -1:]) if self.shape.scale else delta

    def vectors(self, theta: Tensor) -> Tensor | None:
        """dV [T, D, K] at the tower's own scale, or None."""
        if not self.shape.class_vectors:
            return None
        moved = self._moved(theta)
        return moved / (1 + theta[:, -1])[:, None, None] if self.shape.scale else moved

    def _moved(self, theta: Tensor) -> Tensor:
        start = self.shape.components
        flat = theta[:, start : start + self.shape.vectors]
        return self.vector_unit * flat.reshape(len(theta), self.shape.dim, self.shape.classes)

    # --- products -------------------------------------------------------------------------------------------

    def _blocks(self, tasks: int, rows: int) -> list[slice]:
        width = len(self.right) if self.inner is None else max(len(self.right), self.shape.classes)
        one = width * self.right.element_size() * max(rows, self.shape.components)
        most = max(1, BLOCK_BYTES // max(1, one))
        return [slice(start, min(start + most, tasks)) for start in range(0, tasks, most)]

    def _base(self, block: Rows, number: int) -> tuple[Tensor, Tensor]:
        """(base [K, n], r) of a block of the rows that are fitted,
        computed once where they stay in memory."""
        if not isinstance(self.rows, ResidentRows):
            base, r = self.readout.base(block.output)
            return base.T, r
        if number not in self._bases:
            base, r = self.readout.base(block.output)
            self._bases[number] = base.T.contiguous(), r
        return self._bases[number]

    def _right(self, theta: Tensor) -> Tensor:
        """[T*M, J]: class scores of components, times what is learned of them."""
        delta = theta[:, : self.shape.components]
        return (delta[:, None, :] * self.right).flatten(0, 1)

    def _forward(
        self,
        block: Rows,
        theta: Tensor,
        right: Tensor,
        moved: Tensor | None,
        base: Tensor,
        r: Tensor,
        narrow: bool,
    ) -> Tensor:
        """Logits [T, K, n] of a block."""
        if narrow and block.narrow is not None:
            found = (right @ block.narrow.T).to(theta.dtype)
        else:
            found, start = right.new_zeros(len(right), len(r)), 0
            for c in block.coefficients:
                found += product(right[:, start : start + c.shape[1]], c.to(right.dtype).T)
                start += c.shape[1]
        found = found.view(len(theta), len(self.right), len(r))
        if self.inner is not None:
            found = self.inner.T @ found
        if moved is not None:
            found += (moved.mT.flatten(0, 1) @ block.output.T).view_as(found)
        found *= r
        if self.shape.scale:
            return torch.addcmul(found, base, (1 + theta[:, -1])[:, None, None], out=found)
        return found.add_(base)

    def logits(self, block: Rows, theta: Tensor) -> Tensor:
        """Logits [n, T, K] of a block, linear in theta."""
        moved = self._moved(theta) if self.shape.class_vectors else None
        base, r = self.readout.base(block.output)
        return self._forward(block, theta, self._right(theta), moved, base.T, r, False).permute(2, 0, 1)

    def used(self, block: Rows, theta: Tensor) -> Tensor:
        """Logits [n, T, K] as the fitted adapter and head give them, at the length of the tower's output.

        With class vectors moved, the change of y meets the change of V too: a product that the fit leaves
        out, since it is not linear. What is judged has it.
        """
        moved = self._moved(theta) if self.shape.class_vectors else None
        if moved is None or not self.shape.components:
            return self.logits(block, theta)
        base, r = self.readout.base(block.output)
        scale = 1 + theta[:, -1] if self.shape.scale else theta.new_ones(len(theta))
        found = base.new_empty(len(base), len(theta), self.shape.classes)
        for t in range(len(theta)):
            vectors = self.readout.vectors + moved[t] / scale[t]
            delta = theta[t, : self.shape.components] / self.sd
            y, start = scale[t] * block.output, 0
            for c in block.coefficients:
                stop = start + c.shape[1]
                y = y + product(c.to(y.dtype), delta[start:stop, None] * self.readout.basis[start:stop])
                start = stop
            found[:, t] = r[:, None] * (y @ vectors)
        return found

    def evaluate(self, theta: Tensor, tasks: Tasks, *, rough: bool = False) -> tuple[Tensor, Tensor]:
        """F [T] float64 and its gradient [T, P], summed over processes; `rough` reads the bfloat16 copy."""
        value = torch.zeros(len(theta), dtype=torch.float64, device=theta.device)
        grad = torch.zeros_like(theta)
        narrow = rough and self.is_narrow
        runs = self._blocks(len(theta), min(len(self.rows), 4096))
        held: list[int] = []

        def readied() -> Iterator[tuple[slice, Tensor]]:
            for run in runs:
                right = self._right(theta[run])
                yield run, right.bfloat16() if narrow else right

        ready = list(readied()) if len(runs) == 1 else None
        for number, block in enumerate(self.rows.blocks()):
            for run, right in ready or readied():
                some: slice | Tensor = run
                if block.fold is not None:  # the fits that hold these rows out need no products with them
                    held = held or tasks.held.tolist()
                    own = held[run]
                    fits = [t for t, fold in enumerate(own) if fold != block.fold and block.fold >= 0]
                    if not fits:
                        continue
                    if len(fits) < len(own):
                        among = torch.tensor(fits, device=theta.device)
                        right = right.unflatten(0, (len(own), len(self.right)))[among].flatten(0, 1)
                        some = among + run.start
                self._add(block, number, theta[some], right, tasks, some, value, grad, narrow)
        if distributed.world() > 1:
            value, grad = distributed.total(value), distributed.add_up(grad)
        value += tasks.alpha.double() / 2 * self.penalised(theta).double().square().sum(1)
        self.penalised(grad).add_(tasks.alpha[:, None] * self.penalised(theta))
        if self.shape.scale:
            s = theta[:, -1]
            kappa = self._kappa(s)
            value += kappa * (s.double() - torch.log1p(s.double()))
            grad[:, -1] += kappa * s / (1 + s)
        return value, grad

    def _kappa(self, sign: Tensor) -> Tensor:
        """Pseudo-images that hold the scale, for s of this sign."""
        falls, rises = self.kappa
        return torch.full_like(sign, falls).masked_fill(sign > 0, rises)

    def penalised(self, theta: Tensor) -> Tensor:
        """The part of theta that alpha asks of."""
        return theta[..., :-1] if self.shape.scale else theta

    def _add(self, block, number, theta, right, tasks, part, value, grad, narrow) -> None:
        sub = tasks.pick(part)
        moved = self._moved(theta) if self.shape.class_vectors else None
        base, r = self._base(block, number)
        found = self._forward(block, theta, right, moved, base, r, narrow)
        weight = sub.counted(self.targets, block.place)
        log_p = found.log_softmax(1)
        losses = self.targets.losses(log_p.permute(2, 0, 1), sub.which, block.place)
        value[part] += (losses * weight).double().sum(0)
        p = log_p.exp_()
        self.targets.subtract(p.permute(2, 0, 1), sub.which, block.place)
        p *= weight.T[:, None, :]
        if self.shape.scale:
            grad[part, -1] += (p.flatten(1) @ base.flatten()[:, None])[:, 0]
        p *= r
        if moved is not None:
            back = (p.flatten(0, 1) @ block.output).view(len(theta), self.shape.classes, self.shape.dim)
            start = self.shape.components
            grad[part, start : start + self.shape.vectors] += self.vector_unit * back.mT.flatten(1)
        if self.inner is not None:
            p = self.inner @ p
        p = p.flatten(0, 1)
        if narrow:
            coefficients, p = (block.narrow,), p.bfloat16()
        else:
            coefficients = tuple(c.to(p.dtype) for c in block.coefficients)
        start = 0
        for c in coefficients:
            stop = start + c.shape[1]
            back = product(p, c).view(len(theta), len(self.right), c.shape[1])
            grad[part, start:stop] += (back * self.right[:, start:stop]).sum(1)
            start = stop

    def longest(self, theta: Tensor, direction: Tensor) -> Tensor:
        """The step [T] along a direction at which 1 + s reaches zero."""
        ahead = direction[:, -1]
        if not self.shape.scale:
            return torch.full_like(ahead, torch.inf)
        return torch.where(ahead < 0, (1 + theta[:, -1]) / -ahead.clamp_max(-1e-30), torch.inf)

    # --- certificate and scale ------------------------------------------------------------------------------

    def gap(self, theta: Tensor, grad: Tensor, tasks: Tasks) -> Tensor:
        """The duality gap [T] at theta, an upper bound on F(theta) - min F.

        The dual point is softmax - target at theta itself. There the loss's own Fenchel inequality is tight,
        so that what is left is |grad|^2 / (2 alpha) for the penalised numbers, and for s, with q minus the
        loss's derivative, h(s) + h*(q) - s q with h = kappa (s - log(1 + s)), h*(q) = -q - kappa log(1 -
        q/kappa), kappa by the sign.
        """
        found = self.penalised(grad).double().square().sum(1) / (2 * tasks.alpha.double())
        if self.shape.scale:
            s, slope = theta[:, -1].double(), grad[:, -1].double()
            kappa = self._kappa(s)
            q = kappa * s / (1 + s) - slope
            other = self._kappa(q)
            conjugate = -q - other * torch.log1p((-q / other).clamp_min(-1))
            part = kappa * (s - torch.log1p(s)) + conjugate - s * q
            found += torch.where(q < other, part.clamp_min(0), torch.inf)
        return found

    def trace(self) -> float:
        """The trace of the loss's Hessian for one image at equal probabilities:
        over components and class vectors."""
        vectors = self.shape.dim / VECTOR_PENALTY if self.shape.class_vectors else 0.0
        return float(self.spread.double().sum()) + vectors

    def curvature(self, tasks: Tasks, mass: Tensor) -> Tensor:
        """A diagonal [T, P] like the Hessian's at uniform probabilities;
        `mass` [T] weights of rows in each task."""
        found = self.right.new_empty(len(tasks), self.shape.size)  # [T, P]
        vectors = (self.vector_unit * self.readout.scale) ** 2 / (self.shape.dim * self.shape.classes)
        found[:] = (mass * vectors + tasks.alpha)[:, None]
        j = self.shape.components
        found[:, :j] = mass[:, None] * self.spread + tasks.alpha[:, None]
        if self.shape.scale:
            found[:, -1] = self.kappa[0] + mass
        return found
