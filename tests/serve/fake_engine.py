"""An engine without a model, which says what it is told to say and remembers what it was asked."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lmoe.backbones.load import load_tokenizer
from lmoe.config.backbone import BackboneConfig
from lmoe.serve.http.auth import Keys
from lmoe.serve.http.playground import Playground
from lmoe.serve.http.service import Service
from lmoe.serve.prompts import Prompts
from lmoe.serve.request import (
    Condition,
    Decided,
    EngineState,
    ExpertState,
    Mixable,
    Refused,
    RefusedError,
    Request,
    Token,
)
from lmoe.serve.settings import ServeSettings

SAID = "Hello, wörld €5 🎉!"


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    """That of the tiny base."""
    return load_tokenizer(BackboneConfig(model_name="tiny"))


def end() -> int:
    """A token that ends an answer."""
    found = tokenizer().eos_token_id
    assert isinstance(found, int)
    return found


@dataclass(slots=True)
class FakeRunning:
    """Yields the tokens of a script."""

    engine: "FakeEngine"
    request: Request
    script: Sequence[int]
    cancelled: bool = False
    over: threading.Event = field(default_factory=threading.Event)
    """For tests in other threads."""

    async def tokens(self) -> AsyncIterator[Token]:
        for number, token in enumerate(self.script[: self.request.max_tokens]):
            if self.engine.step is not None:
                await self.engine.step(number)
            else:
                await asyncio.sleep(0)
            if self.cancelled:
                return
            found = Token(token)
            if self.request.top_logprobs is not None:
                likeliest = [(token, -0.5), *((other, -float("inf")) for other in range(40))]
                found = Token(token, -0.5, likeliest[: self.request.top_logprobs])
            if self.request.expert_weights:
                found = replace(found, weights=self.engine.weights_of(self.request, number))
            yield found
        self.over.set()

    def cancel(self) -> None:
        self.cancelled = True
        self.over.set()

    @property
    def decided(self) -> Decided:
        load = {"0": 0.25, "1": 0.75} if self.request.load else None
        return Decided(weights=self.request.mixture, load=load)

    @property
    def waited(self) -> float | None:
        return 0.01


@dataclass(slots=True, kw_only=True)
class FakeEngine:
    """Args:
    said: its answer to everything.
    step: awaited before each token.
    refusal: raised by `submit`.
    mixable_of: what requests can be mixed of; None: of the experts.
    weigh: what each expert weighs at an answer's token, by its number; None: as in the request.
    """

    said: str = SAID
    ends: bool = True
    context: int = 512
    limited_by_cache: bool = False
    own_mixture: str = "code*0.5+chat*0.5"
    step: Callable[[int], Any] | None = None
    refusal: Exception | None = None
    asked: list[FakeRunning] = field(default_factory=list)
    stopped: float | None = None
    places: dict[str, list[str]] = field(default_factory=lambda: {"code": ["a"], "chat": ["b"]})
    loaded: set[str] = field(default_factory=lambda: {"code", "chat"})
    condition: Condition = Condition.ready
    mixable_of: Mixable | None = None
    weigh: Callable[[int], Mapping[str, float]] | None = None

    @property
    def mixable(self) -> Mixable:
        weights = {"code": 0.5, "chat": 0.5}
        own = {name: weights[name] for name in self.places if name in weights}
        return self.mixable_of or Mixable(names=list(self.places), own_weights=own, by_request=True, changes=True)

    def weights_of(self, request: Request, number: int) -> Mapping[str, float]:
        if self.weigh is not None:
            return self.weigh(number)
        return request.mixture if request.mixture is not None else self.mixable.own_weights or {}

    def folders(self) -> set[Path]:
        return {Path(place) for places in self.places.values() for place in places}

    async def submit(self, request: Request) -> FakeRunning:
        if self.refusal is not None:
            raise self.refusal
        script = tokenizer().encode(self.said, add_special_tokens=False) + [end()] * self.ends
        running = FakeRunning(self, request, script)
        self.asked.append(running)
        return running

    def experts(self) -> list[ExpertState]:
        return [
            ExpertState(
                name=name,
                loaded=name in self.loaded,
                requests=0,
                version=len(places),
                can_roll_back=len(places) > 1,
                rank=8,
            )
            for name, places in self.places.items()
        ]

    def _known(self, name: str) -> list[str]:
        if name not in self.places:
            raise RefusedError(Refused.unknown_expert, f"there is no expert {name}")
        return self.places[name]

    async def add(self, name: str, place: str) -> None:
        if name in self.places:
            raise RefusedError(Refused.conflict, f"there is an expert {name} already", "name")
        if place.startswith("broken"):
            raise RefusedError(Refused.invalid, "the expert does not fit: rank 64, room for 32", "place")
        self.places[name] = [place]
        self.loaded.add(name)

    async def replace(self, name: str, place: str) -> None:
        self._known(name).append(place)

    async def rename(self, name: str, new: str) -> None:
        self.places[new] = self._known(name)
        del self.places[name]

    async def remove(self, name: str) -> None:
        self._known(name)
        del self.places[name]

    async def unload(self, name: str) -> None:
        self._known(name)
        self.loaded.discard(name)

    async def roll_back(self, name: str) -> None:
        if len(self._known(name)) < 2:
            raise RefusedError(Refused.conflict, f"{name} has no earlier version")
        self._known(name).pop()

    def state(self) -> EngineState:
        return EngineState(
            running=2, waiting=1, cached_tokens=30, cache_capacity=100, steps=5, generated=7, condition=self.condition
        )

    async def stop(self, patience: float) -> None:
        self.stopped = patience if self.stopped is None else self.stopped
        self.refusal = RefusedError(Refused.stopping, "the server is stopping")


def prompts(**changed: Any) -> Prompts:
    """Those of the tiny base, or of a tokenizer that is given."""
    return Prompts(**({"tokenizer": tokenizer(), "ends": frozenset({end()})} | changed))


def service(
    engine: FakeEngine, keys: Keys | None = None, log: Any = None, playground: Playground | None = None, **settings: Any
) -> Service:
    """A server's parts around a fake engine."""
    given: Mapping[str, Any] = {"max_tokens": 64, "request_size": 100_000, "timeout": 20.0} | settings
    log = log or LogLines()
    return Service(
        engine=engine,
        prompts=prompts(),
        settings=ServeSettings(**given),
        keys=keys or (Keys() if playground is None else playground.keys),
        log=log,
        playground=playground,
    )


@dataclass(slots=True)
class LogLines:
    """A request log that tests can read."""

    lines: list[dict[str, Any]] = field(default_factory=list)
    failures: list[tuple[str, BaseException]] = field(default_factory=list)

    def request(self, record: Any) -> None:
        self.lines.append(record.line())

    def failure(self, request_id: str, error: BaseException) -> None:
        self.failures.append((request_id, error))

    def close(self) -> None:
        pass


__all__ = ["FakeEngine", "FakeRunning", "LogLines", "end", "prompts", "replace", "service", "tokenizer"]
