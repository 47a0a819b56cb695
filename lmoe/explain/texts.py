"""Texts to explain: a prompt with the answer that a model gives now, or rows as training sees them."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmoe.backbones.load import context_length
from lmoe.config.data import DataConfig
from lmoe.data.account import Account
from lmoe.data.chats.template import ChatTemplate
from lmoe.data.encode import Encoder
from lmoe.data.encoded import EncodedRow
from lmoe.data.encoded import opening as opening_of
from lmoe.data.rows.row import Row
from lmoe.data.show import decoded_texts, special_ids
from lmoe.errors import ConfigError, DataError, LmoeError
from lmoe.explain.explanation import TextTokens
from lmoe.generate.conversation import asked
from lmoe.generate.earlier_answers import earlier_answers
from lmoe.generate.generate import Sampling, Turn, continue_ids, room_for_answer
from lmoe.ops.lengths import opening_length
from lmoe.vocabulary import RowKind, TrainOn

MOST_TOKENS = 1024
"""Longest text: each of its tokens is computed once for each expert."""


def prompted(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Turn],
    *,
    name: str = "prompt",
    max_new_tokens: int,
    most: int = MOST_TOKENS,
    domain: str | None = None,
    train_on: TrainOn = TrainOn.assistant,
) -> TextTokens:
    """A prompt, and the likeliest answer of a model to it, token by token.

    Args:
        prompt: what the user says, or a conversation.
        max_new_tokens: longest answer; 0: none.
        most: longest prompt with its answer; a longer answer is not asked for.
        domain: of the prompt; inside `lmoe.injection.tracing.domain` where the router goes by it.
        train_on: the turns of conversations that the model has learnt.

    Raises:
        DataError: the prompt is empty, holds something that is no turn, is longer than `most` or than the backbone's
            context, or is refused by the chat template.
    """
    found = asked(tokenizer, prompt)
    ids, length = found.ids, len(found.ids)
    wanted = min(max_new_tokens, max(most - length, 0))
    room_for_answer(model, length, wanted)
    if length > most:
        raise DataError(
            f"the prompt has {length:,} tokens, and at most {most:,} are explained, because each costs a forward for "
            "each expert; shorten it, or raise `max_tokens`"
        )
    answers = earlier_answers(tokenizer, found, train_on=train_on)
    is_answer = torch.zeros(length, dtype=torch.bool) if answers is None else answers.cpu()
    if wanted:
        new = continue_ids(model, tokenizer, ids[None], Sampling(max_new_tokens=wanted), answers=answers).cpu()
        ids = torch.cat([ids.cpu(), new])
        is_answer = torch.cat([is_answer, torch.ones(len(new), dtype=torch.bool)])
    else:
        ids = ids.cpu()
    return text_of(tokenizer, ids, is_answer, name=name, generated=bool(wanted), domain=domain)


def kept_tokens(model: PreTrainedModel, most: int) -> int:
    """Tokens of a row that are kept where at most so many are asked for: no more than the backbone's context holds."""
    limit = context_length(model)
    return most if limit is None else min(most, limit)


def of_rows(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    most: int = MOST_TOKENS,
    data: DataConfig | None = None,
) -> Iterator[TextTokens]:
    """Rows with their own answers, as training sees them; of a pair the preferred one.

    Args:
        tokenizer: with the template of the run.
        most: longest text (`kept_tokens`); a longer one is cut.
        data: section of the run, whose prefix of prompts and learnt turns count; None: there is no run.

    Raises:
        DataError: a row that cannot be rendered.
    """
    learnt = None if data is None else data.max_length  # of a longer row training has not seen the rest
    data = data or DataConfig()
    template = ChatTemplate.of(tokenizer, train_on=data.train_on, day=data.template_date)
    encoders = {
        kind: Encoder(tokenizer, template, most, prompt_prefix=data.prompt_prefix, kind=kind)
        for kind in (RowKind.answers, RowKind.pairs)
    }
    for row in rows:
        kind = RowKind.pairs if row.chosen is not None else RowKind.answers
        [found] = encoders[kind].tokenise([row], Account())
        if isinstance(found, LmoeError):
            raise found
        ids = torch.from_numpy(found.input_ids).long()
        labels = torch.from_numpy(found.is_label)
        if not len(ids):
            raise DataError(f"{row.where}: no text")
        of_text = opening_length(len(ids[:learnt])) if labels[0] else 0
        yield text_of(tokenizer, ids, labels, name=row.where, opening=of_text, domain=row.domain, most=most)


def of_encoded(
    tokenizer: PreTrainedTokenizerBase, row: EncodedRow, *, name: str, domain: str, most: int = MOST_TOKENS
) -> TextTokens:
    """A row that is tokenised already."""
    of_text = opening_of(row) if row.is_label[0] else 0
    return text_of(tokenizer, row.input_ids.long(), row.is_label, name=name, opening=of_text, domain=domain, most=most)


def text_of(
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    answer: Tensor,
    *,
    name: str,
    opening: int = 0,
    generated: bool = False,
    domain: str | None = None,
    most: int = MOST_TOKENS,
) -> TextTokens:
    """A text from its tokens.

    Args:
        ids: (T,) int64.
        answer: (T,) bool: tokens of answers.
        opening: as of `TextTokens`, in the whole text.
        most: tokens that are kept.
    """
    cut = max(0, len(ids) - most)
    ids, answer = ids[:most], answer[:most].bool().clone()
    answer[:1] = False  # nothing predicts it
    special = special_ids(tokenizer)
    numbers = ids.tolist()
    return TextTokens(
        name=name,
        ids=ids,
        texts=tuple(decoded_texts(numbers, tokenizer)),
        special=tuple(number in special for number in numbers),
        answer=answer,
        opening=opening,
        generated=generated,
        domain=domain,
        cut=cut,
    )


def same_tokens(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, named: str) -> None:
    """Refuse to compare models whose tokens differ.

    Args:
        named: what the other one is of, for the message.

    Raises:
        ConfigError: another vocabulary.
    """
    if one.get_vocab() != other.get_vocab():
        raise ConfigError(
            f"{named} has another vocabulary, so its numbers would be of other tokens; compare runs of one base"
        )
