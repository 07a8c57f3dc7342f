"""README's Python blocks run as they stand, in order, in one namespace; its commands exist."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_python_blocks(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 7
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"README block {number + 1}", "exec"), namespace)
    assert "->" in capsys.readouterr().out
    assert (tmp_path / "adapter" / "adapter.json").is_file()
    assert namespace["weight"].grad is not None


def test_commands_and_targets_exist():
    from typer.main import get_command

    from residual_kernels.cli import app

    text = README.read_text()
    named = set(re.findall(r"^residual-kernels (\w+)", text, flags=re.MULTILINE))
    assert named <= set(get_command(app).commands)
    makefile = (README.parent / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", text, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
    assert "make test" in (README.parent / ".ci" / "run").read_text()


def test_paths_exist():
    named = re.findall(
        r"`((?:residual_kernels|tests|benchmarks|examples|docs)/[\w./-]+)`", README.read_text()
    )
    assert named
    for path in named:
        assert (README.parent / path).exists(), path
