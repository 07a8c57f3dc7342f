"""The one tolerance of the numeric tests: no further from the truth than plain PyTorch is, plus a few roundings."""

import torch
from torch import Tensor

ROUNDINGS = 8  # c: how many roundings of the largest value a result may lie beyond torch's own error


def assert_as_accurate(got: Tensor, truth: Tensor, peer: Tensor, what: str = "result") -> None:
    """Asserts |got - truth| <= max |peer - truth| + ROUNDINGS * eps * max |truth|, everywhere.

    `truth` is computed in float64 from the same inputs, `peer` by torch in the dtype under test; eps belongs to the
    dtype of `got`, which `peer` must share.
    """
    assert got.shape == truth.shape == peer.shape, (
        f"{what}: {got.shape}, {truth.shape} and {peer.shape} differ"
    )
    assert got.dtype == peer.dtype, f"{what} is {got.dtype} where torch gives {peer.dtype}"
    if got.numel() == 0:
        return
    truth = truth.to("cpu", torch.float64)
    error = (got.to("cpu", torch.float64) - truth).abs().max()
    allowed = (peer.to("cpu", torch.float64) - truth).abs().max()
    allowed = allowed + ROUNDINGS * torch.finfo(got.dtype).eps * truth.abs().max()
    assert error <= allowed, f"{what} is off by {error:.3g}; {allowed:.3g} is allowed"  # a NaN fails too
