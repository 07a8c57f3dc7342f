"""A second device without one: tensors that say cuda:0, hold CPU values and refuse the company of CPU
tensors.

    with fake_cuda.installed() as device:
        tower = fake_device.moved(tower)
        with device.counted() as seen:
            ...
        assert seen.waits == {}

`waits` counts what makes the host wait for the device, by operator; `launches` counts operators that would
start a kernel. Copies to the host that do not wait arrive only when somebody waits: until then the host reads
NaN. CUDA graphs are recorded and replayed. What the tier cannot show: races between streams, and the device's
own rounding.
"""

import collections
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch._library import custom_ops
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
aten = torch.ops.aten
WAITING = {  # operators whose result's size, or whose answer, the host must know
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "equal",
    "is_nonzero",
    "bincount",
    "repeat_interleave",
    "_local_scalar_dense",
    "linalg_eigh",
    "_linalg_eigh",
}
FREE = {  # operators that start nothing on the device
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "alias",
    "view",
    "_unsafe_view",
    "_reshape_alias",
    "lift_fresh",
    "set_",
    "resize_",
    "is_same_size",
    "_local_scalar_dense",
}


@dataclass
class Seen:
    """What happened between two moments, by operator."""

    waits: collections.Counter = field(default_factory=collections.Counter)
    launches: collections.Counter = field(default_factory=collections.Counter)
    replays: int = 0

    @property
    def count(self) -> int:
        return sum(self.launches.values())


