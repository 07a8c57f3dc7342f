"""How is a product of float32 matrices computed fastest on a CPU?

torch's own float32 product is MKL's, whose best code is kept from other makers' processors. oneDNN, which
torch brings for its layers, takes whatever vectors there are: on an AMD processor with AVX-512 it is twice as
fast.
"""

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [m, k] @ b [k, n], without gradients, in the dtype that both have; by oneDNN for float32 on a CPU."""
    linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if (
        linear is None
        or a.dtype != torch.float32
        or a.device.type != "cpu"
        or not torch.backends.mkldnn.is_available()
        or not (a.numel() and b.numel())
    ):
        return a @ b
    return linear(a, b.T, None, "none", [], "")
