"""Which way a call of `spectral_reweight` is computed, and why."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from residual_kernels.ops.packing import PackedUnits
from residual_kernels.ops.triton.routes import Explanation

if TYPE_CHECKING:  # here, where no backend comes by, the checker holds each of them to its protocol
    from residual_kernels.ops import cpp_backend, torch_backend
    from residual_kernels.ops.backends import Backend, SummingBackend
    from residual_kernels.ops.triton import backend as triton_backend

    _WITH_SUMS: tuple[SummingBackend, SummingBackend] = (triton_backend, cpp_backend)
    _WITHOUT: Backend = torch_backend


@dataclass(frozen=True)
class Plan:
    """How a call is computed. Made by :func:`explain`; `str()` gives sentences.

    Attributes:
        backend: that computes it.
        forward, backward: the route of each pass, with tiles, estimates and reason.
    """

    backend: str
    forward: Explanation
    backward: Explanation

    def __str__(self) -> str:
        lines = [f"backend {self.backend}", str(self.forward), str(self.backward)]
        if self.forward.estimates:
            lines.append("Times are estimates from nominal rates of an H100, not measured.")
        return "\n".join(lines)


def explain(
    pack: PackedUnits, rows: int, *, tasks: int = 1, indexed: bool = False, plain: bool = False
) -> Plan:
    """How :func:`spectral_reweight_packed` computes `rows` rows with these constants: route, tiles, reason.

    Args:
        pack: the packed constants.
        rows: N.
        tasks: T, for a weight [T, J].
        indexed: whether rows choose among the weights (weight_index).
        plain: whether scale and mean are both None (the stream form).

    Returns:
        A :class:`Plan`.
    """
    if pack.backend != "triton":
        reason = f"the {pack.backend} backend has one way to compute"
        routes = [Explanation(name, pack.backend, None, 1, {}, reason) for name in ("forward", "backward")]
        return Plan(pack.backend, *routes)
    from residual_kernels.ops.triton import backend  # the package triton is optional

    found = backend.explain(pack.dtype, list(pack.tensors), list(pack.sizes), rows, tasks, indexed, plain)
    return Plan("triton", *found)
