"""Samples of one shard, from its tar headers alone."""

import os
import posixpath
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from residual_kernels.data.images.account import Account
from residual_kernels.data.images.decode import MARK, UnreadableImage, image_endings
from residual_kernels.data.images.listing import ending_of, is_system, plain_name
from residual_kernels.data.images.not_images import what_it_is

_LABEL = ".cls"
# Webdataset's: a sample's key ends at the name's first dot.
_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)")
_LABEL_BYTES = 64  # more is no number
_DIGITS = 6  # of a class number: names are made for every number up to the highest
_CHUNK = 2**20
_DEPTH = 40  # links to folders on the way to a file, as systems allow them


@dataclass(frozen=True)
class Sample:
    """An image of a shard: its name, where its bytes lie, and its label or None."""

    name: str
    offset: int
    size: int
    label: int | None


@dataclass
class _Group:
    """Members in a row that share a key, which is what webdataset calls a sample."""

    key: str
    images: dict[str, tuple[int, int]] = field(default_factory=dict)  # name -> offset, size
    labels: dict[str, int] = field(default_factory=dict)  # name without its ending -> label


def samples(shard: Path, account: Account, skip: bool) -> tuple[list[Sample], bool]:
    """The images of a shard in its order, and whether it is damaged behind them.

    An image ``0001.v2.jpg`` has the label in ``0001.v2.cls`` or ``0001.cls``. A key that comes again later is
    another sample; a label that stands apart from its image belongs to it when no other has its name.

    Args:
        shard: the tar file.
        account: counts the images, and what is no image.
        skip: whether damage ends the reading, and links to nothing are left out, instead of raising.
    """
    if not shard.is_file():
        if skip and os.path.lexists(shard):
            account.notes.append(f"{shard} is a link to nothing or no file; nothing of it is read")
            return [], True
        hint = (
            "; write a range, such as {000..012}, or name their folder" if set("*?") & set(shard.name) else ""
        )
        raise FileNotFoundError(f"there is no shard {shard}{hint}")
    groups: list[_Group] = []
    try:
        with tarfile.open(shard, "r:") as file:
            for name, member in _members(shard, file, account, skip):
                _enter(groups, shard, file, name, member, account)
            end = file.offset
        damage = _damage(shard, end)
    except tarfile.TarError as error:
        what = what_it_is(shard) if not groups else None
        damage = f"{shard} is {what or f'not a readable (uncompressed) tar file: {error}'}"
    except EOFError as error:
        damage = f"{shard} is cut short: {error}"
    if damage is not None:
        if not skip:
            raise ValueError(damage)
        account.notes.append(f"{damage}; {'what stands before' if groups else 'nothing of it'} is read")
    return _labelled(groups, account), damage is not None


def _members(
    shard: Path, file: tarfile.TarFile, account: Account, skip: bool
) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """(name, member with the bytes) of every file; a link is the member that it leads to,
    before or behind it."""
    members: list[tuple[str, tarfile.TarInfo]] = []
    cut: EOFError | tarfile.TarError | None = None
    try:
        for member in file:
            name = plain_name(member.name)
            if name is None and ending_of(member.name) in image_endings():
                account.found += 1
                account.left_out[f"{shard.name}/{member.name}"] = "its name leads out of the archive"
            if name is not None and not is_system(name):
                members.append((name, member))
    except (EOFError, tarfile.TarError) as error:  # what stands before is read
        cut = error
    links = _Links(members)
    for number, (name, member) in enumerate(members):
        if member.isfile():
            yield name, member
        elif member.islnk() or member.issym():
            found = links.follow(number)
            if found is not None:
                yield name, found
            elif ending_of(name) in image_endings():
                reason = f"it is a link to nothing in the archive ({member.linkname})"
                if not skip and cut is None:
                    raise UnreadableImage(f"{shard}/{name}{MARK}{reason}")
                account.found += 1
                account.left_out[f"{shard.name}/{name}"] = reason
            elif ending_of(name) == _LABEL and not skip:
                raise ValueError(
                    f"{shard}: the label {name} is a link to {member.linkname}, which is not there"
                )
    if cut is not None:
        raise cut


