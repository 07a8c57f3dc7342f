"""How do several processes share the work? torch.distributed as torchrun starts it, and nothing home-made.

Without torchrun (no WORLD_SIZE in the environment) every function here answers for one process and does
nothing.
"""

import contextlib
import contextvars
import datetime
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = 1800.0  # seconds a process waits for one that is silent; one that died is noticed at once


def initialise(timeout: float = TIMEOUT) -> bool:
    """Joins the process group that torchrun describes in the environment;
    True when there are several processes.

    gloo for tensors on the CPU and, where there are GPUs, nccl for those on a GPU; each process takes the GPU
    of its LOCAL_RANK. A group that exists already is left as it is. Call `finish` at the end.
    """
    if not is_distributed() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local < torch.cuda.device_count():
            torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout))
    return world() > 1


def finish() -> None:
    """Leaves the process group, if there is one."""
    if is_distributed():
        _control.cache_clear()
        dist.destroy_process_group()


_apart: contextvars.ContextVar[bool] = contextvars.ContextVar("apart", default=False)


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Within, this process works by itself: it is the only one that the functions here know of."""
    token = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(token)


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if is_distributed() and not _apart.get() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if is_distributed() and not _apart.get() else 1


def gather(value: Any, timeout: float = TIMEOUT) -> list[Any]:
    """Every process's `value` (numbers, strings, lists of them), by rank, once all have come here.

    RuntimeError when a process has died, or does not come within `timeout` seconds.
    """
    if world() == 1:
        return [value]
    group = _control(dist.group.WORLD)
    with _waiting():
        dist.monitored_barrier(group, timeout=datetime.timedelta(seconds=timeout))
        values: list[Any] = [None] * world()
        dist.all_gather_object(values, value, group=group)
    return values


@contextlib.contextmanager
def _waiting() -> Iterator[None]:
    """Whatever torch says when the others do not come becomes one clear line."""
    try:
        yield
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0]
        raise RuntimeError(
            f"process {rank()} of {world()} waited for the others, and one has died or hangs: {first}"
        ) from error


def from_first(make: Callable[[], Any], timeout: float = TIMEOUT) -> Any:
    """What `make` gives in process 0, in every process.

    When it raises there, the others raise RuntimeError.
    """
    value, failure = None, None
    if rank() == 0:
        try:
            value = make()
        except (ValueError, OSError) as error:
            failure = error
    text, value = gather((failure and str(failure), value), timeout)[0]
    if failure is not None:
        raise failure
    if text is not None:
        raise RuntimeError(f"process 0 stopped: {text}")
    return value


def share(count: int) -> slice:
    """This process's part of `count` things in a row: contiguous, and equal but for one."""
    return slice(count * rank() // world(), count * (rank() + 1) // world())


def total(tensor: Tensor) -> Tensor:
    """The sum over processes, added in the order of their ranks: the same bits everywhere.

    For small tensors.
    """
    if world() == 1:
        return tensor
    gathered = [torch.empty_like(tensor) for _ in range(world())]
    with _waiting():
        dist.all_gather(gathered, tensor.contiguous(), group=_group_of(tensor))
    return torch.stack(gathered).sum(0)


def add_up(tensor: Tensor) -> Tensor:
    """The sum over processes, in place: the same bits everywhere, whatever the tensor's size."""
    if world() > 1:
        with _waiting():
            dist.all_reduce(tensor, group=_group_of(tensor))
    return tensor


def _group_of(tensor: Tensor) -> dist.ProcessGroup | None:
    """Tensors on the CPU travel by gloo, whatever the default group's backend is."""
    return _control(dist.group.WORLD) if tensor.device.type == "cpu" else None


@functools.lru_cache(maxsize=1)
def _control(_default: dist.ProcessGroup) -> dist.ProcessGroup:
    """A gloo group for small messages, whatever backend the tensors travel on."""
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=TIMEOUT))
    return cast(dist.ProcessGroup, group)  # every process is a member, so it is no placeholder
