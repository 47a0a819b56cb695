"""What a run keeps that explains its experts: its validation rows, and what its own evaluation found."""

import warnings
from pathlib import Path

from lmoe.adapter.place import adapter_folder, run_folder
from lmoe.adapter.run_data import run_lessons
from lmoe.config.evaluate import EvaluateSettings
from lmoe.config.moe import MoeConfig
from lmoe.errors import CheckpointError, DataError
from lmoe.evaluate.rows import evaluation_rows
from lmoe.evaluate.subject import row_tokenizer
from lmoe.explain.explanation import TextTokens
from lmoe.explain.profiles import Losses
from lmoe.explain.texts import of_encoded
from lmoe.files.run_folder import SUMMARY_FILE
from lmoe.metrics.knock_out import ALL_SITES
from lmoe.report.summary import RunSummary
from lmoe.rules.objectives import OBJECTIVES
from lmoe.vocabulary import NATS

LONGEST_ROW = 256
"""Tokens of a validation row that a profile looks at."""


def validation_texts(
    checkpoint: str | Path,
    moe: MoeConfig,
    *,
    rows: int,
    most: int,
    domain: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[list[TextTokens], str]:
    """The first validation rows of each domain of a run, and what they are called.

    Args:
        checkpoint: run or adapter directory.
        moe: section of the adapter.
        rows: of each domain.
        most: tokens of each row (`kept_tokens`).
        domain: of this one alone; None: of all.

    Raises:
        DataError: rows that cannot be read, or no such domain.
        CheckpointError: the config of the run cannot be read.
    """
    run = run_folder(adapter_folder(checkpoint))
    tokenizer = row_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
    lesson = list(run_lessons(run).values())[-1]
    settings = EvaluateSettings(checkpoint=str(checkpoint), limit=rows)
    kind = OBJECTIVES[lesson.task.name].rows
    length = lesson.data.max_length  # as training cut them
    found, named = evaluation_rows(settings, run, tokenizer, moe, max_length=length, kind=kind, data=lesson.data)
    found = found.preferred()
    if domain is not None and domain not in found.domains:
        raise DataError(f"{named} have no domain {domain!r}; they have {', '.join(found.domains)}")
    texts = []
    for number, row in enumerate(found.rows):
        of_row = found.domains[row.domain]
        if domain is None or of_row == domain:
            name = f"validation row {number}"
            texts.append(of_encoded(tokenizer, row, name=name, domain=of_row, most=most))
    return texts, f"the first {rows} of each domain of {named}"


def known_losses(checkpoint: str | Path) -> Losses | None:
    """What the run's own evaluation found by silencing each expert at all sites (analysis.knock_out=experts); None: it
    did not, or its summary cannot be read, which is warned of."""
    run = run_folder(adapter_folder(checkpoint))
    file = None if run is None else run / SUMMARY_FILE
    if file is None or not file.is_file():
        return None
    try:
        summary = RunSummary.from_json(file)
    except CheckpointError as error:
        warnings.warn(f"what the run's own evaluation found is left out: {error}", stacklevel=2)
        return None
    if summary.loss_measure != NATS:
        return None
    of_all = f"{ALL_SITES}/"
    found = summary.knock_out.items()
    return {int(name.removeprefix(of_all)): losses for name, losses in found if name.startswith(of_all)} or None
