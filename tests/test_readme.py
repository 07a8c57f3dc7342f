"""Python blocks of README and the guide run as they stand, in one namespace; commands, options and paths exist."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
PAGES = (README, *sorted((README.parent / "docs").glob("*.md")))


def test_python_blocks(tmp_path, monkeypatch, capsys):
    text = README.read_text() + (README.parent / "docs" / "GUIDE.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) >= 15
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"block {number + 1}", "exec"), namespace)
    assert "->" in capsys.readouterr().out
    assert (tmp_path / "adapter" / "adapter.json").is_file()
    assert namespace["weight"].grad is not None


def test_commands_and_targets_exist():
    from typer.main import get_command

    from residual_kernels.cli import app

    commands = get_command(app).commands
    for page in PAGES:
        lines = page.read_text().replace("\\\n", " ").splitlines()
        lines = [re.split(r"\s#", line)[0] for line in lines]
        for line in lines:
            called = re.match(r".*?(?:^residual-kernels|-m residual_kernels\.cli) +(\w+)(.*)", line)
            if called is None:
                continue
            assert called[1] in commands, line
            known = {name for parameter in commands[called[1]].params for name in parameter.opts}
            assert set(re.findall(r"(?<= )--[a-z-]+", called[2])) <= known, line
    makefile = (README.parent / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README.read_text(), flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
    assert "make test" in (README.parent / ".ci" / "run").read_text()


def test_paths_exist():
    for page in PAGES:
        text = page.read_text()
        named = re.findall(r"`((?:residual_kernels|tests|benchmarks|examples|docs)/[\w./-]+)`", text)
        for path in named:
            assert (README.parent / path).exists(), f"{page.name}: {path}"
        for path in re.findall(r"!\[.*?\]\(([^)]+)\)", text):
            assert (page.parent / path).exists(), f"{page.name}: {path}"


def test_the_sweep_plan_is_one(tmp_path):
    from residual_kernels.experiments.sweep import SweepPlan

    (plan,) = re.findall(r"```yaml\n(.*?)```", README.read_text(), flags=re.DOTALL)
    (tmp_path / "plan.yaml").write_text(plan)
    assert len(SweepPlan.read(tmp_path / "plan.yaml").towers) == 2
