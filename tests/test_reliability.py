"""The figures of docs/RELIABILITY.md are those of the committed measurements."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "faults"
PAGE = " ".join((ROOT / "docs" / "RELIABILITY.md").read_text(encoding="utf-8").split())


def held(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def stops():
    found = held("faults")
    assert not found["faults"]
    yield f"{found['writers']} writers, {found['stops']:,} stops"
    for row in found["rows"]:
        count = sum(row["stops"].values())
        start = {"new": "from nothing", "over": "over an old result"}[row["start"]]
        share = f"{row['share']:.0%} of its stops" if row["share"] < 1 else "every stop"
        yield f"| {row['writer']}, {start} | {row['calls']} | {count:,} | {share} |"


def interrupted():
    for row in held("interrupted")["rows"]:
        assert not row["faults"]
        assert row["kills"] == 20
        yield f"`{row['command']}`"


def damaged():
    found = held("damaged")
    assert not found["faults"]
    yield f"{found['kinds']} kinds of files, {found['tried']:,} damaged copies"
    yield f"{found['refused']:,} were refused"
    yield f"{found['no effect']:,} gave what the good file gives"
    yield f"{found['another right file']:,} were valid files with other content"


def load():
    found = held("load")
    one, several, switched = found["eight_threads"], found["switched_set"], found["attached_in_between"]
    assert not one["other_outputs"] + several["other_outputs"] + switched["other"] + switched["errors"]
    assert found["forked"]["outcome"] == "same"
    yield f"{one['calls']} calls"
    yield f"{several['switches']:,} switches"
    yield f"{switched['switches']} times"
    tower, adapter = switched["tower"], switched["adapter"]
    assert switched["overlapped"] == switched["switches"]
    yield f"{tower + adapter} outputs: {tower} of the tower, {adapter} of the adapter"
    first, second, third = several["outputs"]
    yield f"its three possible outputs {first}, {second} and {third} times"
    for name in ("many_attachments", "many_calls", "many_fits"):
        yield f"{found[name]['times']:,} times: {found[name]['growth_mib']:+.1f} MiB"
    for name in dict.fromkeys(row["step"] for row in found["scaling"]):
        peaks = [row["peak_mib"] for row in found["scaling"] if row["step"] == name]
        yield f"| {name} | {' | '.join(f'{peak:.0f}' for peak in peaks)} |"


def checks():
    for row in held("op_checks")["rows"]:
        assert row["forward_checks_us"] < 2
        yield f"{row['forward_checks_us']:.2f} us ({row['backend']})"


def fuzzed():
    for name, more in (("fuzz", ""), ("fuzz_emulated", " with every set")):
        found = json.loads((RESULTS.parent / "amd-zen5-avx512bf16" / f"{name}.json").read_text())
        counts = {key: value for key, value in found.items() if ": " in key}
        assert sum(counts.values()) == found["calls"]
        right = sum(count for key, count in counts.items() if key.endswith(": right"))
        assert right == found["calls"] / 2
        yield f"{found['calls']:,} calls{more}"
        yield f"`{name}.json`" if more else f"{right:,} right against float64 and {right:,} with one damaged"


@pytest.mark.parametrize("figures", [stops, interrupted, damaged, load, checks, fuzzed])
def test_figures_on_the_page_are_the_measured_ones(figures):
    missing = [text for text in figures() if text not in PAGE]
    assert not missing, "\n".join(missing)
