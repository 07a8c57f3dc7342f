"""spectral_sum: the operator of a fit on known coefficients, against float64, on every instruction set."""

import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from tolerance import absolute, assert_within, enough_to_notice

from residual_kernels import ops
from residual_kernels.adapters.unit_sum import SpectralConstants

_cpp = pytest.importorskip("residual_kernels._cpp", reason="the extension was not built (no C++ compiler)")
from residual_kernels.ops import cpp_backend  # noqa: E402

SETS = [name for name, reason in _cpp.instruction_sets().items() if reason is None]


def packed(kept, dim, dtype=torch.float32, backend="cpp"):
    """Constants of units that keep so many components each, and their basis [J, D]."""
    generator = torch.Generator().manual_seed(1)
    total = sum(kept)
    basis = torch.randn(total, dim, generator=generator, dtype=torch.float64).to(dtype)
    proj, zeros = basis.new_zeros(total, 3), basis.new_zeros(total)
    offsets = torch.tensor([0, *kept]).cumsum(0)
    return ops.pack_units(proj, zeros, zeros, zeros, basis, offsets, backend=backend), basis


def made(rows, tasks, total, dim, dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    sizes = ((rows, total), (tasks, total), (tasks, rows, dim))
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def results(c, weight, dy, run):
    weight = weight.detach().requires_grad_()
    y = run(c, weight)
    return y.detach(), torch.autograd.grad(y, weight, dy)[0]


def truth_and_terms(c, weight, dy, basis):
    """(y, dweight) in float64, and the sums of their absolute terms."""
    given = {"c": c, "weight": weight, "dy": dy, "basis": basis}
    return [
        results(x["c"], x["weight"], x["dy"], lambda c, weight, x=x: (c * weight[:, None]) @ x["basis"])
        for x in ({name: tensor.double() for name, tensor in given.items()}, absolute(given))
    ]


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("rows", "tasks", "kept", "dim"),
    [
        (64, 1, [7, 1, 40, 0, 33], 70),
        (1, 1, [5], 16),
        (0, 2, [5], 16),
        (20, 0, [5], 16),
        (20, 2, [0, 0], 16),
        (130, 6, [300, 20], 33),
        (9, 3, [1] * 40, 1),
        (200, 1, [64] * 30, 512),
    ],
    ids=str,
)
def test_values_and_gradient(name, dtype, rows, tasks, kept, dim, monkeypatch):
    monkeypatch.setenv(cpp_backend.ENVIRONMENT_VARIABLE, name)
    pack, basis = packed(kept, dim, dtype)
    c, weight, dy = made(rows, tasks, sum(kept), dim, dtype)
    got = results(c, weight, dy, lambda c, weight: ops.spectral_sum(c, weight, pack))
    truth, terms = truth_and_terms(c, weight, dy, basis)
    for what, *tensors in zip(("y", "dweight"), got, truth, terms, strict=True):
        assert_within(*tensors, what)


@pytest.mark.parametrize("result", [0, 1], ids=["y", "dweight"])
def test_a_perturbed_basis_fails(result):
    pack, basis = packed([20, 31], 40)
    c, weight, dy = made(50, 2, 51, 40)
    truth, terms = truth_and_terms(c, weight, dy, basis)
    unit = torch.zeros_like(basis)
    unit[7, 3] = 1
    change = truth_and_terms(c, weight, dy, unit)[0][result]  # linear in the basis
    basis[7, 3] += enough_to_notice(change, terms[result])
    zeros = basis.new_zeros(51)
    wrong = ops.pack_units(
        basis.new_zeros(51, 3), zeros, zeros, zeros, basis, torch.tensor([0, 20, 51]), backend="cpp"
    )
    for one, noticed in ((pack, False), (wrong, True)):
        got = results(c, weight, dy, lambda c, weight, one=one: ops.spectral_sum(c, weight, one))[result]
        with pytest.raises(AssertionError, match="is off by") if noticed else nullcontext():
            assert_within(got, truth[result], terms[result])


def test_any_strides_and_no_copy():
    pack, basis = packed([20, 31], 40)
    c, weight, dy = made(50, 2, 51, 40)
    plain = results(c, weight, dy, lambda c, weight: ops.spectral_sum(c, weight, pack))
    for other in (c.T.contiguous().T, torch.cat([c, c], 1)[:, :51], c.repeat_interleave(2, 0)[::2]):
        assert not other.is_contiguous()
        found = results(other, weight, dy, lambda c, weight: ops.spectral_sum(c, weight, pack))
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    expanded = dy[:1, :1].expand(2, 50, 40)  # the gradient of a sum has strides of zero
    found = results(c, weight, expanded, lambda c, weight: ops.spectral_sum(c, weight, pack))
    wanted = results(c, weight, expanded.contiguous(), lambda c, weight: ops.spectral_sum(c, weight, pack))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_weights_of_any_strides():
    pack, _ = packed([20, 31], 40)
    c, weight, dy = made(50, 3, 51, 40)
    plain = results(c, weight, dy, lambda c, weight: ops.spectral_sum(c, weight, pack))
    compiled = torch.compile(lambda c, weight: ops.spectral_sum(c, weight, pack), fullgraph=True)
    for run in (lambda c, weight: ops.spectral_sum(c, weight, pack), compiled):
        found = results(c, weight.T.contiguous().T, dy, run)
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_one_weight_gives_one_sum():
    pack, _ = packed([20, 31], 40)
    c, weight, dy = made(50, 1, 51, 40)
    y, dweight = results(c, weight[0], dy[0], lambda c, weight: ops.spectral_sum(c, weight, pack))
    stacked = results(c, weight, dy, lambda c, weight: ops.spectral_sum(c, weight, pack))
    assert torch.equal(y, stacked[0][0])
    assert torch.equal(dweight, stacked[1][0])


