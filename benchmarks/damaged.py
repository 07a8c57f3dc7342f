"""Damaged and hostile files of every kind that is read: each ends in one clear sentence, or changes nothing.

    python -m benchmarks.damaged --each 120 --seed 0 --results benchmarks/results/faults

A good file of each kind is made once; a copy of it is damaged (damage.py) and read. What may come out is a
ValueError or FileNotFoundError of one line, or exactly what the good file gives. A read that takes more than
60 seconds or 4 GiB is a fault.
"""

import argparse
import functools
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.damage import damage

SECONDS, MEMORY = 60, 4 * 2**30  # that a read may take
LONGEST = 1500  # characters of a message


@dataclass(frozen=True)
class FileKind:
    """A file (`target`, within what is copied) and how it is read from its place.

    `bare`: its numbers carry no checksum, so that a changed one may be taken for another right file.
    """

    name: str
    source: str  # file or folder that is copied as a whole
    target: str  # the file in it that is damaged; "" is `source` itself, and a pattern names one of several
    read: Callable[[Path], Any]
    bare: bool = False


# --- what is damaged ----------------------------------------------------------------------------------------


def make(root: Path) -> None:
    """A good file of every kind, below `root`."""
    import open_clip.transformer
    import torch
    from PIL import Image

    import residual_kernels as rk
    from residual_kernels import files
    from residual_kernels.analysis import summary
    from residual_kernels.experiments import kept
    from residual_kernels.train import checkpoints

    tower = _tower(open_clip.transformer, torch)
    images, labels = torch.randn(12, 3, 16, 16), torch.arange(12) % 2
    bases = rk.fit_bases(tower, [images])
    head = rk.ZeroShotHead(torch.randn(16, 2), ["a", "b"], 1.5)
    adapter = rk.ResiDual(tower, bases.truncate(components=3), init="normal")
    bases.save(root / "bases.safetensors", moments=True)
    rk.save_adapter(adapter, root / "adapter", head=head, class_names=["a", "b"])
    rk.save_adapter(
        adapter, root / "pair" / "adapter", bases=_kept(bases, root / "pair" / "bases.safetensors")
    )
    adapter.detach()
    batches = [(images[start : start + 4], labels[start : start + 4]) for start in range(0, 12, 4)]
    cache = rk.encode(tower, batches, root / "cache", class_names="ab", shard_images=4)
    head.save(root / "head.safetensors")
    summary.analyze(tower, cache, head, bases, None, points=3, seeds=range(1)).save(root / "analysis")
    task = {
        "best_epoch": 1,
        "best_score": 0.5,
        "stopped": False,
        "diverged": False,
        "history": [[0, None, 1.0]],
    }
    state = {"epoch": 1, "active": [0], "groups": [{"lr": 0.1}], "tasks": [task], "seconds": 1.0}
    checkpoints.save(root / "fit.safetensors", {"a": 1}, state, {"0.best": torch.ones(1, 3)})
    (root / "plan.yaml").write_text(
        "towers: [{model: bundled}]\n"
        "methods: [base, fine]\n"
        "epochs: 3\n"
        "rates: [0.5, 1.0]\n"
        "data: [{name: d, train: /images, test: /test, class_names: null}]\n"
    )
    row = {
        "tower": "t",
        "data": "d",
        "method": "fine",
        "seed": 0,
        "accuracy": 0.5,
        "parameters": 3,
        "lr": 0.1,
    }
    files.write_json(
        root / "fine-0.json", {"schema": files.SCHEMA, "what": kept.WHAT, "recipe": "r", "row": row}
    )
    pictures = {}
    for number in range(6):
        buffer = io.BytesIO()
        Image.effect_noise((16, 16), 40 + number).convert("RGB").save(buffer, "PNG")
        pictures[f"{number:03d}"] = buffer.getvalue()
    with zipfile.ZipFile(root / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number, (name, data) in enumerate(pictures.items()):
            archive.writestr(f"{'ab'[number % 2]}/{name}.png", data)
    with tarfile.open(root / "shard.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for number, (name, data) in enumerate(pictures.items()):
            for ending, content in (("png", data), ("cls", str(number % 2).encode())):
                member = tarfile.TarInfo(f"{name}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    (root / "classnames.txt").write_text("ant\nbee\n")


def _kept(bases, place: Path) -> Path:
    bases.save(place)
    return place


def _tower(transformer, torch):
    torch.manual_seed(0)
    return transformer.VisionTransformer(
        image_size=16, patch_size=8, width=32, layers=2, heads=2, mlp_ratio=2, output_dim=16
    ).eval()


def kinds() -> list[FileKind]:
    import open_clip.transformer
    import torch

    import residual_kernels as rk
    from residual_kernels.analysis import summary
    from residual_kernels.data.images import open_images
    from residual_kernels.experiments import kept, sweep_plan
    from residual_kernels.train import checkpoints

    @functools.cache
    def tower():
        return _tower(open_clip.transformer, torch)

    def adapter(place: Path) -> list:
        folder = rk.AdapterFolder.open(place)
        flags = [one.requires_grad for one in tower().parameters()]
        try:
            found = folder.adapter(tower())
        except ValueError:
            assert flags == [one.requires_grad for one in tower().parameters()], "the tower's flags changed"
            raise
        weight = found.weight.detach().clone()
        found.detach()
        return [weight, folder.class_names, folder.head and folder.head.class_vectors]

    def cache(place: Path) -> list:
        found = rk.UnitCache.load(place)
        return [found.ids, found.labels, found.class_names, found.z["head"], found.output, found.checksum]

    def bases(place: Path) -> list:
        found = rk.SpectralBases.load(place)
        assert found.moments is not None
        return [found.fingerprint(), found.count, found.moments["head"].scatter]

    def head(place: Path) -> list:
        found = rk.ZeroShotHead.load(place)
        return [found.class_vectors, found.class_names]

    def checkpoint(place: Path) -> list:
        found = checkpoints.load(place, {"a": 1})
        return [found and json.dumps(found[0]), found and found[1].get("0.best")]

    def pictures(place: Path) -> list:
        found = open_images(place, lambda image: image)
        data = [hashlib.sha256(found.picture(k)[0].tobytes()).hexdigest() for k in range(len(found))]
        return [data, found.class_names, [int(found.labels[k]) for k in range(len(found))]]

    def shards(place: Path) -> list:
        return pictures(place / "shard.tar")

    return [
        FileKind("cache manifest", "cache", "manifest.json", cache),
        FileKind("cache shard", "cache", "shard-*.safetensors", cache),
        FileKind("bases", "bases.safetensors", "", bases),
        FileKind("adapter config", "adapter", "adapter.json", adapter),
        FileKind("adapter weights", "adapter", "weights.safetensors", adapter),
        FileKind("adapter bases", "adapter", "bases.safetensors", adapter),
        FileKind("bases elsewhere", "pair", "bases.safetensors", lambda place: adapter(place / "adapter")),
        FileKind("adapter's class list", "adapter", "classes.json", adapter),
        FileKind("class vectors", "head.safetensors", "", head, bare=True),
        FileKind("fit checkpoint", "fit.safetensors", "", checkpoint, bare=True),
        FileKind(
            "analysis", "analysis", "analysis.json", lambda f: summary.Analysis.load(f).to_dict(), bare=True
        ),
        FileKind("sweep plan", "plan.yaml", "", lambda f: repr(sweep_plan.SweepPlan.read(f)), bare=True),
        FileKind("sweep result", "fine-0.json", "", lambda f: kept.kept(f, "r", None, {}), bare=True),
        FileKind("images in a zip", "images.zip", "", pictures, bare=True),
        FileKind("images in a tar", "", "shard.tar", shards, bare=True),
        FileKind("class names beside a tar", "", "classnames.txt", shards, bare=True),
    ]


# --- what became of it --------------------------------------------------------------------------------------


def same(a: Any, b: Any) -> bool:
    import torch

    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


def told(error: BaseException) -> str | None:
    """What is wrong with an error; None for one that says in one line what the matter is."""
    text = str(error)
    if type(error) not in (ValueError, FileNotFoundError) and not type(error).__module__.startswith(
        "residual"
    ):
        return f"{type(error).__name__}: {text[:200]}"
    if not isinstance(error, ValueError | FileNotFoundError):
        return f"{type(error).__name__}: {text[:200]}"
    if not text or "\n" in text or len(text) > LONGEST:
        return f"a message of {len(text)} characters and {text.count(chr(10))} line ends: {text[:200]!r}"
    return "terminal escapes in the message" if "\x1b" in text else None


def tried(kind: FileKind, each: int, seed: int, root: Path, place: Path) -> dict:
    """One kind of file, damaged `each` times."""
    counts, faults = {"refused": 0, "no effect": 0, "another right file": 0}, []
    good = root / kind.source if kind.source else root
    wanted = kind.read(good)
    for number in range(each):
        rng = random.Random(f"{seed}:{kind.name}:{number}")
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        if kind.source and good.is_dir():
            shutil.copytree(good, place / "copy")
        elif kind.source:
            shutil.copy(good, place / f"copy{good.suffix}")
        else:
            for name in ("shard.tar", "classnames.txt"):
                shutil.copy(root / name, place)
        copied = place / (f"copy{good.suffix}" if kind.source else "")
        targets = sorted(copied.glob(kind.target)) if kind.target else [copied]
        target = rng.choice(targets)
        before = target.read_bytes()
        how = damage(target, rng)
        if target.read_bytes() == before:
            counts["no effect"] += 1
            continue
        signal.alarm(SECONDS)
        try:
            found = kind.read(copied)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            counts["refused"] += 1
            if (wrong := told(error)) is not None:
                faults.append(f"{kind.name}, {number} ({how}): {wrong}")
        else:
            if same(found, wanted):
                counts["no effect"] += 1
            elif kind.bare:
                counts["another right file"] += 1
            else:
                faults.append(f"{kind.name}, {number} ({how}): accepted, and other numbers came out")
        finally:
            signal.alarm(0)
    return {"kind": kind.name, "seed": seed, "tried": each, **counts, "faults": faults}


def run(each: int, seed: int, names: list[str] | None = None) -> list[dict]:
    """All kinds, in a process whose memory and seconds are bounded."""
    warnings.simplefilter("ignore")

    def too_long(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, too_long)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        root, place = Path(temporary) / "good", Path(temporary) / "tried"
        root.mkdir()
        make(root)
        held = resource.getrlimit(resource.RLIMIT_AS)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, held[1]))
        try:
            for kind in kinds():
                if names is None or kind.name in names:
                    rows.append(tried(kind, each, seed, root, place))
                    print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, held)
            signal.signal(signal.SIGALRM, before)
    return rows


def keep(results: Path, rows: list[dict]) -> None:
    """Writes rows into damaged.json, over those of the same kinds and seeds, and what all sum up to."""
    results.mkdir(parents=True, exist_ok=True)
    file = results / "damaged.json"
    held = json.loads(file.read_text())["rows"] if file.is_file() else []
    both = list({(row["kind"], row["seed"]): row for row in (*held, *rows)}.values())
    counted = ("tried", "refused", "no effect", "another right file")
    total: dict[str, object] = {key: sum(row[key] for row in both) for key in counted}
    total["kinds"] = len({row["kind"] for row in both})
    faults = [text for row in both for text in row["faults"]]
    file.write_text(json.dumps({**total, "rows": both, "faults": faults}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--each", type=int, default=120, help="damaged files of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", help="names of some; all by default")
    parser.add_argument(
        "--results", type=Path, help="folder for damaged.json; rows of other kinds and seeds in it stay"
    )
    options = parser.parse_args()
    rows = run(options.each, options.seed, options.kinds)
    if options.results is not None:
        keep(options.results, rows)
    sys.exit(any(row["faults"] for row in rows))


if __name__ == "__main__":
    main()
