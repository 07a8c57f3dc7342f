"""Every writer of the library, stopped at every call that changes a file.

    python -m benchmarks.faults --results benchmarks/results/faults       # all of it, about 20 minutes on one core
    python -m benchmarks.faults --share 0.05 --seed 1 --writers adapter   # a sample

A child process runs the writer with the k-th of its calls failing (a full disk from there on, or once EIO, EACCES or
EBUSY), or ending the process before it (SIGKILL), or in the middle of a write. The calls are counted below libc
(faults.c, preloaded), so those of compiled libraries are among them. After each stop:

* the folder holds the old result or the new one, whole;
* files of others are as they were: content, inode and time;
* a failure is one OSError of one line;
* the same call again succeeds, and leaves the very files of an undisturbed run, and no others.
"""

import argparse
import ctypes
import errno
import functools
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ONCE, FROM_THERE, KILL, TORN = range(4)  # of faults.c
STOPS = {
    "SIGKILL": (KILL, 0), "SIGKILL inside a write": (TORN, 0), "disk full": (FROM_THERE, errno.ENOSPC),
    "EIO": (ONCE, errno.EIO), "EACCES": (ONCE, errno.EACCES), "EBUSY": (ONCE, errno.EBUSY),
}  # fmt: skip
FOREIGN = ("mine.txt", "sub/code.py", ".hidden.part", "head.safetensors.bak")


@dataclass(frozen=True)
class Writer:
    """What writes into a folder. `old` makes the state that is written over; None where only a new folder is allowed.

    Files that a reader takes by themselves (a page, its figures) are whole one by one after a kill: `at_once` is False.
    """

    name: str
    new: Callable[[Path], object]
    old: Callable[[Path], object] | None = None
    view: Callable[[Path], dict] | None = None
    at_once: bool = True
    rarely: float = 1.0  # share of its stops: it takes seconds and makes hundreds of calls


def files_in(folder: Path) -> dict[str, str]:
    """Digest of every file, by its path in the folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def visible(folder: Path) -> dict[str, str]:
    """The files that a reader would open: not those of others, and not those being written."""
    return {
        name: digest
        for name, digest in files_in(folder).items()
        if name not in FOREIGN and ".part" not in name and not name.startswith(".")
    }


def adapter_view(folder: Path) -> dict[str, str]:
    """What an adapter's config leads to."""
    index = folder / "adapter.json"
    if not index.is_file():
        return {}
    found = {"adapter.json": hashlib.sha256(index.read_bytes()).hexdigest()}
    for plain, entry in json.loads(index.read_text())["files"].items():
        found[plain] = hashlib.sha256((folder / entry["name"]).read_bytes()).hexdigest()
    return found


def cache_view(folder: Path) -> dict[str, str]:
    """A finished cache's files; nothing while it is not finished."""
    manifest = folder / "manifest.json"
    if not manifest.is_file() or not json.loads(manifest.read_text())["complete"]:
        return {}
    return visible(folder)


