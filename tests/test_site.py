"""The documentation site: every public name has an entry in its reference."""

import re
from pathlib import Path

import pytest

import residual_kernels as rk

PAGES = Path(__file__).parent.parent / "docs" / "reference"
MODULES = ("analysis", "export", "ops")  # public, and described by the entries of their own names
ENTRIES = set(re.findall(r"^::: ([\w.]+)$", "\n".join(p.read_text() for p in PAGES.glob("*.md")), re.M))


@pytest.mark.parametrize("name", [name for name in rk.__all__ if name not in MODULES])
def test_every_public_name_is_in_the_reference(name):
    assert name in {entry.rpartition(".")[2] for entry in ENTRIES}


@pytest.mark.parametrize("module", ["analysis", "ops"])
def test_every_name_of_a_public_module_is_in_the_reference(module):
    found = {entry.rpartition(".")[2] for entry in ENTRIES if f".{module}." in entry}
    assert {name for name in getattr(rk, module).__all__ if name != "backends"} <= found


@pytest.mark.parametrize("picture", ["amd-epyc/peers.png", "amd-zen5-avx512bf16/suite.png"])
def test_a_picture_of_results_is_the_committed_one(picture):
    committed = PAGES.parents[1] / "benchmarks" / "results" / picture
    assert (PAGES.parent / "gallery" / committed.name).read_bytes() == committed.read_bytes()


def test_every_picture_is_on_a_page():
    pages = "\n".join(
        page.read_text() for page in [*PAGES.parent.glob("*.md"), PAGES.parents[1] / "README.md"]
    )
    for picture in PAGES.parent.rglob("*.png"):
        assert picture.relative_to(PAGES.parent).as_posix() in pages, picture


def test_every_entry_is_there():
    for entry in sorted(ENTRIES):
        module, _, name = entry.rpartition(".")
        assert hasattr(__import__(module, fromlist=[name]), name), entry
