"""What is a class called? Names of classes and the prompts they stand in."""

from pathlib import Path


def class_names(source: str | None, folders: tuple[str, ...]) -> tuple[str, ...]:
    """Names for class folders: from a file with one name a line, in the folders' sorted order, or the folder names."""
    if source is None:
        return tuple(name.replace("_", " ") for name in folders)
    lines = _lines(source, "class names")
    if len(lines) != len(folders):
        raise ValueError(f"{source} has {len(lines)} class names, but there are {len(folders)} class folders")
    return tuple(lines)


def templates(source: str | None, default: tuple[str, ...]) -> tuple:
    """Prompt templates: a file with one a line, or open_clip's own by name (``openai``, ``simple``)."""
    import open_clip

    named = {
        "openai": open_clip.OPENAI_IMAGENET_TEMPLATES,
        "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES,
    }
    if source is None:
        return default
    return tuple(named[source]) if source in named else tuple(_lines(source, "templates"))


def _lines(source: str, what: str) -> list[str]:
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of {what} at {source}")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{source} is empty; it should hold one of the {what} a line")
    return lines
