"""Draws what a benchmark measured and never measures:
`python -m benchmarks.plot FOLDER` reads ops.json there."""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {
    "cpp": "#c1272d",
    "torch": "#7f7f7f",
    "lowrank": "#0000a7",
    "folded": "#008176",
    "encodings": "#b3831f",
    "textbook": "#5c3a92",
}


def speedups(rows: list[dict]) -> list[tuple[str, list[tuple[str, float]]]]:
    """Per group the providers' times over that of cpp, fastest first."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        kept = "" if row["operator"] == "unit_moments" else f" K {row['components']}"
        what = "moments" if row["operator"] == "unit_moments" else row["mode"]
        short = {"float32": "fp32", "bfloat16": "bf16"}.get(row["dtype"], row["dtype"])
        title = f"{row['shape']}{kept} N {row['N']}\n{what} {short}"
        groups.setdefault((title, row["sgemm_gflops"]), []).append(row)  # measured together, drawn together
    result = []
    for (title, _), members in groups.items():
        own = next((m["median_s"] for m in members if m["provider"] == "cpp"), None)
        if own is not None and "fwd " not in title:
            bars = [(m["provider"], m["median_s"] / own) for m in members]
            result.append((title, sorted(bars, key=lambda bar: bar[1])))
    return result


def draw(record: dict, to: Path) -> None:
    groups = speedups(record["rows"])
    columns = 4
    lines = -(-len(groups) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.6 * columns, 2.5 * lines), squeeze=False)
    for axis, (title, bars) in zip(axes.flat, groups, strict=False):
        names = [name for name, _ in bars]
        values = [value for _, value in bars]
        colours = [COLOURS.get(name.split()[0], "#444444") for name in names]
        axis.barh(names, values, color=colours, alpha=0.9)
        axis.axvline(1.0, color="black", linewidth=0.8)
        if max(values) > 20:
            axis.set_xscale("log")
        for place, value in enumerate(values):
            axis.text(value, place, f" {value:.2f}", va="center", fontsize=7)
        axis.set_xlim(right=max(values) * (3 if max(values) > 20 else 1.18))
        axis.invert_yaxis()
        axis.set_title(title, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    machine = record["machine"]
    figure.suptitle(
        f"Time over that of the compiled backend: {machine['cpu']}, {machine['threads']} threads, "
        f"{machine['instruction_set']}, torch {machine['torch']}",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(to, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws ops.json of a results folder.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    draw(json.loads((folder / "ops.json").read_text()), folder / "ops.png")
    print(folder / "ops.png")


if __name__ == "__main__":
    main()
