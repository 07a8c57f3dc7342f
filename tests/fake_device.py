"""A second device without one: tensors that say cuda:0,
hold CPU values and refuse the company of CPU tensors.

    with fake_device.installed() as device:
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
import concurrent.futures
import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace

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
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)

    def __repr__(self) -> str:
        return f"OnDevice({self.held})"

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __deepcopy__(self, memo: dict) -> "OnDevice":
        if id(self) not in memo:
            copied = OnDevice(self.held.detach().clone())
            is_parameter = isinstance(self, nn.Parameter)
            memo[id(self)] = nn.Parameter(copied, self.requires_grad) if is_parameter else copied
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return DEVICE.run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return DEVICE.run(func, args, kwargs or {})


def held(x: object) -> object:
    return x.held if isinstance(x, OnDevice) else x


def on_device(kind: object) -> bool:
    return kind is not None and torch.device(kind).type in (
        "cuda",
        "meta",
    )  # the wrapper's own device is meta


class _Device:
    """What all tensors of the device share: counters, copies on their way, the graph being captured."""

    def __init__(self) -> None:
        self.seen = Seen()
        self.coming: list[tuple[Tensor, Tensor]] = []  # (where on the host, values) of copies on their way
        self.graph: _Graph | None = None

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
            return CUDA
        if name == "_to_copy":
            return self.moved(func, args[0], kwargs)
        if name == "copy_" and isinstance(args[0], OnDevice) != isinstance(args[1], OnDevice):
            return self.across(
                args[0], args[1], bool(args[2] if len(args) > 2 else kwargs.get("non_blocking"))
            )
        self.refuse(name, args, leaves)
        own = custom_ops.OPDEFS.get(f"{func.namespace}::{name}")
        if own is not None:  # an operator of Python is what it launches
            with _Mode():  # which torch has left to come here
                return own._init_fn(*args, **kwargs)
        return self.compute(func, name, args, kwargs, ours)

    def moved(self, func, x: Tensor, kwargs: dict):
        target, rest = (
            kwargs.get("device"),
            {k: v for k, v in kwargs.items() if k not in ("device", "non_blocking")},
        )
        to = x.device if target is None else CUDA if on_device(target) else torch.device(target)
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


DEVICE = _Device()


# --- streams, events, graphs --------------------------------------------------------------------------------


class _Event:
    def __init__(self, *_, **__) -> None:
        self.recorded = False

    def record(self, *_) -> None:
        self.recorded = True

    def synchronize(self) -> None:
        if self.recorded:
            DEVICE.wait("event")

    wait = query = lambda self, *_: True


class _Stream:
    def __init__(self, *_, **__) -> None:
        self.device = CUDA

    def synchronize(self) -> None:
        DEVICE.wait("stream")

    def record_event(self, event: _Event | None = None) -> _Event:
        event = event or _Event()
        event.record()
        return event

    wait_stream = wait_event = lambda self, *_: None


class _Graph:
    """What was launched while it was captured; `replay` does it again, in the same memory."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, Callable[[], None] | None]] = []

    def replay(self) -> None:
        DEVICE.seen.replays += 1
        for name, again in self.steps:
            DEVICE.seen.launches[f"graph: {name}"] += 1
            assert again is not None, f"{name} cannot be captured"
            again()


@contextlib.contextmanager
def _capture(graph: _Graph, *_, **__) -> Iterator[None]:
    assert DEVICE.graph is None
    DEVICE.graph = graph
    try:
        yield
    finally:
        DEVICE.graph = None


def _quiet(*_, **__) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext()


_CUDA_MODULE = {
    "_lazy_init": lambda: None,
    "is_available": lambda: True,
    "current_device": lambda: 0,
    "device_count": lambda: 1,
    "get_device_properties": lambda *_: SimpleNamespace(total_memory=80 << 30, name="fake", major=9, minor=0),
    "get_device_name": lambda *_: "fake",
    "get_device_capability": lambda *_: (9, 0),
    "synchronize": lambda *_: DEVICE.wait("synchronize"),
    "Event": _Event,
    "Stream": _Stream,
    "current_stream": lambda *_: _Stream(),
    "stream": _quiet,
    "device": _quiet,
    "CUDAGraph": _Graph,
    "graph": _capture,
    "is_current_stream_capturing": lambda: DEVICE.graph is not None,
}


