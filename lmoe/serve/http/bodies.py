"""Bodies of requests: which fields there are, what they may hold, and precise words where they do not."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from lmoe.config.keys import near
from lmoe.errors import LmoeError
from lmoe.files.small_file import Reader
from lmoe.files.wording import shown
from lmoe.generate.generate import COLDEST, MOST_TOKENS
from lmoe.serve.http.problem import Problem

MOST_STOPS, LONGEST_STOP = 4, 1_000
MOST_BIASES = 1_024
MOST_LOGPROBS = 20
TOKENS = "tokens"
"""Asks for what the experts weigh at each token."""
SHOWN = 8
"""Problems of a body that are said."""
WITHOUT_EFFECT = frozenset(
    {
        *("user", "metadata", "store", "parallel_tool_calls", "service_tier", "safety_identifier"),
        *("prompt_cache_key", "prompt_cache_retention"),
    }
)
"""OpenAI's fields that are taken and do nothing here: docs/SERVING.md lists them."""
OF_MESSAGES = frozenset({"refusal", "annotations", "audio"})
"""Fields of messages, as clients give back those that they got, that do nothing."""
REFUSED: Mapping[str, str] = {
    "response_format": "answers are plain text: no grammar holds them to a format; ask for the format in the prompt",
    "functions": "an older name; give tools",
    "function_call": "an older name; give tool_choice",
    "modalities": "there is only text",
    "audio": "there is only text",
    "prediction": "there are no predicted outputs",
    "reasoning_effort": "models here have no such setting",
    "verbosity": "models here have no such setting",
    "web_search_options": "there is no search",
    "suffix": "the model continues a text; it fills in none",
    "best_of": "give n, and choose",
}
PLAIN: Mapping[str, Sequence[object]] = {
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "best_of": (1,),
    "suffix": ("",),
}
"""Values of refused fields that say what is so anyway."""
Kind = TypeVar("Kind", bound=BaseModel)


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class CalledFunction(_Part):
    """The function of a call, its arguments as an object."""

    name: str
    arguments: Annotated[dict[str, Any], BeforeValidator(lambda value: _object_of(value))]


class Call(_Part):
    """A call of a function that the assistant made."""

    id: str | None = None
    type: Literal["function"] = "function"
    index: int | None = None
    function: CalledFunction


class Message(_Part):
    """A turn."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, BeforeValidator(lambda value: _text_of(value))] = ""
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[Call] | None = None
    reasoning_content: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: item for name, item in value.items() if item is not None and name not in OF_MESSAGES}

    @model_validator(mode="after")
    def _whole(self) -> "Message":
        if self.tool_calls is not None and self.role != "assistant":
            raise ValueError("tool_calls belong to the assistant's messages")
        if not self.tool_calls and "content" not in self.model_fields_set:
            raise ValueError("content is missing")
        return self


class Function(_Part):
    """A function that the assistant may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Part):
    """What the assistant may call."""

    type: Literal["function"]
    function: Function


class StreamOptions(_Part):
    """What a stream holds beside the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False


def _object_of(value: Any) -> Any:
    """Arguments of a call, which clients give as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        found = READER.parsed(value or "{}", "")
    except _NoJson as error:
        raise ValueError(f"is no JSON: {str(error).removeprefix(': ')}") from None
    if not isinstance(found, dict):
        raise ValueError("must be JSON of an object")
    return found


def _text_of(value: Any) -> Any:
    """The text of a message's content, which may come in parts."""
    if not isinstance(value, list):
        return value
    texts = []
    for number, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") not in ("text", "refusal"):
            kind = part.get("type") if isinstance(part, dict) else part
            raise ValueError(f"part {number} is {shown(kind)}; there is only text: {{type: text, text: …}}")
        text = part.get(part["type"])
        if not isinstance(text, str):
            raise ValueError(f"part {number} has no text")
        texts.append(text)
    return "\n".join(texts)


def _reported(value: Any) -> Any:
    if value != TOKENS and not isinstance(value, bool):
        raise ValueError(f"is {shown(value)}, must be true, false, or {TOKENS}: the weights at each token too")
    return value


