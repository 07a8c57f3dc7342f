"""Bytes -> an RGB image of 8 bits: the one decoder of every source, and what makes an image unreadable."""

import contextlib
import errno
import functools
import io
import lzma
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.Image import DecompressionBombError, Transpose

MAX_BYTES = 2**30  # of one encoded image; what claims more is not read into memory
MARK = " is not a readable image: "  # between an image's name and the reason

# Formats that Pillow names but does not decode by itself: EPS starts Ghostscript, the others need a handler.
_REFUSED = frozenset({"EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5"})
# Formats whose grey images of 16 bits fill their range; in others (FITS ...) the range is the author's own.
_FULL_RANGE = frozenset({"PNG", "TIFF", "JPEG2000", "PPM"})
# What decoders and archives raise about the bytes they are given, and never about the machine.
_ABOUT_BYTES = (
    ValueError,
    SyntaxError,
    EOFError,
    LookupError,
    ArithmeticError,
    TypeError,
    AttributeError,
    NotImplementedError,
    struct.error,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
    DecompressionBombError,
)
# Errors of the system that concern one file. Any other (EMFILE, ENOMEM, EIO ...) concerns the machine or the
# disk.
_ABOUT_ONE_FILE = frozenset(
    # Of a seek to before the beginning, where a damaged zip says a member lies.
    {
        errno.ENOENT,
        errno.EACCES,
        errno.EPERM,
        errno.ELOOP,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ENXIO,
        errno.ENAMETOOLONG,
        errno.EINVAL,
    }
)
_NO_IMAGES = (  # how text in an image's place begins, in lower case -> what it is
    (
        b"version https://git-lfs",
        "it is a Git LFS pointer, not the image itself; fetch it with `git lfs pull`",
    ),
    (b"<!doctype html", "it is a web page; download the image itself"),
    (b"<html", "it is a web page; download the image itself"),
)
_ORIENTATION = 274  # the EXIF tag
_UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


class UnreadableImage(ValueError):
    """An image that cannot be read; the message names it and the reason."""


@functools.cache
def formats() -> tuple[str, ...]:
    """The formats that are decoded: all that this Pillow reads by itself."""
    Image.init()
    return tuple(sorted(name for name in Image.OPEN if name not in _REFUSED))


@functools.cache
def image_endings() -> frozenset[str]:
    """File endings of these formats, in lower case, with their dot."""
    readable = formats()
    found = {ending for ending, name in Image.registered_extensions().items() if name in readable}
    # Two JPEGs in one; Pillow registers no ending.
    return frozenset(found | ({".mpo"} if "JPEG" in readable else set()))


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Whatever is wrong with the image called `name` becomes an :class:`UnreadableImage`.

    Errors of the machine (too many open files, no memory, a failing disk) are raised as they are.
    """
    try:
        yield
    except UnreadableImage:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImage(f"{name}{MARK}its format is unknown") from error
    except OSError as error:
        if error.errno is not None and error.errno not in _ABOUT_ONE_FILE:
            if error.filename is None:  # as of a read: where it happened is worth knowing
                error.filename = name
            raise
        raise UnreadableImage(f"{name}{MARK}{_sentence(error.strerror or error)}") from error
    except RuntimeError as error:  # zipfile: an encrypted member
        if not isinstance(error, NotImplementedError) and "encrypted" not in str(error):
            raise
        said = (
            "it is encrypted, and no password is asked for" if "encrypted" in str(error) else _sentence(error)
        )
        raise UnreadableImage(f"{name}{MARK}{said}") from error
    except _ABOUT_BYTES as error:
        raise UnreadableImage(f"{name}{MARK}{_sentence(error)}") from error


def _sentence(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def decode(data: bytes, *, exif: bool = True) -> Image.Image:
    """An encoded image in RGB; call it inside :func:`reading`.

    Args:
        data: the bytes of the file.
        exif: whether the image is turned as its EXIF orientation says.
    """
    if not data:
        raise ValueError("it is empty")
    known = next((what for start, what in _NO_IMAGES if data.lstrip()[: len(start)].lower() == start), None)
    if known is not None:
        raise ValueError(known)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")  # of large images, of tags: none names the file
        with Image.open(io.BytesIO(data), formats=formats()) as image:
            image.load()
            return rgb(image, exif=exif)


def rgb(image: Image.Image, *, exif: bool = True) -> Image.Image:
    """A decoded image in RGB with 8 bits a channel.

    Grey images of more than 8 bits are scaled by the range of their mode. Images of float or 32-bit numbers
    have no range of their own, so they are refused (ValueError).
    """
    turn = _UPRIGHT.get(_orientation(image) or 0) if exif else None
    found = _eight_bits(image).convert("RGB")
    return found if turn is None else found.transpose(turn)


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(_ORIENTATION)
    except (*_ABOUT_BYTES, OSError):  # a broken EXIF block says nothing; the pixels may still be whole
        return None


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode == "LAB":  # some versions of Pillow convert it without the illuminant that the file means
        raise ValueError("its colours are CIELAB (mode LAB); save it as RGB")
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if deep and image.format in _FULL_RANGE:
        tags = getattr(image, "tag_v2", {})
        highest = 2 ** int(tags.get(258, (16,))[0]) - 1  # BitsPerSample: TIFF also has grey images of 12 bits
        values = np.asarray(image).astype(np.float32) * np.float32(255 / highest)
        if tags.get(262) == 0:  # PhotometricInterpretation: white is zero, which Pillow leaves so at 16 bits
            values = 255 - values
        return Image.fromarray(np.rint(values).clip(0, 255).astype(np.uint8))
    if deep or image.mode in ("I", "F"):
        kind = "float numbers" if image.mode == "F" else "integers"
        raise ValueError(
            f"it holds {kind} whose range is not known (mode {image.mode} in {image.format}); "
            "save it with 8 or 16 bits"
        )
    return image
