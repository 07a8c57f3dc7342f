"""Every figure of docs/MEASURED.md, and those of other pages, are those of the committed results,
within rounding."""

import json
import re
from pathlib import Path

import pytest
from test_readme import DOCS, ROOT, rows_of

from benchmarks import measured
from benchmarks import scale as scale_tables

RESULTS = ROOT / "benchmarks" / "results"


def result(name):
    return json.loads((RESULTS / name).read_text())


ROWS = [list(row[:3]) + [f"`{row[3]}`"] for row in measured.rows()]


@pytest.mark.parametrize("place", range(len(ROWS)))
def test_a_measured_figure_is_the_committed_one(place):
    shown = rows_of(DOCS / "MEASURED.md", "# Measured")
    assert len(shown) == len(ROWS)
    assert shown[place] == ROWS[place], "python -m benchmarks.measured --write"


def test_the_newest_machine_that_has_a_figure_gives_it(tmp_path, monkeypatch):
    for folder, found in (("new", {"a": 1}), ("old", {"a": 2, "b": 3})):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.json").write_text(json.dumps(found))
    monkeypatch.setattr(measured, "RESULTS", tmp_path)
    monkeypatch.setattr(measured, "MACHINES", {"new": "New", "old": "Old"})
    assert measured.newest("x.json") == ({"a": 1}, "New")
    assert measured.newest("x.json", lambda found: "b" in found) == ({"a": 2, "b": 3}, "Old")
    with pytest.raises(SystemExit, match="no machine has these results of y.json"):
        measured.newest("y.json")


def test_a_page_gets_the_rows_and_keeps_its_sentences():
    made = [("speed", "2 times faster", "New", "python -m x"), ("size", "3 MB", "Old", "python -m y")]
    before = "# Measured\n\nWords.\n\n| what | figure |\n|---|---|\n| old | row |\n\nMore words.\n"
    after = measured.page(before, made)
    assert measured.table(made) in after
    assert "old" not in after
    assert after.startswith("# Measured\n\nWords.\n\n|")
    assert after.endswith("|\n\nMore words.\n")
    assert measured.page(after, made) == after


def test_numbers_in_sentences_are_those_of_the_table():
    text = " ".join((DOCS / "MEASURED.md").read_text().split())
    cached, ready = (row[1] for row in measured.fit() if "step" in row[0])
    assert f'"{cached.split(" (")[0]}"' in text
    assert f"the gain is {ready.split(' faster')[0]}" in text


def test_the_table_of_attention_pooling_is_the_counted_one():
    shown = rows_of(DOCS / "YOUR_TOWER.md", "## Towers that pool by attention")
    for row, one in zip(shown, result("counted/attention_pooling.json")["models"], strict=True):
        assert row == [
            one["model"],
            f"{one['tower_flop'] / 1e9:.1f}",
            f"+{100 * (one['apart_flop'] / one['tower_flop'] - 1):.0f} %",
            f"{one['z_bytes'] / 1e3:,.0f} kB",
            f"{one['short_z_bytes'] / 1e3:,.0f} kB",
            f"{one['operator_flop'] / 1e6:,.0f}",
            f"{one['short_operator_flop'] / 1e6:,.0f}",
            f"{one['moment_bytes'] / 1e9:.2f} GB",
            f"{one['short_moment_bytes'] / 1e6:,.0f} MB",
        ]


def test_what_the_comparison_says_in_words_is_in_its_table():
    rows = {row[0]: row for row in rows_of(DOCS / "COMPARISON.md", "## With other methods")}
    text = " ".join((DOCS / "COMPARISON.md").read_text().split())
    full, lora = rows["ResiDual full"], rows["LoRA"]
    behind = 100 * (float(lora[3]) - float(full[3]))
    assert f"within {behind:.1f} points" in text

    def number(cell):
        return float(cell.replace(",", ""))

    assert round(number(lora[4]) / number(full[4])) == 45
    assert "a 45th of the numbers" in text
    assert round(number(lora[5]) / number(full[5])) == 9
    assert "a ninth of the time" in text
    coarse, fine = float(rows["ResiDual coarse"][6]), float(rows["ResiDual fine"][6])
    assert f"`coarse` loses most ({coarse:.3f}), then `fine` ({fine:.3f})" in text
    assert sorted(rows, key=lambda name: float(rows[name][6]))[:2] == ["ResiDual coarse", "ResiDual fine"]
    assert max(float(row[6]) for row in rows.values()) == float(rows["base"][6])
    assert (
        max(rows, key=lambda name: float(rows[name][2]))
        == max(rows, key=lambda name: float(rows[name][3]))
        == "LoRA"
    )


def test_what_the_faq_says_of_labels_is_in_the_table():
    full = next(
        row for row in rows_of(DOCS / "COMPARISON.md", "## With other methods") if row[0] == "ResiDual full"
    )
    text = " ".join((DOCS / "FAQ.md").read_text().split())
    assert f"`full` rises from {full[2]} with 16 to {full[3]} with all 599" in text


def test_the_base_of_every_page_is_one_of_the_measured():
    """On the digits 0.875 with the demo's prompts and 0.870 with the default one; on photographs 0.591."""
    base = {row["method"]: row["accuracy"] for row in result("amd-epyc/demo.json")["rows"]}["base"]
    tasks = {row["task"]: row["base_accuracy"] for row in result("amd-zen5-avx512bf16/convex.json")["tasks"]}
    assert f"{base:.3f}" == f"{tasks['digits']:.3f}" == "0.875"
    assert f"{tasks['photographs']:.3f}" == "0.591"
    pages = [*DOCS.glob("*.md"), ROOT / "README.md"]
    said = re.compile(r"untouched model reads (?:right )?(\d?\.\d+|\d+\.\d+%)")
    allowed = {"0.875", "87.5%", "0.870", "87.0%", "0.591", "58.8%"}
    for page in pages:
        found = set(said.findall(" ".join(Path(page).read_text().split())))
        assert found <= allowed, (page.name, found - allowed)


def test_what_the_check_costs_is_measured():
    text = " ".join((DOCS / "TOWERS_IN_USE.md").read_text().split())
    small, large = result("amd-zen5-avx512bf16/agreement.json")
    assert (small["model"], large["model"]) == ("bundled", "ViT-B-32")
    assert f"{large['check_s']:.1f} s for ViT-B-32, {100 * large['share']:.2f} % of an encode" in text
    assert f"{1000 * small['check_s']:.0f} ms for the bundled model, {100 * small['share']:.2f} %" in text
    assert f"takes {small['unchanged_us']:.0f} µs a forward of the bundled model" in text
    assert f"and {large['unchanged_us']:.0f} µs of ViT-B-32" in text
    one_image = large["encode_1000_s"] / 1000
    assert f"{100 * large['unchanged_us'] * 1e-6 / one_image:.2f} % of one image" in text
    assert max(small["share"], large["share"]) < 0.02


def test_the_tables_of_scale_are_what_its_benchmark_computes():
    text = (DOCS / "SCALE.md").read_text()
    made = text
    for name, lines in scale_tables.tables().items():
        made = scale_tables.put_in(made, name, lines)
    assert made == text
