"""Files that were damaged, or made to harm: one clear ValueError, and never a wrong answer.

The variable DAMAGED_FILES says how many are tried, 320 by default: ``DAMAGED_FILES=1200 pytest
tests/test_damaged.py``.
"""

import copy
import json
import os
import shutil

import pytest

import residual_kernels as rk
from benchmarks import damaged
from residual_kernels import files, schema

TRIED = int(os.environ.get("DAMAGED_FILES", 320))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder with a file of every kind."""
    root = tmp_path_factory.mktemp("good")
    damaged.make(root)
    return root


def test_damaged_files():
    """A slice of benchmarks/damaged.py."""
    rows = damaged.run(TRIED // len(damaged.kinds()), seed=5)
    faults = [text for row in rows for text in row["faults"]]
    assert not faults, "\n".join(faults[:40])
    assert sum(row["refused"] for row in rows) > TRIED * 0.7
    assert all(row["refused"] > row["tried"] * 0.3 for row in rows), rows


def test_a_reader_that_believes_everything_is_found_out(tmp_path):
    """What the search for faults finds: other numbers in silence,
    and an error that says nothing to a reader."""
    (tmp_path / "good").mkdir()
    place = tmp_path / "good" / "n.json"
    place.write_text(json.dumps({"schema": 1, "numbers": list(range(99))}))
    kind = damaged.FileKind("numbers", "n.json", "", lambda path: json.loads(path.read_bytes())["numbers"])
    found = damaged.tried(kind, 60, 0, tmp_path / "good", tmp_path / "tried")["faults"]
    assert any("other numbers came out" in text for text in found)
    assert any("Error: " in text for text in found)


def test_forms(tmp_path):
    """The reader of JSON itself: what it takes, and how it says what is wrong."""
    form = schema.Count | None
    assert schema.typed(3, form, "f") == 3
    assert schema.typed(None, form, "f") is None
    for value in (-1, True, 1.0, "1", 2**63, [1]):
        with pytest.raises(ValueError, match=r"^f: the whole must be .*whole number"):
            schema.typed(value, form, "f")
    assert schema.typed({"a": [1, 2.5]}, dict[str, tuple[float, ...]], "f") == {"a": (1, 2.5)}
    with pytest.raises(ValueError, match=r"f: a\[1\] must be a finite number, not 'x'"):
        schema.typed({"a": [1, "x"]}, dict[str, list[float]], "f")
    for text in (
        "[" * 100_000,
        "[" * 40 + "]" * 40,
        "1" * 5000,
        "{",
        '{"a": 1',
        "\xff".encode("latin-1"),
        "",
        '{"a": 1, "a": 2}',
        '{"b": {"a": 1, "b": 1, "a": 1}}',
        "9" * 10_000,
    ):
        with pytest.raises(ValueError, match="^here: "):
            schema.parse(text, "here")
    for value in (float("nan"), float("inf"), -float("inf"), 10**400, json.loads("1e999")):
        with pytest.raises(ValueError, match="f: the whole must be a finite number"):
            schema.typed(value, float, "f")
    assert schema.typed(float("-inf"), schema.Measured, "f") == float("-inf")  # a loss that diverged
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="a device or a pipe"):
        schema.read_bytes(tmp_path / "pipe", 10)
    (tmp_path / "long").write_bytes(bytes(11))
    with pytest.raises(ValueError, match="more than 10 bytes"):
        schema.read_bytes(tmp_path / "long", 10)


def test_what_a_manifest_must_not_say(good, tmp_path):
    """Rows that are missing, columns that are missing, files elsewhere: never fewer images in silence."""
    root = good
    manifest = json.loads((root / "cache" / "manifest.json").read_text())

    def case(change, message):
        place = tmp_path / "cache"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(root / "cache", place)
        held = copy.deepcopy(manifest)
        change(held)
        (place / "manifest.json").write_text(json.dumps(held))
        for verify in ("full", "size"):
            with pytest.raises(ValueError, match=message):
                rk.UnitCache.load(place, verify=verify)

    case(lambda m: m["shards"].pop(), "counts 12 images, and its shards 8")
    case(lambda m: (m["shards"].pop(), m.update(images=8)), "which its manifest does not name")
    case(lambda m: m["run"]["columns"].pop("labels"), "do not hold the same columns|not the shard")
    case(
        lambda m: m["shards"][0].update(file="../cache/shard-00000.safetensors"),
        "where shard-00000.safetensors belongs",
    )
    case(lambda m: m["shards"].reverse(), "belongs")
    case(lambda m: m["run"].update(class_names=["a"]), "not the shard")
    case(lambda m: m["run"].update(shard_images=10**12), "a shard does not hold")
    case(lambda m: m["run"]["columns"]["output"].update(shape=[2**50]), "cannot be")


def test_names_are_shown_harmless(tmp_path, capsys):
    from residual_kernels.cli.printing import _Plain

    for stderr in (False, True):
        console = _Plain(stderr=stderr, markup=False, width=200)
        from rich.table import Table

        table = Table("\x1b]0;owned\x07", "b")
        table.add_row("\x1b[2Jx", "\u202egnp.exe [bold]")
        console.print("a \x1b[31mred\x1b[0m name", table)
        with console.status("working on \x1b[2J [red]x"):
            pass
    shown = capsys.readouterr()
    for text in shown:
        assert "\x1b[2J" not in text
        assert "\x1b[31m" not in text
        assert "\x07" not in text
        assert "\u202e" not in text
        assert "\\x1b[31mred" in text
        assert "[bold]" in text
    files.write_csv(tmp_path / "t.csv", [["=cmd()", "+1", "-2.5e3", "@x", "-a", " =b", "plain", 3, "\ud800"]])
    text = (tmp_path / "t.csv").read_text()
    assert text == "'=cmd(),+1,-2.5e3,'@x,'-a,' =b,plain,3,\\ud800\n"
