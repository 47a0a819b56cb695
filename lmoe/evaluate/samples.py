"""What the model writes after prompts of the rows, with the adapters off and on."""

from torch import Tensor

from lmoe.backbones.load import context_length
from lmoe.data.encoded import EncodedRow, opening
from lmoe.data.split import first_of_each
from lmoe.evaluate.loss_rows import EvaluationRows
from lmoe.evaluate.results import Sample
from lmoe.evaluate.subject import Subject
from lmoe.generate.batches import BatchAnswers, batches_of
from lmoe.generate.generate import Sampling
from lmoe.injection.record import injected
from lmoe.injection.tracing import adapters_off
from lmoe.rules.routers import needs_domain


def samples(subject: Subject, data: EvaluationRows, *, count: int, max_new_tokens: int) -> list[Sample]:
    """Greedy answers to the first prompts of each domain that leave room for one, in batches.

    Args:
        count: prompts of each domain.
        max_new_tokens: longest answer, in tokens.
    """
    rows, limit = data.rows, context_length(subject.model)
    fits = [i for i in range(len(rows)) if limit is None or opening(rows[i]) < limit]
    names = rows.domains[fits].tolist()
    picked = [rows[fits[i]] for i in sorted(first_of_each(names, count), key=lambda i: (names[i], i))]
    chosen = [row.pair()[0] if row.second else row for row in picked]
    domains = [data.domains[row.domain] for row in chosen]
    prompts = [row.input_ids[: opening(row)].long() for row in chosen]
    sampling = Sampling(max_new_tokens=max_new_tokens)
    answering = BatchAnswers(model=subject.model, tokenizer=subject.tokenizer, sampling=sampling)
    by_domain = needs_domain(injected(subject.model).moe)

    def text(tokens: Tensor) -> str:
        return str(subject.tokenizer.decode(tokens, skip_special_tokens=True))

    def answers() -> list[str]:
        found: dict[int, str] = {}
        for batch in batches_of([len(prompt) for prompt in prompts], subject.batch_size):
            named = [domains[i] for i in batch] if by_domain else None
            told = answering.answer([prompts[i] for i in batch], numbers=batch, domains=named)
            found |= {i: text(answer.ids) for i, answer in zip(batch, told, strict=True)}
        return [found[i] for i in range(len(prompts))]

    def answer_of(row: EncodedRow) -> str:
        first = opening(row)
        return text(row.input_ids[first:][row.is_label[first:]])

    def compared(row: EncodedRow) -> dict[str, str]:
        """What a row says next: an answer, the answers of a pair, or a bad answer."""
        if row.second:
            good, bad = row.pair()
            return {"reference": answer_of(good), "rejected": answer_of(bad)}
        return {"reference": answer_of(row)} if row.good else {"reference": "", "rejected": answer_of(row)}

    with adapters_off(subject.model):
        off = answers()
    on = answers()
    return [
        Sample(
            domain=domains[i],
            prompt=str(subject.tokenizer.decode(prompts[i])),
            off=off[i],
            on=on[i],
            **compared(row),
        )
        for i, row in enumerate(picked)
    ]