class OnDevice(Tensor):
    """A tensor of the device. `held` is where its values lie."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnDevice":
        made = Tensor._make_wrapper_subclass(  # meta beneath: autograd would ask a real device for streams
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=torch.device("meta"),
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: DEVICE.place)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)

    def __repr__(self) -> str:
        return f"OnDevice({self.held})"

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: "OnDevice") -> None:
        self.held = value.held  # else values would stay where they were

    def __deepcopy__(self, memo: dict) -> "OnDevice":
        if id(self) not in memo:
            copied = OnDevice(self.held.detach().clone())
            is_parameter = isinstance(self, nn.Parameter)
            memo[id(self)] = nn.Parameter(copied, self.requires_grad) if is_parameter else copied
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return DEVICE.run(func, args, kwargs or {})


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return DEVICE.run(func, args, kwargs or {})


def held(x: object) -> object:
    return x.held if isinstance(x, OnDevice) else x


def on_device(kind: object) -> bool:
    # The wrapper's own device is meta.
    return kind is not None and torch.device(kind).type in (
        "cuda",
        "meta",
    )


class Device:
    """What all tensors of the device share: counters, copies on their way, the graph being captured."""

    def __init__(self) -> None:
        self.seen = Seen()
        self.place = CUDA  # where its tensors say they are
        self.current = 0  # the number of the device that streams, graphs and Triton's launches go to
        self.coming: list[tuple[Tensor, Tensor]] = []  # (where on the host, values) of copies on their way
        self.graph: Graph | None = None

    @contextlib.contextmanager
    def counted(self) -> Iterator[Seen]:
        before, self.seen = self.seen, Seen()
        try:
            yield self.seen
        finally:
            self.seen = before

    def wait(self, why: str) -> None:
        """The host waits for everything that was launched."""
        if self.graph is not None:
            raise RuntimeError(
                f"operation not permitted when stream is capturing: {why} waits for the device"
            )
        self.seen.waits[why] += 1
        self.arrive()

    def arrive(self) -> None:
        for target, values in self.coming:
            target.copy_(values)
        self.coming.clear()

    def launch(self, name: str, again: Callable[[], None] | None = None) -> None:
        """Counts a kernel; `again` does it once more, for a graph."""
        if self.graph is None:
            self.seen.launches[name] += 1
        else:
            self.graph.steps.append((name, again))

    # --- operators ---

    def run(self, func, args: tuple, kwargs: dict):
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        ours = [x for x in leaves if isinstance(x, OnDevice)]
        name = func.__name__.split(".")[0]
        target = kwargs.get("device")
        if not ours and not on_device(target):
            return func(*args, **kwargs)
        if func is torch.ops.prim.device.default:
            return self.place
        if name == "_to_copy":
            return self.moved(func, args[0], kwargs)
        if name == "copy_" and isinstance(args[0], OnDevice) != isinstance(args[1], OnDevice):
            return self.across(
                args[0], args[1], bool(args[2] if len(args) > 2 else kwargs.get("non_blocking"))
            )
        self.refuse(name, args, leaves)
        own = custom_ops.OPDEFS.get(f"{func.namespace}::{name}")
        if own is not None:  # an operator of Python is what it launches
            with Mode():  # which torch has left to come here
                return own._init_fn(*args, **kwargs)
        return self.compute(func, name, args, kwargs, ours)

    def moved(self, func, x: Tensor, kwargs: dict):
        target, rest = (
            kwargs.get("device"),
            {k: v for k, v in kwargs.items() if k not in ("device", "non_blocking")},
        )
        to = x.device if target is None else self.place if on_device(target) else torch.device(target)
        quiet = bool(kwargs.get("non_blocking"))
        if isinstance(x, OnDevice) and to.type != "cpu":
            return self.compute(func, "_to_copy", (x,), rest, [x])
        if isinstance(x, OnDevice):
            out = func(x.held, **rest)
            out = out.clone() if out is x.held else out
            if quiet:
                self.coming.append((out, out.clone()))
                _spoil(out)
                self.launch("copy to the host")
            else:
                self.launch("copy to the host")
                self.wait("copy to the host")
            return out
        if not quiet:
            self.wait("copy to the device")
        out = func(x, **rest)
        self.launch("copy to the device")
        return OnDevice(out.clone() if out is x else out)

    def across(self, target: Tensor, source: Tensor, quiet: bool) -> Tensor:
        if isinstance(target, OnDevice):
            if not quiet:
                self.wait("copy to the device")
            target.held.copy_(source)
        elif quiet:
            self.coming.append((target, source.held.clone()))
            _spoil(target)
        else:
            self.wait("copy to the host")
            target.copy_(source.held)
        self.launch("copy across")
        return target

    def refuse(self, name: str, args: tuple, leaves: list[Tensor]) -> None:
        """As torch does: no CPU tensor beside ours, but for a single number, and for an index,
        which is waited for."""
        strangers = [x for x in leaves if not isinstance(x, OnDevice)]
        if name in ("lift_fresh", "detach"):
            return
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            index = [x for x in args[1] or () if isinstance(x, Tensor)]
            if any(x.dtype == torch.bool for x in index):
                self.wait(f"{name} by a mask")
            if any(not isinstance(x, OnDevice) for x in index):
                self.wait(f"{name} by a CPU tensor")
            strangers = [x for x in strangers if not any(x is one for one in index)]
        if any(x.ndim for x in strangers):
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 "
                f"and cpu! ({name}, shapes {[tuple(x.shape) for x in leaves]})"
            )

    def compute(self, func, name: str, args: tuple, kwargs: dict, ours: list[OnDevice]):
        if name in WAITING:
            self.wait(name)

        def plain(x: object) -> object:
            if isinstance(x, torch.device):
                return CPU if on_device(x) else x
            return held(x)

        bare_args, bare_kwargs = tree_map(plain, (args, kwargs))
        if bare_kwargs.get("device") is not None:
            bare_kwargs["device"] = CPU
        bare_kwargs.pop("pin_memory", None)
        known = {id(x.held): x for x in ours}
        result = func(*bare_args, **bare_kwargs)
        if not (name in FREE or getattr(func, "is_view", False)):

            def again() -> None:
                new = func(*bare_args, **bare_kwargs)
                for was, now in zip(tree_leaves(result), tree_leaves(new), strict=True):
                    if isinstance(was, Tensor) and was is not now:
                        was.copy_(now)

            self.launch(name, again)

        def ourselves(x: object) -> object:
            if not isinstance(x, Tensor) or isinstance(x, OnDevice):
                return x
            return known.get(id(x)) if id(x) in known else OnDevice(x)

        return tree_map(ourselves, result)


def _spoil(values: Tensor) -> None:
    """What the host would read before a copy has arrived."""
    values.fill_(float("nan") if values.is_floating_point() else 0)


DEVICE = Device()


# --- streams, events, graphs --------------------------------------------------------------------------------


class Graph:
    """What was launched while it was captured; `replay` does it again, in the same memory."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, Callable[[], None] | None]] = []

    def replay(self) -> None:
        DEVICE.seen.replays += 1
        for name, again in self.steps:
            DEVICE.seen.launches[f"graph: {name}"] += 1
            assert again is not None, f"{name} cannot be captured"
            again()


# --- what torch does below the dispatcher -------------------------------------------------------------------


def moved(module: nn.Module) -> nn.Module:
    """Puts a module's parameters and buffers on the device, as .to("cuda") does with a real one."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(
                    OnDevice(parameter.detach().clone()), parameter.requires_grad
                )
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = OnDevice(buffer.clone())
    return module


def to_device(values: Tensor) -> Tensor:
    """A copy on the device, uncounted."""
    return OnDevice(values.detach().clone())
