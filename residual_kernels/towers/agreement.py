"""Is what is decomposed what the model computes?

One image goes through the tower's own forward and through ours.

A view reads a tower: it calls its norms and MLPs and writes out its attention. Whatever changes what a
block's own call computes (a hook, a subclass, a patched method) would be passed over. So the first image that
a view sees goes both ways, and again after the tower is no longer made as it was
(:mod:`residual_kernels.towers.watch`):

* the output must agree, and so must the sum of the units;
* to the rounding of the tower's dtype. A difference above a first, tight bound is looked at block by block,
  each from the model's own stream, so that rounding that merely piles up over many layers is told from a
  block that computes something else. The first such block is named, with what stands there.

The check costs three forward passes of one image. It changes nothing in the tower, draws no random numbers,
and does not run in code that is compiled, exported, traced, transformed or captured in a CUDA graph.
"""

import contextlib
import inspect
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from residual_kernels.towers import suspects
from residual_kernels.towers.blocks import whole
from residual_kernels.towers.edit import stream_maps
from residual_kernels.towers.norm import Norm
from residual_kernels.towers.view import Edit, Terms, Tower, UnsupportedTowerError
from residual_kernels.towers.watch import Watch

# Relative differences of output and sum that need no second look: this many roundings, at most one part in
# 50.
ROUNDINGS, AT_MOST = 64, 0.02
# Of one block, the mean over coordinates of |difference| / (eps (|stream| + rms of what the block adds)).
# Seen: below 1.2 in float32, and below 0.15 in bfloat16 and float16, whose products are summed in float32.
BLOCK, HALF_BLOCK = 6.0, 1.0


