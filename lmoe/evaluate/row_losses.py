"""The loss of each row, which two models can be compared by: the file that keeps them, and how they are measured."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lmoe.data.encoded import EncodedRow, row_digest
from lmoe.errors import CheckpointError
from lmoe.evaluate.loss_rows import EvaluationRows
from lmoe.evaluate.subject import Subject
from lmoe.files.small_file import Reader
from lmoe.report.files import write_bytes
from lmoe.training.measure import batch_losses

COLUMNS = ("row", "domain", "labels", "label_tokens", "loss")
FILE = Reader(most=2**30, what="such a file", finite=False, cure="remove it, and it is measured again")


@dataclass(slots=True, frozen=True)
class RowLoss:
    """One row.

    Args:
        row: its name (`EvaluationRows.row_ids`).
        domain: its domain.
        labels: digest of the tokens that carry a label: two models were asked for the same where it is the same.
        label_tokens: their number.
        loss: sum over them, in nats.
    """

    row: str
    domain: str
    labels: str
    label_tokens: int
    loss: float


def row_losses(subject: Subject, data: EvaluationRows) -> list[RowLoss]:
    """The loss of each row, in the order of the rows.

    Args:
        subject: with the adapters as they are to be measured.
    """
    order: list[int] = []

    def batches():
        for indices, batch in subject.batches(data.rows):
            order.extend(indices)
            yield batch

    sums: list[float] = []
    for losses in batch_losses(subject.objective, subject.model, batches(), data.domains):
        sums += (losses.values.double() * losses.counted).flatten(1).sum(1).tolist()
    by_row = dict(zip(order, sums, strict=True))
    ids = data.row_ids()
    return [
        RowLoss(ids[i], data.domains[row.domain], label_digest(row), int(row.is_label[1:].sum()), by_row[i])
        for i, row in enumerate(data.rows)
    ]


def label_digest(row: EncodedRow) -> str:
    """A digest of the tokens of a row that carry a label."""
    labels = row.input_ids[1:][row.is_label[1:]]
    return f"{row_digest(labels.contiguous().numpy()) % 2**64:016x}"


def write_row_losses(losses: Sequence[RowLoss], file: Path) -> None:
    """Write a CSV file, whole or not at all; numbers keep all their digits.

    Raises:
        TrainingError: it cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows((x.row, x.domain, x.labels, x.label_tokens, repr(x.loss)) for x in losses)
    write_bytes(file, text.getvalue().encode("utf-8"))


def read_row_losses(file: Path) -> list[RowLoss]:
    """Return what `write_row_losses` has written.

    Raises:
        CheckpointError: the file is damaged, or holds something else.
    """
    lines = FILE.rows(io.StringIO(FILE.text(file), newline=""), file)
    if tuple(next(lines, ())) != COLUMNS:
        raise CheckpointError(f"{file}: it does not begin with {','.join(COLUMNS)}; {FILE.cure}")
    found = []
    for number, line in enumerate(lines, start=2):
        try:
            row, domain, labels, tokens, loss = line
            found.append(RowLoss(row, domain, labels, int(tokens), float(loss)))
        except ValueError:
            raise CheckpointError(f"{file}:{number}: no row of it; {FILE.cure}") from None
    if not found or not all(math.isfinite(x.loss) for x in found):
        raise CheckpointError(f"{file}: {'a loss is no finite number' if found else 'no rows'}; {FILE.cure}")
    return found
