"""The one tolerance of the numeric tests: no further from the truth than plain PyTorch is, plus a few roundings."""

import torch
from torch import Tensor

ROUNDINGS = 8  # c: how many roundings of the scale a result may lie beyond torch's own error
ROUNDINGS_IN_FLOAT64 = 32  # there the truth has roundings of its own, and torch may have just the same ones


def assert_as_accurate(
    got: Tensor, truth: Tensor, peer: Tensor, what: str = "result", *, scale: float | None = None
) -> None:
    """Asserts |got - truth| <= max |peer - truth| + c * eps * scale, everywhere.

    `truth` is computed in float64 from the same inputs, `peer` by torch in the dtype under test; eps belongs to the
    dtype of `got`, which `peer` must share. `scale` is max |truth| unless given: where a sum cancels, the size of its
    summands.
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
    roundings = ROUNDINGS_IN_FLOAT64 if got.dtype == torch.float64 else ROUNDINGS
    allowed = allowed + roundings * torch.finfo(got.dtype).eps * (
        truth.abs().max() if scale is None else scale
    )
    assert error <= allowed, f"{what} is off by {error:.3g}; {allowed:.3g} is allowed"  # a NaN fails too
