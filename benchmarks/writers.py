"""Which writers has the library?

Each as a call that writes into a folder, small enough for thousands of stops.

What takes seconds and changes no file (loading a model, drawing a figure, tracing a module) is computed once.
The writer "report, drawn anew" draws each time, for a share of its stops.
"""

import atexit
import functools
import hashlib
import io
import json
import shutil
import tempfile
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

FOREIGN = ("mine.txt", "sub/code.py", ".hidden.part", "head.safetensors.bak")


@dataclass(frozen=True)
class Writer:
    """What writes into a folder.

    `old` makes the state that is written over; None where only a new folder is allowed.

    Files that a reader takes by themselves (a page, its figures) are whole one by one after a kill: `at_once`
    is False.
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


DRAWN_ANEW = "report, drawn anew"


class Once:
    """Patches for this process: what changes no file is computed at its first call and kept.

    Figures are kept as the bytes of their files, and seconds stand still, so that two runs leave the same
    files.
    """

    def __init__(self):
        import torch
        from matplotlib.figure import Figure

        from residual_kernels import figures
        from residual_kernels.data import models
        from residual_kernels.report import charts, page, tables
        from residual_kernels.train import fitting

        self.kept: dict = {}  # key -> (what its ids are of, the result)
        self.draw_anew = False
        draw = Figure.savefig

        def save(figure: Figure, target, **options: Any) -> None:
            if self.draw_anew:
                return draw(figure, target, **options)
            text = isinstance(target, io.StringIO)
            key = (id(figure), text, repr(options))
            if key not in self.kept:
                draw(figure, held := io.StringIO() if text else io.BytesIO(), **options)
                self.kept[key] = (figure, held.getvalue())
            data = self.kept[key][1]
            target.write(data) if text else Path(target).write_bytes(data)

        type.__setattr__(Figure, "savefig", save)
        for holder, name in (
            (charts, "on_page"),
            (charts, "in_folder"),
            (figures, "accuracy_table"),
            (models, "load_model"),
            (torch.onnx, "export"),
            (torch.export, "export"),
            (charts, "inline"),
            (tables, "tables"),
            (page, "_render"),
        ):
            setattr(holder, name, self._once(getattr(holder, name), named=holder in (models, figures)))
        vars(fitting)["time"] = types.SimpleNamespace(perf_counter=lambda: 0.0)

    def _once(self, function: Callable, named: bool) -> Callable:
        def kept(*arguments: object, **options: object):
            key = (function, repr(arguments) if named else tuple(map(id, arguments[:1])))
            if self.draw_anew or key not in self.kept:
                found = function(*arguments, **options)
                found = list(found) if hasattr(found, "__next__") else found
                if self.draw_anew:
                    return found
                self.kept[key] = (arguments, found)
            return self.kept[key][1]

        return kept


def writers(names: list[str] | None = None) -> list[Writer]:
    import open_clip.transformer
    import torch

    import residual_kernels as rk
    from residual_kernels import files
    from residual_kernels.adapters import export, hub
    from residual_kernels.analysis import summary
    from residual_kernels.bundled.drawings import drawn_images
    from residual_kernels.experiments.sweep import DataSpec, Sweep, SweepPlan, SweepTable, TowerSpec
    from residual_kernels.report import gather, write_report
    from residual_kernels.report.facts import Source
    from residual_kernels.train import checkpoints

    once = Once()
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
        return summary.analyze(tower, cache, heads[0], bases, None, points=3, seeds=range(1))

    @functools.cache
    def facts(number: int):
        return gather((one, two)[number], heads[0], cache, Source("m", "d"[: number + 1], "r"))

    def report(folder: Path, number: int, anew: bool = False) -> None:
        once.draw_anew = anew
        try:
            write_report(facts(number), folder / "r.html", cache)
        finally:
            once.draw_anew = False

    def swept(folder: Path, epochs: int) -> None:
        data = (DataSpec("d", str(drawn), str(drawn)),)
        plan = SweepPlan((TowerSpec("bundled"),), data, ("base", "fine", "coarse"), epochs=epochs)
        SweepTable.of(Sweep(plan, folder).run()).write(folder)

    def fitted(folder: Path) -> None:
        adapter = rk.ResiDual(tower, bases.truncate(components=2))
        try:
            rk.fit(
                adapter,
                heads[0],
                cache,
                cache,
                epochs=4,
                batch_size=12,
                checkpoint=folder / "fit.safetensors",
            )
            rk.save_adapter(adapter, folder / "a", head=heads[0])
        finally:
            adapter.detach()

    drawn = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, drawn)
    for number, image in enumerate(drawn_images(10, seed=1)):
        (drawn / "ab"[number % 2]).mkdir(exist_ok=True)
        image.save(drawn / "ab"[number % 2] / f"{number}.png")
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
            lambda f: report(f, 1),
            lambda f: report(f, 0),
            at_once=False,
        ),
        Writer(
            DRAWN_ANEW,
            lambda f: report(f, 1, anew=True),
            lambda f: report(f, 0),
            at_once=False,
            rarely=0.02,
        ),
        Writer(
            "fit with a checkpoint",
            fitted,
            None,
            lambda f: adapter_view(f / "a"),
        ),
        Writer(
            "sweep",
            lambda f: swept(f, 2),
            lambda f: swept(f, 1),
            lambda f: {name: mark for name, mark in visible(f).items() if "/" not in name},
            at_once=False,
        ),
        Writer(
            "export .pt2",
            lambda f: export.write(merged, f / "m.pt2", images[:2], verify=False),
            lambda f: files.write_text(f / "m.pt2", "old"),
        ),
        Writer(
            "export .onnx",
            lambda f: export.write(merged, f / "m.onnx", images[:2], verify=False),
            lambda f: files.write_text(f / "m.onnx", "old"),
        ),
    ]
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
    return replace(found, images=found.images + 1)
