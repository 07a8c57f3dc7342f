"""Random calls of the operators: right against float64, or refused; never a crash,
never memory that is not theirs.

    python tests/fuzz_operators.py --calls 10000 --out build/fuzz.json

Half of the calls are valid: ragged, strided, empty and negated operands on every backend and every
instruction set of this processor. Their values and gradients are compared with the reference in float64. The
other half calls one of the seven registered operators, forward or backward, with one thing damaged: an error
must name it, or the result must have the shape it should. Under `make sanitize` a read or write out of bounds
ends the run.
"""

import argparse
import collections
import json
import os
import random
import sys
from pathlib import Path

import torch
from tolerance import absolute, assert_within

from residual_kernels.ops import backends, pack_units, reference, spectral_reweight, unit_moments

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REFUSALS = (ValueError, RuntimeError, TypeError, IndexError, OverflowError, MemoryError)


def instruction_sets() -> list[str]:
    """Those of the compiled backend that this processor has; empty without the extension."""
    if backends.missing("cpp", torch.device("cpu")) is not None:
        return []
    reasons = backends.load("cpp")._cpp.instruction_sets()
    return [name for name, reason in reasons.items() if reason is None]


def providers() -> list[tuple[str, str | None]]:
    return [("torch", None), *(("cpp", name) for name in instruction_sets())]


class Case:
    """One random valid call: operands, constants and what they are for, drawn from `random.Random`."""

    def __init__(self, rng: random.Random, dtype: torch.dtype):
        self.rng, self.dtype = rng, dtype
        self.draw = torch.Generator().manual_seed(rng.getrandbits(40))
        self.rows, self.units = rng.choice((0, 1, 2, 5, 9)), rng.randint(1, 4)
        self.width, self.dim = rng.choice((0, 1, 3, 16, 17, 64, 130)), rng.choice((0, 1, 5, 16, 33))
        sizes = [rng.choice((0, 0, 1, 2, 7, 19)) for _ in range(self.units)]
        self.offsets = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()])
        self.tasks = rng.choice((None, 0, 1, 3))
        self.components = total = int(self.offsets[-1])
        self.constants = {
            "proj": self.normal(total, self.width),
            **{name: self.normal(total) for name in ("bias", "slope", "offset")},
            "basis": self.normal(total, self.dim),
        }
        self.z = self.strided(self.rows, self.units, self.width)
        self.scale = None if rng.random() < 0.3 else self.strided(self.rows)
        self.mean = None if rng.random() < 0.3 else self.strided(self.rows)
        self.weight = self.strided(total) if self.tasks is None else self.strided(self.tasks, total)
        indexed = self.tasks is not None and (self.tasks > 0 or self.rows == 0) and rng.random() < 0.4
        choices = max(self.tasks or 0, 1)
        self.index = torch.randint(choices, (self.rows,), generator=self.draw) if indexed else None

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.draw, dtype=torch.float64).to(self.dtype)

    def strided(self, *shape: int) -> torch.Tensor:
        """A tensor of this shape: contiguous, transposed, sliced,
        broadcast or negated in place of its memory."""
        kind = self.rng.choice(("plain", "transposed", "sliced", "expanded", "negated"))
        if kind == "transposed":
            return self.normal(*shape[::-1]).permute(*reversed(range(len(shape))))
        if kind == "sliced":
            return self.normal(*(2 * size + 1 for size in shape))[tuple(slice(1, None, 2) for _ in shape)]
        if kind == "expanded":
            return self.normal(1, *shape[1:]).expand(*shape)
        if kind == "negated":
            return torch._neg_view(self.normal(*shape))
        return self.normal(*shape)


