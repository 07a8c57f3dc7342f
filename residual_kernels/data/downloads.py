"""Are weights on this machine, and if not, can the hub be asked? One attempt, and one clear answer."""

import contextlib
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator

from huggingface_hub import constants, try_to_load_from_cache

SECONDS = 10.0  # for the hub to answer


def on_this_machine(repository: str, files: Iterable[str]) -> bool:
    """Whether one of these files of a repository of the hub was downloaded before."""
    return any(isinstance(try_to_load_from_cache(repository, file), str) for file in files)


def unreachable() -> str | None:
    """Why the hub cannot be asked; None where it answers. Asked once, without retries."""
    endpoint = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE forbids asking the hub"
    request = urllib.request.Request(endpoint, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=SECONDS).close()
    except urllib.error.HTTPError:
        return None  # an answer, whatever it says
    except (OSError, ValueError) as error:
        return f"{endpoint} cannot be reached ({why(error)})"
    return None


def why(error: BaseException) -> str:
    """What a library says of a download that failed, in one line without numbers of errors."""
    reason = getattr(error, "reason", None) or error
    text = " ".join(str(reason).split()) or type(error).__name__
    return re.sub(r"<urlopen error (.*?)>", r"\1", re.sub(r"\[Errno -?\d+\] ", "", text))


@contextlib.contextmanager
def without_network() -> Iterator[None]:
    """Files of the hub come from this machine alone,
    so that nothing waits for a network that may not be there."""
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