def writers(names: list[str] | None = None) -> list[Writer]:
    import open_clip.transformer
    import torch

    import residual_kernels as rk
    from residual_kernels import files
    from residual_kernels.adapters import export, hub
    from residual_kernels.analysis import overview
    from residual_kernels.experiments.sweep import SweepTable
    from residual_kernels.report import gather, write_report
    from residual_kernels.report.facts import Source
    from residual_kernels.train import checkpoints

    torch.manual_seed(0)
    tower = open_clip.transformer.VisionTransformer(
        image_size=16, patch_size=8, width=32, layers=2, heads=2, mlp_ratio=2, output_dim=16
    ).eval()
    images = torch.randn(24, 3, 16, 16)
    bases = rk.fit_bases(tower, [images])
    one, two = (rk.ResiDual(tower, bases.truncate(components=k), init="normal") for k in (2, 3))
    heads = [rk.ZeroShotHead(torch.randn(16, 2), ["a", name]) for name in "bc"]
    rows = [
        {"tower": "t", "data": "d", "method": m, "seed": 0, "accuracy": a, "parameters": 3}
        for m, a in (("base", 0.5), ("fine", 0.75))
    ]
    cache = rk.encode(tower, [(images, torch.arange(24) % 2)], class_names="ab")
    merged = two.merge()

    @functools.cache
    def found():
        return overview.analyze(tower, cache, heads[0], bases, None, points=3, seeds=range(1))

    @functools.cache
    def facts(number: int):
        return gather((one, two)[number], heads[number], cache, Source("m", "d", "r"))

    loader = [(images[i : i + 6], torch.arange(6) % 2) for i in range(0, 24, 6)]
    quiet = {"label": "a"}
    result = [
        Writer(
            "save_adapter",
            lambda f: rk.save_adapter(two, f),
            lambda f: rk.save_adapter(one, f, head=heads[0]),
            adapter_view,
        ),
        Writer(
            "fit --out",
            lambda f: rk.save_adapter(two, f, head=heads[1], class_names=["a", "c"]),
            None,
            adapter_view,
        ),
        Writer(
            "hub folder",
            lambda f: hub.HubAdapter(two, heads[1], quiet).save_pretrained(f),
            lambda f: hub.HubAdapter(one, heads[0], quiet).save_pretrained(f),
            adapter_view,
        ),
        Writer(
            "bases",
            lambda f: bases.save(f / "b.safetensors", moments=True),
            lambda f: bases.save(f / "b.safetensors"),
        ),
        Writer(
            "head",
            lambda f: heads[1].save(f / "h.safetensors"),
            lambda f: heads[0].save(f / "h.safetensors"),
        ),
        Writer(
            "encode",
            lambda f: rk.encode(tower, loader, f / "c", shard_images=6, class_names="ab", data="these"),
            None,
            lambda f: cache_view(f / "c"),
        ),
        Writer(
            "checkpoint",
            lambda f: checkpoints.save(f / "c.safetensors", {"a": 1}, {"epoch": 2}, {"w": torch.ones(9)}),
            lambda f: checkpoints.save(f / "c.safetensors", {"a": 1}, {"epoch": 1}, {"w": torch.zeros(9)}),
        ),
        Writer(
            "JSON",
            lambda f: files.write_json(f / "n.json", {"a": [1] * 99}),
            lambda f: files.write_json(f / "n.json", {"a": 1}),
        ),
        Writer(
            "CSV",
            lambda f: files.write_csv(f / "n.csv", [["a", 1]] * 99),
            lambda f: files.write_csv(f / "n.csv", [["a"]]),
        ),
        Writer(
            "sweep table",
            lambda f: SweepTable.of(rows).write(f),
            lambda f: SweepTable.of(rows[:1]).write(f),
            at_once=False,
        ),
        Writer("analysis", lambda f: found().save(f), lambda f: _other(found()).save(f), at_once=False),
        Writer(
            "report",
            lambda f: write_report(facts(1), f / "r.html", cache),
            lambda f: write_report(facts(0), f / "r.html", cache),
            at_once=False,
            rarely=0.02,
        ),
        Writer(
            "export .pt2",
            lambda f: export.write(merged, f / "m.pt2", images[:2], verify=False),
            lambda f: files.write_text(f / "m.pt2", "old"),
            rarely=0.2,
        ),
        Writer(
            "export .onnx",
            lambda f: export.write(merged, f / "m.onnx", images[:2], verify=False),
            lambda f: files.write_text(f / "m.onnx", "old"),
            rarely=0.2,
        ),
    ]  # fmt: skip
    if names == [WRONG]:
        return [Writer(WRONG, _in_place, lambda f: (f / "n.json").write_text('{"a": 1}'))]
    return [writer for writer in result if names is None or writer.name in names]


WRONG = "a wrong writer"  # asked for by name: what finds no fault with it proves nothing


def _in_place(folder: Path) -> None:
    for path in folder.glob("mine*"):
        path.rename(folder / f"{path.name}.old")
        (folder / f"{path.name}.old").rename(path)
    (folder / "n.json").write_text(json.dumps({"a": [1] * 99}))


def _other(found):
    from dataclasses import replace

    return replace(found, images=found.images + 1)


# --- one stop -------------------------------------------------------------------------------------------------


class Shim:
    """faults.c, preloaded into this process."""

    def __init__(self):
        self.lib = ctypes.CDLL(None)
        self.lib.fault_count.restype = ctypes.c_long
        self.lib.fault_call.restype = ctypes.c_char_p

    def arm(self, root: Path, at: int = -1, error: int = 0, mode: int = ONCE) -> None:
        self.lib.fault_arm(os.fsencode(root), ctypes.c_long(at), error, mode)

    def calls(self) -> list[str]:
        return [self.lib.fault_call(ctypes.c_long(k)).decode() for k in range(self.lib.fault_count())]


def in_child(run: Callable[[], object], report: Path) -> tuple[str, str]:
    """What became of it, in a process of its own: ("done" | "error" | "killed" | "broken", message)."""
    report.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        code = 0
        try:
            run()
        except OSError as error:
            code = 3 if str(error) and "\n" not in str(error) else 4
            report.write_text(f"{type(error).__name__}: {error}")
        except BaseException as error:
            code = 4
            report.write_text(f"{type(error).__name__}: {error}")
        os._exit(code)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        return (
            "killed" if os.WTERMSIG(status) == signal.SIGKILL else "broken"
        ), f"signal {os.WTERMSIG(status)}"
    kind = {0: "done", 3: "error"}.get(os.WEXITSTATUS(status), "broken")
    return kind, report.read_text() if report.exists() else ""


