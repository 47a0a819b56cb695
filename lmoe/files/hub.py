"""Names on the Hugging Face hub, local copies of what is there, and what the hub's refusals mean.

NOTE huggingface_hub is imported where it is used: a config is validated without it.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from lmoe.errors import CheckpointError
from lmoe.files.places import is_local
from lmoe.files.wording import first_line

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
SIGN_IN = "set HF_TOKEN, or sign in once with `hf auth login`"
READING = {
    401: "it has no such repository, or it is private and nobody is signed in who may read it: check the name, and "
    + SIGN_IN,
    403: "whoever is signed in may not read it",
    404: "it has no such repository, or no such revision of it",
}
WRITING = {
    401: f"it does not take the token (401): {SIGN_IN}, with a token that may write",
    403: "the token may not write there (403): name a place of your own, or use a token that may write to it",
    404: "it has no such repository or branch (404)",
    409: "somebody else has changed the repository meanwhile (409): give the same command again",
    412: "somebody else has changed the repository meanwhile (412): give the same command again",
    413: "it takes no file that large (413)",
    429: "it was asked too often (429): wait a while, and give the same command again",
}
AGAIN = "give the same command again later, and what has arrived is not sent twice"


def is_hub_name(place: str | Path) -> bool:
    """Whether a place is meant as a name on the hub: user/name, which is no path of this machine (`is_local`)."""
    return isinstance(place, str) and HUB_NAME.fullmatch(place) is not None and not is_local(place)


def name_problem(name: str) -> str | None:
    """Why the hub would refuse a name for a repository; None: it would not."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    allowed = "allowed: user/name, up to 96 letters, digits and . _ -, such as maria/sql-experts"
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        return f"{first_line(error)} {allowed}"
    return None if "/" in name else f"it names no user or organisation; {allowed}"


def local_copy(name: str, files: Sequence[str], *, revision: str | None = None) -> Path:
    """The folder of a repository of the hub on this machine, downloaded as far as it is not there yet.

    Args:
        name: user/name.
        files: names or patterns of the files that are wanted; nothing else is downloaded.
        revision: branch, tag or commit; None: main.

    Raises:
        CheckpointError: the hub does not give it; without network, or offline, what was downloaded before is used.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except Exception as error:  # of the hub's library, its HTTP client and the disk
        wanted = name if revision is None else f"{name} at revision {revision}"
        raise CheckpointError(
            f"{wanted}: no such directory, and the hub does not give it: {_why_not_read(error)}"
        ) from None


def _why_not_read(error: Exception) -> str:
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RevisionNotFoundError

    if isinstance(error, HFValidationError):
        return first_line(error)
    if isinstance(error, RevisionNotFoundError):
        return "it has no such revision"
    if isinstance(error, LocalEntryNotFoundError):
        if HF_HUB_OFFLINE:
            return "HF_HUB_OFFLINE forbids the network, and it was not downloaded before; download it once without that"
        return f"{ENDPOINT} cannot be reached, and it was not downloaded before: {first_line(error)}"
    status = status_of(error)
    return first_line(error) if status is None else READING.get(status, f"{first_line(error)} ({status})")


def why_not_written(error: Exception) -> str:
    """What a refusal of the hub means to whoever wants to write there."""
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.errors import HTTPError  # of whatever HTTP client the library has

    chain = _chain(error)
    status = next((found for one in chain if (found := status_of(one)) is not None), None)
    said = list(dict.fromkeys((first_line(error), first_line(chain[-1]))))
    if status is None:
        broken = any(isinstance(one, HTTPError | ConnectionError | TimeoutError) for one in chain)
        return f"the connection to {ENDPOINT} broke ({said[-1]}): {AGAIN}" if broken else ": ".join(said)
    if status >= 500:
        return f"{ENDPOINT} has a problem of its own ({status}): {AGAIN}"
    return WRITING.get(status, f"{said[-1]} ({status})")


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error of the hub's library is about; None: none has arrived."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _chain(error: BaseException) -> list[BaseException]:
    """An error and what it was raised from, down to the first."""
    chain = [error]
    while chain[-1].__cause__ is not None and chain[-1].__cause__ not in chain:
        chain.append(chain[-1].__cause__)
    return chain
