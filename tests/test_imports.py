"""What importing costs: the package loads torch, numpy and safetensors,
and nothing heavy before it is used."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import residual_kernels as rk
from residual_kernels import extras

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LIGHT = {"torch", "numpy", "safetensors", "residual_kernels", "filelock"}
HEAVY = (
    "matplotlib",
    "sklearn",
    "scipy",
    "open_clip",
    "timm",
    "torchvision",
    "huggingface_hub",
    "transformers",
    "typer",
    "rich",
    "yaml",
    "plotly",
    "jinja2",
    "PIL",
    "triton",
    "sympy",
    "torch._dynamo",
    "torch._inductor",
)


def loaded_by(code: str) -> set[str]:
    """Names of the modules that `code` loads in a fresh Python, beyond those of `import torch, numpy`."""
    program = (
        "import json, sys, torch, numpy\n"
        "before = set(sys.modules)\n"
        f"{code}\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_bare_import_loads_nothing_but_the_package():
    loaded = {name.partition(".")[0] for name in loaded_by("import residual_kernels")}
    assert loaded - set(sys.stdlib_module_names) == {"residual_kernels"}


@pytest.mark.parametrize("names", [tuple(n for n in rk.__all__ if n not in ("pull_adapter", "push_adapter"))])
def test_public_names_load_nothing_heavy(names):
    loaded = loaded_by("import residual_kernels as rk\n" + "\n".join(f"rk.{name}" for name in names))
    assert "residual_kernels.adapters.residual" in loaded  # the names did load their rooms
    assert not [name for name in HEAVY if name in loaded]


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'ResiDuals'"):
        _ = rk.ResiDuals


def test_a_missing_library_is_named_with_its_extra():
    with pytest.raises(
        ImportError, match=r"drawing needs the library `no_such_library`; .*residual-kernels\[plot\]"
    ):
        extras.need("no_such_library.part", "plot", "drawing")


def test_every_extra_that_an_error_names_is_declared():
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert set(extras.EXTRAS) <= set(project["optional-dependencies"])
