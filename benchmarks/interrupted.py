"""Commands that are killed at a random moment of their work, and then run again.

    python -m benchmarks.interrupted --results benchmarks/results/faults      # 20 kills of each command

`encode`, `bases`, `fit` with a checkpoint, `sweep` and `report` run on drawn images with the bundled model.
Each is run once without disturbance. Then it is killed (SIGKILL) at a random moment between the beginning of
its work and its end, and run again. The files must be those of the undisturbed run, byte for byte; the clock
that fits note their seconds by stands still.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import types
from pathlib import Path
from typing import Any

import torch

from residual_kernels import cli, report
from residual_kernels.bundled.drawings import drawn_images
from residual_kernels.train import convex, fitting, tuning


def images(folder: Path, count: int, seed: int) -> None:
    """Drawn images in two class folders."""
    for number, image in enumerate(drawn_images(count, seed=seed)):
        place = folder / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{number}.png")


def commands(data: Path) -> dict[str, list[str]]:
    """Arguments of each command; OUT stands for the folder it writes into."""
    plan = data / "plan.yaml"
    plan.write_text(
        f"towers: [{{model: bundled}}]\n"
        "methods: [base, fine, coarse]\n"
        "epochs: 40\n"
        f"data: [{{name: d, train: {data / 'images'}, test: {data / 'test'}}}]\n"
    )
    cache = str(data / "cache")
    return {
        "encode": ["encode", "--data", str(data / "images"), "--out", "OUT/c", "--shard-images", "16"],
        "bases": ["bases", "--data", str(data / "images"), "--out", "OUT/b.safetensors"],
        "fit": [
            "fit",
            "--data",
            cache,
            "--out",
            "OUT/a",
            "--checkpoint",
            "OUT/fit.safetensors",
            "--epochs",
            "60",
            "--patience",
            "60",
            "--method",
            "full",
        ],
        "sweep": ["sweep", str(plan), "--out", "OUT/s"],
        "report": ["report", str(data / "run"), "--data", cache, "--out", "OUT/r.html"],
    }


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def start(arguments: list[str], place: Path) -> int:
    """A process that runs the command, forked from this one; it makes a file `mark` where its work begins:
    when it first calls a module, or gathers what a report says."""
    (place / "mark").unlink(missing_ok=True)
    pid = os.fork()
    if pid:
        return pid
    with (place / "errors").open("w") as errors:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(errors.fileno(), 2)

    def begun(*_: object) -> None:
        (place / "mark").touch()
        hook.remove()

    def gather(*arguments: Any, **options: Any):
        begun()
        return gathered(*arguments, **options)

    gathered, report.gather = report.gather, gather
    hook = torch.nn.modules.module.register_module_forward_pre_hook(begun)
    for module in (convex, fitting, tuning):
        vars(module)["time"] = types.SimpleNamespace(perf_counter=lambda: 0.0)
    sys.argv = ["residual-kernels", *(text.replace("OUT", str(place / "out")) for text in arguments)]
    code = 0
    try:
        cli.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stderr.flush()
    os._exit(code)


def begins(pid: int, place: Path) -> None:
    """Waits until the work of a process begins."""
    while not (place / "mark").exists():
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            raise SystemExit(f"it ended before its work began: {(place / 'errors').read_text()[-500:]}")
        time.sleep(0.001)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed(name: str, arguments: list[str], times: int, rng: random.Random, place: Path) -> dict:
    out = place / "out"
    out.mkdir()
    pid = start(arguments, place)
    begins(pid, place)
    began = time.perf_counter()
    if ended(pid):
        raise SystemExit(f"{name} fails undisturbed: {(place / 'errors').read_text()[-500:]}")
    took, undisturbed = time.perf_counter() - began, files_of(out)
    faults: list[str] = []
    moments: list[dict] = []
    for _ in range(3 * times):
        if len(moments) == times:
            break
        shutil.rmtree(out)
        out.mkdir()
        pid = start(arguments, place)
        begins(pid, place)
        moment = rng.uniform(0, took)
        time.sleep(moment)
        os.kill(pid, signal.SIGKILL)
        if ended(pid) != -signal.SIGKILL:
            continue  # it had ended by itself
        left = files_of(out)
        moments.append({"seconds": round(moment, 3), "files": len(left)})
        code, found = ended(start(arguments, place)), files_of(out)
        if code:
            faults.append(f"killed at {moment:.2f} s: {code} {(place / 'errors').read_text()[-300:]}")
        elif found != undisturbed:
            names = [key for key in set(found) | set(undisturbed) if found.get(key) != undisturbed.get(key)]
            faults.append(f"killed at {moment:.2f} s: {sorted(names)} differ")
    shutil.rmtree(out)
    return {"command": name, "seconds": took, "kills": len(moments), "moments": moments, "faults": faults}


def keep(file: Path, rows: list[dict]) -> None:
    """Writes rows over those of the same commands; the others stay."""
    file.parent.mkdir(parents=True, exist_ok=True)
    held = json.loads(file.read_text())["rows"] if file.is_file() else []
    found = {row["command"]: row for row in (*held, *rows)}
    file.write_text(json.dumps({"rows": list(found.values())}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", nargs="*")
    parser.add_argument("--images", type=int, default=320, help="that the commands read")
    parser.add_argument(
        "--results", type=Path, help="folder for interrupted.json; rows of other commands in it stay"
    )
    options = parser.parse_args()
    rng, rows = random.Random(options.seed), []
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        images(place / "images", options.images, 1)
        images(place / "test", 60, 2)
        wanted = commands(place)
        for arguments in (
            [
                "encode",
                "--data",
                str(place / "images"),
                "--out",
                str(place / "cache"),
                "--kinds",
                "head",
                "--kinds",
                "mlp",
            ],
            [
                "fit",
                "--data",
                str(place / "cache"),
                "--out",
                str(place / "run"),
                "--method",
                "fine",
                "--epochs",
                "3",
            ],
        ):
            if ended(start(arguments, place)):
                raise SystemExit((place / "errors").read_text())
        for name, arguments in wanted.items():
            if options.commands is None or name in options.commands:
                rows.append({"images": options.images, **killed(name, arguments, options.times, rng, place)})
                print(json.dumps(rows[-1]), flush=True)
    if options.results is not None:
        keep(options.results / "interrupted.json", rows)
    sys.exit(any(row["faults"] or row["kills"] < options.times for row in rows))


if __name__ == "__main__":
    main()
