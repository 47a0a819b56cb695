"""What is asked of the engine, and what it gives back: token ids in, tokens out as they come."""

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from lmoe.errors import LmoeError


class Refused(StrEnum):
    """Why a request is refused; the HTTP layer gives each a status."""

    invalid = "invalid"
    unknown_expert = "unknown_expert"
    conflict = "conflict"
    full = "full"
    stopping = "stopping"
    unavailable = "unavailable"
    failed = "failed"


class RefusedError(LmoeError):
    """A request that is refused or has failed. Its message is for the client: it shows no path of this machine.

    Args:
        reason: what kind of refusal.
        message: what was wrong, and what is allowed.
        field: of the request's body, where one is to blame.
    """

    def __init__(self, reason: Refused, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.reason, self.field = reason, field


@dataclass(slots=True, frozen=True, kw_only=True)
class SamplingSettings:
    """How each next token of a request is chosen.

    Args:
        temperature: 0 takes the likeliest token; above 0 samples.
        top_p: mass of the tokens to sample from.
        top_k: number of the tokens to sample from; 0: all.
        repetition_penalty: divides the scores of tokens that were there before (CTRL, 1909.05858); 1: none.
        presence_penalty, frequency_penalty: taken off the score of each token that the answer has already, once, and
            for each time, as in OpenAI's API.
        logit_bias: added to the scores of tokens, by id.
        seed: of the sampling; None: another one for each request.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None


@dataclass(slots=True, frozen=True, kw_only=True)
class Request:
    """One answer that is asked for.

    Args:
        prompt: token ids.
        max_tokens: of the answer; together with the prompt at most the model's context.
        end_tokens: ids that end the answer.
        sampling: how.
        mixture: weight by expert; names left out are 0. None: the router's own decision, or the weights that the server
            was started with.
        earlier_answers: whether each token of the prompt belongs to an earlier answer of the conversation, for routers
            that decide by the prompt; None: all of it is one prompt.
        top_logprobs: how many of the likeliest tokens come with each token, which then has its own log-probability;
            None: neither.
        load: whether what the tokens decide is to be counted, where they do: each expert's share, or mean weight.
        expert_weights: whether each token comes with what the experts weighed where it was chosen.
    """

    prompt: Sequence[int]
    max_tokens: int
    end_tokens: frozenset[int]
    sampling: SamplingSettings = SamplingSettings()
    mixture: Mapping[str, float] | None = None
    earlier_answers: Sequence[bool] | None = None
    top_logprobs: int | None = None
    load: bool = False
    expert_weights: bool = False


@dataclass(slots=True, frozen=True)
class Token:
    """One token of an answer.

    Args:
        id: of the vocabulary.
        logprob: natural logarithm of its probability before temperature, penalties and cuts; None: not asked for.
        top: ids and log-probabilities of the likeliest tokens, best first.
        weights: of each expert by name in the forward that chose it, the mean over all sites; those left out are 0.
            None: not asked for.
    """

    id: int
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()
    weights: Mapping[str, float] | None = None


@dataclass(slots=True, frozen=True)
class Decided:
    """What mixed an answer.

    Args:
        weights: of each expert by name, the mean over the answer's tokens where a blend weighs each of them anew; None:
            the routers of a trained mixture weigh each token anew, and the load says it.
        load: share of each expert of the answer's and the prompt's routed tokens, over all sites; None: not counted.
    """

    weights: Mapping[str, float] | None = None
    load: Mapping[str, float] | None = None


class Running(Protocol):
    """A request that the engine works at."""

    def tokens(self) -> AsyncIterator[Token]:
        """Yields its tokens as they come, the one that ends it included; to be read once.

        Raises:
            RefusedError: it has failed.
        """
        ...

    def cancel(self) -> None:
        """Free its row before the next step; harmless when it is over."""
        ...

    @property
    def decided(self) -> Decided:
        """What mixed it; whole when its tokens have been read."""
        ...

    @property
    def waited(self) -> float | None:
        """Seconds until it had a row in the batch; None: it has none yet."""
        ...


@dataclass(slots=True, frozen=True, kw_only=True)
class ExpertState:
    """An expert as the server knows it.

    Args:
        name: by which requests weigh it.
        loaded: whether its tensors are in memory; they come back with the next request that weighs it.
        requests: that weigh it now, its earlier versions included.
        version: counts up with each replacement and each rollback, from 1.
        can_roll_back: whether there is an earlier version to go back to.
        rank: largest of its sites.
    """

    name: str
    loaded: bool
    requests: int
    version: int
    can_roll_back: bool
    rank: int


@dataclass(slots=True, frozen=True, kw_only=True)
class Mixable:
    """What requests of an engine can be mixed of.

    Args:
        names: of the experts, also of those that a trained router weighs alone.
        own_weights: what a request weighs that names no mixture; None: they differ by prompt or by token.
        by_request: whether requests may name weights.
        changes: whether experts come and go.
    """

    names: Sequence[str]
    own_weights: Mapping[str, float] | None
    by_request: bool
    changes: bool


class Condition(StrEnum):
    """Whether an engine answers."""

    ready = "ready"
    restarting = "restarting"
    """Its batches have broken and begin anew; requests wait."""
    failing = "failing"
    """They break whenever they begin; requests are refused until they do not."""


@dataclass(slots=True, frozen=True, kw_only=True)
class EngineState:
    """What the engine does at the moment.

    Args:
        running: requests with a row in the batch.
        waiting: requests without one.
        cached_tokens: that the KV cache holds.
        cache_capacity: tokens that it can hold.
        steps: forwards since the start.
        generated: tokens since the start.
        condition: whether it answers.
    """

    running: int
    waiting: int
    cached_tokens: int
    cache_capacity: int
    steps: int
    generated: int
    condition: Condition = Condition.ready


class Engine(Protocol):
    """What runs the model. All methods are called on the event loop of the server, and none of them blocks it."""

    @property
    def context(self) -> int:
        """Most tokens that a prompt and its answer have together."""
        ...

    @property
    def limited_by_cache(self) -> bool:
        """Whether it is the KV cache that holds no more than `context`, and not the model."""
        ...

    @property
    def own_mixture(self) -> str:
        """How a request without a mixture is mixed, for people: "router top_k", or "code*0.5+chat*0.5"."""
        ...

    @property
    def mixable(self) -> Mixable:
        """What requests can be mixed of."""
        ...

    async def submit(self, request: Request) -> Running:
        """Take a request; what it weighs is loaded where it was not.

        Raises:
            RefusedError: it cannot be, or there is no room.
        """
        ...

    def experts(self) -> Sequence[ExpertState]:
        """All experts that requests may weigh; none where a trained router decides alone."""
        ...

    def folders(self) -> Collection[Path]:
        """Folders that experts are read from, or would be again after a roll-back or an unload."""
        ...

    async def add(self, name: str, place: str) -> None:
        """One more expert, from a directory or the hub.

        Raises:
            RefusedError: the name is taken or cannot be, the expert cannot be read or does not fit.
        """
        ...

    async def replace(self, name: str, place: str) -> None:
        """Another expert under a name; requests under way keep the one that they began with.

        Raises:
            RefusedError: as `add`, or no such name.
        """
        ...

    async def rename(self, name: str, new: str) -> None:
        """Another name for an expert.

        Raises:
            RefusedError: no such name, or one that is taken or cannot be.
        """
        ...

    async def remove(self, name: str) -> None:
        """Take an expert away; its tensors go when the requests under way that weigh it are over.

        Raises:
            RefusedError: no such name.
        """
        ...

    async def unload(self, name: str) -> None:
        """Drop an idle expert's tensors; the next request that weighs it reads them again.

        Raises:
            RefusedError: no such name, or requests weigh it.
        """
        ...

    async def roll_back(self, name: str) -> None:
        """The version before the last replacement; once more goes forward again.

        Raises:
            RefusedError: no such name, or no earlier version.
        """
        ...

    def state(self) -> EngineState:
        """What it does at the moment."""
        ...

    async def stop(self, patience: float) -> None:
        """Take no more requests, let those under way end for so many seconds, then fail the rest."""
        ...
