"""Draws what the suite measured: `python -m benchmarks.suite.plot benchmarks/results/<device>/suite.json`.

One panel a count. A dot is a method's average gain over the untouched model, its line runs from the worst
task to the best. What lies left of zero is what a user would have regretted.
"""

import argparse
import json
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

from benchmarks.suite.table import AUTO, BASE, ORDER, cells, labels_per_class
from residual_kernels.figures.style import BLUE, DPI, GREY, INK, ORANGE, PALE, SKY, styled

OURS = (AUTO, "anchored", "anchored + class vectors")


@styled
def draw(result: dict) -> Figure:
    found, tasks = cells(result["rows"]), list(result["tasks"])
    counts = sorted({shots for _, shots, _ in found}, key=lambda n: (n is None, n))
    names = [name for name in ORDER if name != BASE and any(key[2] == name for key in found)][::-1]
    figure = Figure(figsize=(3.1 * len(counts) + 1.6, 0.36 * len(names) + 1.5), layout="constrained")
    panels = figure.subplots(1, len(counts), sharey=True)
    for panel, n in zip(panels, counts, strict=True):
        panel.axvline(0, color=INK, linewidth=0.8)
        for height, name in enumerate(names):
            own = [found[task, n, name] for task in tasks if (task, n, name) in found]
            if len(own) < len(tasks):
                continue
            gains = [100 * cell.gain for cell in own]
            colour = BLUE if name == AUTO else SKY if name in OURS else GREY
            panel.plot([min(gains), max(gains)], [height, height], color=PALE, linewidth=2, zorder=1)
            below = [100 * cell.gain for cell in own if cell.below]
            panel.scatter(below, [height] * len(below), marker="|", color=ORANGE, s=40, zorder=2)
            panel.scatter(statistics.fmean(gains), height, color=colour, s=42, zorder=3)
        panel.set_title(labels_per_class(n))
        panel.set_xlabel("points above the model")
        panel.grid(axis="x")
        panel.grid(visible=False, axis="y")
    panels[0].set_yticks(range(len(names)), names)
    figure.suptitle(
        f"{len(tasks)} tasks: average gain (dot), worst to best task (line), tasks below the model by more "
        "than one error (orange)",
        fontsize=10,
        x=0.01,
        ha="left",
    )
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws a suite's results beside them.")
    parser.add_argument("results", type=Path)
    path = parser.parse_args().results
    draw(json.loads(path.read_text())).savefig(path.with_suffix(".png"), dpi=DPI)
    print(path.with_suffix(".png"))


if __name__ == "__main__":
    main()
