"""How often rows have judged: the more models were compared on them, the less a verdict on them is worth."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lmoe.config.study import LEDGER_FILE
from lmoe.errors import StudyError, TrainingError
from lmoe.files.lock import free_within
from lmoe.files.small_file import Reader
from lmoe.report.files import write_bytes

LOCK_FILE = f".{LEDGER_FILE}.lock"
LONGEST_WAIT = 60.0
"""Seconds for another study to write its number down."""
LOOK_AGAIN = 0.05
LEDGER = Reader(error=StudyError, cure="put it back, or remove it to count anew", what="it")


def rows_digest(rows: Sequence[str]) -> str:
    """Which rows have judged, by their names in their order."""
    return hashlib.sha256(" ".join(rows).encode()).hexdigest()[:16]


def models_judged(root: Path, name: str, digest: str, models: int) -> dict[str, int]:
    """Note how many models a study, or a comparison of runs, has judged on its rows.

    Args:
        root: folder of all studies, which keeps the numbers.
        name: of the study.
        digest: of the names of the rows.
        models: of this study.

    Returns:
        The numbers of all studies and comparisons on the same rows, by name.

    Raises:
        StudyError: the file is damaged.
        TrainingError: it cannot be written.
    """
    file = root / LEDGER_FILE
    with _locked(root):
        kept = LEDGER.json(file) if file.exists() else {}
        of_rows = kept.get(digest, {})
        if not isinstance(of_rows, dict) or not all(isinstance(count, int) for count in of_rows.values()):
            raise LEDGER.refusal(file, "holds something else")
        of_rows[name] = models
        write_bytes(file, (json.dumps(kept | {digest: of_rows}, indent=1) + "\n").encode())
    return of_rows


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Keep other studies away from the numbers inside the block.

    Raises:
        StudyError: one keeps them for too long.
        TrainingError: the folder cannot be written.
    """
    place = root / LOCK_FILE
    try:
        root.mkdir(parents=True, exist_ok=True)
        file = place.open("a")
    except OSError as error:
        raise TrainingError(f"{place} cannot be written: {error.strerror or error}") from None
    with file:
        if not free_within(file, LONGEST_WAIT, LOOK_AGAIN):
            raise StudyError(f"{place} is held by another process since {LONGEST_WAIT:g} s; stop it")
        yield
