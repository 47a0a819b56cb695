"""One answer while it is computed: the engine's tokens as pieces of text, cut before a stop string."""

import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lmoe.serve.prompts import Prompts
from lmoe.serve.request import Decided, Engine, Request, Running, Token
from lmoe.serve.stop import StopStrings
from lmoe.serve.text import Detokeniser

Finish = Literal["stop", "length"]


@dataclass(slots=True, frozen=True)
class Piece:
    """The next text of an answer.

    Args:
        text: that can be shown.
        tokens: that made it, where log-probabilities or weights of experts were asked for, each with the characters of
            the answer before it.
    """

    text: str
    tokens: Sequence[tuple[int, Token]] = ()


@dataclass(slots=True, kw_only=True)
class Answer:
    """An answer under way.

    Args:
        request: what was asked.
        running: the engine's work at it.
        prompts: whose tokens they are.
        stops: stop strings.
        submitted: when, on the clock of time.monotonic.
        generated: tokens so far.
        first, last: when the first and the latest token came.
        finish: why it has ended; None: it has not.
    """

    request: Request
    running: Running
    prompts: Prompts
    stops: Sequence[str] = ()
    submitted: float = field(default_factory=time.monotonic)
    generated: int = 0
    first: float | None = None
    last: float | None = None
    finish: Finish | None = None
    _waiting: list[tuple[int, Token]] = field(default_factory=list)
    _made: int = 0
    _shown: int = 0

    @classmethod
    async def begin(cls, engine: Engine, request: Request, prompts: Prompts, stops: Sequence[str]) -> "Answer":
        """Hand a request to the engine.

        Raises:
            RefusedError: the engine does not take it.
        """
        submitted = time.monotonic()
        running = await engine.submit(request)
        return cls(request=request, running=running, prompts=prompts, stops=stops, submitted=submitted)

    @property
    def decided(self) -> Decided:
        """What mixed it; whole once it has ended."""
        return self.running.decided

    def cancel(self) -> None:
        """Free its row in the batch."""
        self.running.cancel()

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Yields its text as it comes; its row is free as soon as it has ended or nobody reads on.

        Raises:
            RefusedError: the engine has failed at it.
        """
        text, stops = Detokeniser(self.prompts.tokenizer), StopStrings(self.stops)
        ended = False
        try:
            async for token in self.running.tokens():
                self._count()
                if token.id in self.request.end_tokens:
                    ended = True
                    break
                self._waiting.append((self._made, token))
                made = text.push(token.id)
                self._made += len(made)
                if (piece := self._piece(stops.push(made))) is not None:
                    yield piece
                if stops.found:
                    break
            if not stops.found and (piece := self._piece(stops.push(text.flush()))) is not None:
                yield piece
            if not stops.found and (piece := self._piece(stops.flush(), last=True)) is not None:
                yield piece
            self.finish = "stop" if ended or stops.found else "length"
        finally:
            self.cancel()

    def _count(self) -> None:
        self.last = time.monotonic()
        self.first = self.first or self.last
        self.generated += 1

    def _piece(self, text: str, *, last: bool = False) -> Piece | None:
        """What is shown next, with the tokens that began in it."""
        self._shown += len(text)
        if self.request.top_logprobs is None and not self.request.expert_weights:
            self._waiting.clear()
            return Piece(text) if text else None
        tokens = [entry for entry in self._waiting if last or entry[0] < self._shown]
        self._waiting = self._waiting[len(tokens) :]
        return Piece(text, tokens) if text or tokens else None
