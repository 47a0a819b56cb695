"""Which tokens of a prompt are answers that the assistant has given before: those that training would have labelled."""

import warnings
from collections.abc import Collection
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lmoe.data.chats.template import ChatTemplate
from lmoe.data.encode import token_labels
from lmoe.data.rows.row import Row
from lmoe.errors import DataError
from lmoe.generate.conversation import Asked
from lmoe.vocabulary import TrainOn

NOT_FOUND = (
    "a router that decides by the prompt takes this whole conversation for the prompt, because the chat template does "
    "not show where its earlier answers stand"
)


def earlier_answers(
    tokenizer: PreTrainedTokenizerBase,
    asked: Asked,
    *,
    muted: Collection[int] = (),
    train_on: TrainOn = TrainOn.assistant,
) -> Tensor | None:
    """(T,) bool: tokens of earlier answers; None: there are none. Where they cannot be found that is warned of.

    Args:
        asked: the conversation that is to be answered.
        muted: indices of turns of the assistant that training would not have labelled.
        train_on: the turns that training has labelled: with `last` the earlier ones were a part of the prompt.
    """
    answered = any(message["role"] == "assistant" and i not in muted for i, message in enumerate(asked.messages))
    if not answered or train_on is not TrainOn.assistant or not tokenizer.chat_template:
        return None
    found = None
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        try:
            found = _found(tokenizer, asked, frozenset(muted))
        except DataError:
            found = None
    if found is None:
        warnings.warn(NOT_FOUND, stacklevel=2)
    return found


def _found(tokenizer: PreTrainedTokenizerFast, asked: Asked, muted: frozenset[int]) -> Tensor | None:
    """(T,) bool; None: the conversation is rendered otherwise where it is to be answered.

    Raises:
        DataError: turns of the assistant cannot be told apart.
    """
    tools = None if asked.tools is None else tuple(asked.tools)
    row = Row(where="this conversation", domain="", messages=tuple(asked.messages), muted=muted, tools=tools)
    rendered = ChatTemplate.of(tokenizer).render(row)
    given: list[Any] = list(asked.given)
    text = tokenizer.apply_chat_template(given, tools=asked.tools, add_generation_prompt=True, tokenize=False)  # type: ignore[arg-type]
    end = rendered.spans[-1][1] if rendered.spans else 0
    if not isinstance(text, str) or text[:end] != rendered.text[:end]:
        return None
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    if tokens["input_ids"] != asked.ids.tolist():
        return None
    answers = token_labels(tokens["offset_mapping"], rendered.spans)
    answers[:1] = False  # the first token of a row has no label
    return answers if bool(answers.any()) else None
