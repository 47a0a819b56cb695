"""How often rows have judged: the more models were compared on them, the less a verdict on them is worth."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from lmoe.config.study import LEDGER_FILE
from lmoe.errors import StudyError
from lmoe.files.small_file import Reader
from lmoe.report.files import write_bytes

LEDGER = Reader(error=StudyError, cure="put it back, or remove it to count anew", what="it")


def rows_digest(rows: Sequence[str]) -> str:
    """Which rows have judged, by their names in their order."""
    return hashlib.sha256(" ".join(rows).encode()).hexdigest()[:16]


def judged_often(judged: Mapping[str, int]) -> str:
    """How often rows have judged, in words.

    Args:
        judged: as `models_judged` returns it.
    """
    times = f"{len(judged)} studies or comparisons" if len(judged) > 1 else "1 study or comparison"
    return f"these judging rows have judged {sum(judged.values())} models in {times} here"


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
    kept = LEDGER.json(file) if file.exists() else {}
    of_rows = kept.get(digest, {})
    if not isinstance(of_rows, dict) or not all(isinstance(count, int) for count in of_rows.values()):
        raise LEDGER.refusal(file, "holds something else")
    of_rows[name] = models
    write_bytes(file, (json.dumps(kept | {digest: of_rows}, indent=1) + "\n").encode())
    return of_rows
