"""What the distributions hold: the sdist all sources,
the wheel the package and its extension and nothing else."""

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytest.importorskip("build")
pytest.importorskip("setuptools")
pytest.importorskip("pybind11")


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The sdist of this tree and the wheel built from that sdist, as paths."""
    out = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "build",
            "--no-isolation",
            "--skip-dependency-check",
            "--outdir",
            str(out),
            str(ROOT),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel, done.stdout + done.stderr


def table_of(text, heading):
    """The lines of a YAML list, by the key that it belongs to."""
    return re.findall(
        r"^ +- (.+)$", re.search(rf"^ *{heading}:\n((?: +- .+\n)+)", text, flags=re.M)[1], flags=re.M
    )


def test_the_conda_recipe_has_the_requirements_of_the_package():
    project = (ROOT / "pyproject.toml").read_text()
    wanted = re.search(r"^dependencies = \[\n(.*?)^\]", project, flags=re.M | re.S)[1]
    wanted = {line.strip().strip('",') for line in wanted.splitlines()}
    python = re.search(r'^requires-python = "(.+)"', project, flags=re.M)[1]
    conda = {"pytorch": "torch", "open-clip-torch": "open_clip_torch"}
    recipe = (ROOT / "packaging" / "conda" / "recipe.yaml").read_text()
    run = {
        conda.get(name, name) + bound
        for name, _, bound in (x.partition(" ") for x in table_of(recipe, "run"))
    }
    assert run == wanted | {f"python{python}"}


def test_one_version_everywhere():
    from residual_kernels import __version__

    dated = re.findall(
        r"^## \[?(\d[\w.]*)\]? - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), flags=re.M
    )
    citation = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), flags=re.M)[1]
    recipe = re.search(
        r'^  version: "(.+)"$', (ROOT / "packaging/conda/recipe.yaml").read_text(), flags=re.M
    )[1]
    assert {dated[0], citation, recipe} == {__version__}


def test_sdist_holds_every_source(distributions):
    with tarfile.open(distributions[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()}
    sources |= {str(path.relative_to(ROOT)) for path in (ROOT / "residual_kernels").rglob("*.py")}
    assert sources <= names, sorted(sources - names)
    assert {"setup.py", "pyproject.toml"} <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]


def test_wheel_holds_the_package_and_the_extension(distributions):
    _, wheel, log = distributions
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        extension = [name for name in names if name.startswith("residual_kernels/_cpp.")]
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert "residual_kernels/ops/cpp_backend.py" in names
    assert "residual_kernels/py.typed" in names
    packaged = ("residual_kernels/", "residual_kernels-")
    assert not [name for name in names if not name.startswith(packaged)], (
        "only the package itself is installed"
    )
    assert not [name for name in names if name.endswith((".cpp", ".h"))]
    assert "Name: residual-kernels" in metadata
    if not extension:  # no compiler here: the wheel is pure, and the build has said so
        assert "the CPU extension was not built" in log
        return
    assert len(extension) == 1
    assert "any" not in wheel.name.rpartition("-")[2]


def test_without_a_compiler_it_installs_as_pure_python(tmp_path):
    done = subprocess.run(
        [sys.executable, "setup.py", "build", "--build-base", str(tmp_path)],
        cwd=ROOT,
        env={"PATH": "/nonexistent", "CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("residual_kernels:")]
    assert "not built" in line
    assert "torch backend" in line
    assert list(tmp_path.rglob("cpp_backend.py"))
    assert not list(tmp_path.rglob("*.so"))


def test_the_wheel_installs_and_its_extension_loads_without_torch(distributions, tmp_path):
    install = ["install", "-q", "--no-deps", "--no-index", "--target", str(tmp_path), str(distributions[1])]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True, capture_output=True)
    if not list(tmp_path.glob("residual_kernels/_cpp.*")):
        return  # no compiler here: the wheel is pure, as the test above has seen
    (tmp_path / "load.py").write_text(
        "import sys\n"
        "import residual_kernels._cpp as cpp\n"
        "assert 'torch' not in sys.modules\n"
        "print(cpp.__file__, cpp.instruction_sets())\n"
    )
    done = subprocess.run([sys.executable, tmp_path / "load.py"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(tmp_path))
    assert "'portable': None" in done.stdout
