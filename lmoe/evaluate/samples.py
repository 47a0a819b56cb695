"""What the model writes after prompts of the rows, with the adapters off and on."""

from contextlib import nullcontext

from torch import Tensor

from lmoe.backbones.load import context_length
from lmoe.data.encoded import EncodedRow
from lmoe.data.split import first_of_each
from lmoe.evaluate.loss_rows import EvaluationRows
from lmoe.evaluate.results import Sample
from lmoe.evaluate.subject import Subject
from lmoe.generate.generate import Sampling, continue_ids
from lmoe.injection.record import injected
from lmoe.injection.tracing import adapters_off
from lmoe.injection.tracing import domain as of_domain
from lmoe.rules.routers import needs_domain

OPENING = 32
"""Tokens of a plain text that are its prompt; of a shorter one the first half."""


def samples(subject: Subject, data: EvaluationRows, *, count: int, max_new_tokens: int) -> list[Sample]:
    """Greedy answers to the first prompts of each domain that leave room for one.

    Args:
        count: prompts of each domain.
        max_new_tokens: longest answer, in tokens.
    """
    rows, limit = data.rows, context_length(subject.model)
    fits = [i for i in range(len(rows)) if limit is None or opening(rows[i]) < limit]
    domains = rows.domains[fits].tolist()
    chosen = [fits[i] for i in sorted(first_of_each(domains, count), key=lambda i: (domains[i], i))]
    return [_sample(subject, rows[i], data.domains[rows[i].domain], max_new_tokens) for i in chosen]


def opening(row: EncodedRow) -> int:
    """Tokens of a row that are its prompt: those before its first label, or the head of a plain text."""
    first = int(row.is_label.int().argmax())
    return first or min(OPENING, len(row) // 2)


def _sample(subject: Subject, row: EncodedRow, domain: str, max_new_tokens: int) -> Sample:
    model, tokenizer, length = subject.model, subject.tokenizer, opening(row)
    ids = row.input_ids[None, :length].long()

    def text(tokens: Tensor) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    def answer() -> str:
        return text(continue_ids(model, tokenizer, ids, Sampling(max_new_tokens=max_new_tokens)))

    with of_domain(model, domain) if needs_domain(injected(model).moe) else nullcontext():
        with adapters_off(model):
            off = answer()
        on = answer()
    said = row.input_ids[length:][row.is_label[length:]]
    return Sample(
        domain=domain,
        prompt=str(tokenizer.decode(ids[0])),
        reference=text(said),
        off=off,
        on=on,
    )