def foreign_marks(folder: Path) -> dict[str, tuple]:
    marks = {}
    for name in FOREIGN:
        path = folder / name
        found = path.lstat() if path.exists() else None
        marks[name] = found and (path.read_bytes(), found.st_ino, found.st_mtime_ns, found.st_mode)
    return marks


def planted(folder: Path, old: Path | None) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if old is not None:
        shutil.copytree(old, folder)
    for name in FOREIGN:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"precious {name}")


def tried(writer: Writer, start: str, share: float, rng: random.Random, shim: Shim, place: Path) -> dict:
    """Every stop of one writer from one start ("new": nothing of it is there; "over": an older result is)."""
    view = writer.view or visible
    folder, report, armed = place / "root" / "out", place / "report", place / "root"
    old = None
    if start == "over":
        old = place / "old"
        shutil.rmtree(old, ignore_errors=True)
        old.mkdir(parents=True)
        writer.old(old)
    planted(folder, old)
    before = view(folder)
    shim.arm(armed)
    writer.new(folder)
    calls = shim.calls()
    shim.arm(place / "nowhere")
    after, undisturbed = view(folder), files_in(folder)
    faults, count = [], dict.fromkeys(STOPS, 0)
    for k, call in enumerate(calls):
        for stop, (mode, error) in STOPS.items():
            if (mode == TORN and call != "write") or rng.random() >= share * writer.rarely:
                continue
            planted(folder, old)
            marks = foreign_marks(folder)
            shim.arm(armed, k, error, mode)
            outcome, message = in_child(lambda: writer.new(folder), report)
            shim.arm(place / "nowhere")
            count[stop] += 1
            wrong = []
            found = view(folder)
            killed = mode in (KILL, TORN)
            if outcome == "broken" or (outcome == "killed") != killed:
                wrong.append(f"{outcome} {message}")
            whole = found in (before, after)
            if not whole and killed and not writer.at_once:
                whole = all(digest in (before.get(name), after.get(name)) for name, digest in found.items())
                whole = whole and set(before) <= set(found)
            if not whole:
                wrong.append("neither the old nor the new result")
            if outcome == "done" and found != after:
                wrong.append("said to be done, but it is not")
            if foreign_marks(folder) != marks:
                wrong.append("a foreign file was touched")
            again, message = in_child(lambda: writer.new(folder), report)
            if again != "done":
                wrong.append(f"again: {again} {message}")
            elif view(folder) != after:
                wrong.append("again: another result")
            elif files_in(folder) != undisturbed:
                wrong.append(f"again: {sorted(set(files_in(folder)) ^ set(undisturbed))} differ")
            faults += [f"{writer.name}, {start}, call {k} ({call}), {stop}: {text}" for text in wrong]
    return {"writer": writer.name, "start": start, "calls": len(calls), "stops": count, "faults": faults}


def run(names: list[str] | None, share: float, seed: int) -> dict:
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    shim, rng, started = Shim(), random.Random(seed), time.perf_counter()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary).resolve()
        for writer in writers(names):
            for start in ("new", "over"):
                if start == "new" or writer.old is not None:
                    rows.append(tried(writer, start, share, rng, shim, place))
                    print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return {
        "share": share, "seed": seed, "seconds": time.perf_counter() - started, "rows": rows,
        "stops": sum(sum(row["stops"].values()) for row in rows),
        "faults": [text for row in rows for text in row["faults"]],
    }  # fmt: skip


def preloaded(arguments: list[str]) -> subprocess.CompletedProcess:
    """This module, run in a process with faults.c below it; its last line of output is the result as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        shim = Path(folder) / "faults.so"
        compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
        compiler = compiler if shutil.which(compiler) else "cc"
        source = Path(__file__).with_suffix(".c")
        subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", shim, source, "-ldl"], check=True)
        environment = {**os.environ, "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "benchmarks.faults", *arguments]
        root = Path(__file__).parent.parent
        return subprocess.run(command, env=environment, cwd=root, text=True, stdout=subprocess.PIPE)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--writers", nargs="*", help="names of some; all by default")
    parser.add_argument("--share", type=float, default=1.0, help="of the stops, chosen at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, help="folder for faults.json")
    options = parser.parse_args()
    if not hasattr(ctypes.CDLL(None), "fault_arm"):
        done = preloaded(sys.argv[1:])
        print(done.stdout, end="")
        sys.exit(done.returncode)
    found = run(options.writers, options.share, options.seed)
    if options.results is not None:
        options.results.mkdir(parents=True, exist_ok=True)
        (options.results / "faults.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))
    sys.exit(bool(found["faults"]))


if __name__ == "__main__":
    main()