def check_valid(case: Case, backend: str) -> None:
    """Values and every gradient of one case against the reference in float64."""
    named = {"z": case.z, "scale": case.scale, "mean": case.mean, "weight": case.weight, **case.constants}
    lead = (case.rows,) if case.tasks is None or case.index is not None else (case.tasks, case.rows)
    dy = case.strided(*lead, case.dim)

    def run(function, values: dict, upstream: torch.Tensor, **options) -> list[torch.Tensor]:
        leaves = {
            name: None if x is None else x.detach().requires_grad_()
            for name, x in values.items()
            if name in ("z", "scale", "mean", "weight")
        }
        held = [values[name] for name in ("proj", "bias", "slope", "offset")]
        y = function(
            leaves["z"],
            leaves["scale"],
            leaves["mean"],
            *held,
            leaves["weight"],
            values["basis"],
            case.offsets,
            weight_index=case.index,
            **options,
        )
        there = [x for x in leaves.values() if x is not None]
        return [y.detach(), *torch.autograd.grad(y, there, upstream)]

    got = run(spectral_reweight, named, dy, backend=backend)
    exact = {name: None if x is None else x.double() for name, x in named.items()}
    truth = run(reference.spectral_reweight, exact, dy.double())
    sizes = absolute({**named, "dy": dy})
    terms = run(reference.spectral_reweight, sizes, sizes.pop("dy"))
    for one, right, size in zip(got, truth, terms, strict=True):
        assert_within(one, right, size, dtype=case.dtype)
    total, moment = unit_moments(case.z, case.scale, case.mean, backend=backend)
    l = reference.unit_coordinates(
        *(None if x is None else x.double() for x in (case.z, case.scale, case.mean))
    )
    assert_within(total, l.sum(0), l.abs().sum(0), dtype=torch.promote_types(case.dtype, torch.float32))
    assert_within(
        moment,
        torch.einsum("nri,nrj->rij", l, l),
        torch.einsum("nri,nrj->rij", l.abs(), l.abs()),
        dtype=torch.promote_types(case.dtype, torch.float32),
    )


def damaged(rng: random.Random, x: torch.Tensor) -> torch.Tensor:
    """A tensor that is not what it should be: shorter, longer, sparse, of another dtype, shape or content."""
    how = rng.choice(("short", "long", "dtype", "strides", "flat", "content", "empty", "meta", "sparse"))
    if how == "short" and x.ndim and len(x):
        return x[: rng.randrange(len(x))]
    if how == "long" and x.ndim:
        return torch.cat([x, x.new_zeros(1, *x.shape[1:])])
    if how == "dtype":
        return x.to(
            rng.choice(
                [d for d in (torch.float64, torch.float32, torch.int64, torch.bfloat16) if d != x.dtype]
            )
        )
    if how == "strides" and x.ndim:
        return x.new_zeros(1).expand(x.shape)
    if how == "flat":
        return x.reshape(-1)
    if how == "content" and x.dtype in (torch.int64, torch.int32) and x.numel():
        x = x.clone()
        x.view(-1)[rng.randrange(x.numel())] += rng.choice((-(1 << 40), -3, -1, 1, 2, 1 << 40))
        return x
    if how == "meta":
        return x.to("meta")
    if how == "sparse" and x.ndim and not x.is_sparse:
        return x.to_sparse()
    return x.new_empty(0)


def check_damaged(case: Case, backend: str) -> str:
    """Calls a registered operator with one thing damaged, each of them in turn; says what happened."""
    checks = [check_damaged_packed, check_damaged_unpacked, check_damaged_moments]
    if backend == "cpp":
        checks.append(check_damaged_sum)
    try:
        case.rng.choice(checks)(case, backend)
        return "computed"
    except REFUSALS:
        return "refused"


def wide_operands(case: Case) -> list[torch.Tensor | None]:
    """z, scale, mean, weight [T, J] and weight_index as the registered operators take them."""
    least = torch.promote_types(case.dtype, torch.float32)
    weight = case.weight.to(least) if case.weight.ndim == 2 else case.weight.to(least)[None]
    scale, mean = (None if x is None else x.to(least) for x in (case.scale, case.mean))
    return [case.z, scale, mean, weight, case.index]


def harm(rng: random.Random, values: list) -> None:
    """Damages one of the tensors in a list."""
    place = rng.choice([i for i, x in enumerate(values) if x is not None])
    values[place] = damaged(rng, values[place])


def check_damaged_unpacked(case: Case, backend: str) -> None:
    """Operands, constants or the incoming gradient; the backward pass is called by itself too."""
    rng, values = case.rng, wide_operands(case)
    constants = [*case.constants.values(), case.offsets]
    dy = torch.ones(result_shape(case), dtype=case.dtype)
    target, operators = rng.choice(("operand", "constant", "upstream")), torch.ops.residual_kernels
    if target == "upstream":
        dy = damaged(rng, dy)
    else:
        harm(rng, values if target == "operand" else constants)
    if target != "upstream" and rng.random() < 0.5:
        operators.spectral_reweight_unpacked(*values, constants, backend)
    else:
        operators.spectral_reweight_unpacked_backward(dy, *values, constants, [True] * 4, backend)


