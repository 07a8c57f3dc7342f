"""Why does a file not hold a model's weights? The whole reason, in one line."""

import pickle
import re
import struct
import zipfile
from pathlib import Path

_POINTER = b"version https://git-lfs"
_HEAD = 512  # bytes that tell what a file is
_SHOWN = 3  # keys of each kind in a message

# What torch, safetensors and open_clip raise about a file that holds something else.
ABOUT_WEIGHTS = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    LookupError,
    AttributeError,
    TypeError,
    AssertionError,
    StopIteration,
    ValueError,
)


def check_file(path: Path) -> None:
    """Raises ValueError for a file that is no checkpoint at first sight."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name the checkpoint file in it")
    with path.open("rb") as file:
        head = file.read(_HEAD)
    what = None
    if not head:
        what = "is empty"
    elif head.startswith(_POINTER):
        what = "is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"
    elif head.lstrip()[:1] == b"<":
        what = "is a web page, not weights; download the file itself"
    elif head.startswith(b"PK") and path.suffix != ".npz" and not _holds_a_checkpoint(path):
        what = "is a zip, but not one that PyTorch wrote; name the checkpoint file itself"
    if what is not None:
        raise ValueError(f"{path} {what}")


def _holds_a_checkpoint(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as file:
            return any(name.endswith("/data.pkl") or name == "constants.pkl" for name in file.namelist())
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError):
        return True  # a damaged one: the reader says how


def reason(error: BaseException) -> str:
    """What is wrong with a checkpoint, from the error of the library that read it."""
    text = str(error)
    if "Error(s) in loading state_dict" in text:
        return _differences(text)
    found = re.search(r"WeightsUnpickler error: (.*)|(Trying to load unsupported GLOBAL .* is blocked)", text)
    if found is not None:
        what = (found[1] or found[2] or "").strip().rstrip(".")
        if not what:
            return "it is not a checkpoint"
        return (
            f"it holds more than tensors ({what}), and loading that could run code; save it as .safetensors"
        )
    if "object has no attribute 'trunk'" in text:
        return "it is an archive of NumPy, as Big Vision's SigLIP models have them, and this model is another"
    found = re.search(r"'(\w+)' object has no attribute '(?:items|keys)'", text)
    if found is not None:
        return f"it holds a {found[1]}, not weights by name"
    if isinstance(error, StopIteration):
        return "it holds no weights"
    if isinstance(error, KeyError):
        return f"it has no entry {text}"
    if isinstance(error, IndexError | AssertionError):  # of a reader that met other bytes
        return "it is no checkpoint that PyTorch or safetensors wrote"
    return " ".join(text.split())[:300] or type(error).__name__


def _differences(text: str) -> str:
    """The keys and shapes that differ, counted, with the first of each kind."""
    said = []
    for title, word in (("Missing key(s)", "it lacks"), ("Unexpected key(s)", "it also has")):
        line = next((line for line in text.splitlines() if title in line), "")
        keys = re.findall(r'"([^"]+)"', line)
        if keys:
            said.append(f"{word} {_counted(keys, 'weights')}")
    shapes = re.findall(
        r"size mismatch for (\S+): copying a param with shape torch\.Size\(\[(.*?)\]\) from checkpoint, "
        r"the shape in current model is torch\.Size\(\[(.*?)\]\)",
        text,
    )
    if shapes:
        rows = [f"{key} [{there}] where the model has [{here}]" for key, there, here in shapes]
        said.append(_counted(rows, "weights have other shapes", first=True))
    return "; ".join(said) or " ".join(text.split())[:300]


def _counted(rows: list[str], what: str, first: bool = False) -> str:
    more = " ..." if len(rows) > _SHOWN else ""
    number = "1 weight" + what.removeprefix("weights") if len(rows) == 1 else f"{len(rows)} {what}"
    if first and len(rows) == 1:
        number = number.replace("have other shapes", "has another shape")
    return f"{number} ({', '.join(rows[:_SHOWN])}{more})"
