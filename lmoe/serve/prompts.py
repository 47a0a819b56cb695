"""Prompts of requests: messages, texts and tokens of clients as token ids.

A tokenizer must not be used by two threads at once. What a client sends may be long, so that it is read in one thread
of its own, by a copy of the tokenizer.
"""

import asyncio
import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from transformers import PreTrainedTokenizerBase

from lmoe.adapter.answer_end import end_tokens
from lmoe.errors import DataError
from lmoe.generate.conversation import asked, text_ids
from lmoe.generate.earlier_answers import earlier_answers
from lmoe.injection.batch_info import reads_prompts
from lmoe.serve.request import Refused, RefusedError
from lmoe.serve.text import TokenTexts
from lmoe.vocabulary import TrainOn

if TYPE_CHECKING:
    from lmoe.generate.speaker import Speaker

Found = TypeVar("Found")


@dataclass(slots=True, frozen=True)
class Prompt:
    """What an answer follows.

    Args:
        ids: its tokens.
        earlier: whether each belongs to an earlier answer; None: all of it is one prompt.
    """

    ids: list[int]
    earlier: list[bool] | None = None


@dataclass(slots=True, kw_only=True)
class Prompts:
    """Makes prompts for one model.

    Args:
        tokenizer: of the model.
        ends: ids that end an answer.
        train_on: the turns that the model has learnt.
        by_prompt: whether its routers decide by the prompt.
    """

    tokenizer: PreTrainedTokenizerBase
    ends: frozenset[int]
    train_on: TrainOn = TrainOn.assistant
    by_prompt: bool = False
    _reading: PreTrainedTokenizerBase = field(init=False)
    _thread: ThreadPoolExecutor = field(init=False)
    texts: TokenTexts = field(init=False)
    """Of single tokens."""

    def __post_init__(self) -> None:
        self._reading = copy.deepcopy(self.tokenizer)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lmoe prompts")
        self.texts = TokenTexts(self.tokenizer)

    @classmethod
    def of(cls, speaker: "Speaker") -> "Prompts":
        """Make prompts for what speaks."""
        return cls(
            tokenizer=speaker.tokenizer,
            ends=frozenset(end_tokens(speaker.model, speaker.tokenizer)),
            train_on=speaker.train_on,
            by_prompt=reads_prompts(speaker.model),
        )

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        return len(self.tokenizer)

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template, without which texts can be continued and conversations cannot."""
        return self.tokenizer.chat_template is not None

    async def conversation(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None
    ) -> Prompt:
        """Tokens of a conversation under the chat template, with the prompt for an answer.

        Args:
            messages: with arguments of calls as objects.
            tools: functions that the assistant may call.

        Raises:
            RefusedError: the template refuses it.
        """
        return await self._in_thread(lambda: self._conversation(messages, tools))

    async def text(self, text: str) -> Prompt:
        """Tokens of a text that is to be continued."""
        return await self._in_thread(lambda: Prompt(text_ids(self._reading, text)[0].tolist()))

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, work: Callable[[], Found]) -> Found:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _conversation(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None) -> Prompt:
        try:
            found = asked(self._reading, messages, tools)
        except DataError as error:
            raise RefusedError(Refused.invalid, str(error), "messages") from None
        earlier = earlier_answers(self._reading, found, train_on=self.train_on) if self.by_prompt else None
        return Prompt(found.ids.tolist(), None if earlier is None else earlier.tolist())