def check_damaged_sum(case: Case, backend: str) -> None:
    """Coefficients, weights, the pack or the incoming gradient of the sum."""
    rng, least = case.rng, torch.promote_types(case.dtype, torch.float32)
    constants = [x.to(least) for x in case.constants.values()]
    pack = pack_units(*constants, case.offsets, backend=backend)
    weight = wide_operands(case)[3]
    values = [case.normal(case.rows, case.components).to(least), weight]
    tensors, sizes, dim = list(pack.tensors), list(pack.sizes), pack.dim
    dy = torch.ones(len(weight), case.rows, dim, dtype=least)
    target = rng.choice(("operand", "tensor", "size", "dim", "upstream"))
    if target == "operand":
        harm(rng, values)
    elif target == "tensor":
        harm(rng, tensors)
    elif target == "size":
        sizes[rng.randrange(len(sizes))] += rng.choice((-(10**12), -1, 1, 7, 10**8, 10**15))
    elif target == "dim":
        dim += rng.choice((-1, 1, 10**9))
    else:
        dy = damaged(rng, dy)
    operators = torch.ops.residual_kernels
    if target != "upstream":
        operators.spectral_sum(*values, tensors, sizes, dim, backend)
    operators.spectral_sum_backward(dy, *values, tensors, sizes, backend)


def check_damaged_moments(case: Case, backend: str) -> None:
    """z, scale, mean or the shift of the moments."""
    values = [*wide_operands(case)[:3], torch.zeros(case.units, case.width + 2, dtype=torch.float64)]
    harm(case.rng, values)
    total, moment = torch.ops.residual_kernels.unit_moments(*values, backend)
    assert (total.shape, moment.shape) == (values[3].shape, (*values[3].shape, values[3].shape[1]))


def result_shape(case: Case) -> tuple[int, ...]:
    """Of y, as the registered operators give it."""
    lead = (case.rows,) if case.index is not None else (1 if case.tasks is None else case.tasks, case.rows)
    return (*lead, case.dim)


def check_damaged_packed(case: Case, backend: str) -> None:
    """Operands, tensors or sizes of the pack, or the incoming gradient."""
    rng, values = case.rng, wide_operands(case)
    pack = pack_units(*case.constants.values(), case.offsets, backend=backend)
    tensors, sizes, dim = list(pack.tensors), list(pack.sizes), pack.dim
    target = rng.choice(("operand", "tensor", "size", "dim", "count", "upstream"))
    if target == "operand":
        harm(rng, values)
    elif target == "tensor":
        harm(rng, tensors)
    elif target == "size":
        sizes[rng.randrange(len(sizes))] += rng.choice((-(10**12), -1, 1, 7, 10**8, 10**15))
    elif target == "dim":
        dim += rng.choice((-1, 1, 10**9))
    elif target == "count":
        one = rng.choice((tensors, sizes))
        one.pop(rng.randrange(len(one)))
    operators = torch.ops.residual_kernels
    if target == "upstream":
        dy = damaged(rng, torch.ones(result_shape(case), dtype=case.dtype))
    else:
        y = operators.spectral_reweight(*values, tensors, sizes, dim, backend)
        lead = (len(values[0]),) if values[4] is not None else (len(values[3]), len(values[0]))
        assert y.shape == (*lead, dim), f"a damaged {target} gave {tuple(y.shape)}"
        dy = torch.ones_like(y)
    operators.spectral_reweight_backward(dy, *values, tensors, sizes, [True] * 4, backend)


def fuzz(calls: int, seed: int, only: list[tuple[str, str | None]] | None = None) -> dict[str, int]:
    """Runs `calls` random calls; an AssertionError names the seed of the case that failed."""
    counts: collections.Counter[str] = collections.Counter()
    chosen = only or providers()
    before = os.environ.get("RESIDUAL_KERNELS_INSTRUCTION_SET")
    try:
        for i in range(calls):
            rng = random.Random(f"{seed}:{i}")
            backend, name = rng.choice(chosen)
            os.environ.pop("RESIDUAL_KERNELS_INSTRUCTION_SET", None)
            if name is not None:
                os.environ["RESIDUAL_KERNELS_INSTRUCTION_SET"] = name
            case = Case(rng, rng.choice(DTYPES))
            where = f"call {i} of seed {seed}, {name or backend}, {case.dtype}"
            try:
                if i % 2:
                    counts[f"{name or backend}: {check_damaged(case, backend)}"] += 1
                else:
                    check_valid(case, backend)
                    counts[f"{name or backend}: right"] += 1
            except (AssertionError, *REFUSALS) as error:
                raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
    finally:
        os.environ.pop("RESIDUAL_KERNELS_INSTRUCTION_SET", None)
        if before is not None:
            os.environ["RESIDUAL_KERNELS_INSTRUCTION_SET"] = before
    return dict(sorted(counts.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    counts = {"seed": options.seed, "calls": options.calls, **fuzz(options.calls, options.seed)}
    text = json.dumps(counts, indent=2)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
    print(text, file=sys.stderr if options.out else sys.stdout)


if __name__ == "__main__":
    main()
