"""Which tokens of a prompt are answers that the assistant has given before: those that training would have labelled."""

import warnings
from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lmoe.data.chats.template import ChatTemplate
from lmoe.data.encode import token_labels
from lmoe.data.rows.row import Message, Row
from lmoe.errors import DataError
from lmoe.vocabulary import TrainOn

NOT_FOUND = (
    "a router that decides by the prompt takes this whole conversation for the prompt, because the chat template does "
    "not show where its earlier answers stand"
)


def earlier_answers(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] | None,
    ids: Tensor,
    *,
    muted: Collection[int] = (),
    train_on: TrainOn = TrainOn.assistant,
) -> Tensor | None:
    """(T,) bool: tokens of earlier answers; None: there are none. Where they cannot be found that is warned of.

    Args:
        messages: the conversation that is to be answered.
        tools: functions that the assistant may call.
        ids: (T,) its tokens under the chat template, with the prompt for an answer.
        muted: indices of turns of the assistant that training would not have labelled.
        train_on: the turns that training has labelled: with `last` the earlier ones were a part of the prompt.
    """
    answered = any(message["role"] == "assistant" and i not in muted for i, message in enumerate(messages))
    if not answered or train_on is not TrainOn.assistant or not tokenizer.chat_template:
        return None
    shown = tuple(tools) if tools else None
    row = Row(where="this conversation", domain="", messages=tuple(messages), muted=frozenset(muted), tools=shown)
    found = None
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        try:
            found = _found(tokenizer, row, ids)
        except DataError:
            found = None
    if found is None:
        warnings.warn(NOT_FOUND, stacklevel=2)
    return found


def _found(tokenizer: PreTrainedTokenizerFast, row: Row, ids: Tensor) -> Tensor | None:
    """(T,) bool; None: the conversation is rendered otherwise where it is to be answered.

    Raises:
        DataError: turns of the assistant cannot be told apart.
    """
    rendered = ChatTemplate.of(tokenizer).render(row)
    messages: list[Any] = list(row.messages or ())
    tools: list[Any] | None = None if row.tools is None else list(row.tools)
    text = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)
    end = rendered.spans[-1][1] if rendered.spans else 0
    if not isinstance(text, str) or text[:end] != rendered.text[:end]:
        return None
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    if tokens["input_ids"] != ids.tolist():
        return None
    answers = token_labels(tokens["offset_mapping"], rendered.spans)
    answers[:1] = False  # the first token of a row has no label
    return answers if bool(answers.any()) else None
