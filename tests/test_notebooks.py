"""The notebooks run top to bottom, offline, with the bundled model; figures appear; files hold no outputs."""

import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
NAMES = ("start_here", "your_photographs", "what_a_head_knows", "paper_figures")


def book(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def test_every_notebook_is_known_and_linked():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NAMES)
    root = FOLDER.parents[1]
    for page in (root / "README.md", root / "docs" / "NOTEBOOKS.md"):
        text = page.read_text()
        assert all(f"notebooks/{name}.ipynb" in text for name in NAMES), page


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_clean_and_changes_model_by_one_line(name):
    cells = [cell for cell in book(name).cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
    assert "%pip install" in cells[0].source
    assert [cell.source.count("load_model(") for cell in cells] == [0, 2, *[0] * (len(cells) - 2)]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(name, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parents[1]))
    ran = book(name)
    client = nbclient.NotebookClient(
        ran, timeout=300, kernel_name="", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.km = client.create_kernel_manager()
    client.km.kernel_spec.argv[0] = sys.executable  # the tests' own, whatever kernels are installed
    client.execute()
    outputs = [output for cell in ran.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [one for one in outputs if one.output_type == "error"]
    assert any("image/png" in one.get("data", {}) for one in outputs)
    warned = "".join(one.text for one in outputs if one.output_type == "stream" and one.name == "stderr")
    assert "residual_kernels" not in warned, warned


def test_a_notebook_that_fails_is_noticed(tmp_path):
    ran = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    client = nbclient.NotebookClient(ran, timeout=60)
    client.km = client.create_kernel_manager()
    client.km.kernel_spec.argv[0] = sys.executable
    with pytest.raises(nbclient.exceptions.CellExecutionError):
        client.execute()
