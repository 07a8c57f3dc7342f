"""The Triton kernels of spectral_sum against float64, in the interpreter and on a GPU."""

from itertools import product

import pytest
import torch
from tolerance import TF32, absolute, assert_within, enough_to_notice

from residual_kernels import ops

pytest.importorskip("triton", reason="the package triton is not installed")
from residual_kernels.ops.triton import spectral_sum as kernels
from residual_kernels.ops.triton.tiles import INTERPRETED

NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and TRITON_INTERPRET=0"),
]
DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=NEEDS_GPU)]
SHAPES = [  # rows, tasks, components of each unit, outputs
    (64, 1, [7, 1, 40, 0, 33], 70),
    (1, 1, [5], 16),
    (7, 3, [16, 2], 24),
    (70, 2, [30, 66, 9], 130),
    (0, 2, [5], 16),
    (20, 0, [5], 16),
]


@pytest.fixture(params=DEVICES)
def device(request):
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty is full of NaN
    yield request.param
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")


def made(rows, tasks, kept, dim, device):
    generator = torch.Generator().manual_seed(1)
    total = sum(kept)
    sizes = {"c": (rows, total), "weight": (tasks, total), "dy": (tasks, rows, dim), "basis": (total, dim)}
    given = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    offsets = torch.tensor([0, *kept]).cumsum(0)
    here = {name: value.to(device) for name, value in given.items()}
    zeros = here["basis"].new_zeros(total)
    proj = here["basis"].new_zeros(total, 16)
    pack = ops.pack_units(proj, zeros, zeros, zeros, here["basis"], offsets.to(device), backend="triton")
    return given, here, pack


def results(c, weight, dy, run):
    weight = weight.detach().requires_grad_()
    y = run(c, weight)
    return y.detach().cpu(), torch.autograd.grad(y, weight, dy)[0].cpu()


def truth(given):
    """(y, dweight) in float64, and the sums of their absolute terms."""
    return [
        results(x["c"], x["weight"], x["dy"], lambda c, weight, x=x: (c * weight[:, None]) @ x["basis"])
        for x in ({name: tensor.double() for name, tensor in given.items()}, absolute(given))
    ]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradient(device, shape):
    given, here, pack = made(*shape, device)
    expected, terms = truth(given)
    found = results(
        here["c"], here["weight"], here["dy"], lambda c, weight: ops.spectral_sum(c, weight, pack)
    )
    for mine, right, sizes in zip(found, expected, terms, strict=True):
        assert_within(mine, right, sizes)


def test_strides_one_weight_and_splits(device, monkeypatch):
    """Transposed coefficients, an expanded gradient, and partial sums over components and rows."""
    given, here, pack = made(150, 1, [70, 80, 64, 66], 40, device)
    c = here["c"].T.contiguous().T
    dy = here["dy"][0, :, :1].expand(-1, 40)
    given = given | {"dy": given["dy"][:, :, :1].expand(-1, -1, 40)}
    expected, terms = truth(given)
    monkeypatch.setattr(kernels.routes, "PROCESSORS", 8)  # a small chip: other splits
    found = results(c, here["weight"][0], dy, lambda c, weight: ops.spectral_sum(c, weight, pack))
    for mine, right, sizes in zip(found, expected, terms, strict=True):
        assert_within(mine, right[0], sizes[0])


def test_the_same_bits_every_time(device):
    _, here, pack = made(70, 2, [30, 66, 9], 130, device)
    runs = [
        results(here["c"], here["weight"], here["dy"], lambda c, weight: ops.spectral_sum(c, weight, pack))
        for _ in range(3)
    ]
    for other, position in product(runs[1:], range(2)):
        assert torch.equal(other[position], runs[0][position])


@pytest.mark.parametrize("said", ["high", "medium"])
@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU and TRITON_INTERPRET=0")
def test_the_switch_is_followed(said):
    given, here, pack = made(64, 1, [40, 64], 96, "cuda")
    expected, terms = truth(given)
    torch.set_float32_matmul_precision(said)
    found = results(
        here["c"], here["weight"], here["dy"], lambda c, weight: ops.spectral_sum(c, weight, pack)
    )
    torch.set_float32_matmul_precision("highest")
    for mine, right, sizes in zip(found, expected, terms, strict=True):
        assert_within(mine, right, sizes, dtype=TF32 if said == "high" else torch.bfloat16)


def test_a_perturbed_weight_fails(device):
    given, here, pack = made(20, 1, [7, 9], 24, device)
    expected, terms = truth(given)
    change = given["c"][:, 3:4].double() * given["basis"][3].double()
    moved = here["weight"].clone()
    moved[:, 3] += enough_to_notice(change[None], terms[0])
    found = results(here["c"], moved, here["dy"], lambda c, weight: ops.spectral_sum(c, weight, pack))
    with pytest.raises(AssertionError):
        assert_within(found[0], expected[0], terms[0])


def test_it_is_taken_where_it_pays(monkeypatch):
    """By estimate: few rows with tf32, where c * weight would cost as much as the product;
    never with exact float32."""
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    try:
        assert not kernels.pays(64, 1, 11269, 768)
        torch.set_float32_matmul_precision("high")
        assert kernels.pays(64, 1, 11269, 768)
        assert not kernels.pays(2048, 1, 11269, 768)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_pack_in_another_dtype_is_refused(device):
    _, here, _ = made(4, 1, [7], 16, device)
    zeros = here["basis"].new_zeros(7)
    half = ops.pack_units(
        here["basis"].new_zeros(7, 16).bfloat16(),
        zeros,
        zeros,
        zeros,
        here["basis"].bfloat16(),
        torch.tensor([0, 7], device=device),
        backend="triton",
    )
    with pytest.raises(ValueError, match="packed"):
        ops.spectral_sum(here["c"], here["weight"], half)
    op = torch.ops.residual_kernels.spectral_sum
    with pytest.raises(ValueError, match="bfloat16 as packed"):
        op(here["c"], here["weight"], list(half.tensors), list(half.sizes), 16, "triton")
