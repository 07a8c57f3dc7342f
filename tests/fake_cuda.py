"""torch's own calls to a device, answered by the fake device while `installed` runs."""

import concurrent.futures
import contextlib
import gc
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
from fake_device import DEVICE, Device, Graph, Mode, OnDevice, held, on_device
from torch import Tensor


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
        self.device = DEVICE.place

    def synchronize(self) -> None:
        DEVICE.wait("stream")

    def record_event(self, event: _Event | None = None) -> _Event:
        event = event or _Event()
        event.record()
        return event

    wait_stream = wait_event = lambda self, *_: None


@contextlib.contextmanager
def _capture(graph: Graph, *_, **__) -> Iterator[None]:
    assert DEVICE.graph is None
    assert DEVICE.current == DEVICE.place.index, "a graph of another device would be captured"
    DEVICE.graph = graph
    try:
        yield
    finally:
        DEVICE.graph = None


@contextlib.contextmanager
def _current(device: object) -> Iterator[None]:
    was, DEVICE.current = DEVICE.current, torch.device(device).index or 0
    try:
        yield
    finally:
        DEVICE.current = was


def _quiet(*_, **__) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext()


_CUDA_MODULE = {
    "_lazy_init": lambda: None,
    "is_available": lambda: True,
    "current_device": lambda: DEVICE.current,
    "device_count": lambda: 2,
    "get_device_properties": lambda *_: SimpleNamespace(total_memory=80 << 30, name="fake", major=9, minor=0),
    "get_device_name": lambda *_: "fake",
    "get_device_capability": lambda *_: (9, 0),
    "synchronize": lambda *_: DEVICE.wait("synchronize"),
    "Event": _Event,
    "Stream": _Stream,
    "current_stream": lambda *_: _Stream(),
    "stream": _quiet,
    "device": _current,
    "CUDAGraph": Graph,
    "graph": _capture,
    "is_current_stream_capturing": lambda: DEVICE.graph is not None,
}


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
            sent = tuple(
                torch.tensor(part).to(DEVICE.place) if isinstance(part, list) else part for part in parts
            )
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
        return was(data, *args, **kwargs).to(DEVICE.place)

    return make


def _kernel_run(was: Callable) -> Callable:
    """A Triton kernel in the interpreter: it gets the values, and counts as one launch."""

    def run(self, *args, **kwargs):
        bare, bare_kwargs = [held(x) for x in args], {key: held(x) for key, x in kwargs.items()}
        if not any(isinstance(x, OnDevice) for x in (*args, *kwargs.values())):
            return was(self, *args, **kwargs)
        if DEVICE.current != DEVICE.place.index:
            raise RuntimeError(
                f"illegal memory access: tensors of {DEVICE.place}, launched on cuda:{DEVICE.current}"
            )
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
            with Mode():
                return call(*args, **kwargs)

        return was(self, there, *args, **kwargs)

    return submit


@contextlib.contextmanager
def installed(kernels: bool = False, index: int = 0) -> Iterator[Device]:
    """The device exists inside, as number `index`.

    With `kernels` the Triton backend takes it too, in Triton's interpreter, and a launch while another device
    is the current one is an error.
    """
    with contextlib.ExitStack() as stack:

        def put(where: object, name: str, value: object) -> None:
            was = getattr(where, name)
            setattr(where, name, value)
            stack.callback(setattr, where, name, was)

        put(DEVICE, "place", torch.device("cuda", index))
        for name, value in _CUDA_MODULE.items():
            put(torch.cuda, name, value)
        for name, value in _tensor_methods().items():
            put(Tensor, name, value)
        from residual_kernels.towers import plain_linear

        # A dispatch of its own, yet plain numbers.
        put(plain_linear, "_NUMBERS", (*plain_linear._NUMBERS, OnDevice.__name__))
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
        stack.enter_context(Mode())
        try:
            yield DEVICE
        finally:
            DEVICE.arrive()
            gc.collect()
