"""Real processes for tests, cheap to start: forked from one server that has imported the library before."""

import multiprocessing
import os
import socket

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["residual_kernels", "processes"])


def start(function, *arguments, environment=None) -> multiprocessing.Process:
    """A process that runs `function` (of an importable module) with these variables set."""
    process = CONTEXT.Process(target=_run, args=(environment or {}, function, arguments), daemon=True)
    process.start()
    return process


def start_ranks(world: int, function, *arguments) -> list[multiprocessing.Process]:
    """Processes as torchrun would start them: function(*arguments) in each."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    return [
        start(function, *arguments, environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world)
    ]


def exit_codes(processes, seconds: float = 60) -> list[int | None]:
    """Exit codes once all have ended; a process that outlives `seconds` is killed and its code is None."""
    codes = []
    for process in processes:
        process.join(seconds)
        codes.append(process.exitcode)
        if process.exitcode is None:
            process.kill()
    return codes


def _run(environment, function, arguments) -> None:
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    function(*arguments)
