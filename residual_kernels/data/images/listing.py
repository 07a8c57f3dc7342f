"""Which files of a folder, a zip or a shard are images, and what class is each? One rule for all of them."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from residual_kernels.data.images.account import Account
from residual_kernels.data.images.decode import image_endings
from residual_kernels.data.user_text import normal, some

NO_ENDING = "(no ending)"
# What operating systems and storage boxes leave behind; so are names that begin with a dot.
_SYSTEM = frozenset(
    {
        "__macosx",
        "@eadir",
        "#recycle",
        "$recycle.bin",
        "system volume information",
        "lost+found",
        "thumbs.db",
        "desktop.ini",
        "paxheaders",
    }
)
_PARTS = frozenset(  # names of a data set's parts, which are no classes
    {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}
)
Where = TypeVar("Where")


def is_system(name: str) -> bool:
    """Whether a part of this relative name is hidden or belongs to the system."""
    return any(part.startswith(".") or part.lower() in _SYSTEM for part in name.split("/"))


def ending_of(name: str) -> str:
    """The ending in lower case, with its dot."""
    return os.path.splitext(name)[1].lower() or NO_ENDING


def plain_name(name: str) -> str | None:
    """A name inside an archive with ``/`` between its parts and without ``./``, a drive or a leading slash.

    None where it would lead out of the archive.
    """
    steps = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    if steps and re.fullmatch("[A-Za-z]:", steps[0]):
        steps = steps[1:]
    return None if ".." in steps else "/".join(steps)


def images_among(members: Iterable[tuple[str, Where]], account: Account) -> dict[str, Where]:
    """The images among (name, where it is), in sorted order of names; the rest is counted in the account.

    Of several members with one name the last counts, as it does when an archive is unpacked.
    """
    found: dict[str, Where] = {}
    for name, where in members:
        if is_system(name):
            continue
        ending = ending_of(name)
        if ending not in image_endings():
            account.ignored[ending] += 1
            continue
        if name in found:
            account.duplicates[name] = "several members of this name; the last is read"
        found[name] = where
    account.found += len(found)
    return dict(sorted(found.items()))


def walk(root: Path, account: Account | None = None, skip: bool = False) -> Iterator[tuple[str, bool]]:
    """(name relative to `root`, whether it is a folder) of everything below a folder.

    Links are followed, but every folder is listed once: by its own name where it lies below `root`, else by
    the first link to it. So links that lead back up, or across, end. A folder that may not be listed is an
    error; with `skip` it is left out, and stands in the account.
    """
    top = os.path.realpath(root)
    seen: dict[tuple[int, int], str] = {_identity(root): "the folder itself"}
    folders: list[tuple[str, Path]] = [("", root)]
    links: list[tuple[str, Path]] = []
    while folders or links:
        if folders:
            prefix, path = folders.pop()
        else:
            prefix, path = links.pop(0)
            known = seen.get(_identity(path))
            above = top.startswith(os.path.join(os.path.realpath(path), ""))
            if known is not None or above:
                if account is not None:
                    account.duplicates[prefix.rstrip("/")] = f"a link to {known or 'a folder above'}"
                continue
            seen[_identity(path)] = prefix.rstrip("/")
            yield prefix.rstrip("/"), True
        try:
            with os.scandir(path) as inside:
                entries = sorted(inside, key=lambda entry: entry.name)
        except PermissionError as error:
            if skip and account is not None and prefix:
                account.found += 1
                account.left_out[prefix.rstrip("/")] = f"the folder may not be listed ({error.strerror})"
                continue
            raise PermissionError(
                f"the folder {path} may not be listed, so its images are not known: {error.strerror}"
            ) from error
        for entry in entries:
            name = prefix + entry.name
            if is_system(entry.name):
                continue
            if not _leads_to_folder(entry):
                yield name, False
            elif entry.is_symlink():
                links.append((f"{name}/", Path(entry.path)))
            else:
                seen.setdefault(_identity(entry.path), name)
                yield name, True
                folders.append((f"{name}/", Path(entry.path)))
        links.sort(key=lambda link: link[0])


def _leads_to_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(path: str | os.PathLike) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def class_order(names: Iterable[str]) -> tuple[str, ...]:
    """Class folders in order: by number where all are numbers (0, 1, 2, 10), else by name."""
    names = set(names)
    if all(re.fullmatch("[0-9]+", name) for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def is_flat(names: Iterable[str]) -> bool:
    """Whether no image lies in a folder of its own."""
    return all("/" not in name for name in names)


def by_folder(
    names: Sequence[str], folders: Iterable[str], path: Path, account: Account
) -> tuple[tuple[str, ...], Tensor]:
    """(class names, labels int64 [N]) of images in ``class/**/image``.

    Args:
        names: of the images, relative to `path`.
        folders: all folders directly below `path`, with or without images.

    Raises ValueError where images lie outside of class folders, a class has none, or `path` holds the parts
    of a data set (train, test) instead of classes.
    """
    loose = [name for name in names if "/" not in name]
    if loose:
        raise ValueError(f"{path} must hold one folder per class, but {loose[0]} lies outside of any")
    tops = [name.partition("/")[0] for name in names]
    if _holds_parts(names, set(tops)):
        inner = some(sorted(set(tops)))
        raise ValueError(
            f"the folders of {path} ({inner}) hold folders, not images; name one of them, such as "
            f"{path / tops[0]}"
        )
    spelled: dict[str, set[str]] = {}
    for top in tops:
        spelled.setdefault(normal(top), set()).add(top)
    classes = class_order(spelled)
    empty = sorted({normal(name) for name in folders} - set(classes))
    if empty:
        raise ValueError(f"class without images in {path}: {some(empty)}")
    twice = [name for name, forms in spelled.items() if len(forms) > 1]
    if twice:
        account.notes.append(f"folders whose names differ only in Unicode form are one class: {some(twice)}")
    folded: dict[str, list[str]] = {}
    for name in classes:
        folded.setdefault(name.casefold(), []).append(name)
    alike = [" and ".join(forms) for forms in folded.values() if len(forms) > 1]
    if alike:
        account.notes.append(f"folders whose names differ only in case are different classes: {some(alike)}")
    index = {form: label for label, name in enumerate(classes) for form in spelled[name]}
    return classes, torch.tensor([index[top] for top in tops])


def _holds_parts(names: Sequence[str], tops: set[str]) -> bool:
    """Whether the first folders are parts of a data set, or one folder around it, rather than classes."""
    split = [name.split("/") for name in names]
    deep = [steps for steps in split if len(steps) > 2]
    if deep and {name.lower() for name in tops} <= _PARTS:
        return True
    return len(tops) == 1 and len(deep) == len(split) and len({steps[1] for steps in split}) > 1
