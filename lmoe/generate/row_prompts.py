"""What a row asks, whatever its format: the conversation up to its last answer, or a plain text to be continued."""

import json
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lmoe.config.data import DataConfig
from lmoe.data.encode import prefixed
from lmoe.data.rows.row import Message, Row
from lmoe.data.rows.sources import read_rows
from lmoe.errors import DataError
from lmoe.generate.conversation import Asked, asked, asked_text
from lmoe.generate.earlier_answers import earlier_answers
from lmoe.vocabulary import TrainOn


@dataclass(slots=True, frozen=True, kw_only=True)
class RowPrompt:
    """What is asked of one row.

    Args:
        domain: of the row.
        prompt: messages, or a plain text.
        tools: functions that the assistant may call.
        reference: the row's own answer, and where it calls tools the calls as JSON; None where the row has none.
        ignored: fields of the row that nothing is made of.
        muted: indices of the assistant's turns in the prompt that carry no label in training.
    """

    domain: str
    prompt: list[Message] | str
    tools: tuple[dict[str, Any], ...] | None = None
    reference: str | None = None
    ignored: tuple[str, ...] = ()
    muted: frozenset[int] = frozenset()

    def asked(self, tokenizer: PreTrainedTokenizerBase) -> Asked:
        """The prompt with its tokens.

        Raises:
            DataError: nothing is asked, or the chat template refuses it.
        """
        if not self.prompt:
            raise DataError("no prompt: nothing stands before the answer")
        if isinstance(self.prompt, str):
            if not self.prompt.strip():
                raise DataError("no prompt: the text is blank")
            return asked_text(tokenizer, self.prompt)
        return asked(tokenizer, self.prompt, self.tools)

    def answers(self, tokenizer: PreTrainedTokenizerBase, prompt: Asked, train_on: TrainOn) -> Tensor | None:
        """(T,) bool: tokens of the prompt that are earlier answers (`earlier_answers`); None: there are none.

        Args:
            prompt: as `asked` gives it.
            train_on: the turns that the model has learnt.
        """
        return earlier_answers(tokenizer, prompt, muted=self.muted, train_on=train_on)


def row_prompts(source: str, data: DataConfig | None = None) -> list[RowPrompt]:
    """What the rows of a JSONL file, a folder of them or a hub data set ask.

    Args:
        data: section of the run that answers: names of its columns, and what stands before its prompts; None: there is
            no run.

    Raises:
        DataError: rows that cannot be read, or none.
    """
    own = data or DataConfig()
    rows = read_rows(source, columns=own.columns_of(source))
    return [prompt_of(prefixed(row, own.prompt_prefix)) for row in rows]


def prompt_of(row: Row) -> RowPrompt:
    """What a row asks: of a conversation that ends with the assistant all but that turn, of another one all of it.

    Of a pair of answers the preferred one stands for the row's own; one that is labelled bad is no reference.
    """
    if row.messages is None:
        return RowPrompt(domain=row.domain, prompt=row.text or "", ignored=row.ignored)
    turns, own = [*row.messages, *(row.chosen or ())], row.answer
    if turns and turns[-1]["role"] == "assistant":
        last = turns.pop()
        own = own if row.label is False else _answer_text(last) or own
    return RowPrompt(
        domain=row.domain, prompt=turns, tools=row.tools, reference=own, ignored=row.ignored, muted=row.muted
    )


def _answer_text(turn: Message) -> str:
    calls = turn.get("tool_calls")
    parts = [turn["content"], json.dumps(calls, ensure_ascii=False) if calls else ""]
    return "\n".join(part for part in parts if part)
