"""Draws what bench_peers measured and never measures:
`python -m benchmarks.plot_peers FOLDER` reads its peers.json."""

import argparse
import itertools
import json
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from residual_kernels.figures.style import BLUE, DPI, GREEN, GREY, INK, ORANGE, PALE, SKY, defaults

APART = 0.3  # decades between markers
NEAR = 0.14  # share of the accuracies' range within which markers would touch
STEPS = 40  # rounds of moving
# Colours of the library's figures; blue is this library's, and shapes tell methods of one colour apart.
MARKS = {
    "base": (INK, "D"),
    "linear probe": (GREY, "s"),
    "CLIP-Adapter": (GREY, "^"),
    "Tip-Adapter": (ORANGE, "v"),
    "Tip-Adapter-F": (ORANGE, "^"),
    "LoRA": (GREEN, "s"),
    "fine-tuning": (GREEN, "P"),
    "ResiDual coarse": (SKY, "o"),
    "ResiDual fine": (BLUE, "o"),
    "ResiDual full": (BLUE, "s"),
    "ResiDual output": (SKY, "s"),
    "ResiDual linear": (SKY, "^"),
    "ResiDual stream": (BLUE, "^"),
}
OTHER = (PALE, "X")


def apart(rows: list[dict]) -> list[float]:
    """Where markers stand on the axis of learned numbers:
    those that would touch are moved a little to either side.

    Markers touch when their numbers lie within a third of a decade, and their accuracies within `NEAR`.
    """
    places = [math.log10(max(row["parameters"], 12)) for row in rows]
    reach = NEAR * (max(row["accuracy"] for row in rows) - min(row["accuracy"] for row in rows))
    for _ in range(STEPS):
        for i, j in itertools.combinations(range(len(rows)), 2):
            gap = places[j] - places[i]
            if abs(gap) < APART and abs(rows[i]["accuracy"] - rows[j]["accuracy"]) < reach:
                push = (APART - abs(gap)) / 2 * (1 if gap >= 0 else -1)
                places[i], places[j] = places[i] - push, places[j] + push
    return [10**place for place in places]


def panel(axis: Axes, rows: list[dict]) -> None:
    """Accuracy over the learned numbers; a method that learns none stands at the left edge."""
    for row, across in zip(rows, apart(rows), strict=True):
        colour, marker = MARKS.get(row["method"], OTHER)
        axis.errorbar(
            across,
            row["accuracy"],
            yerr=row["std"],
            fmt=marker,
            markersize=7,
            color=colour,
            capsize=2,
            elinewidth=1,
            markeredgecolor="white",
        )
    base = next((row["accuracy"] for row in rows if row["method"] == "base"), None)
    if base is not None:
        axis.axhline(base, color=MARKS["base"][0], linewidth=0.8, linestyle=":")
    axis.set_xscale("log")
    axis.set_xlim(4, 4e6)
    axis.set_xticks([12, 100, 1e3, 1e4, 1e5, 1e6], ["0", "100", "1k", "10k", "100k", "1M"])
    axis.minorticks_off()
    axis.grid(axis="y", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def draw(result: dict, to: Path) -> None:
    with defaults():
        _draw(result, to)


def _draw(result: dict, to: Path) -> None:
    tasks = list(result["tasks"])
    shots = list(dict.fromkeys(row["shots"] for row in result["rows"]))
    figure, axes = plt.subplots(
        len(tasks),
        len(shots),
        figsize=(3.7 * len(shots), 3.1 * len(tasks) + 1.1),
        squeeze=False,
        sharey="row",
    )
    for line, task in zip(axes, tasks, strict=True):
        for axis, count in zip(line, shots, strict=True):
            panel(axis, [row for row in result["rows"] if row["task"] == task and row["shots"] == count])
            axis.set_title(f"{task}, {count or 'all'} labelled per class", fontsize=9)
        line[0].set_ylabel("test accuracy", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("learned numbers", fontsize=8)
    handles = [
        Line2D(
            [],
            [],
            linestyle="",
            marker=MARKS.get(name, OTHER)[1],
            markersize=7,
            label=name,
            color=MARKS.get(name, OTHER)[0],
        )
        for name in result["methods"]
    ]
    figure.legend(handles=handles, loc="lower center", ncol=5, fontsize=8, frameon=False)
    figure.suptitle(
        "Every method has the same tower, labelled images and validation images; mean and deviation over "
        f"{len(result['seeds'])} seeds; blue: this library; markers that would touch stand side by side",
        fontsize=9,
    )
    lines = -(-len(handles) // 5)
    figure.tight_layout(rect=(0, 0.01 + 0.2 * lines / figure.get_figheight(), 1, 1))
    figure.savefig(to, dpi=DPI)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws peers.json of a results folder.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    draw(json.loads((folder / "peers.json").read_text()), folder / "peers.png")
    print(folder / "peers.png")


if __name__ == "__main__":
    main()
