"""How is a product of float32 matrices computed fastest on a CPU?

torch's own float32 product is MKL's, whose best code is kept from other makers' processors. oneDNN, which
torch brings for its layers, uses whatever vector instructions there are: on an AMD processor with AVX-512 it
is twice as fast. Views take it for linear maps that they write out themselves, and the convex fit for all of
its products. Where it cannot serve, torch's own product does.
"""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode

WORTH = 2**20  # multiply-adds of a product below which the other route's own cost tells


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in] @ weight [out, in]^T + bias [out], as :func:`torch.nn.functional.linear` has it."""
    if not _serves(x, weight, bias):
        return F.linear(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1])
    y = torch.ops.mkldnn._linear_pointwise(flat, weight, bias, "none", [], "")
    return y.view(*x.shape[:-1], len(weight))


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [m, k] @ b [k, n], in the dtype that both have."""
    return linear(a, b.T, None)


def _serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN serves: plain float32 on a CPU, and nothing that records, compiles or transforms."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    given = [tensor for tensor in (x, weight, bias) if tensor is not None]
    return (
        all(
            type(tensor) in (Tensor, nn.Parameter)
            and tensor.dtype == torch.float32
            and tensor.device.type == "cpu"
            for tensor in given
        )
        and x.numel() * len(weight) >= WORTH
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given))
        and not torch.is_autocast_enabled("cpu")
        and torch._C._functorch.peek_interpreter_stack() is None
        and _get_current_dispatch_mode() is None
        and forward_ad._current_level < 0  # no public name says it
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)  # the user's own switch
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
