"""Which shards does a name mean? Patterns such as ``photos-{000..012}.tar``, and folders of tar files."""

import math
import re
from pathlib import Path

from residual_kernels import extras
from residual_kernels.data.images.decode import image_endings
from residual_kernels.data.images.listing import ending_of, walk

MAX_SHARDS = 100_000
_RANGE = re.compile(r"\{(-?\d{1,18})\.\.(-?\d{1,18})(?:\.\.(-?\d{1,18}))?\}")
_CHOICE = re.compile(r"\{[^{}]*,[^{}]*\}")


def is_pattern(text: str) -> bool:
    """Whether a name that no file has stands for several: it holds a range, a choice,
    or ``::`` between names."""
    return bool(_RANGE.search(text) or _CHOICE.search(text) or "::" in text)


def expand(text: str) -> list[str]:
    """The names that a pattern stands for, as webdataset expands it; a ValueError when they are too many."""
    counts = [abs(int(b) - int(a)) // max(1, abs(int(step or 1))) + 1 for a, b, step in _RANGE.findall(text)]
    if re.search(r"\{-?\d{19}|\.\.-?\d{19}", text):
        raise ValueError(
            f"{text} has a range of numbers that no shards have; the most is {MAX_SHARDS:,} shards"
        )
    counts += [found.count(",") + 1 for found in _CHOICE.findall(text)]
    if math.prod(counts) > MAX_SHARDS:
        raise ValueError(f"{text} stands for {math.prod(counts):,} shards; the most is {MAX_SHARDS:,}")
    shardlists = extras.need("webdataset.shardlists", "data", "naming shards by a pattern")
    return list(shardlists.expand_urls(text))


def shards_in(folder: Path) -> list[Path] | None:
    """The tar files of a folder; None where it holds images besides, or no tar files."""
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".tar" and not path.is_dir())
    if not found:
        return None
    endings = image_endings()
    if any(not is_folder and ending_of(name) in endings for name, is_folder in walk(folder)):
        return None  # a stray archive beside the images
    return found