def test_same_bits_for_any_number_of_threads():
    pack, _ = packed([64] * 30, 100)
    c, weight, dy = made(150, 5, 1920, 100)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(results(c, weight, dy, lambda c, weight: ops.spectral_sum(c, weight, pack)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_opcheck_and_compile():
    pack, basis = packed([5, 18], 24)
    c, weight, _ = made(9, 2, 23, 24)
    operator = torch.ops.residual_kernels.spectral_sum
    torch.library.opcheck(
        operator, (c, weight.requires_grad_(), list(pack.tensors), list(pack.sizes), pack.dim, "cpp")
    )
    compiled = torch.compile(
        lambda c, weight: ops.spectral_sum(c, weight, pack).square().sum(), fullgraph=True
    )
    (got,) = torch.autograd.grad(compiled(c, weight), weight)
    (wanted,) = torch.autograd.grad(ops.spectral_sum(c, weight, pack).square().sum(), weight)
    assert torch.equal(got, wanted)


def test_what_does_not_fit_is_refused():
    pack, _ = packed([5, 18], 24)
    c, weight, _ = made(9, 2, 23, 24)
    with pytest.raises(ValueError, match=r"\(9, 22\)"):
        ops.spectral_sum(c[:, :22], weight, pack)
    with pytest.raises(ValueError, match=r"\(1, 2, 23\)"):
        ops.spectral_sum(c, weight[None], pack)
    with pytest.raises(ValueError, match="float64"):
        ops.spectral_sum(c.double(), weight, pack)
    with pytest.raises(ValueError, match="bfloat16"):
        ops.spectral_sum(c.bfloat16(), weight, pack)
    with pytest.raises(ValueError, match="requires_grad=True"):
        ops.spectral_sum(c.clone().requires_grad_(), weight, pack)
    for elsewhere in ((c.to("meta"), weight), (c, weight.to("meta"))):
        with pytest.raises(ValueError, match="is on meta but the packed constants are on cpu"):
            ops.spectral_sum(*elsewhere, pack)
    plain, _ = packed([5, 18], 24, backend="torch")
    with pytest.raises(ValueError, match="for torch"):
        ops.spectral_sum(c, weight, plain)


@pytest.mark.parametrize("several", [False, True], ids=["one order", "several orders"])
def test_a_fit_reads_features_through_it(several, monkeypatch):
    """from_features gives the same y on both backends, and asks the operator on the compiled one."""
    from residual_kernels.bases.principal import KindBases

    generator = torch.Generator().manual_seed(3)
    phi = torch.linalg.qr(torch.randn(24, 10, generator=generator, dtype=torch.float64)).Q.T.contiguous()
    part = KindBases(
        components=phi,
        variance=torch.ones(10).double(),
        mean=torch.randn(2, 24, generator=generator).double(),
        offsets=torch.tensor([0, 4, 10]),
        total_variance=torch.ones(2).double(),
    )
    calls = []
    monkeypatch.setattr(ops, "spectral_sum", lambda *a, run=ops.spectral_sum: calls.append(1) or run(*a))
    c = torch.randn(*((3,) if several else ()), 7, 10, generator=generator)
    weight = torch.randn(3, 10, generator=generator)
    found = []
    for backend in ("torch", "cpp"):
        units = SpectralConstants(None, part, torch.zeros(()), backend)
        found.append(units.from_features({"c": c}, weight))
    assert len(calls) == (3 if several else 1)
    assert found[0].shape == (3, 7, 24)
    torch.testing.assert_close(found[0], found[1])


ONE_TEAM = """
import os, torch
from residual_kernels import ops
from test_spectral_sum import made, packed
torch.set_num_threads(2)
big = torch.randn(600, 600)
big @ big
team = len(os.listdir("/proc/self/task"))
pack, _ = packed([64] * 30, 100)
c, weight, _ = made(150, 1, 1920, 100)
ops.spectral_sum(c, weight, pack)
print(team, len(os.listdir("/proc/self/task")))
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in /proc")
def test_pytorchs_own_threads_do_the_work():
    done = subprocess.run(
        [sys.executable, "-c", ONE_TEAM],
        capture_output=True,
        text=True,
        cwd=os.path.dirname(__file__),
        check=True,
    )
    team, after = map(int, done.stdout.split())
    assert team == after
