"""Old module names of version 0.1 go on working, and say where things are now."""

import importlib
import sys

import pytest

from residual_kernels import _moved


@pytest.mark.parametrize("old", sorted(_moved._NEW))
def test_an_old_module_name_gives_the_new_modules_names_and_says_so(old):
    if "triton" in old:
        pytest.importorskip("triton")
    sys.modules.pop(f"residual_kernels.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"is now residual_kernels.{_moved._NEW[old]}"):
        module = importlib.import_module(f"residual_kernels.{old}")
    new = importlib.import_module(f"residual_kernels.{_moved._NEW[old]}")
    public = [name for name in vars(new) if not name.startswith("_")]
    assert public
    assert all(getattr(module, name) is getattr(new, name) for name in public)


def test_a_name_that_never_was_is_not_found():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("residual_kernels.utils")