class _Links:
    """Where the links of an archive lead: to the nearest member of that name before them,
    else the first behind."""

    def __init__(self, members: list[tuple[str, tarfile.TarInfo]]):
        self.members = members
        self.places: dict[str, list[int]] = {}
        self.folders: dict[str, str] = {}  # links that may lead to folders
        for number, (name, member) in enumerate(members):
            if not member.isdir():
                self.places.setdefault(name, []).append(number)
            if member.issym():
                self.folders[name] = _target(name, member)

    def follow(self, number: int) -> tarfile.TarInfo | None:
        """The file that a link leads to, over other links; None where it leads to nothing or to itself."""
        seen: set[int] = set()
        while number not in seen:
            seen.add(number)
            name, member = self.members[number]
            if member.isfile():
                return member
            there = self.places.get(self._real(_target(name, member)), [])
            before = [place for place in there if place < number]
            if not there:
                return None
            number = before[-1] if before else there[0]
        return None

    def _real(self, name: str) -> str:
        """A name with links to folders in its path resolved."""
        for _ in range(_DEPTH):
            steps = name.split("/")
            above = next((one for one in _prefixes(steps) if one in self.folders), None)
            if above is None:
                break
            name = posixpath.normpath(self.folders[above] + name[len(above) :])
        return name


def _prefixes(steps: list[str]) -> Iterator[str]:
    return ("/".join(steps[:length]) for length in range(1, len(steps)))


def _target(name: str, member: tarfile.TarInfo) -> str:
    """The name that a link of this name leads to.

    One that leads out of the archive begins with ``..`` or ``/``.
    """
    if not member.issym():  # a hard link: counted from the top
        return plain_name(member.linkname) or ".."
    return posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))


def _enter(
    groups: list[_Group],
    shard: Path,
    file: tarfile.TarFile,
    name: str,
    member: tarfile.TarInfo,
    account: Account,
) -> None:
    matched = _KEY.fullmatch(name)
    ending = ending_of(name)
    if matched is None or (ending not in image_endings() and ending != _LABEL):
        account.ignored[ending] += 1
        return
    stem, key = name[: -len(ending)], matched[1]
    if not groups or groups[-1].key != key or name in groups[-1].images:
        groups.append(_Group(key))
    if ending == _LABEL:
        if stem in groups[-1].labels:
            groups.append(_Group(key))
        groups[-1].labels[stem] = _label(shard, file, name, member)
    else:
        groups[-1].images[name] = (member.offset_data, member.size)


def _label(shard: Path, file: tarfile.TarFile, name: str, member: tarfile.TarInfo) -> int:
    inside = file.extractfile(member)
    assert inside is not None  # a label is a regular file
    text = inside.read(_LABEL_BYTES).decode("utf-8-sig", "replace").strip()
    if not (text.isascii() and text.isdecimal() and len(text) <= _DIGITS):
        raise ValueError(f"{shard}: {name} holds {text[:20]!r}; it must be a class number, counted from 0")
    return int(text)


def _labelled(groups: list[_Group], account: Account) -> list[Sample]:
    apart: dict[str, list[int]] = {}
    for group in groups:
        for stem, label in group.labels.items():
            apart.setdefault(stem, []).append(label)
    found = []
    for group in groups:
        for name, (offset, size) in group.images.items():
            stem = name[: -len(ending_of(name))]
            number = group.labels.get(stem, group.labels.get(group.key))
            if number is None:
                for one in (stem, group.key):
                    if len(apart.get(one, ())) == 1:
                        number = apart[one][0]
                        break
            found.append(Sample(stem, offset, size, number))
    account.found += len(found)
    return found


def _damage(shard: Path, end: int) -> str | None:
    """What is wrong with what follows the last member that could be read;
    None when it is the end of a whole file."""
    with shard.open("rb") as file:
        file.seek(end)
        mark = file.read(tarfile.BLOCKSIZE)
        if len(mark) < tarfile.BLOCKSIZE:
            return (
                f"{shard} is cut short: it ends at byte {end + len(mark):,} without the end mark of a tar "
                "file"
            )
        if any(mark):
            return f"{shard} is damaged at byte {end:,}: no member begins there"
        after = _first_byte(file)
        if after is not None:
            return (
                f"{shard} holds more after its end mark, at byte {after:,}: tar files that were joined "
                "byte by byte; join them with `tar --concatenate`, or name them one by one"
            )
    return None


def _first_byte(file: BinaryIO) -> int | None:
    """Where the first byte that is not zero lies from here on."""
    while True:
        start, chunk = file.tell(), file.read(_CHUNK)
        if not chunk:
            return None
        rest = chunk.lstrip(b"\0")
        if rest:
            return start + len(chunk) - len(rest)
