"""docs/MEASURED.md's table: every figure from the committed results, of the newest machine that has them.

    python -m benchmarks.measured            prints the rows
    python -m benchmarks.measured --write    puts them into docs/MEASURED.md

The page's other sentences name no figure that changes with a run.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "MEASURED.md"
MACHINES = {"amd-zen5-avx512bf16": "Zen 5", "amd-epyc": "EPYC"}  # the newest first
LOWRANK = ("lowrank", "lowrank compiled", "folded", "folded compiled")
Row = tuple[str, str, str, str]  # what, figure, machine, command


def newest(name: str, holds: Callable[[dict], object] = bool) -> tuple[dict, str]:
    """The results `name` of the newest machine where they hold what is asked for, and that machine."""
    for folder, machine in MACHINES.items():
        path = RESULTS / folder / name
        if path.is_file():
            found = json.loads(path.read_text())
            if holds(found):
                return found, machine
    raise SystemExit(f"no machine has these results of {name}")


def times(values: list[float]) -> str:
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    said = "times faster" if float(low) > 1 else "times as fast"  # no speed is "0.9 times faster"
    return f"{low} {said}" if low == high else f"{low}–{high} {said}"


def main_job() -> Iterator[Row]:
    command = "python -m benchmarks.main_job --out build/main_job"
    found, machine = newest("main_job.json")
    for tower in found["towers"]:
        rows = tower["rows"]
        yield (
            f"{tower['model']}, batch {tower['batch']}: images per second, decomposed / with ResiDual "
            "attached, relative to plain open_clip",
            " / ".join(f"{rows[name]['times_plain']:.2f}" for name in ("decomposed", "attached, rest zero")),
            machine,
            command,
        )
    bases = found["bases"]
    yield (
        f"bases of {bases['heads']} heads from {bases['rows']:,} images, per head, against one SVD of N × D",
        f"{bases['ratio']:.0f} times faster",
        machine,
        command,
    )


def fit() -> Iterator[Row]:
    command = "python -m benchmarks.bench_fit --out build/fit"
    found, machine = newest("fit.json", lambda found: "steps" in found)
    rows = found["steps"]["rows"]
    cached, tower, ready = (
        rows[name]["seconds_a_step"]
        for name in ("cached", "tower in the loop, textbook", "ready units, textbook")
    )
    yield (
        "ViT-B-32 with random weights, energy 0.90 (6,156 components), N = 64: a fit step on cached units "
        "against the textbook step with the tower in the loop",
        f"{tower / cached:.0f} times faster ({1e3 * cached:.0f} ms / {tower:.1f} s)",
        machine,
        command,
    )
    yield (
        "the same against the textbook step on ready-made units",
        f"{ready / cached:.1f} times faster ({1e3 * cached:.0f} ms / {1e3 * ready:.0f} ms)",
        machine,
        command,
    )
    yield (
        "30 epochs of 10,000 cached images, validated after each",
        f"{found['fit']['seconds']:.0f} s",
        machine,
        command,
    )


def analysis() -> Iterator[Row]:
    found, machine = newest("analysis.json")
    command = found["command"].split(" --out")[0] + " --out build/analysis"
    whole, large, two = found["whole"], found["two_nn_large"], found["two_nn"]
    yield (
        f"`analyze`, every table: 12 × 12 heads, {whole['images']:,} images, {whole['classes']} classes, "
        "from a cache",
        f"{whole['seconds']:.0f} s",
        machine,
        command,
    )
    ratios = [
        two["rows"][name]["times_ours"]
        for name in ("cdist + topk, D outputs, float64", "scikit-learn, D outputs", "cdist + topk, D outputs")
    ]
    yield (
        f"TwoNN of one head, {two['points']:,} points, against the D outputs in float64 (all distances) / in "
        "scikit-learn / in float32 by products (inexact)",
        " / ".join(f"{one:.1f}" for one in ratios) + " times faster",
        machine,
        command,
    )
    yield (
        f"TwoNN of one head, {large['points']:,} points",
        f"{large['seconds']:.1f} s, {large['peak_bytes'] / 1e6:.0f} MB "
        f"(all distances: {large['textbook_bytes'] / 1e9:.0f} GB)",
        machine,
        command,
    )


def report() -> Iterator[Row]:
    for folder, machine in MACHINES.items():
        path = RESULTS / folder / "analysis.json"
        found = json.loads(path.read_text()) if path.is_file() else {}
        if "report" in found:
            one = found["report"]
            yield (
                f"`report` of an adapter of {one['model']}, {one['images']:,} cached images, with pictures",
                f"{one['seconds']:.0f} s",
                machine,
                found["command"].split(" --out")[0] + " --out build/analysis",
            )
            return


def scale() -> Iterator[Row]:
    command = "python -m benchmarks.bench_scale --rounds 3 --folder build/cache --out build/scale"
    found, machine = newest("scale.json", lambda found: found.get("encoding"))
    names = [one["model"] for one in found["encoding"]]
    yield (
        f"encoding to disk, images per second relative to the plain tower: {' / '.join(names)}",
        " / ".join(
            f"{one['rows']['encode, heads, bfloat16']['times_plain']:.2f}" for one in found["encoding"]
        ),
        machine,
        command,
    )
    found, machine = newest("scale.json", lambda found: found.get("reading"))
    rate = {name: row["gigabytes_per_second"] for name, row in found["reading"]["rows"].items()}
    yield (
        "reading a cache of L/14 heads from disk, in order / shuffled, GB/s",
        f"{rate['read in order, cold']:.2f} / {rate['read shuffled, cold']:.2f}",
        machine,
        command,
    )
    yield (
        "the same from memory",
        f"{rate['read in order, warm']:.1f} / {rate['read shuffled, warm']:.2f}",
        machine,
        command,
    )


def counted() -> Iterator[Row]:
    models = json.loads((RESULTS / "counted" / "attention_pooling.json").read_text())["models"]
    added = [100 * (one["apart_flop"] / one["tower_flop"] - 1) for one in models]
    yield (
        "SigLIP, PE-Core, CoCa: FLOP added by exact units of heads, counted",
        f"{min(added):.0f}–{max(added):.0f} %",
        "any",
        "python -m benchmarks.attention_pooling --out build/attention_pooling",
    )


def groups(found: dict) -> list[tuple[dict, dict[str, dict]]]:
    """What was measured together: the row of our compiled backend, and {provider: row}."""
    made: dict[tuple, dict[str, dict]] = {}
    for row in found["rows"]:
        key = tuple(row[n] for n in ("operator", "shape", "components", "N", "dtype", "mode"))
        made.setdefault((*key, row.get("peak_gflops", row["sgemm_gflops"])), {})[row["provider"]] = row
    return [(rows["cpp"], rows) for rows in made.values() if "cpp" in rows]


def against(rows: dict[str, dict], names: tuple[str, ...]) -> list[float]:
    """How many times the compiled backend's time the best of some providers takes; [] where none was run."""
    found = [rows[name]["median_s"] for name in names if name in rows]
    return [min(found) / rows["cpp"]["median_s"]] if found else []


