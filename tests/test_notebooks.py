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


def run(ran, tmp_path, monkeypatch):
    """Runs a notebook in a folder of its own, offline, and returns what its cells gave."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parents[1]))
    client = nbclient.NotebookClient(
        ran, timeout=300, kernel_name="", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.km = client.create_kernel_manager()
    client.km.kernel_spec.argv[0] = sys.executable  # the tests' own, whatever kernels are installed
    client.execute()
    outputs = [output for cell in ran.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [one for one in outputs if one.output_type == "error"]
    return outputs


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(name, tmp_path, monkeypatch):
    outputs = run(book(name), tmp_path, monkeypatch)
    assert any("image/png" in one.get("data", {}) for one in outputs)
    warned = "".join(one.text for one in outputs if one.output_type == "stream" and one.name == "stderr")
    assert "residual_kernels" not in warned, warned


# What the comment of the second cell names, with random weights. ViT-B-16 itself takes minutes on a
# processor, so a small configuration of the same classes takes its name.
SMALL = """
import json, pathlib, open_clip
pathlib.Path("ViT-B-16.json").write_text(json.dumps({
    "embed_dim": 48,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}))
open_clip.add_model_config("ViT-B-16.json")
"""


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_with_the_other_line(name, tmp_path, monkeypatch):
    ran = book(name)
    (cell,) = (cell for cell in ran.cells if "load_model(" in cell.source)
    other = cell.source.partition("# or ")[2].splitlines()[0]
    assert other == 'load_model("ViT-B-16", "openai"), and nothing else changes'
    line = other.partition(", and")[0].replace("openai", "none")
    cell.source = (
        f"{SMALL}\nfrom residual_kernels.data.models import load_model\nmodel, preprocess, tokenizer = {line}"
    )
    run(ran, tmp_path, monkeypatch)


def test_the_other_line_loads_the_model_of_that_name():
    from residual_kernels.data.models import load_model

    model, preprocess, tokenizer = load_model("ViT-B-16", "none")
    assert (model.visual.image_size, model.visual.output_dim) == ((224, 224), 512)
    assert tokenizer(["a photo"]).shape == (1, 77)
    assert not model.training
    assert preprocess is not None


def test_a_notebook_that_fails_is_noticed(tmp_path):
    ran = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    client = nbclient.NotebookClient(ran, timeout=60)
    client.km = client.create_kernel_manager()
    client.km.kernel_spec.argv[0] = sys.executable
    with pytest.raises(nbclient.exceptions.CellExecutionError):
        client.execute()
