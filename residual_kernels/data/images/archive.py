"""Members of a zip by the names they were meant to have, and where a path leads into one."""

import posixpath
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from residual_kernels.data.images.account import Account
from residual_kernels.data.images.listing import is_system, plain_name
from residual_kernels.data.images.not_images import what_it_is
from residual_kernels.data.models import nearest

_LONGEST_LINK, _LONGEST_CHAIN = 4096, 40  # bytes of a link's target; links that lead to links
_UTF8 = 0x800  # flag of a member whose name is UTF-8
_UNICODE_PATH = 0x7075  # extra field with the name in UTF-8


def split_archive(path: Path) -> tuple[Path | None, str]:
    """(zip file, folder inside it with a trailing slash or "") of a path that may go on inside a zip."""
    if path.is_dir():
        return None, ""
    for parent in (path, *path.parents):
        if parent.is_file():
            inside = path.relative_to(parent).as_posix()
            if not zipfile.is_zipfile(parent):
                what = what_it_is(parent)
                told = (
                    f"neither a folder nor a readable zip: it is {what}"
                    if what
                    else "neither a folder nor a zip of one"
                )
                raise ValueError(f"{parent} is {told}")
            return parent, "" if inside == "." else f"{inside}/"
    siblings = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
    hint = f"; {nearest(path.name, siblings)}" if siblings else ""
    raise FileNotFoundError(f"there is no folder or zip at {path}{hint}")


def members(archive: Path, prefix: str, account: Account) -> Iterator[tuple[str, zipfile.ZipInfo]]:
    """(name, member) of everything below `prefix`, names relative to it; a folder's name ends with a slash.

    Raises ValueError when the archive cannot be read.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            inside = file.infolist()
            links = {
                id(info): _target(file, info) for info in inside if stat.S_ISLNK(info.external_attr >> 16)
            }
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError) as error:
        raise ValueError(f"{archive} is not a readable zip: {error}") from error
    unknown: list[str] = []
    plain_names = [(plain_name(_intended_name(info)[0]), info) for info in inside] if links else []
    places = {name: info for name, info in plain_names if name is not None}
    for info in inside:
        name, sure = _intended_name(info)
        plain = plain_name(name)
        if plain is None:
            if not info.is_dir() and not is_system(name.replace("..", "")):
                account.found += 1
                account.left_out[name] = "its name leads out of the archive"
            continue
        if not sure:
            unknown.append(plain)
        folder = name.replace("\\", "/").endswith("/")
        plain += "/" if folder and plain else ""
        if plain.startswith(prefix) and plain != prefix:
            yield plain[len(prefix) :], _followed(plain, info, places, links)
    if unknown:
        account.notes.append(
            f"the names of {len(unknown)} members are in an unknown encoding and were read as code page "
            f"437, such as {unknown[0]}; if that looks wrong, make the zip again with UTF-8 names"
        )


def _target(file: zipfile.ZipFile, info: zipfile.ZipInfo) -> str:
    """What a link in a zip names; "" where that cannot be read."""
    if info.file_size > _LONGEST_LINK or info.flag_bits & 1:
        return ""
    try:
        return file.read(info).decode("utf-8", "surrogateescape")
    except (zipfile.BadZipFile, NotImplementedError, zlib.error, EOFError):
        return ""


def _followed(
    name: str, info: zipfile.ZipInfo, places: dict[str, zipfile.ZipInfo], links: dict[int, str]
) -> zipfile.ZipInfo:
    """The member that a link in a zip leads to.

    The link itself, which is no image, where it leads to none.
    """
    found, at = info, name
    for _ in range(_LONGEST_CHAIN):
        if id(found) not in links:
            return found
        at = posixpath.normpath(posixpath.join(posixpath.dirname(at), links[id(found)]))
        if at not in places:
            return info
        found = places[at]
    return info


def _intended_name(info: zipfile.ZipInfo) -> tuple[str, bool]:
    """The name of a member, and whether its encoding is known.

    Many programs write UTF-8 without saying so.
    """
    name = info.filename
    if info.flag_bits & _UTF8 or name.isascii():
        return name, True
    raw = info.orig_filename.encode("cp437")  # as zipfile decoded it
    own = _unicode_path(info.extra, zlib.crc32(raw))
    for text in (own, raw):
        if text is not None:
            try:
                return text.decode("utf-8"), True
            except UnicodeDecodeError:
                continue
    return name, False


def _unicode_path(extra: bytes, checksum: int) -> bytes | None:
    """Info-ZIP's field: version 1, CRC-32 of the raw name, the name in UTF-8."""
    while len(extra) >= 4:
        kind, size = struct.unpack("<HH", extra[:4])
        value, extra = extra[4 : 4 + size], extra[4 + size :]
        if kind == _UNICODE_PATH and len(value) > 5 and struct.unpack("<BL", value[:5]) == (1, checksum):
            return value[5:]
    return None
