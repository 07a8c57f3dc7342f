"""Linear maps that a view writes out: the layer's own numbers, and oneDNN only where it serves."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn import functional as F

from residual_kernels.ops import onednn

ROWS, IN, OUT = 40, 160, 200  # above WORTH


def given(dtype=torch.float32, lead=(4, 10)):
    generator = torch.Generator().manual_seed(0)
    shapes = ((*lead, IN), (OUT, IN), (OUT,))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.fixture
def taken(monkeypatch):
    """Which calls go to oneDNN."""
    calls = []
    chosen = onednn._serves
    monkeypatch.setattr(onednn, "_serves", lambda *a: calls.append(chosen(*a)) or calls[-1])
    return calls


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cut", [slice(None), slice(0, 1)])
def test_the_layers_numbers(bias, cut, taken):
    """Of rows that lie apart too, as the class token's do."""
    x, weight, shift = given(lead=(40, 10))
    x, shift = x[:, cut], shift if bias else None
    y = onednn.linear(x, weight, shift)
    truth = F.linear(x.double(), weight.double(), None if shift is None else shift.double())
    terms = F.linear(x.double().abs(), weight.double().abs(), None if shift is None else shift.double().abs())
    assert ((y - truth).abs() <= 4 * torch.finfo(torch.float32).eps * terms).all()
    assert (y - truth).abs().max() > 0  # float32
    assert taken == [torch.backends.mkldnn.is_available()]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN here")
def test_where_it_does_not_serve(taken):
    x, weight, shift = given()
    onednn.linear(x, weight, shift)
    assert taken == [True]
    onednn.linear(x[:1, :2], weight, shift)  # too little to pay
    for dtype in (torch.float64, torch.bfloat16):
        onednn.linear(*given(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert onednn.linear(x, weight, shift).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        onednn.linear(x, weight, shift)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(tensor) for tensor in (x, weight, shift)]
        assert onednn.linear(*fake).shape == (4, 10, OUT)
    with forward_ad.dual_level():
        dual = onednn.linear(forward_ad.make_dual(x, x), weight, None)
        assert torch.equal(forward_ad.unpack_dual(dual).tangent, F.linear(x, weight))
    torch.func.vmap(lambda row: onednn.linear(row, weight, shift))(x.expand(3, -1, -1, -1))
    assert taken == [True] + [False] * 8


def test_gradients_are_the_layers():
    x, weight, shift = (tensor.requires_grad_() for tensor in given())
    ours = torch.autograd.grad(onednn.linear(x, weight, shift).sum(), (x, weight, shift))
    theirs = torch.autograd.grad(F.linear(x, weight, shift).sum(), (x, weight, shift))
    assert all(map(torch.equal, ours, theirs))
    with torch.no_grad():
        assert not onednn.linear(x, weight, shift).requires_grad
