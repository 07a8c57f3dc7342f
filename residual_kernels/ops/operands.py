"""Do the tensors of a call have the sizes that its pack states? Asked inside every registered operator.

Compiled graphs and exported programs call the registered operators without the functions in front of them,
and the compiled backends read addresses: a size that is too large would read memory that is not theirs. The
functions check what a user hands in, with longer messages; these checks cost about a microsecond.
"""

import weakref

import torch
from torch import Tensor
from torch.autograd import forward_ad

from residual_kernels.ops import backends
from residual_kernels.ops.tracing import constant_when_traced

WIDE = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}


_checked: dict[
    tuple, tuple[int, int, int, int]
] = {}  # packs that were found right; entries go with their tensors


def check_pack(tensors: list[Tensor], sizes: list[int], backend: str) -> tuple[int, int, int, int]:
    """(R, C, J, D) of a pack; ValueError when its tensors do not have the sizes that it states.

    A pack is looked at once, and known by its tensors from then on.
    """
    key = (backend, *map(id, tensors), *sizes)
    known = _checked.get(key)
    if known is not None:
        return known
    if backend not in backends.BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; choose one of {', '.join(backends.BACKENDS)}")
    shape = backends.load(backend).shape(tensors, sizes)
    _checked[key] = shape
    for tensor in tensors:  # an id is free again, and may be another tensor's, when its tensor is gone
        weakref.finalize(tensor, _checked.pop, key, None).atexit = False
    return shape


def check_call(
    z: Tensor,
    scale: Tensor | None,
    mean: Tensor | None,
    weight: Tensor,
    weight_index: Tensor | None,
    constant: Tensor,
    shape: tuple[int, int, int, int],
) -> None:
    """ValueError unless z [N, R, C], scale and mean [N],
    weight [T, J] and weight_index [N] fit together and `shape`.

    `constant` is a tensor of the pack, for its device.
    """
    units, coordinates, components, _ = shape
    least = WIDE.get(z.dtype)
    rows = z.shape[:1]
    if least is None or z.ndim != 3 or z.shape[1:] != (units, coordinates) or z.layout is not torch.strided:
        raise ValueError(
            f"z must be a dense floating tensor [N, R, C] = [N, {units}, {coordinates}] as packed; "
            f"got {z.dtype} {tuple(z.shape)} ({z.layout})"
        )
    if weight.ndim != 2 or weight.shape[1] != components or weight.dtype != least:
        raise ValueError(
            f"weight must be {least} [T, J] with J = {components} as packed; got {weight.dtype} "
            f"{tuple(weight.shape)}"
        )
    device = z.device
    for name, tensor in (("scale", scale), ("mean", mean)):
        if tensor is not None and (tensor.shape != rows or tensor.dtype != least or tensor.device != device):
            raise ValueError(
                f"{name} must be {least} [N] = {tuple(rows)} on {device} like z; "
                f"got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            )
    if weight_index is not None and (
        weight_index.shape != rows or weight_index.dtype != torch.int64 or weight_index.device != device
    ):
        raise ValueError(
            f"weight_index must be int64 [N] = {tuple(rows)} on {device} like z; "
            f"got {weight_index.dtype} {tuple(weight_index.shape)} on {weight_index.device}"
        )
    if weight.device != device or constant.device != device:
        raise ValueError(
            f"z is on {device}, weight on {weight.device} and the packed constants on {constant.device}; "
            "move them to one device"
        )


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether one of them carries a derivative in forward mode."""
    # Outside of a dual level no tensor has a tangent.
    return forward_ad._current_level >= 0 and any(
        x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors
    )


@constant_when_traced
def forward_mode() -> bool:
    """Whether a forward-mode derivative is being taken where a compiler traces this call.

    The compiler guards its graphs by that, so that an answer holds for its graph.
    """
    top = torch._C._functorch.peek_interpreter_stack()
    return forward_ad._current_level >= 0 or (
        top is not None and top.key() == torch._C._functorch.TransformType.Jvp
    )


def refuse_compiled_tangents(operator: str) -> None:
    """ValueError where a graph would be made of a forward-mode derivative.

    Without fullgraph=True the compiler then leaves the function as it is, and its derivative is right.
    """
    if torch.compiler.is_compiling() and forward_mode():
        raise ValueError(
            f"a compiled graph holds no forward-mode derivative of {operator}; use torch.func.jvp and jacfwd "
            "outside torch.compile, or without fullgraph=True"
        )


def refuse_tangents(*tensors: Tensor | None) -> None:
    """RuntimeError for a derivative in forward mode, which PyTorch drops at a registered operator."""
    if has_tangent(*tensors):
        raise RuntimeError(
            "the registered operators have no derivatives in forward mode; call the functions of "
            "residual_kernels.ops, or use reverse mode"
        )


def check_index_values(weight_index: Tensor | None, tasks: int) -> None:
    """ValueError for a row's choice outside [0, T).

    On a device a look would wait for it: checked on the CPU alone.
    """
    if weight_index is not None and weight_index.device.type == "cpu" and len(weight_index):
        low, high = (int(x) for x in torch.aminmax(weight_index))
        if low < 0 or high >= tasks:
            raise ValueError(f"weight_index runs from {low} to {high}, but there are T = {tasks} weights")


def check_upstream(dy: Tensor, expected: tuple[int, ...], like: Tensor) -> None:
    """ValueError unless the incoming gradient has the shape, dtype and device of the result."""
    if dy.shape != expected or dy.dtype != like.dtype or dy.device != like.device:
        raise ValueError(
            f"dy must be {like.dtype} {expected} on {like.device} like y; "
            f"got {dy.dtype} {tuple(dy.shape)} on {dy.device}"
        )
