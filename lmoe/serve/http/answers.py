"""Answers as OpenAI's API writes them: whole, and in chunks of a stream."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol
from uuid import uuid4

from lmoe import __version__
from lmoe.serve.answer import Answer, Piece
from lmoe.serve.request import Decided, ExpertState, Token
from lmoe.serve.text import TokenTexts

if TYPE_CHECKING:
    from lmoe.serve.http.service import Service

Json = dict[str, Any]
IMPOSSIBLE = -9999.0
"""In place of a log-probability that JSON cannot hold."""
DONE = b"data: [DONE]\n\n"


class Shape(Protocol):
    """How the answers to one request are written."""

    def whole(self, answers: Sequence[Answer], pieces: Sequence[Sequence[Piece]], used: Json, decided: bool) -> Json:
        """The response of one that is not streamed."""
        ...

    def first(self, index: int) -> Json | None:
        """The chunk with which an answer begins; None: it has none."""
        ...

    def chunk(self, index: int, piece: Piece) -> Json:
        """The next piece of an answer."""
        ...

    def last(self, index: int, answer: Answer, decided: bool) -> Json:
        """The chunk that says why an answer has ended."""
        ...

    def usage(self, used: Json) -> Json:
        """The chunk of a stream that says what was used."""
        ...


@dataclass(slots=True, kw_only=True)
class _Common:
    model: str
    texts: TokenTexts
    id: str
    created: int = field(default_factory=lambda: int(time.time()))

    def _head(self, kind: str, choices: Sequence[Json]) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": [*choices]}

    def _with_decided(self, body: Json, answers: Sequence[Answer], decided: bool) -> Json:
        """The body with what mixed its answers: of one beside it, of several each in its choice."""
        if decided and len(answers) == 1:
            body["lmoe"] = decided_json(answers[0].decided)
        elif decided:
            for choice, answer in zip(body["choices"], answers, strict=True):
                choice["lmoe"] = decided_json(answer.decided) | choice.get("lmoe", {})
        return body


@dataclass(slots=True, kw_only=True)
class ChatShape(_Common):
    """Of chat completions.

    Args:
        model: as the request named it.
        texts: of tokens, for log-probabilities.
    """

    id: str = field(default_factory=lambda: f"chatcmpl-{uuid4().hex}")

    def whole(self, answers: Sequence[Answer], pieces: Sequence[Sequence[Piece]], used: Json, decided: bool) -> Json:
        """The response of one that is not streamed."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": "".join(p.text for p in own), "refusal": None},
                "logprobs": self._logprobs(own) if answer.request.top_logprobs is not None else None,
                "finish_reason": answer.finish,
                **weighed_json(own),
            }
            for index, (answer, own) in enumerate(zip(answers, pieces, strict=True))
        ]
        return self._with_decided(self._head("chat.completion", choices) | {"usage": used}, answers, decided)

    def first(self, index: int) -> Json | None:
        """The chunk with which an answer begins."""
        return self._chunk(index, {"role": "assistant", "content": ""})

    def chunk(self, index: int, piece: Piece) -> Json:
        """The next piece of an answer."""
        chunk = self._chunk(index, {"content": piece.text}, self._logprobs([piece]) if scored(piece) else None)
        chunk["choices"][0] |= weighed_json([piece])
        return chunk

    def last(self, index: int, answer: Answer, decided: bool) -> Json:
        """The chunk that says why an answer has ended."""
        chunk = self._chunk(index, {})
        chunk["choices"][0]["finish_reason"] = answer.finish
        return self._with_decided(chunk, [answer], decided)

    def usage(self, used: Json) -> Json:
        """The chunk of a stream that says what was used."""
        return self._head("chat.completion.chunk", []) | {"usage": used}

    def _chunk(self, index: int, delta: Json, logprobs: Json | None = None) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
        return self._head("chat.completion.chunk", [choice])

    def _logprobs(self, pieces: Sequence[Piece]) -> Json:
        tokens = [token for piece in pieces for _, token in piece.tokens]
        content = [
            self._scored(token.id, token.logprob)
            | {"top_logprobs": [self._scored(number, logprob) for number, logprob in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _scored(self, token: int, logprob: float | None) -> Json:
        found = self.texts.of(token)
        return {"token": found.text, "logprob": finite(logprob), "bytes": list(found.content)}


@dataclass(slots=True, kw_only=True)
class CompletionShape(_Common):
    """Of completions.

    Args:
        model, texts: as of `ChatShape`.
        before: text in front of each answer, where the request asks to have its prompt echoed.
    """

    id: str = field(default_factory=lambda: f"cmpl-{uuid4().hex}")
    before: Sequence[str] = ()

    def whole(self, answers: Sequence[Answer], pieces: Sequence[Sequence[Piece]], used: Json, decided: bool) -> Json:
        """The response of one that is not streamed."""
        choices = [
            {
                "index": index,
                "text": self._before(index) + "".join(piece.text for piece in own),
                "logprobs": self._logprobs(own) if answer.request.top_logprobs is not None else None,
                "finish_reason": answer.finish,
                **weighed_json(own),
            }
            for index, (answer, own) in enumerate(zip(answers, pieces, strict=True))
        ]
        return self._with_decided(self._head("text_completion", choices) | {"usage": used}, answers, decided)

    def first(self, index: int) -> Json | None:
        """The chunk with the echoed prompt; None: it is not echoed."""
        return self.chunk(index, Piece(self._before(index))) if self._before(index) else None

    def chunk(self, index: int, piece: Piece) -> Json:
        """The next piece of an answer."""
        logprobs = self._logprobs([piece]) if scored(piece) else None
        choice = {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": None}
        return self._head("text_completion", [choice | weighed_json([piece])])

    def last(self, index: int, answer: Answer, decided: bool) -> Json:
        """The chunk that says why an answer has ended."""
        chunk = self.chunk(index, Piece(""))
        chunk["choices"][0]["finish_reason"] = answer.finish
        return self._with_decided(chunk, [answer], decided)

    def usage(self, used: Json) -> Json:
        """The chunk of a stream that says what was used."""
        return self._head("text_completion", []) | {"usage": used}

    def _before(self, index: int) -> str:
        return self.before[index] if self.before else ""

    def _logprobs(self, pieces: Sequence[Piece]) -> Json:
        tokens = [entry for piece in pieces for entry in piece.tokens]
        return {
            "tokens": [self.texts.of(token.id).text for _, token in tokens],
            "token_logprobs": [finite(token.logprob) for _, token in tokens],
            "top_logprobs": [self._top(token) for _, token in tokens],
            "text_offset": [offset for offset, _ in tokens],
        }

    def _top(self, token: Token) -> dict[str, float]:
        return {self.texts.of(number).text: finite(logprob) for number, logprob in reversed(token.top)}


def finite(logprob: float | None) -> float:
    """A log-probability that JSON can hold."""
    return logprob if logprob is not None and math.isfinite(logprob) else IMPOSSIBLE


def scored(piece: Piece) -> bool:
    """Whether the tokens of a piece come with log-probabilities."""
    return any(token.logprob is not None for _, token in piece.tokens)


def weighed_json(pieces: Sequence[Piece]) -> Json:
    """What a choice says of its tokens: where each begins, in characters of the answer, and what the experts weighed
    where it was chosen; nothing where that was not asked for."""
    tokens = [
        {
            "id": token.id,
            "offset": offset,
            "weights": {name: round(weight, 6) for name, weight in token.weights.items() if weight},
        }
        for piece in pieces
        for offset, token in piece.tokens
        if token.weights is not None
    ]
    return {"lmoe": {"tokens": tokens}} if tokens else {}


def usage_json(prompt: int, generated: int) -> Json:
    """Tokens of the prompts and of all answers."""
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


def decided_json(decided: Decided) -> Json:
    """What mixed an answer."""

    def rounded(shares: Mapping[str, float] | None) -> Json | None:
        return None if shares is None else {name: round(share, 6) for name, share in shares.items()}

    return {"weights": rounded(decided.weights), "load": rounded(decided.load)}


def event(body: Json | Literal["done"]) -> bytes:
    """One event of a stream."""
    if body == "done":
        return DONE
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


def model_json(name: str, created: int) -> Json:
    """A model of the list of models."""
    return {"id": name, "object": "model", "created": created, "owned_by": "lmoe"}


def list_json(items: Sequence[Json]) -> Json:
    """A list of things."""
    return {"object": "list", "data": [*items]}


def server_json(service: "Service", *, admin: bool) -> Json:
    """What a server is and lets do, as clients want to know it that show it to people.

    Args:
        admin: who asks may change experts.
    """
    mixable, settings = service.engine.mixable, service.settings
    return {
        "object": "server",
        "version": __version__,
        "model": settings.name,
        "chat": service.prompts.has_template,
        "context": service.engine.context,
        "max_tokens": settings.max_tokens,
        "own_mixture": service.engine.own_mixture,
        "own_weights": None if mixable.own_weights is None else dict(mixable.own_weights),
        "experts": list(mixable.names),
        "weights_by_request": mixable.by_request,
        "experts_change": mixable.changes,
        "admin": admin,
        "upload_size": settings.upload_size,
    }


def expert_json(expert: ExpertState) -> Json:
    """An expert as the administration sees it."""
    return {
        "object": "expert",
        "name": expert.name,
        "loaded": expert.loaded,
        "requests": expert.requests,
        "version": expert.version,
        "can_roll_back": expert.can_roll_back,
        "rank": expert.rank,
    }
