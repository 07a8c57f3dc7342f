"""Device time by CUDA-graph replay, and the table of a GPU benchmark: rows, roofs,
aims beside their outcomes."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

BUDGET = 450.0  # seconds of a part
REPLAYS = 15
Work = Callable[[], object]


class Bench:
    """Collects rows; knows the device, the clock and how much time is left."""

    def __init__(self, folder: Path, part: str, tiny: bool) -> None:
        self.folder, self.part, self.tiny = folder, part, tiny
        self.device = torch.device("cpu" if tiny else "cuda")
        self.start = time.monotonic()
        self.rows: list[dict] = []
        self.roofs: dict[str, float | None] = {}
        self.aims: list[dict] = []
        folder.mkdir(parents=True, exist_ok=True)

    def late(self) -> bool:
        return time.monotonic() - self.start > BUDGET

    def seconds(self, calls: list[Work]) -> float | None:
        """Median device seconds of one call; None in a tiny run, where nothing is timed."""
        if self.tiny:
            for call in calls[:2]:
                call()
            return None
        turns = max(len(calls), 8)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            # Compiles, packs, warms; nothing may do so while a graph is captured.
            for call in [
                *calls,
                *calls[:2],
            ]:
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for turn in range(turns):
                calls[turn % len(calls)]()
        for _ in range(3):
            graph.replay()
        times = []
        for _ in range(REPLAYS):
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before.record()
            graph.replay()
            after.record()
            after.synchronize()
            times.append(before.elapsed_time(after) / 1e3 / turns)
        return statistics.median(times)

    def row(self, provider: str, make: Callable[[], list[Work]], **fields: Any) -> float | None:
        """Times the calls that `make` prepares; notes why where it cannot."""
        note, seconds = "", None
        if self.late():
            note = "time ran out"
        else:
            try:
                seconds = self.seconds(make())
            except torch.cuda.OutOfMemoryError:
                note = "does not fit"
        if not self.tiny:
            torch.cuda.empty_cache()
        self.add(provider, seconds, note, **fields)
        return seconds

    def add(self, provider: str, seconds: float | None, note: str = "", **fields: Any) -> None:
        """A row of the table, printed and saved."""
        self.rows.append({"provider": provider, "seconds": seconds, "note": note, **fields})
        shown = note or ("not timed" if seconds is None else f"{1e6 * seconds:9.1f} us")
        words = [str(value) for key, value in fields.items() if key != "roof"]
        print("  ".join([*words, provider, shown]), flush=True)
        self.save()

    def wall(self, provider: str, call: Work, **fields: Any) -> float | None:
        """Wall seconds of an eager call among many, the device waited for once at the end."""
        seconds = None
        call()
        if not self.tiny:
            rounds = []
            for _ in range(REPLAYS):
                torch.cuda.synchronize()
                before = time.perf_counter()
                for _ in range(50):
                    call()
                torch.cuda.synchronize()
                rounds.append((time.perf_counter() - before) / 50)
            seconds = statistics.median(rounds)
        self.add(provider, seconds, **fields)
        return seconds

    def find(self, provider: str, **fields: Any) -> float | None:
        for row in self.rows:
            if row["provider"] == provider and all(row.get(key) == value for key, value in fields.items()):
                return row["seconds"]
        return None

    def aim(self, text: str, outcome: float | None, wanted: float, *, at_least: bool) -> None:
        """An aim beside its outcome; no outcome, no verdict."""
        verdict = "not measured"
        if outcome is not None:
            verdict = "met" if (outcome >= wanted) == at_least else "MISSED"
        self.aims.append({"aim": text, "wanted": wanted, "outcome": outcome, "verdict": verdict})
        shown = "-" if outcome is None else f"{outcome:.3g}"
        print(f"{verdict:12s} {text}: {shown} (aim {'>=' if at_least else '<='} {wanted:.3g})", flush=True)
        self.save()

    def save(self) -> None:
        record = {
            "part": self.part,
            "tiny": self.tiny,
            "device": "none: interpreter, nothing timed" if self.tiny else torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "roofs": self.roofs,
            "rows": self.rows,
            "aims": self.aims,
        }
        (self.folder / f"{self.part}.json").write_text(json.dumps(record, indent=1) + "\n")
        # A part that is cut off leaves what it has.
        (self.folder / f"{self.part}.md").write_text(self.markdown())

    def markdown(self) -> str:
        lines = [
            "| operator | shape | K | N | dtype | mode | provider | us | of roof |",
            "|---|---|---|---:|---|---|---|---:|---:|",
        ]
        for row in self.rows:
            seconds, roof = row["seconds"], row.get("roof")
            told = row["note"] or ("not timed" if seconds is None else f"{1e6 * seconds:.1f}")
            share = f"{roof / seconds:.0%}" if roof and seconds else "-"
            cells = [
                row.get(key, "-")
                for key in ("operator", "shape", "components", "N", "dtype", "mode", "provider")
            ]
            lines.append("| " + " | ".join(map(str, [*cells, told, share])) + " |")
        lines += ["", "| aim | wanted | outcome | verdict |", "|---|---:|---:|---|"]
        for aim in self.aims:
            outcome = "-" if aim["outcome"] is None else f"{aim['outcome']:.3g}"
            lines.append(f"| {aim['aim']} | {aim['wanted']:.3g} | {outcome} | {aim['verdict']} |")
        return "\n".join(lines) + "\n"

    def finish(self) -> None:
        self.save()
