"""The accuracies of a sweep in the layout of the paper's main table, beside what the paper published.

    python examples/paper/table.py paper          # the folder given to `residual-kernels sweep --out`

`published.json` holds what we know of the paper's numbers: its range of averages. Whoever has the paper's
table writes single cells into "cells", as {"tower": {"method": {"data set": accuracy}}}; they then stand in
brackets.
"""

import argparse
import csv
import json
from pathlib import Path

HERE = Path(__file__).resolve().parent


def rows_of(folder: Path) -> tuple[list[str], list[dict]]:
    """Data sets, and the rows of a sweep's table.csv."""
    with (folder / "table.csv").open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        fields = list(reader.fieldnames or [])
        found = list(reader)
    return fields[fields.index("learned numbers") + 1 : fields.index("average") + 1], found


def layout(columns: list[str], rows: list[dict], published: dict) -> str:
    """A Markdown table: a block of methods for each tower; published accuracies in brackets."""
    cells = published["cells"]
    lines = [
        "| tower | method | learned | " + " | ".join(columns) + " |",
        "|---|---|---:|" + "---:|" * len(columns),
    ]
    tower = None
    for row in rows:
        texts = []
        for name in columns:
            known = cells.get(row["tower"], {}).get(row["method"], {}).get(name)
            texts.append(f"{float(row[name]):.3f}" + ("" if known is None else f" [{known:.3f}]"))
        shown = row["tower"] if row["tower"] != tower else ""
        tower = row["tower"]
        lines.append(
            f"| {shown} | {row['method']} | {int(row['learned numbers']):,} | " + " | ".join(texts) + " |"
        )
    low, high = published["average accuracy of ResiDual"]
    few, many = published["numbers learned"]
    lines += [
        "",
        f"Published ({published['source']}): ResiDual reaches an average accuracy of {low:.2f} to "
        f"{high:.2f} with {few:,} to {many:,} learned numbers, equal to full fine-tuning of about "
        f"{published['numbers learned by full fine-tuning']:,}. "
        + ("In brackets: published cells." if cells else "Its single cells are not in published.json."),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="what --out of the sweep named")
    published = json.loads((HERE / "published.json").read_text(encoding="utf-8"))
    print(layout(*rows_of(parser.parse_args().folder), published))


if __name__ == "__main__":
    main()
