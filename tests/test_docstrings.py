"""Every public callable documents its parameters and what it returns, in Google style."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

import residual_kernels as rk

PAGES = sorted((Path(__file__).parents[1] / "docs" / "reference").glob("*.md"))
SECTIONS = re.compile(r"^(Args|Attributes(?: \(.*\))?|Returns|Yields|Raises):$")
ENTRY = re.compile(r" {4}([\w*]+(?:, [\w*]+)*):( |$)")  # of one parameter, or of several


def public_callables():
    """Name -> object of all that the package, its operators, analyses and reference name, with methods."""
    found: dict[str, object] = {}
    modules = [(module, name) for module in (rk, rk.ops, rk.analysis) for name in module.__all__]
    entries = re.findall(r"^::: ([\w.]+)\.(\w+)$", "\n".join(page.read_text() for page in PAGES), re.M)
    for module, name in modules + [(importlib.import_module(place), name) for place, name in entries]:
        value = getattr(module, name)
        if inspect.isclass(value) and issubclass(value, Exception):
            continue  # made by the library, with a message
        if inspect.isclass(value):
            found[name] = value
            for method, function in inspect.getmembers(value, inspect.isroutine):
                ours = getattr(function, "__module__", None) or ""
                if not method.startswith("_") and ours.startswith("residual_kernels"):
                    found[f"{name}.{method}"] = function
        elif callable(value):
            found[name] = value
    return found


PUBLIC = public_callables()


def sections(doc):
    """Lines of each section of a docstring, by its name; prose is under ""."""
    found, name = {"": []}, ""
    for line in doc.splitlines():
        if heading := SECTIONS.match(line):
            name = heading[1].split(" ")[0]
        elif line and not line.startswith(" "):
            name = ""
        found.setdefault(name, []).append(line)
    return found


def complaints(value):
    """What the docstring of a callable lacks."""
    doc = inspect.getdoc(value) or ""
    if not doc:
        return ["it has no docstring"]
    if doc.split("\n")[0][-1] not in ".):":
        yield f"its first line is no sentence: {doc.splitlines()[0]!r}"
    parts = sections(doc)
    described = set()
    for line in parts.get("Args", []) + parts.get("Attributes", []):
        if entry := ENTRY.match(line):
            described |= set(entry[1].split(", "))
    signature = inspect.signature(value)
    hidden = {"self", "cls", "_"}
    wanted = {name for name in signature.parameters if name not in hidden and not name.startswith("_")}
    if missing := wanted - described:
        yield f"it does not describe {', '.join(sorted(missing))}"
    if not inspect.isclass(value) and (extra := described - wanted):
        yield f"it describes {', '.join(sorted(extra))}, which it does not take"
    gives = signature.return_annotation not in (inspect.Signature.empty, None, "None")
    if wanted and gives and not inspect.isclass(value) and not {"Returns", "Yields"} & set(parts):
        yield "it does not say what it returns"
    if any(line.startswith("Raises ") for line in parts[""]) and len(parts) > 1:
        yield "its errors stand in a sentence instead of a section Raises"


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_a_public_callable_is_documented(name):
    assert list(complaints(PUBLIC[name])) == []


def test_all_are_looked_at():
    assert {"ResiDual.from_features", "fit", "spectral_sum", "Analysis.load", "UnitCache.batches"} <= set(
        PUBLIC
    )
    assert len(PUBLIC) > 150


@pytest.mark.parametrize(
    "doc, said",
    [
        ("Adds two numbers.", "does not describe a, b"),
        ("Adds two numbers.\n\nArgs:\n    a, b: numbers.", "does not say what it returns"),
        (
            "Adds.\n\nArgs:\n    a, b, c: numbers.\n\nReturns:\n    The sum.",
            "describes c, which it does not take",
        ),
        (
            "Adds.\n\nArgs:\n    a, b: numbers.\n\nReturns:\n    The sum.\n\nRaises ValueError.",
            "a section Raises",
        ),
        ("adds a and b", "no sentence"),
    ],
)
def test_a_gap_is_noticed(doc, said):
    def add(a: int, b: int) -> int:
        return a + b

    add.__doc__ = doc
    assert any(said in complaint for complaint in complaints(add))


def test_a_complete_docstring_passes():
    def add(a: int, b: int = 0) -> int:
        """The sum.

        Args:
            a: one number.
            b: another one.

        Returns:
            a + b.
        """
        return a + b

    assert list(complaints(add)) == []
    assert list(complaints(rk.analysis.Analysis)) == []
