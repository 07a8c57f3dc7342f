"""README and docs are true: Python blocks run, commands parse, paths exist,
tables are the committed figures."""

import ast
import json
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = (README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md")))
IN_ORDER = ("START", "GUIDE", "METHODS", "FEW_LABELS", "YOUR_TOWER", "EMBED")  # pages of one namespace


def python_blocks(*pages):
    return [
        (f"{page.name}, block {number}", block)
        for page in pages
        for number, block in enumerate(
            re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL), 1
        )
    ]


def run(blocks):
    namespace = {}
    for name, block in blocks:
        exec(compile(block, name, "exec"), namespace)
    return namespace


def write_photos():
    """Folders of digits, as the pages name a user's photographs."""
    from residual_kernels.demo import DIGITS, digit_images, thirds

    pictures, labels = digit_images()
    train, _, test = thirds(len(pictures))
    for part, rows in (
        ("photos/train", train[:300]),
        ("photos/test", test[:100]),
        ("new-photos", test[100:104]),
    ):
        for row in rows.tolist():
            folder = Path(part) if part == "new-photos" else Path(part, DIGITS[labels[row]])
            folder.mkdir(parents=True, exist_ok=True)
            pictures[row].save(folder / f"{row:04d}.png")


def test_python_blocks_of_the_pages(tmp_path, monkeypatch, capsys):
    blocks = python_blocks(*(DOCS / f"{page}.md" for page in IN_ORDER))
    assert len(blocks) >= 15
    monkeypatch.chdir(tmp_path)
    write_photos()
    namespace = run(blocks)
    assert re.search(r"0\.875 -> 0\.9\d\d", capsys.readouterr().out)  # before is the untouched model
    assert (tmp_path / "adapter" / "adapter.json").is_file()
    assert namespace["weight"].grad is not None


def test_python_blocks_of_the_readme(tmp_path, monkeypatch, capsys):
    """As they stand, but for the model that open_clip would download: the bundled one stands in for it."""
    import open_clip

    import residual_kernels as rk
    from residual_kernels.demo import DIGITS

    model, preprocess, tokenizer = rk.load_bundled()
    monkeypatch.setattr(open_clip, "create_model_and_transforms", lambda *_, **__: (model, None, preprocess))
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda *_: tokenizer)
    monkeypatch.chdir(tmp_path)
    write_photos()
    namespace = run(python_blocks(README))
    assert set(namespace["labels"]) <= set(DIGITS)
    result = namespace["classifier"].result_
    assert result.table[0].name == "base"
    assert result.accuracy >= result.base_accuracy
    assert (tmp_path / "photos-adapter" / "adapter.json").is_file()
    result.adapter.detach()


PROGRAM = re.compile(
    r"(?:^|\s)(?:residual-kernels|python -m (benchmarks\.\w+)|-m residual_kernels\.cli)(?=\s)"
)
VERBS = "analyze|bases|bench|demo|doctor|encode|eval|fit|merge|predict|report|sweep|towers"


def commands():
    """Every call of this project's programs in the pages: (page, line, program, arguments, whole).

    `whole` lines stand in blocks. Those inside a sentence, such as `fit --method auto`, may leave out what is
    required.
    """
    for page in PAGES:
        parts = re.split(r"^```(\w*)\n", page.read_text().replace("\\\n", " "), flags=re.MULTILINE)
        for number, text in enumerate(parts[::2]):
            inside, language = number % 2 == 1, parts[2 * number - 1] if number else ""
            if inside and language:
                continue
            lines = text.splitlines() if inside else re.findall(r"`([^`\n]+)`", text)
            for line in lines:
                line = re.split(r"\s#", line)[0].strip()
                if not inside and re.match(rf"(?:{VERBS}) --", line):
                    line = f"residual-kernels {line}"
                found = PROGRAM.search(line)
                if found is not None:
                    whole = inside or found[1] is not None
                    yield page, line, found[1] or "residual-kernels", shlex.split(line[found.end() :]), whole


COMMANDS = list(commands())


@pytest.mark.parametrize(
    "page, line, program, arguments, whole",
    COMMANDS,
    ids=[f"{one[0].stem}: {one[1][:60]}" for one in COMMANDS],
)
def test_commands_parse(page, line, program, arguments, whole):
    """By the real parsers, without running anything: options exist and take such values,
    required ones are given."""
    parse = parse_ours if program == "residual-kernels" else parse_benchmark
    parse(program, arguments, whole)


def parse_ours(_, arguments, whole):
    from typer.main import get_command

    from residual_kernels.cli import app

    group = get_command(app)
    if not arguments or arguments[0].startswith("--"):
        assert set(arguments) <= {"--version", "--help"}
        return
    command = group.commands[arguments[0]]
    if not whole:
        known = {name for parameter in command.params for name in parameter.opts}
        given = {one for one in arguments[1:] if one.startswith("--")}
        assert given <= known, f"{arguments[0]} has no {', '.join(given - known)}"
        return
    command.make_context(arguments[0], list(arguments[1:]))


def parse_benchmark(module, arguments, whole):
    """By the options in its source: importing benchmarks loads libraries that a page's reader may lack."""
    tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
    options, required = set(), set()
    for call in ast.walk(tree):
        if (
            isinstance(call, ast.Call)
            and isinstance(call.func, ast.Attribute)
            and call.func.attr == "add_argument"
        ):
            names = {one.value for one in call.args if isinstance(one, ast.Constant)}
            options |= names
            if any(key.arg == "required" and getattr(key.value, "value", False) for key in call.keywords):
                required |= names
    given = {one for one in arguments if one.startswith("--")}
    assert given <= options, f"{module} has no {', '.join(given - options)}"
    assert required <= given, f"{module} needs {', '.join(required - given)}"


