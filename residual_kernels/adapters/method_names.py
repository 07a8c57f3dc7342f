"""Which methods are there?

The table of their names, in the order of tables and menus; light enough for `--help`.

Each is a file in `methods/` that ends in its record.
"""

BASE = "base"  # the tower itself, which learns nothing
NAMES = (
    BASE,
    "fine",
    "full",
    "coarse",
    "output",
    "linear",
    "anchored",
    "shared",
    "stream",
)
