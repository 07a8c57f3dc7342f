"""Every writer of the library, stopped at every call that changes a file.

    TMPDIR=/dev/shm python -m benchmarks.faults --results benchmarks/results/faults   # all of it
    python -m benchmarks.faults --share 0.05 --seed 1 --writers save_adapter encode   # a sample

A writer runs with the k-th of its calls failing (a full disk from there on, or once EIO, EACCES or EBUSY); or
a child process runs it, which ends before that call (SIGKILL), or in the middle of a write. The calls are
counted below libc (faults.c, preloaded), so those of compiled libraries are among them. After each stop:

* the folder holds the old result or the new one, whole;
* files of others are as they were: content, inode and time;
* a failure is one OSError of one line;
* the same call again succeeds, and leaves the very files of an undisturbed run, and no others.
"""

import argparse
import ctypes
import errno
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
from pathlib import Path

from benchmarks.writers import FOREIGN, Writer, files_in, visible, writers

ONCE, FROM_THERE, KILL, TORN = range(4)  # of faults.c
STOPS = {
    "SIGKILL": (KILL, 0),
    "SIGKILL inside a write": (TORN, 0),
    "disk full": (FROM_THERE, errno.ENOSPC),
    "EIO": (ONCE, errno.EIO),
    "EACCES": (ONCE, errno.EACCES),
    "EBUSY": (ONCE, errno.EBUSY),
}


# --- one stop -----------------------------------------------------------------------------------------------


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


def ended(run: Callable[[], object]) -> tuple[str, str]:
    """What became of it: ("done" | "error" | "broken", message)."""
    try:
        run()
    except OSError as error:
        kind = "error" if str(error) and "\n" not in str(error) else "broken"
        return kind, f"{type(error).__name__}: {error}"
    except BaseException as error:
        return "broken", f"{type(error).__name__}: {error}"
    return "done", ""


def killed(run: Callable[[], object]) -> tuple[str, str]:
    """What became of it in a process of its own, which is to be killed: ("killed" | "broken", message)."""
    pid = os.fork()
    if pid == 0:
        ended(run)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    as_meant = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    return ("killed" if as_meant else "broken"), f"status {status}"


def foreign_marks(folder: Path) -> dict[str, tuple | None]:
    marks: dict[str, tuple | None] = {}
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
    folder, armed = place / "root" / "out", place / "root"
    old = None
    if start == "over" and writer.old is not None:
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
    faults, count, started = [], dict.fromkeys(STOPS, 0), time.perf_counter()
    for k, call in enumerate(calls):
        for stop, (mode, error) in STOPS.items():
            if (mode == TORN and call != "write") or rng.random() >= share * writer.rarely:
                continue
            planted(folder, old)
            marks = foreign_marks(folder)
            shim.arm(armed, k, error, mode)
            kills = mode in (KILL, TORN)
            outcome, message = (killed if kills else ended)(lambda: writer.new(folder))
            shim.arm(place / "nowhere")
            count[stop] += 1
            wrong = []
            found = view(folder)
            if outcome == "broken":
                wrong.append(f"{outcome} {message}")
            whole = found in (before, after)
            if not whole and kills and not writer.at_once:
                whole = all(digest in (before.get(name), after.get(name)) for name, digest in found.items())
                whole = whole and set(before) <= set(found)
            if not whole:
                wrong.append("neither the old nor the new result")
            if outcome == "done" and found != after:
                wrong.append("said to be done, but it is not")
            if foreign_marks(folder) != marks:
                wrong.append("a foreign file was touched")
            again, message = ended(lambda: writer.new(folder))
            if again != "done":
                wrong.append(f"again: {again} {message}")
            elif view(folder) != after:
                wrong.append("again: another result")
            elif files_in(folder) != undisturbed:
                wrong.append(f"again: {sorted(set(files_in(folder)) ^ set(undisturbed))} differ")
            faults += [f"{writer.name}, {start}, call {k} ({call}), {stop}: {text}" for text in wrong]
    return {
        "writer": writer.name,
        "start": start,
        "calls": len(calls),
        "share": share * writer.rarely,
        "stops": count,
        "seconds": round(time.perf_counter() - started, 1),
        "faults": faults,
    }


def summed(rows: list[dict]) -> dict:
    """The rows, in the order of their writers, and what they sum up to."""
    return {
        "rows": rows,
        "writers": len({row["writer"] for row in rows}),
        "stops": sum(sum(row["stops"].values()) for row in rows),
        "faults": [text for row in rows for text in row["faults"]],
    }


def keep(results: Path, rows: list[dict]) -> None:
    """Writes rows into faults.json, over those of the same writers."""
    results.mkdir(parents=True, exist_ok=True)
    file = results / "faults.json"
    held = json.loads(file.read_text())["rows"] if file.is_file() else []
    found = {(row["writer"], row["start"]): row for row in (*held, *rows)}
    file.write_text(json.dumps(summed(list(found.values())), indent=1) + "\n")


def run(
    names: list[str] | None,
    share: float,
    seed: int,
    results: Path | None = None,
    starts: list[str] | None = None,
) -> dict:
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    shim, rng = Shim(), random.Random(seed)
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary).resolve()
        for writer in writers(names):
            for start in starts or ("new", "over"):
                if start == "new" or writer.old is not None:
                    rows.append(tried(writer, start, share, rng, shim, place))
                    print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
                    if results is not None:
                        keep(results, rows[-1:])
    return summed(rows)


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
    parser.add_argument(
        "--starts", nargs="*", choices=("new", "over"), help="of the writers; both by default"
    )
    parser.add_argument("--share", type=float, default=1.0, help="of the stops, chosen at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--results", type=Path, help="folder for faults.json; rows of other writers in it stay"
    )
    options = parser.parse_args()
    if not hasattr(ctypes.CDLL(None), "fault_arm"):
        done = preloaded(sys.argv[1:])
        print(done.stdout, end="")
        sys.exit(done.returncode)
    found = run(options.writers, options.share, options.seed, options.results, options.starts)
    print(json.dumps(found))
    sys.exit(bool(found["faults"]))


if __name__ == "__main__":
    main()
