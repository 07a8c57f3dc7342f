"""Which fits of a sweep stay? What the file of a fit holds; whether it is of this plan and these images."""

from pathlib import Path
from typing import TypedDict

from residual_kernels.data.images.account import Told
from residual_kernels.files import SCHEMA, Head, read_json, write_json
from residual_kernels.schema import Count
from residual_kernels.units.cache import MANIFEST
from residual_kernels.units.cache.shards import read_manifest

WHAT, READING = "result of a sweep", "account of a sweep"
Identities = dict[str, str]  # train, val, test, bases -> the fingerprint of the images there


class SweepRow(TypedDict):
    """What is known of one fit; there may be more."""

    tower: str
    data: str
    method: str
    seed: int
    accuracy: float
    parameters: Count


class MadeOf(Head, total=False):
    """Which images a fit was made of; not there in files from before they were compared."""

    images: dict[str, str]


class Result(MadeOf):
    """The file of one fit."""

    recipe: str
    row: SweepRow


class Accounts(Head):
    """What the fits of one data set read: the source in the plan -> its account."""

    sources: dict[str, Told]


def keep(file: Path, recipe: str, images: Identities, row: dict) -> None:
    """Writes the file of a fit."""
    write_json(file, {"schema": SCHEMA, "what": WHAT, "recipe": recipe, "images": images, "row": row})


def kept(file: Path, recipe: str, images: Identities | None, caches: dict[str, Path]) -> dict | None:
    """The row in `file`, when it is there and was made by this recipe of these images.

    Args:
        file: of the fit.
        recipe: checksum of what the plan says.
        images: what is there now; None where that cannot be told.
        caches: part -> folder of its cache, which tells the images of a fit whose file does not.
    """
    if not file.is_file():
        return None
    found = read_json(file, WHAT, Result)
    if found["recipe"] != recipe:
        return None
    made_of = found.get("images")
    if made_of is None:
        made_of = _of_caches(caches)
        if made_of:  # noted, for the caches may be removed
            write_json(file, {**found, "images": made_of})
    same = images is None or all(made_of.get(part, told) == told for part, told in images.items())
    return found["row"] if same else None


def _of_caches(folders: dict[str, Path]) -> Identities:
    found = {}
    for part, folder in folders.items():
        told = read_manifest(folder)["run"]["data"] if (folder / MANIFEST).is_file() else None
        if told is not None:
            found[part] = told
    return found
