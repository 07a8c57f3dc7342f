"""The route `matmul`: the calls of the torch backend, for units wider than a tile."""

from torch import Tensor

from residual_kernels.ops import torch_backend
from residual_kernels.ops.triton import routes
from residual_kernels.ops.triton.kernel_layout import SIZES, TENSORS, Call
from residual_kernels.ops.triton.routes import Problem


def torch_layout(call: Call) -> tuple[list[Tensor], list[int]]:
    """The torch backend's view of a pack of wide units: its own tensors stand behind ours."""
    tensors, sizes = call.pack
    return list(tensors[TENSORS:]), list(sizes[SIZES:])


def run_forward(call: Call) -> Tensor:
    return torch_backend.spectral_reweight_forward(
        call.z, call.scale, call.mean, call.weight, call.index, *torch_layout(call)
    )


def run_backward(call: Call, dy: Tensor, wanted: list[bool]) -> list[Tensor]:
    upstream = dy if call.index is None else dy[0]
    return torch_backend.spectral_reweight_backward(
        upstream, call.z, call.scale, call.mean, call.weight, call.index, *torch_layout(call), wanted
    )


def estimate(p: Problem) -> float:
    """Nominal seconds: [N, J] in memory, about eight passes over it, two vendor products."""
    z, proj, basis = routes.sizes(p)
    kept = float(p.pairs) * p.components * p.itemsize
    products = 2.0 * p.pairs * p.components * (p.coordinates + p.dim)
    return 7 * routes.LAUNCH + routes.launch(
        z + proj + basis + 8 * kept, products, routes.VENDOR_RATE[p.kind]
    )


def _route(run) -> routes.Route:
    return routes.Route(
        "matmul",
        serves=lambda p: p.coordinates > routes.NARROW,
        estimate=estimate,
        tiles=lambda p: None,
        run=run,
        reason=lambda p: (
            f"units of {p.coordinates} > {routes.NARROW} coordinates go to the vendor's products, "
            "where the fold does not pay or rows choose their weights"
        ),
    )


FORWARD, BACKWARD = _route(run_forward), _route(run_backward)
