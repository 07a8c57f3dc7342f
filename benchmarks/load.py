"""What does long and heavy use do?

Peak memory at N, 4 N and 16 N images, thousands of repetitions, threads, forks.

    python -m benchmarks.load --results benchmarks/results/faults

Each measurement runs in a process of its own, forked before anything was computed; memory is what the kernel
counts for it (VmHWM, VmRSS), beyond what it had when the measurement began.
"""

import argparse
import functools
import gc
import json
import os
import shutil
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import residual_kernels as rk
from residual_kernels import report
from residual_kernels.files import write_json
from residual_kernels.report.facts import Source

N = 250
MIB = 2**20


def _status(key: str) -> int:
    """A number of bytes that the kernel keeps of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"the kernel counts no {key}")


def in_process(run: Callable[[], object]) -> dict:
    """What `run` returned, its peak of memory and its seconds on the processor, from a forked process."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        code = 1
        try:
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
            before, start = _status("VmRSS"), time.process_time()
            found = run()
            result = {
                "peak_mib": round((_status("VmHWM") - before) / MIB, 1),
                "cpu_seconds": round(time.process_time() - start, 2),
                **(found if isinstance(found, dict) else {}),
            }
            os.write(write, json.dumps(result).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read()
    if os.waitpid(pid, 0)[1] or not text:
        raise RuntimeError("the measurement failed")
    return json.loads(text)


def model_and_batches():
    model, _, _ = rk.load_bundled()

    def batches(count: int, size: int = 50):
        generator = torch.Generator().manual_seed(0)
        for _ in range(0, count, size):
            yield torch.randn(size, 3, 32, 32, generator=generator), torch.arange(size) % 4

    return model.visual, batches


def step(name: str, count: int, place: Path) -> None:
    """One step on `count` images; caches are on disk, of shards of 250 images."""
    tower, batches = model_and_batches()
    if name == "encode":
        rk.encode(tower, batches(count), place / str(count), class_names="abcd", shard_images=250)
        return
    if name == "fit_bases":
        rk.fit_bases(tower, batches(count)).save(place / "bases.safetensors")
        return
    cache = rk.UnitCache.load(place / str(count), verify="size")
    adapter = rk.ResiDual(tower, rk.SpectralBases.load(place / "bases.safetensors").truncate(energy=0.9))
    torch.manual_seed(0)
    head = rk.ZeroShotHead(torch.randn(adapter.bases.dim, 4), "abcd")
    if name == "fit":
        rk.fit(adapter, head, cache, epochs=2)
    elif name == "report":
        facts = report.gather(adapter, head, cache, Source("model", "data", "run"))
        report.write_report(facts, place / "report.html", cache)
    elif name == "predict, images":
        rk.predict(adapter, head, (images for images, _ in batches(count)))
    else:
        rk.evaluate(adapter, head, cache if name == "evaluate" else batches(count))


STEPS = ("encode", "fit_bases", "fit", "evaluate", "evaluate, images", "predict, images", "report")


def scaling() -> list[dict]:
    """Peaks of every step at N, 4 N and 16 N images."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for count in (N, 4 * N, 16 * N):
            for name in STEPS:
                measured = in_process(functools.partial(step, name, count, Path(temporary)))
                rows.append({"step": name, "images": count, **measured})
                print(json.dumps(rows[-1]), flush=True)
            shutil.rmtree(Path(temporary) / str(count))
    return rows


def repeated(what: str, times: int, once: Callable[[], object]) -> dict:
    """Resident memory after a tenth of the repetitions, and after all."""
    for _ in range(times // 10):
        once()
    gc.collect()
    early = _status("VmRSS")
    for _ in range(times - times // 10):
        once()
    gc.collect()
    return {"what": what, "times": times, "growth_mib": round((_status("VmRSS") - early) / MIB, 1)}


def many_fits() -> dict:
    tower, batches = model_and_batches()
    cache = rk.encode(tower, batches(100), class_names="abcd")
    bases = rk.fit_bases(tower, cache).truncate(components=2)
    adapter = rk.ResiDual(tower, bases)
    head = rk.ZeroShotHead(torch.randn(cache.output.shape[1], 4), "abcd")
    return repeated("fit", 1000, lambda: rk.fit(adapter, head, cache, cache, epochs=1))


def many_attachments() -> dict:
    model, _, _ = rk.load_bundled()
    images = torch.randn(20, 3, 32, 32)
    bases = rk.fit_bases(model.visual, [images]).truncate(components=2)

    def once():
        with rk.attach(model, bases):
            pass

    return repeated("attach and detach", 1000, once)


def many_calls() -> dict:
    tower, _ = model_and_batches()
    images = torch.randn(20, 3, 32, 32)
    residual = rk.ResiDual(tower, rk.fit_bases(tower, [images]).truncate(components=2))
    cache = rk.encode(tower, [images])
    terms = cache.terms(slice(0, 20))

    def once():
        residual.from_units(terms).square().sum().backward()
        residual.weight.grad = None

    return repeated("operator, forward and backward", 10_000, once)


def in_eight_threads(call: Callable[[], torch.Tensor], allowed: list[torch.Tensor], beside=None) -> dict:
    """Calls made in eight threads at once, and how many gave each of the outputs that are allowed,
    or another one."""
    counts, lock, running = [0] * (len(allowed) + 1), threading.Lock(), [8]

    def run() -> None:
        with torch.no_grad():
            for _ in range(25):
                found = call()
                right = [place for place, one in enumerate(allowed) if torch.equal(found, one)]
                with lock:
                    counts[right[0] if right else -1] += 1
        running[0] -= 1

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    while beside is not None and running[0]:
        beside()
    for thread in threads:
        thread.join()
    return {"calls": sum(counts), "outputs": counts[:-1], "other_outputs": counts[-1]}


def eight_threads() -> dict:
    """One ResiDual, read by eight threads at once: every output is that of one thread alone."""
    tower, _ = model_and_batches()
    images = torch.randn(20, 3, 32, 32)
    residual = rk.ResiDual(tower, rk.fit_bases(tower, [images]).truncate(components=2))
    with torch.no_grad():
        expected = residual(images)
    return {
        "what": "one ResiDual in eight threads",
        **in_eight_threads(lambda: residual(images), [expected]),
    }


def switched_set() -> dict:
    """One AdapterSet in eight threads, while another switches its active name:
    every output is one member's."""
    tower, _ = model_and_batches()
    images = torch.randn(20, 3, 32, 32)
    inside = rk.fit_bases(tower, [images], placement="stream").truncate(components=2)
    members = {
        "a": rk.ResiDual(tower, rk.fit_bases(tower, [images]).truncate(components=2), init="normal"),
        "b": rk.StreamResiDual(tower, inside, init="normal"),
    }
    adapters = rk.AdapterSet(tower, members)
    names = (*members, None)
    allowed = []
    for name in names:
        adapters.active = name
        with torch.no_grad():
            allowed.append(adapters(images))
    switches = 0

    def switch() -> None:
        nonlocal switches
        switches += 1
        adapters.active = names[switches % 3]
        time.sleep(0.0005)

    found = in_eight_threads(lambda: adapters(images), allowed, switch)
    return {"what": "one AdapterSet in eight threads, switched", "switches": switches, **found}


def attached_in_between() -> dict:
    """attach and detach while other threads are inside a forward pass:
    each output is the tower's or the adapter's."""
    model, _, _ = rk.load_bundled()
    images = torch.randn(8, 3, 32, 32)
    bases = rk.fit_bases(model.visual, [images, torch.randn(12, 3, 32, 32)]).truncate(components=2)
    with torch.no_grad():
        plain = model.encode_image(images)
        with rk.attach(model, bases):
            adapted = model.encode_image(images)
    stop, inside = threading.Event(), [0]
    counts: dict[str, Any] = {"tower": 0, "adapter": 0, "other": 0, "errors": 0}
    lock = threading.Lock()

    def run():
        while not stop.is_set():
            try:
                with lock:
                    inside[0] += 1
                with torch.no_grad():
                    found = model.encode_image(images)
            except Exception as error:  # counted: there must be none
                kind, counts["error"] = "errors", repr(error)[:200]
            else:
                kind = (
                    "tower"
                    if torch.equal(found, plain)
                    else "adapter"
                    if torch.equal(found, adapted)
                    else "other"
                )
            with lock:
                inside[0] -= 1
                counts[kind] += 1

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    overlapped = switches = 0
    start = time.perf_counter()
    while time.perf_counter() - start < 10:
        overlapped += inside[0] > 0
        handle = rk.attach(model, bases)
        time.sleep(0.002)
        overlapped += inside[0] > 0
        handle.detach()
        time.sleep(0.002)
        switches += 2
    stop.set()
    for thread in threads:
        thread.join()
    return {"what": "attach during forward passes", "switches": switches, "overlapped": overlapped, **counts}


def forked() -> dict:
    """A child forked after the parent has computed with several threads computes too, with one."""
    torch.set_num_threads(4)
    tower, _ = model_and_batches()
    images = torch.randn(64, 3, 32, 32)
    residual = rk.ResiDual(tower, rk.fit_bases(tower, [images]).truncate(components=2))
    with torch.no_grad():
        expected = residual(images)
    pid = os.fork()
    if pid == 0:
        with torch.no_grad():
            os._exit(0 if torch.allclose(residual(images), expected, rtol=1e-4, atol=1e-5) else 3)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return {"what": "after a fork", "outcome": "same" if status == 0 else f"status {status}"}
        time.sleep(0.05)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return {"what": "after a fork", "outcome": "hangs"}


REPEATED = (forked, eight_threads, switched_set, attached_in_between, many_attachments, many_calls, many_fits)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path)
    parser.add_argument(
        "--only", nargs="*", help=f"of {', '.join(run.__name__ for run in REPEATED)}, scaling"
    )
    options = parser.parse_args()
    file = None if options.results is None else options.results / "load.json"
    found = json.loads(file.read_text()) if file is not None and file.is_file() else {}
    torch.set_num_threads(1)
    for run in (*REPEATED, scaling):  # this process computes nothing itself: each is forked from it
        if options.only is None or run.__name__ in options.only:
            found[run.__name__] = scaling() if run is scaling else in_process(run)
            print(json.dumps(found[run.__name__]), flush=True)
            if file is not None:
                write_json(file, found)


if __name__ == "__main__":
    main()
