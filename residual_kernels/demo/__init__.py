"""The demonstration: the main job on real handwritten digits, offline.

Its names load it when they are first used.
"""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    if not name.startswith("_"):
        story = importlib.import_module("residual_kernels.demo.story")
        if name == "story":
            return story
        if hasattr(story, name):
            return getattr(story, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