def steps(found: dict, dtype: str = "float32") -> list[tuple[dict, dict[str, dict]]]:
    """The groups of spectral_reweight's forward and dweight in one dtype."""
    wanted = ("spectral_reweight", dtype, "step")
    return [one for one in groups(found) if tuple(one[0][n] for n in ("operator", "dtype", "mode")) == wanted]


def operators() -> Iterator[Row]:
    found, machine = newest("ops.json")
    command = found["machine"]["command"]
    measured = steps(found)
    what = "`spectral_reweight`, forward + dweight, heads of B/16, L/14, H/14, float32"
    for which, some in (
        ("256 and more", [own for own, _ in measured if own["N"] >= 256]),
        ("64", [own for own, _ in measured if own["N"] < 256]),
    ):
        shares = [100 * one["share_of_peak"] for one in some]
        yield (
            f"{what}, N = {which}: share of the multiply-adds that the processor reaches in registers",
            f"{min(shares):.0f}–{max(shares):.0f} %",
            machine,
            command,
        )
    best = [ratio for _, rows in measured for ratio in against(rows, LOWRANK)]
    yield "the same against the best of four plain-torch low-rank forms", times(best), machine, command
    half = [ratio for _, rows in steps(found, "bfloat16") for ratio in against(rows, LOWRANK)]
    yield "the same in bfloat16", times(half), machine, command
    moments = [rows for own, rows in groups(found) if own["operator"] == "unit_moments"]
    ratios = " / ".join(f"{against(rows, ('einsum compiled',))[0]:.1f}" for rows in moments)
    yield (
        "`unit_moments`, N = 1,024, against a compiled einsum: "
        + " / ".join(one["cpp"]["shape"] for one in moments),
        f"{ratios} times faster",
        machine,
        command,
    )
    found, machine = newest(
        "ops.json", lambda found: "textbook" in {row["provider"] for row in found["rows"]}
    )
    theirs = [
        times([one for _, rows in steps(found) for one in against(rows, (name, f"{name} compiled"))])
        for name in ("textbook", "encodings")
    ]
    yield (
        f"{what}, against the best textbook form / the authors' form on ready-made units",
        f"{theirs[0].split(' times')[0]} / {theirs[1]}",
        machine,
        found["machine"]["command"],
    )


def rows() -> list[Row]:
    return [*main_job(), *fit(), *analysis(), *report(), *scale(), *counted(), *operators()]


def table(made: list[Row]) -> str:
    lines = ["| what | figure | measured on | command |", "|---|---|---|---|"]
    lines += [f"| {what} | {figure} | {machine} | `{command}` |" for what, figure, machine, command in made]
    return "\n".join(lines) + "\n"


def page(text: str, made: list[Row]) -> str:
    """The page with these rows in place of its table's."""
    return re.sub(r"(?:^\|.*\n)+", lambda _: table(made), text, count=1, flags=re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="put the table into docs/MEASURED.md")
    made = rows()
    if parser.parse_args().write:
        PAGE.write_text(page(PAGE.read_text(), made))
    print(table(made), end="")


if __name__ == "__main__":
    main()