# --- what torch does below the dispatcher -------------------------------------------------------------------


def _tensor_methods() -> dict[str, Callable]:
    def tolist(self, _was=Tensor.tolist):
        if isinstance(self, OnDevice):
            DEVICE.wait("tolist")
        return _was(held(self))

    def refused(name: str) -> Callable:
        was = getattr(Tensor, name)

        def method(self, *args, **kwargs):
            if isinstance(self, OnDevice):
                raise TypeError(
                    "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it to "
                    "host memory"
                )
            return was(self, *args, **kwargs)

        return method

    def pin(self, *_):
        return self.clone()

    def getitem(self, index, _was=Tensor.__getitem__):
        if isinstance(self, OnDevice):  # torch makes a tensor of a list, and sends it
            parts = index if isinstance(index, tuple) else (index,)
            sent = tuple(torch.tensor(part).to(CUDA) if isinstance(part, list) else part for part in parts)
            return _was(self, sent if isinstance(index, tuple) else sent[0])
        return _was(self, index)

    return {
        "__getitem__": getitem,
        "tolist": tolist,
        "numpy": refused("numpy"),
        "__array__": refused("__array__"),
        "pin_memory": pin,
    }


def _made(was: Callable) -> Callable:
    """torch.tensor, torch.as_tensor: what they make on the device is copied there."""

    def make(data, *args, device=None, **kwargs):
        if device is None or not on_device(device):
            found = data if isinstance(data, OnDevice) and not (args or kwargs) else None
            return was(data, *args, device=device, **kwargs) if found is None else found
        return was(data, *args, **kwargs).to(CUDA)

    return make


def _kernel_run(was: Callable) -> Callable:
    """A Triton kernel in the interpreter: it gets the values, and counts as one launch."""

    def run(self, *args, **kwargs):
        bare, bare_kwargs = [held(x) for x in args], {key: held(x) for key, x in kwargs.items()}
        if not any(isinstance(x, OnDevice) for x in (*args, *kwargs.values())):
            return was(self, *args, **kwargs)
        with _outside():
            result = was(self, *bare, **bare_kwargs)

        def again() -> None:
            with _outside():
                was(self, *bare, **bare_kwargs)

        DEVICE.launch(self.fn.__name__.strip("_"), again)
        return result

    return run


def _outside() -> contextlib.AbstractContextManager:
    """Where operators are the CPU's own."""
    return torch.utils._python_dispatch._disable_current_modes()


def _threads(was: Callable) -> Callable:
    """Threads are on the device too: a dispatch mode belongs to one thread."""

    def submit(self, call, /, *args, **kwargs):
        def there(*args, **kwargs):
            with _Mode():
                return call(*args, **kwargs)

        return was(self, there, *args, **kwargs)

    return submit


@contextlib.contextmanager
def installed(kernels: bool = False) -> Iterator[_Device]:
    """The device exists inside. With `kernels` the Triton backend takes it too, in Triton's interpreter."""
    with contextlib.ExitStack() as stack:

        def put(where: object, name: str, value: object) -> None:
            was = getattr(where, name)
            setattr(where, name, value)
            stack.callback(setattr, where, name, was)

        for name, value in _CUDA_MODULE.items():
            put(torch.cuda, name, value)
        for name, value in _tensor_methods().items():
            put(Tensor, name, value)
        from residual_kernels.towers import plain_linear

        put(
            plain_linear, "_NUMBERS", (*plain_linear._NUMBERS, OnDevice.__name__)
        )  # a dispatch of its own, yet plain numbers
        put(torch, "tensor", _made(torch.tensor))
        put(torch, "as_tensor", _made(torch.as_tensor))
        put(
            concurrent.futures.ThreadPoolExecutor,
            "submit",
            _threads(concurrent.futures.ThreadPoolExecutor.submit),
        )
        if kernels:
            from triton.runtime.interpreter import GridExecutor

            from residual_kernels.ops import backends

            put(
                backends,
                "_missing_triton",
                lambda device, by_name: None if device.type == "cuda" else "not here",
            )
            put(GridExecutor, "__call__", _kernel_run(GridExecutor.__call__))
        stack.enter_context(_Mode())
        try:
            yield DEVICE
        finally:
            DEVICE.arrive()
            gc.collect()


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
