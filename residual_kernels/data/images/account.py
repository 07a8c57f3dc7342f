"""What became of everything a source holds?

Found, read, left out and why, ignored, duplicate; and the classes.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

from residual_kernels.data.images.decode import MARK
from residual_kernels.schema import Count

SHOWN = 10  # names in a message; the account itself holds all
_PICTURES = frozenset(  # endings of images that need more than Pillow: said aloud, not only counted
    {
        ".heic",
        ".heif",
        ".jxl",
        ".svg",
        ".eps",
        ".exr",
        ".hdr",
        ".dng",
        ".cr2",
        ".cr3",
        ".nef",
        ".arw",
        ".orf",
        ".rw2",
        ".raf",
        ".raw",
        ".pef",
        ".srw",
        ".3fr",
        ".x3f",
        ".iiq",
        ".wmf",
        ".emf",
        ".ps",
        ".ai",
        ".xcf",
        ".kra",
    }
)


class ToldClass(TypedDict):
    """A class in the JSON of an account."""

    folder: str
    name: str | None
    images: Count


class Told(TypedDict):
    """An account as JSON holds it."""

    source: str
    found: Count
    read: Count
    left_out: dict[str, str]
    reasons: dict[str, Count]
    ignored: dict[str, Count]
    duplicates: dict[str, str]
    notes: list[str]
    classes: list[ToldClass]


@dataclass
class Account:
    """What a source of images holds, and what became of it.

    Attributes:
        source: what the user named.
        found: images there, readable or not; duplicates are counted once.
        left_out: name -> reason, of images that were found and are not read.
        ignored: ending -> number, of files that are no images.
        duplicates: name -> what it repeats.
        notes: sentences that a user should read.
        classes: (folder or number, name in the prompts or None, images) of every class.
    """

    source: str
    found: int = 0
    left_out: dict[str, str] = field(default_factory=dict)
    ignored: Counter = field(default_factory=Counter)
    duplicates: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    classes: list[tuple[str, str | None, int]] = field(default_factory=list)

    @property
    def read(self) -> int:
        return self.found - len(self.left_out)

    def leave_out(self, rows: Iterable[tuple[str, str]]) -> None:
        """Adds (name, message of the :class:`UnreadableImage`) of images that are not read."""
        self.left_out |= {name: text.partition(MARK)[2] or text for name, text in rows}

    def pair(self, folders: Sequence[str], names: Sequence[str]) -> None:
        """Says what each class is called in the prompts."""
        given = dict(zip(folders, names, strict=True))
        self.classes = [(folder, given.get(folder, name), count) for folder, name, count in self.classes]

    def reasons(self) -> Counter:
        """Reason -> number of images; numbers inside a reason are not told apart."""
        return Counter(reason.partition(" (")[0] for reason in self.left_out.values())

    def warnings(self) -> list[str]:
        """What a user should read before the work begins."""
        found = list(self.notes)
        strange = {ending: count for ending, count in self.ignored.items() if ending in _PICTURES}
        if strange:
            found.append(
                f"{_counts(strange)} ignored: Pillow does not read them here; convert them to JPEG or PNG"
            )
        if self.duplicates:
            shown = [f"{name} ({why})" for name, why in self.duplicates.items()]
            found.append(f"{len(shown)} counted once: {_first(shown)}")
        return [f"{self.source}: {text}" for text in found]

    def summary(self) -> str:
        """One line."""
        text = f"{self.source}: {self.found} images found, {self.read} read"
        if self.left_out:
            why = "; ".join(f"{reason}: {count}" for reason, count in self.reasons().most_common())
            text += f", {len(self.left_out)} left out ({why}; {_first(list(self.left_out))})"
        if self.ignored:
            text += f"; other files ignored: {_counts(self.ignored)}"
        if self.duplicates:
            text += f"; {len(self.duplicates)} duplicates"
        return text

    @classmethod
    def of(cls, told: Told) -> "Account":
        """The account that :meth:`to_dict` told of."""
        classes = [(row["folder"], row["name"], row["images"]) for row in told["classes"]]
        return cls(
            told["source"],
            told["found"],
            told["left_out"],
            Counter(told["ignored"]),
            told["duplicates"],
            told["notes"],
            classes,
        )

    def to_dict(self) -> Told:
        """For JSON."""
        return {
            "source": self.source,
            "found": self.found,
            "read": self.read,
            "left_out": self.left_out,
            "reasons": dict(self.reasons()),
            "ignored": dict(self.ignored.most_common()),
            "duplicates": self.duplicates,
            "notes": self.notes,
            "classes": [
                {"folder": folder, "name": name, "images": count} for folder, name, count in self.classes
            ],
        }


def _first(names: list[str]) -> str:
    more = len(names) - 3
    return ", ".join(names[:3]) + (f" and {more} more" if more > 0 else "")


def _counts(counted: dict[str, int]) -> str:
    rows = Counter(counted).most_common()
    text = ", ".join(f"{count} {what}" for what, count in rows[:8])
    return text if len(rows) <= 8 else f"{text}, {sum(count for _, count in rows[8:])} others"
