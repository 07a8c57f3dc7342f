"""hypothesis, where it is installed: elsewhere a test of a property is skipped,
and the other tests of its file run."""

from collections.abc import Callable

import pytest

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st

    settings.register_profile("no clock", deadline=None)  # no test says how fast a machine must be
    settings.load_profile("no clock")
except ImportError:

    class _Strategies:
        def __getattr__(self, name: str) -> Callable:
            return lambda *_, **__: self

    st = _Strategies()

    def given(*_, **__) -> Callable:
        def skipped(test: Callable) -> Callable:
            def without() -> None:
                pytest.skip("the package hypothesis is not installed")

            without.__name__, without.__doc__ = test.__name__, test.__doc__
            return without

        return skipped

    def settings(*_, **__) -> Callable:
        return lambda test: test


__all__ = ["given", "settings", "st"]