@pytest.mark.parametrize(
    "line, said",
    [
        ("fit --data a --out b --learning-rate 1", "No such option"),
        ("fit --data a", "Missing"),
        ("fit --data a --out b --method finest", "is not one of"),
    ],
)
def test_a_wrong_command_is_noticed(line, said):
    with pytest.raises(Exception, match=said):
        parse_ours("residual-kernels", shlex.split(line), True)


def test_a_wrong_benchmark_is_noticed():
    with pytest.raises(AssertionError, match="needs --out"):
        parse_benchmark("benchmarks.main_job", [], True)
    with pytest.raises(AssertionError, match="has no --images"):
        parse_benchmark("benchmarks.main_job", ["--out", "x", "--images", "3"], True)


def test_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for target in re.findall(r"^make ([\w-]+)", page.read_text(), flags=re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"{page.name}: make {target}"
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_paths_exist():
    for page in PAGES:
        text = page.read_text()
        for path in re.findall(r"`((?:residual_kernels|tests|benchmarks|examples|docs)/[\w./-]+)`", text):
            assert "NAME" in path or (ROOT / path).exists(), f"{page.name}: {path}"
        for path in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) + re.findall(
            r'src(?:set)?="([^"]+)"', text
        ):
            assert path.startswith("http") or (page.parent / path).exists(), f"{page.name}: {path}"


def test_every_room_is_in_the_table_of_rooms():
    table = (ROOT / "CONTRIBUTING.md").read_text().split("## Rooms", 1)[1].split("## ", 1)[0]
    named = set(re.findall(r"`([\w/.]+)`", table))
    package = ROOT / "residual_kernels"
    rooms = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    rooms |= {path.name for path in package.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert rooms <= named, rooms - named


def test_every_extra_and_every_method_is_in_its_table():
    import residual_kernels as rk

    project = (
        (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    )
    extras = set(re.findall(r"^(\w+) = \[", project, flags=re.MULTILINE))
    named = set(re.findall(r"`(\w+)`", "".join(row[0] for row in rows_of(DOCS / "COMMANDS.md", "## Extras"))))
    assert extras == named
    methods = {row[0].strip("`") for row in rows_of(DOCS / "METHODS.md", "## The methods")}
    assert methods == set(rk.METHODS) - {"base"}


def test_the_sweep_plan_is_one(tmp_path):
    from residual_kernels.experiments.sweep import SweepPlan

    (plan,) = re.findall(r"```yaml\n(.*?)```", (DOCS / "COMMANDS.md").read_text(), flags=re.DOTALL)
    (tmp_path / "plan.yaml").write_text(plan)
    assert len(SweepPlan.read(tmp_path / "plan.yaml").towers) == 2


def rows_of(page, heading):
    """The rows of the table under a heading, cells as text."""
    text = page.read_text().split(heading, 1)[1]
    table = re.search(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def test_the_demo_s_table_is_the_committed_one():
    truth = json.loads((ROOT / "benchmarks/results/amd-epyc/demo.json").read_text())["rows"]
    expected = [
        [row["method"], f"{row['accuracy']:.3f}", f"{row['parameters']:,}", f"{row['seconds']:.1f}"]
        for row in truth
    ]
    assert rows_of(README, "## What to expect") == expected


@pytest.mark.parametrize("page, columns", [("COMPARISON", (1, 2, 3)), ("FEW_LABELS", (1,))])
def test_tables_of_peers_are_the_committed_ones(page, columns):
    text = (ROOT / "benchmarks/results/amd-epyc/peers.md").read_text()
    digits, photographs = (
        {
            cells[0]: cells
            for cells in [
                [c.strip("* ") for c in line.strip("|").split("|")]
                for line in part.splitlines()
                if line.startswith("|")
            ]
        }
        for part in text.split("**photographs**")
    )
    heading = {"COMPARISON": "## With other methods", "FEW_LABELS": "## What to expect"}[page]
    shown = rows_of(DOCS / f"{page}.md", heading)
    assert len(shown) >= 7
    for row in shown:
        of_digits, of_photographs = digits[row[0]], photographs[row[0]]
        for column in columns:
            assert row[column] == of_digits[column].split(" ")[0].strip("*")
        assert row[-1] == of_photographs[columns[-1]].split(" ")[0].strip("*")
        if page == "COMPARISON":
            assert row[4:6] == of_digits[4:6]


def test_the_table_of_the_stream_is_the_committed_one():
    truth = json.loads((ROOT / "benchmarks/results/amd-epyc/stream_digits.json").read_text())
    shown = rows_of(DOCS / "GUIDE.md", "## Inside the tower")
    assert [row[1:] for row in shown] == [
        [str(one["parameters"]), str(one["rate"]), f"{one['validation']:.3f}", f"{one['test']:.3f}"]
        for one in truth
    ]


def test_what_the_readme_says_of_tune_is_the_committed_figure():
    results = "benchmarks/results/amd-zen5-avx512bf16/convex.md"
    table = (ROOT / results).read_text()
    assert f"`{results}`" in README.read_text()
    rows = {
        cells[0]: cells
        for cells in ([c.strip() for c in line.strip("|").split("|")] for line in table.splitlines())
    }
    text = " ".join(README.read_text().split())
    assert f"reaches {rows['digits'][-1]} on the same test images" in text
    assert f"({rows['photographs'][-1]} where the model has {rows['photographs'][5]})" in text
