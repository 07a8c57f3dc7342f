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

OURS = "ResiDual"
# Decades between markers; share of the accuracies' range; rounds of moving.
APART, NEAR, STEPS = (
    0.3,
    0.09,
    40,
)
COLOURS = {
    "base": "#444444",
    "linear probe": "#7f7f7f",
    "CLIP-Adapter": "#0000a7",
    "Tip-Adapter": "#3b8bc2",
    "Tip-Adapter-F": "#1b4f72",
    "LoRA": "#b3831f",
    "fine-tuning": "#5c3a92",
    "ResiDual coarse": "#e8a09a",
    "ResiDual fine": "#d9534f",
    "ResiDual full": "#a31621",
    "ResiDual output": "#e07b39",
    "ResiDual linear": "#7a4b3a",
    "ResiDual stream": "#00a87a",
}


def apart(rows: list[dict]) -> list[float]:
    """Where markers stand on the axis of numbers trained:
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
    """Accuracy over the numbers trained; nothing trained stands at the left edge."""
    for row, across in zip(rows, apart(rows), strict=True):
        ours = row["method"].startswith(OURS)
        axis.errorbar(
            across,
            row["accuracy"],
            yerr=row["std"],
            fmt="o" if ours else "s",
            markersize=7,
            color=COLOURS.get(row["method"], "#999999"),
            capsize=2,
            elinewidth=1,
            markeredgecolor="white",
        )
    base = next((row["accuracy"] for row in rows if row["method"] == "base"), None)
    if base is not None:
        axis.axhline(base, color=COLOURS["base"], linewidth=0.8, linestyle=":")
    axis.set_xscale("log")
    axis.set_xlim(4, 4e6)
    axis.set_xticks([12, 100, 1e3, 1e4, 1e5, 1e6], ["0", "100", "1k", "10k", "100k", "1M"])
    axis.minorticks_off()
    axis.grid(axis="y", linewidth=0.4, alpha=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def draw(result: dict, to: Path) -> None:
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
            axis.set_title(f"{task}, {count or 'all'} labelled a class", fontsize=9)
        line[0].set_ylabel("accuracy on the test part", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("learned numbers", fontsize=8)
    handles = [
        Line2D(
            [],
            [],
            linestyle="",
            marker="o" if name.startswith(OURS) else "s",
            markersize=7,
            label=name,
            color=COLOURS.get(name, "#999999"),
        )
        for name in result["methods"]
    ]
    figure.legend(handles=handles, loc="lower center", ncol=5, fontsize=8, frameon=False)
    figure.suptitle(
        "The same tower, labelled images and validation part for everyone; mean and deviation over "
        f"{len(result['seeds'])} seeds; circles: this library; markers that would touch stand side by side",
        fontsize=9,
    )
    lines = -(-len(handles) // 5)
    figure.tight_layout(rect=(0, 0.01 + 0.2 * lines / figure.get_figheight(), 1, 1))
    figure.savefig(to, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws peers.json of a results folder.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    draw(json.loads((folder / "peers.json").read_text()), folder / "peers.png")
    print(folder / "peers.png")


if __name__ == "__main__":
    main()
