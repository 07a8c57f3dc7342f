"""What is a file that is no source of images, and what can its owner do? Told from its first bytes."""

from pathlib import Path

_UNPACK = "images in it cannot be read in any order, so unpack it"
_KINDS = (  # how a file begins -> what it is and what to do; {0} is its path
    (
        b"PK\x03\x04",
        "a zip that is cut short: its directory at the end is missing; copy or download it again",
    ),
    (b"PK\x07\x08", "one part of a zip in several parts; join them (`zip -s 0 {0} --out whole.zip`)"),
    (b"\x1f\x8b", f"compressed by gzip; {_UNPACK} (`tar -xzf {{0}} -C FOLDER`) and name the folder"),
    (b"BZh", f"compressed by bzip2; {_UNPACK} (`tar -xjf {{0}} -C FOLDER`) and name the folder"),
    (b"\xfd7zXZ\0", f"compressed by xz; {_UNPACK} (`tar -xJf {{0}} -C FOLDER`) and name the folder"),
    (
        b"\x28\xb5\x2f\xfd",
        f"compressed by zstd; {_UNPACK} (`tar --zstd -xf {{0}} -C FOLDER`) and name the folder",
    ),
    (
        b"7z\xbc\xaf\x27\x1c",
        "a 7z archive; unpack it (`7z x {0} -oFOLDER`) and name the folder, or make it a zip",
    ),
    (
        b"Rar!\x1a\x07",
        "a RAR archive; unpack it (`unrar x {0} FOLDER/`) and name the folder, or make it a zip",
    ),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"),
    (b"PAR1", "a Parquet table; name the folder that it lies in as hf:FOLDER"),
)
_TAR_MARK = (257, b"ustar")
_HEAD = 512


def what_it_is(path: Path) -> str | None:
    """A clause that follows "PATH is": the kind of file and what to do; None for what is not known."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if not head:
        return "empty"
    for start, text in _KINDS:
        if head.startswith(start):
            return text.format(path)
    offset, mark = _TAR_MARK
    if head[offset : offset + len(mark)] == mark:
        return "a tar file by its content; give it a name that ends with .tar and it is read as a shard"
    if head.lstrip()[:1] == b"<":
        return "a web page or XML, not an archive; download the file itself"
    from residual_kernels.data.images.decode import image_endings

    if path.suffix.lower() in image_endings():
        return "a single image; name the folder that holds it"
    return None