class Runnable(Tower, Protocol):
    """A view as far as the check runs it; :class:`~residual_kernels.towers.transformer.TransformerTower` is
    one."""

    span: slice

    @property
    def blocks(self) -> Sequence[nn.Module]: ...

    @property
    def stem_weight(self) -> Tensor: ...

    @property
    def sums_units(self) -> bool: ...

    @property
    def shortens(self) -> bool: ...

    @property
    def norm(self) -> Norm: ...

    def projection(self) -> tuple[Tensor | None, Tensor | None]: ...

    def unsteady(self) -> list[str]: ...

    def own(self, images: Tensor) -> Tensor: ...

    def beside(self) -> Sequence[nn.Module]: ...

    def run(
        self, images: Tensor, kinds: tuple[str, ...], edit: Edit | None = None, every_token: bool = False
    ) -> Terms: ...

    def embed(self, images: Tensor) -> tuple[Tensor, Any]: ...

    def block(
        self, index: int, x: Tensor, context: Any, first_only: bool, edit: Any
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def finish(self, x: Tensor) -> tuple[Tensor, Tensor | None]: ...


# What was found in agreement: of each tower the marks of its structure with the versions of its parameters. A
# LoRA that was all zeros when it was checked is checked again after it has trained. Several, for a setting
# that goes to and fro.
_agreed: "WeakKeyDictionary[nn.Module, deque[tuple[int, int]]]" = WeakKeyDictionary()
_KEPT = 8


def agreed(view: Runnable, images: Tensor, before: Watch | None = None) -> Watch | None:
    """Checks a view on the first of `images` unless that was done.

    A Watch of the tower it holds for, after `before`.

    None where no check can be made in this call (compiled, traced or transformed code, training mode with
    parts that are dropped at random): then the next call asks again. Raises UnsupportedTowerError where the
    model computes something else than the view.
    """
    if not eager(images) or (view.module.training and view.unsteady()):
        return None
    watch = Watch(view.module, view.beside(), before)
    parameters = [p for p in view.module.parameters() if not p.is_inference()]
    found = watch.mark, sum(p._version for p in parameters)
    known = _agreed.setdefault(view.module, deque(maxlen=_KEPT))
    if found not in known:
        check(view, images[:1].detach())
        known.append(found)
    return watch


def eager(images: Tensor) -> bool:
    """Whether this is a plain call on real numbers: nothing that compiles, traces,
    transforms or captures it."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or type(images) not in (Tensor, nn.Parameter)
        or images.is_meta
        or torch._C._functorch.peek_interpreter_stack() is not None
        or _get_current_dispatch_mode() is not None
        or (images.is_cuda and torch.cuda.is_current_stream_capturing())
    )


@dataclass(frozen=True)
class Agreement:
    """How far, relative to its size, the model's own output is from the view's output and from the sum of its
    units.

    `place` says where they part, and what stands there; None where all differences are rounding.
    """

    output: float
    units: float
    place: str | None


def check(view: Runnable, image: Tensor) -> None:
    """Raises UnsupportedTowerError where the model computes something else than the view,
    seen on one image."""
    found = compare(view, image)
    if found.place is not None:
        raise UnsupportedTowerError(
            "this tower's own output differs from the sum of the units that its parts give "
            f"(they are {max(found.output, found.units):.1e} apart, relative, on one image): "
            f"{found.place}. Undo that change, or merge it into the weights (a LoRA with "
            "merge_and_unload()); check=False skips this check and computes units from the parts alone"
        )


@torch.no_grad()
def compare(view: Runnable, image: Tensor) -> Agreement:
    """Runs one image [1, 3, H, W] through the model's own forward and through the view."""
    check_here(view)
    if not view.module.training and (dropping := suspects.dropping(view.module)):
        raise UnsupportedTowerError(
            f"{dropping} while the tower is in eval mode, so its output is not repeatable; call .eval() on "
            "the tower"
        )
    with _one_dtype(view, image) as image:
        own, terms = _embedding(view, image), view.run(image, view.layout.kinds)
        total, size = _sum_of_units(view, terms)
        allowed = min(ROUNDINGS * _eps(own), AT_MOST)
        apart = _relative(terms.output, own) if terms.output.shape == own.shape else float("inf")
        short = _relative(total, own) if total.shape == own.shape else float("inf")
        place = None
        if own.isfinite().all():  # NaN and Inf are named where they are read
            place = _where_streams_part(view, image, own) if apart > allowed else None
            if place is None and short > allowed:
                place = _where_sums_part(view, image, terms, total, size)
    return Agreement(apart, short, place)


def _embedding(view: Runnable, image: Tensor) -> Tensor:
    """The model's own embedding; UnsupportedTowerError where its forward takes or gives something else."""
    name = type(view.module).__name__
    try:
        inspect.signature(view.module.forward).bind(image)
    except TypeError as error:
        raise UnsupportedTowerError(
            f"the forward of {name} takes other arguments than images ({error}), so there is no output to "
            "compare units with; check=False computes units from the parts alone"
        ) from error
    except ValueError:
        pass  # it has no signature to read
    own = view.own(image)
    if not isinstance(own, Tensor) or not own.is_floating_point():
        raise UnsupportedTowerError(
            f"the forward of {name} gives {type(own).__name__} instead of an embedding [N, D]; let it return "
            "the embedding, or use check=False for units from the parts alone"
        )
    return own


def check_here(view: Runnable, structure: bool = False) -> None:
    """Raises UnsupportedTowerError where weights are offloaded between calls, or on several devices.

    Of a tower whose `structure` alone is asked for, all may be on meta.
    """
    devices = {p.device for p in view.module.parameters()}
    if len(devices) > 1 or any(device.type == "meta" for device in devices):
        found = ", ".join(sorted(str(device) for device in devices))
        hooked = any("_hf_hook" in vars(part) for part in view.module.modules())
        if structure and len(devices) == 1 and not hooked:
            return  # a tower without values yet
        raise UnsupportedTowerError(
            f"this tower's weights are on {found}{' (offloaded by accelerate)' if hooked else ''}, and "
            "units are made of all of them at once: load it whole on one device (accelerate: "
            "remove_hook_from_submodules, or no device_map)"
        )


@contextlib.contextmanager
def _one_dtype(view: Runnable, image: Tensor) -> Iterator[Tensor]:
    """The image in the tower's dtype and no autocast, where the tower has one dtype:
    rounding is smallest there."""
    dtypes = {p.dtype for p in view.module.parameters() if p.is_floating_point()}
    if len(dtypes) == 1 and torch.is_autocast_enabled(image.device.type):
        with torch.autocast(image.device.type, enabled=False):
            yield image.to(view.stem_weight.dtype)
    else:
        yield image


def _eps(value: Tensor) -> float:
    """One rounding; a float64 tower may have float32 inside, such as transformers' eager softmax."""
    return max(torch.finfo(value.dtype).eps, torch.finfo(torch.float32).eps)


def _relative(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float((a - b).abs().max() / b.abs().max().clamp_min(torch.finfo(torch.float32).tiny))


def _sum_of_units(view: Runnable, terms: Terms) -> tuple[Tensor, Tensor]:
    """The sum of all units [1, D], and the sum of the sizes of what it is made of, both float32 or better.

    It is what ``Decomposition.units().sum(1)`` gives: summed in model width first, which needs one map of
    each layer.
    """
    if not view.sums_units:  # z is x_u itself
        units = torch.cat([terms.z[kind] for kind in view.layout.kinds], dim=1)
        wide = units.to(terms.scale.dtype)
        return wide.sum(1), wide.abs().sum(1)
    dtype, like = terms.scale.dtype, view.stem_weight
    added_terms = [terms.z["emb"].to(dtype), terms.z["mlp"].to(dtype)]
    heads = terms.z["head"].to(dtype).unflatten(1, (view.layout.layers, view.layout.heads))
    for layer in range(view.layout.layers):
        maps = stream_maps(view, layer)
        added = torch.einsum("nhc,hcw->nw", heads[:, layer], maps.A.to(dtype)) + maps.b.sum(0).to(dtype)
        added_terms.append(added[:, None])
    stream = torch.cat(added_terms, dim=1)
    gamma, beta = (t.to(dtype) for t in view.norm.constants(view.width, like))
    P, p = (None if t is None else whole(t).to(dtype) for t in view.projection())

    def out(x: Tensor, m: Tensor, size: bool) -> Tensor:
        g, b = (t.abs() if size else t for t in (gamma, beta))
        M, c = (t if t is None or not size else t.abs() for t in (P, p))
        x = terms.scale[:, None] * (x + m[:, None]) * g + b
        return (x if M is None else x @ M) + (0 if c is None else c)

    total = out(stream.sum(1), -terms.mean, False)
    return total, out(stream.abs().sum(1), terms.mean.abs(), True)


def _roundings(ours: Tensor, own: Tensor, added: Tensor) -> float:
    """The mean over coordinates of |ours - own|, in roundings of |own| + rms(added)."""
    eps = _eps(own)
    ours, own, added = ours.double(), own.double(), added.double()
    size = own.abs() + added.square().mean().sqrt()
    return float(((ours - own).abs() / (eps * size).clamp_min(1e-300)).mean())


def _part(ours: Tensor, own: Tensor, added: Tensor) -> bool:
    """Whether two streams of the same tokens, in any order of dimensions of size one,
    are more than roundings apart."""
    if ours.numel() != own.numel():
        return True
    limit = HALF_BLOCK if torch.finfo(own.dtype).bits == 16 else BLOCK
    return not _roundings(ours, own.reshape(ours.shape), added) <= limit  # NaN parts too


def _where_streams_part(view: Runnable, image: Tensor, own: Tensor) -> str | None:
    """Where the model's own stream first differs from ours, and what stands there;
    None where it nowhere does."""
    entered, left = _own_streams(view, image)
    blocks = list(view.blocks)
    x, context = view.embed(image)
    where = suspects.outside(view.module, blocks, view.beside())
    if (order := _other_order(blocks, [block for block, _ in left])) is not None:
        return f"its own forward {order}{where}"
    if _part(x, entered, x):
        return f"the token streams diverge before the first block{where}"
    x = entered.reshape(x.shape)
    for index, block in enumerate(blocks):
        ours, _, _ = view.block(index, x, context, False, None)
        theirs = left[index][1]
        if theirs.numel() != x.numel() or _part(ours, theirs, theirs.reshape(x.shape) - x):
            return f"the token streams diverge at block {index}{suspects.inside(block, blocks)}"
        if index == len(blocks) - 1 and view.shortens:  # where the first token alone is computed
            ours, theirs = view.block(index, x, context, True, None)[0], theirs.reshape(x.shape)[:, :1]
            if _part(ours, theirs, theirs - x[:, :1]):
                return (
                    f"block {index} gives its first token other numbers when that is computed alone"
                    f"{suspects.inside(block, blocks)}"
                )
        x = left[index][1].reshape(x.shape)
    ours = view.finish(x)[0]
    if _part(ours, own, own):
        return f"the token streams diverge after the last block{where}"
    return None


def _own_streams(view: Runnable, image: Tensor) -> tuple[Tensor, list[tuple[nn.Module, Tensor]]]:
    """What enters the first block in the model's own forward, and what leaves each, in the order of calls.

    The hooks do not stay.
    """
    entered: list[Tensor] = []
    left: list[tuple[nn.Module, Tensor]] = []

    def before(_, args: tuple, kwargs: dict) -> None:
        entered.append(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))

    def behind(block: nn.Module, _, output: Any) -> None:
        left.append((block, output[0] if isinstance(output, tuple) else output))

    with contextlib.ExitStack() as hooks:
        for index, block in enumerate(dict.fromkeys(view.blocks)):  # one may stand in several places
            if index == 0:
                handle = block.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
                hooks.callback(handle.remove)
            hooks.callback(block.register_forward_hook(behind).remove)
        view.own(image)
    return entered[0] if entered else image, left


def _other_order(blocks: Sequence[nn.Module], ran: Sequence[nn.Module]) -> str | None:
    """How the model's own order of blocks differs from theirs, in words; None where it does not."""
    if list(ran) == list(blocks):
        return None
    for index, block in enumerate(blocks):
        expected, found = list(blocks).count(block), list(ran).count(block)
        if not found:
            return f"does not run block {index} ({suspects.kind(block)})"
        if found != expected:
            times = f"{found} times" if found > 1 else "once"
            return f"runs block {index} ({suspects.kind(block)}) {times} for an image"
    return "runs its blocks in another order"


def _where_sums_part(view: Runnable, image: Tensor, terms: Terms, total: Tensor, size: Tensor) -> str | None:
    """The first layer whose heads do not sum to what its attention adds;
    or what stands behind the last block."""
    if view.sums_units:
        found: list[int] = []

        def compare(layer: int, z: Tensor, attended: Tensor) -> Tensor:
            maps = stream_maps(view, layer)
            ours = torch.einsum("nthc,hcw->ntw", z.double(), maps.A) + maps.b.sum(0)
            if _part(ours, attended, attended):
                found.append(layer)
            return attended

        view.run(image, (), compare)
        if found:
            block = view.blocks[found[0]]
            return (
                f"the heads of layer {found[0]} do not sum to what its attention adds"
                f"{suspects.inside(block, view.blocks)}"
            )
    eps = _eps(terms.output)
    if ((total - terms.output.to(total.dtype)).abs() > 4 * eps * size).any():
        where = suspects.outside(view.module, view.blocks, view.beside())
        return f"the final norm or projection is not what its weights say{where}"
    return None