def _stops_of(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _temperature(value: float) -> float:
    if 0 < value < COLDEST:
        raise ValueError(f"must be 0, or {COLDEST:g} or more")
    return value


def _bias(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if len(value) > MOST_BIASES:
        raise ValueError(f"has {len(value):,} tokens, may have {MOST_BIASES:,}")
    found = {}
    for token, weight in value.items():
        if not (token.isascii() and token.isdigit() and len(token) <= 9):
            raise ValueError(f"{shown(token)} is no id of a token")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not -100 <= weight <= 100:
            raise ValueError(f"of token {token} is {shown(weight)}, must be a number from -100 to 100")
        found[int(token)] = float(weight)
    return found


def _prompts_of(value: Any) -> list[str] | list[list[int]]:
    """Prompts in the four ways in which they may be given."""
    many = [value] if isinstance(value, str) or _is_ids(value) else value
    if isinstance(many, list) and many and all(isinstance(one, str) for one in many):
        return many
    if isinstance(many, list) and many and all(_is_ids(one) for one in many):
        return many
    raise ValueError("must be a text, several, a list of token ids, or several of them; no list empty")


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)


def _weights(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError('must be an object of weights by expert: {"code": 0.7, "chat": 0.3}')
    if not value:
        raise ValueError("is empty; leave it out for the server's own mixture, or give weights")
    for name, weight in value.items():
        good = isinstance(weight, int | float) and not isinstance(weight, bool) and _finite(weight)
        if not good:
            raise ValueError(f"the weight of {shown(name)} is {shown(weight)}, must be a finite number")
    return {name: float(weight) for name, weight in value.items()}


def _finite(value: float) -> bool:
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Biases = Annotated[dict[int, float], BeforeValidator(_bias)]
Weights = Annotated[dict[str, float], BeforeValidator(_weights)]
Reported = Annotated[bool | Literal["tokens"], BeforeValidator(_reported)]


class Asked(_Part):
    """What both kinds of requests hold."""

    model: Annotated[str, Field(max_length=10_000)] | None = None
    experts: Weights | None = None
    lmoe: Reported = False
    max_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2), AfterValidator(_temperature)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=MOST_TOKENS)] = 0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: Biases = {}
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1)] = 1
    stop: Annotated[list[Stop], Field(max_length=MOST_STOPS), BeforeValidator(_stops_of)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _streamed(self) -> "Asked":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options have no effect without stream: true; leave them out")
        return self

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with what was used."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def most_tokens(self) -> int | None:
        """Longest answer that is asked for; None: as long as may be."""
        return self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """How many of the likeliest tokens come with each; None: not even its own log-probability."""
        return None


class ChatBody(Asked):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    tools: list[Tool] | None = None
    tool_choice: Any = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _chat(self) -> "ChatBody":
        if self.tool_choice not in (None, "none", "auto"):
            raise ValueError(
                f"tool_choice is {shown(self.tool_choice)}, must be none or auto: nothing holds the model to a call"
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs has no effect without logprobs: true; leave it out")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens is the older name of max_completion_tokens; give one of them, not both")
        return self

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def turns(self) -> list[dict[str, Any]]:
        """The messages as a chat template takes them."""
        turns = []
        for message in self.messages:
            turn = message.model_dump(exclude_none=True)
            turns.append(turn | {"content": message.content})
        return turns

    def shown_tools(self) -> list[dict[str, Any]] | None:
        """Functions that the model is shown."""
        if not self.tools or self.tool_choice == "none":
            return None
        return [tool.model_dump(exclude_none=True) for tool in self.tools]


class CompletionBody(Asked):
    """The body of POST /v1/completions."""

    prompt: Annotated[list[str] | list[list[int]], BeforeValidator(_prompts_of)]
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _completion(self) -> "CompletionBody":
        if self.echo and self.logprobs is not None:
            raise ValueError("echo with logprobs would need those of the prompt, which are not computed; leave one out")
        return self

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens or 16  # OpenAI's default here

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs


class NewExpert(_Part):
    """The body of POST /v1/experts."""

    name: Annotated[str, Field(min_length=1, max_length=255)]
    place: Annotated[str, Field(min_length=1, max_length=4_096)]


class OtherPlace(_Part):
    """The body of PUT /v1/experts/{name}."""

    place: Annotated[str, Field(min_length=1, max_length=4_096)]


class OtherName(_Part):
    """The body of PATCH /v1/experts/{name}."""

    name: Annotated[str, Field(min_length=1, max_length=255)]


class _NoJson(LmoeError):
    """Text that is no JSON, or none that may be."""


READER = Reader(error=_NoJson, what="a body", keys_once=True)


def body_of(kind: type[Kind], content: bytes) -> Kind:
    """The body of a request.

    Raises:
        Problem: it is no JSON object, or its fields cannot be; all problems at once.
    """
    try:
        raw = READER.parsed(READER.decoded(content, "the body"), "the body")
    except _NoJson as error:
        raise Problem(400, str(error), code="invalid_json") from None
    if not isinstance(raw, dict):
        raise Problem(400, f"the body must be a JSON object, is {shown(raw)}", code="invalid_json")
    given = {name: value for name, value in raw.items() if value is not None and name not in WITHOUT_EFFECT}
    known = kind.model_fields
    problems: list[tuple[str | None, str]] = []
    for name in [name for name in given if name in REFUSED and name not in known]:
        if given.pop(name) not in PLAIN.get(name, ()):
            problems.append((name, f"{name} is not supported: {REFUSED[name]}"))
    body = None
    try:
        body = kind.model_validate(given)
    except ValidationError as error:
        problems += [_said(one, list(known)) for one in error.errors(include_url=False)]
    if body is None or problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        message = "; ".join(text for _, text in problems[:SHOWN]) + more
        raise Problem(400, message, problems[0][0], "invalid_value")
    return body


def _said(error: Any, known: list[str]) -> tuple[str | None, str]:
    """(field, what is wrong with it) of one of pydantic's errors."""
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"])
    place = shown(place.removeprefix("."), longest=200) if place else None
    if error["type"] == "missing":
        return place, f"{place} is missing"
    if error["type"] == "extra_forbidden":
        hint = f"; {near(str(error['loc'][0]), known)}" if len(error["loc"]) == 1 else ""
        return place, f"{place}: no such field{hint}"
    if error["type"] == "value_error":
        reason = str(error["ctx"]["error"])
        return (place, f"{place} {reason}") if place else (reason.split(" ")[0], reason)
    reason = error["msg"].removeprefix("Input should be ").removeprefix("Input should have ")
    return place, f"{place} is {shown(error['input'])}, must be {reason}"
