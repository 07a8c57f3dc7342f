"""Sums and second moments of units' coordinates over the torch backend."""

import pytest
import torch
from tolerance import absolute, assert_within

from residual_kernels.ops import reference, unit_moments


def inputs(rows=9, units=3, coordinates=5, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, units, coordinates, generator=draw, dtype=torch.float64)
    scale = torch.rand(rows, generator=draw, dtype=torch.float64) + 0.5
    mean = torch.randn(rows, generator=draw, dtype=torch.float64)
    shift = torch.randn(units, coordinates + 2, generator=draw, dtype=torch.float64)
    # Constant columns (no scale, no mean) then add up exactly.
    shift[:, -2:] = shift[:, -2:].mul(8).round() / 8
    return z.to(dtype), scale.to(dtype), mean.to(dtype), shift


def check(given):
    """Sums in float32, of float64 in float64."""
    got = unit_moments(**given, backend="torch")
    truth, terms = reference.unit_moments(**given), reference.unit_moments(**absolute(given))
    dtype = torch.promote_types(given["z"].dtype, torch.float32)
    for name, *tensors in zip(("total", "moment"), got, truth, terms, strict=True):
        assert tensors[0].dtype == torch.float64
        assert_within(*tensors, name, dtype=dtype, length=len(given["z"]))
    assert torch.allclose(got[1], got[1].mT)


@pytest.mark.parametrize("rows", [0, 1, 9, 2500])
@pytest.mark.parametrize("given", ["all", "no scale", "no mean", "z alone"])
@pytest.mark.parametrize("shifted", [True, False])
def test_against_the_definition(rows, given, shifted):
    z, scale, mean, shift = inputs(rows)
    scale = None if given in ("no scale", "z alone") else scale
    mean = None if given in ("no mean", "z alone") else mean
    shift = shift if shifted else None
    check({"z": z, "scale": scale, "mean": mean, "shift": shift})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_accumulates_in_float32_or_better(dtype):
    z, scale, mean, _ = inputs(5000, dtype=dtype)
    check({"z": z, "scale": scale, "mean": mean, "shift": None})


def test_a_shift_keeps_what_float32_would_lose():
    """Far from the origin a variance of 1e-4 drowns in float32 sums of squares of 1e6."""
    z = 1000 + 0.01 * torch.randn(4096, 1, 3, generator=torch.Generator().manual_seed(0))
    shift = torch.tensor([[1000.0, 1000.0, 1000.0, 1.0, 0.0]], dtype=torch.float64)
    truth = reference.unit_moments(z, None, None, shift)[1]
    good = unit_moments(z, None, None, shift, backend="torch")[1]
    assert (good - truth).abs().max() < 1e-5 * truth[0, 0, 0]
    total, raw = unit_moments(z, None, None, backend="torch")
    centred = raw - total[:, :, None] * total[:, None, :] / len(z)
    assert (centred[0, :3, :3] - truth[0, :3, :3]).abs().max() > 0.01 * truth[0, 0, 0]


def test_views_and_grad_inputs():
    z, scale, mean, shift = inputs()
    truth = unit_moments(z, scale, mean, shift)
    view = z.transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    total, moment = unit_moments(view, scale.requires_grad_(), mean, shift)
    assert not total.requires_grad
    assert torch.allclose(total, truth[0])
    assert torch.allclose(moment, truth[1])


def test_opcheck():
    z, scale, mean, shift = inputs()
    torch.library.opcheck(torch.ops.residual_kernels.unit_moments.default, (z, scale, mean, shift, "torch"))
    torch.library.opcheck(torch.ops.residual_kernels.unit_moments.default, (z, None, None, shift, "torch"))


BAD = [
    ({"z": lambda t: t[0]}, r"z must be a floating tensor \[N, R, C\]"),
    ({"z": lambda t: t.long()}, "z must be a floating tensor"),
    ({"scale": lambda t: t[:-1]}, r"scale must be \[N\] = \(9,\)"),
    ({"mean": lambda t: t[:, None]}, r"mean must be \[N\]"),
    ({"shift": lambda t: t[:, :-1]}, r"shift must be \[R, C\+2\] = \(3, 7\)"),
    ({"shift": lambda t: t.to("meta")}, "shift is on meta"),
]


@pytest.mark.parametrize("changes, message", BAD)
def test_bad_arguments(changes, message):
    named = dict(zip(("z", "scale", "mean", "shift"), inputs(), strict=True))
    with pytest.raises(ValueError, match=message):
        unit_moments(**named | {name: change(named[name]) for name, change in changes.items()})
