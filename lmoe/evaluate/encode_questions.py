"""Tokenise questions with each of their choices, and label the tokens whose likelihood is compared.

A question and a choice are rendered together and tokenised once; the choice's tokens are found by their characters.
Tokenising the two apart would be off where a token reaches across the border.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lmoe.data.chats.spans import Span
from lmoe.data.chats.template import ChatTemplate, Rendered
from lmoe.data.encode import CHUNK, token_labels, token_places
from lmoe.data.encoded import EncodedRow, EncodedRows
from lmoe.errors import DataError
from lmoe.evaluate.questions import ChoiceRow

BARE = "Question: {question}\nAnswer:"
"""What stands before a blank and the choice where there is no chat template, or none is wanted."""


@dataclass(slots=True, frozen=True)
class EncodedChoices:
    """Questions times choices, the choices of a question behind one another.

    Args:
        rows: one a choice.
        questions: those that were encoded.
        too_long: questions left out because a choice of theirs passes the longest row.
    """

    rows: EncodedRows
    questions: list[ChoiceRow]
    too_long: int


def encode_choices(
    questions: Sequence[ChoiceRow],
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate | None,
    max_length: int,
    domain: int = 0,
) -> EncodedChoices:
    """Tokenise every choice of every question.

    Args:
        tokenizer: one with character offsets ("fast").
        template: renders question and choice as a chat; None: bare text.
        max_length: longest row in tokens.
        domain: index that all rows get.

    Raises:
        DataError: a slow tokenizer, a template that refuses a question, a choice without a token of its own, or
            nothing left.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise DataError(
            f"{type(tokenizer).__name__} gives no character offsets, so the tokens of a choice cannot be found. "
            "Use a tokenizer with a tokenizer.json (a fast one)"
        )
    kept: list[EncodedRow] = []
    fitting: list[ChoiceRow] = []
    longest = 0
    for question, choices in _tokenised(questions, tokenizer, template, domain):
        longest = max(longest, *(len(choice) for choice in choices))
        if max(len(choice) for choice in choices) <= max_length:
            kept += choices
            fitting.append(question)
    if not fitting:
        raise DataError(
            f"{questions[0].where}: all {len(questions)} questions are longer than {max_length} tokens (the longest "
            f"has {longest}); raise `max_length`"
        )
    return EncodedChoices(EncodedRows.of(kept), fitting, len(questions) - len(fitting))


def choice_spans(offsets: Sequence[Sequence[Span]], spans: Sequence[Span]) -> list[Span]:
    """The spans, begun early enough for all choices to be scored behind the same text.

    Where a token of one choice reaches back across its border, that token counts, and so do those that the other
    choices have in its place.

    Args:
        offsets: (start, end) characters of the tokens of each choice of one question.
        spans: where each choice stands.
    """
    firsts = []
    for places, span in zip(offsets, spans, strict=True):
        starts = token_places(places)[0]
        labels = token_labels(places, [span])
        firsts += [int(starts[int(labels.int().argmax())])] if bool(labels.any()) else []
    edge = min(firsts, default=0)
    return [(min(edge, start), end) for start, end in spans]


def _tokenised(
    questions: Sequence[ChoiceRow], tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None, domain: int
) -> Iterator[tuple[ChoiceRow, list[EncodedRow]]]:
    for first in range(0, len(questions), CHUNK):
        chunk = questions[first : first + CHUNK]
        rendered = [[_render(row, choice, template) for choice in row.choices] for row in chunk]
        tokens = tokenizer(
            [one.text for row in rendered for one in row],
            add_special_tokens=template is None,
            return_offsets_mapping=True,
            verbose=False,
        )
        encoded = iter(zip(tokens["input_ids"], tokens["offset_mapping"], strict=True))
        for row, texts in zip(chunk, rendered, strict=True):
            ids, offsets = zip(*(next(encoded) for _ in texts), strict=True)
            spans = choice_spans(offsets, [one.spans[0] for one in texts])
            labels = [token_labels(places, [span]) for places, span in zip(offsets, spans, strict=True)]
            if any(not bool(label[1:].any()) for label in labels):
                raise DataError(f"{row.where}: a choice has no token of its own behind the first of the row")
            yield (
                row,
                [
                    EncodedRow(torch.tensor(own, dtype=torch.int32), label, domain)
                    for own, label in zip(ids, labels, strict=True)
                ],
            )


def _render(row: ChoiceRow, choice: str, template: ChatTemplate | None) -> Rendered:
    if template is None:
        before = BARE.format(question=row.question)
        return Rendered(f"{before} {choice}", [(len(before), len(before) + 1 + len(choice))])
    turns = [{"role": "user", "content": row.question}, {"role": "assistant", "content": choice}]
    return template.render_answer(turns, row.where)
