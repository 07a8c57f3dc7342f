"""The one tolerance of the numeric tests: a few roundings of the absolute terms that make a value."""

import torch
from torch import Tensor

STORED = 2  # c of the dtype that values are stored and multiplied in
SUMMED = 8  # c of the dtype that they are summed in
NOTICED = 4  # an error of so many times the bound must be noticed
TF32 = "tf32"


def absolute(arguments: dict, subtracted: tuple[str, ...] = ("offset", "shift")) -> dict:
    """Arguments for which an operator adds up the sizes of its terms:
    |x| in float64 for each floating tensor.

    The operators are sums of products, so at these arguments no two terms cancel and the value is the sum of
    the absolute terms. The same holds for their gradients, given |dy|. What an operator subtracts becomes
    -|x|.
    """
    return {
        name: x if x is None or not x.is_floating_point() else x.double().abs() * (-1) ** (name in subtracted)
        for name, x in arguments.items()
    }


def bound(terms: Tensor, dtype: torch.dtype | str, length: int = 0) -> Tensor:
    """(2 eps + (8 + sqrt(length)) eps_sum) * terms: the error allowed of each element;
    see :func:`assert_within`."""
    if dtype == TF32:  # it drops the last 13 bits of a float32 where others round: a whole unit of 2^-10
        eps, summed = 2.0**-9, torch.finfo(torch.float32)
    else:
        eps, summed = torch.finfo(dtype).eps, torch.finfo(torch.promote_types(dtype, torch.float32))
    smallest = summed.smallest_normal if dtype == TF32 else torch.finfo(dtype).smallest_normal
    return (STORED * eps + (SUMMED + length**0.5) * summed.eps) * terms.clamp(min=smallest)


def assert_within(
    got: Tensor,
    truth: Tensor,
    terms: Tensor,
    what: str = "result",
    *,
    dtype: torch.dtype | str | None = None,
    length: int = 0,
) -> None:
    """Asserts |got - truth| <= (2 eps + (8 + sqrt(length)) eps_sum) * terms for every element.

    Args:
        got: What the code under test gave, of any floating dtype.
        truth: The same value in float64, from the same inputs; same shape.
        terms: For each element the sum of the absolute terms that make it, in float64; same shape.
        what: What the message calls the value.
        dtype: The coarsest dtype that a value on the way is stored or multiplied in; eps is its unit. By
            default that of `got`. A float32 gradient of bfloat16 operands is as good as its bfloat16 factors.
            TF32 is one of them.
        length: How many terms of one sign the longest sum has; 0 where the signs are random.

    Sums are made in float32, of float64 in float64; eps_sum is the unit there. Why the bound holds on any
    processor:

    * A rounding changes a value on the way by at most eps/2 of it, and no value on the way is larger than its
      absolute terms. So k roundings in a row cost at most k * eps/2 * terms, in any order of summation, with
      or without fused multiply-add (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1).
    * No backend rounds to storage more than four times in a row (an operand made on the way, a coefficient or
      folded constant, a product, the result): 2 eps, strictly.
    * A sum of n terms adds n roundings in a row to those of its terms. They are independent, with a standard
      deviation of 0.21 eps_sum of the partial sum each. Partial sums of random signs stay small: 0.2 eps_sum
      * terms, for any n. An element is the end of a few such sums, and the truth of a float64 result has as
      many: 8 leaves five standard deviations and more. Partial sums of one sign grow: 0.12 * sqrt(n) eps_sum
      * terms if one register runs through all of them, as in a matrix product. sqrt(n) is eight standard
      deviations. Only terms that are all equal round alike; a test that adds up many gives them few bits, so
      that they add up exactly.

    Below the smallest normal number eps is not relative, so terms count at least that much.
    """
    assert got.shape == truth.shape == terms.shape, (
        f"{what}: {got.shape}, {truth.shape} and {terms.shape} differ"
    )
    allowed = bound(terms.detach().to("cpu", torch.float64), got.dtype if dtype is None else dtype, length)
    error = (got.detach().to("cpu", torch.float64) - truth.detach().to("cpu", torch.float64)).abs()
    share = torch.where(error.isnan(), torch.inf, error / allowed)
    if share.numel() and share.max() > 1:
        worst = tuple(index.item() for index in torch.unravel_index(share.argmax(), share.shape))
        count = int((share > 1).sum())
        raise AssertionError(
            f"{what} is off by {error[worst]:.3g} at {worst} where {allowed[worst]:.3g} is allowed; "
            f"{count} of {share.numel()} elements are off"
        )


def enough_to_notice(
    change: Tensor, terms: Tensor, dtype: torch.dtype = torch.float32, length: int = 0
) -> float:
    """The step of a constant that puts its value off by four times the bound,
    where a step of 1 makes `change`."""
    share = (change.abs() / bound(terms, dtype, length)).max()
    assert 0 < share < torch.inf, "the value does not depend on this constant"
    return NOTICED / float(share)
