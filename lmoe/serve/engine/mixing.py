"""Who decides what a request weighs: the request, the server's own weights, or a router that reads the prompt."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from transformers import PreTrainedModel

from lmoe.blend.blend import Blend
from lmoe.blend.weights import SILENT
from lmoe.injection.record import Injected, injected, model_route, new_names
from lmoe.layers.routing import Routing
from lmoe.serve.engine.paged import RowInBatch
from lmoe.serve.engine.shelf import Shelf, Version, refusing
from lmoe.serve.engine.weighing import ArrowWeighing, BlendWeighing, Load, RowRouting, RowWeights, RunWeighing, Weighing
from lmoe.serve.request import Decided, ExpertState, Mixable, Refused, RefusedError, Request
from lmoe.vocabulary import BlendRouter

WITHOUT_WEIGHTS = (BlendRouter.arrow, BlendRouter.static)
"""Routers of blends that take no weights from requests."""


class Elsewhere(Protocol):
    """Runs a function of no arguments in the thread that changes the model."""

    def __call__(self, action: Callable[[], Any], *, alone: bool = False) -> Awaitable[Any]:
        """What it returns; alone: while no batch runs."""
        ...


@dataclass(eq=False)
class Given:
    """What the experts were given at the tokens of an answer, where each token decides."""

    tokens: int = 0
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, weights: Mapping[str, float]) -> None:
        """Count the weights of one more token, by the experts' names."""
        self.tokens += 1
        for name, weight in weights.items():
            self.sums[name] = self.sums.get(name, 0.0) + weight

    def means(self) -> dict[str, float]:
        """Mean weights over the tokens so far, by the experts' names."""
        return {name: total / self.tokens for name, total in dict(self.sums).items()}


@dataclass(eq=False)
class Held:
    """What one request weighs, until it is over.

    Args:
        weights: by the experts' names, for people; None: they differ by token.
        given: sums up what its tokens decide, where that is asked for and no load says it; None: nobody does.
        row: what its tokens weigh over a blend.
        routing: what the router of a whole model has decided.
        versions: of the experts that it weighs, by name.
        load: counts its routed tokens, where it is asked for.
        names: of the experts that are counted.
        shown: names of the experts by those that the model has for them, where somebody asks for their weights at each
            token; None: nobody does.
    """

    weights: Mapping[str, float] | None = None
    given: Given | None = None
    row: RowWeights | None = None
    routing: RowRouting | None = None
    versions: Mapping[str, Version] = field(default_factory=dict)
    load: Load | None = None
    names: Sequence[str] = ()
    shown: Mapping[str, str] | None = None

    def decided(self) -> Decided:
        """What mixed the request."""
        weights = self.weights if self.given is None else self.given.means()
        return Decided(weights, None if self.load is None else self.load.shares(self.names))


class Mixing(Protocol):
    """Decides for requests, and lets forwards compute so. On the event loop, but for `forward`."""

    description: str

    @property
    def shelf(self) -> Shelf:
        """The experts that come and go.

        Raises:
            RefusedError: they do not.
        """
        ...

    @property
    def mixable(self) -> Mixable:
        """What requests can be mixed of."""
        ...

    def use(self, elsewhere: Elsewhere) -> None:
        """Told once, where work on the model is done."""
        ...

    async def hold(self, request: Request) -> Held:
        """Decide for a request.

        Raises:
            RefusedError: it names what there is not.
        """
        ...

    def release(self, held: Held) -> None:
        """The request is over."""
        ...

    def begin(self, request_id: str, held: Held) -> None:
        """Told when a request's tokens come into the batches."""
        ...

    def end(self, request_id: str) -> None:
        """Told when they come no more."""
        ...

    def forward(self, rows: Sequence[RowInBatch]) -> AbstractContextManager[Any]:
        """A block around a forward of these rows; in the thread of the batches."""
        ...

    def token_weights(self, rows: Sequence[RowInBatch]) -> Mapping[str, Mapping[str, float]]:
        """What each expert weighs, by name, where the next token of a row is chosen; by the ids of the requests that
        want to know. Inside the block, behind the forward."""
        ...

    def experts(self) -> Sequence[ExpertState]:
        """Returns the experts that requests may weigh."""
        ...

    async def sweep(self) -> None:
        """Let go of experts that nobody weighs any more."""
        ...

    async def rename(self, name: str, new: str) -> None:
        """Another name for an expert."""
        ...

    async def remove(self, name: str) -> None:
        """Take an expert away."""
        ...


@dataclass(eq=False)
class BlendMixing:
    """Requests over a blend.

    Args:
        model: the whole one.
        blend: over it.
    """

    model: PreTrainedModel
    blend: Blend
    description: str = ""
    _rows: dict[str, RowWeights] = field(default_factory=dict)
    _shown: dict[str, Mapping[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kind = self.blend.router
        self._own: dict[str, float] = {}
        if kind in (BlendRouter.weighted, BlendRouter.static):
            assert isinstance(self.blend.weights, dict)
            self._own = {name: weight for name, weight in self.blend.weights.items() if abs(weight) >= SILENT}
        self.description = self._described()
        arrow = kind is BlendRouter.arrow
        self._weighing: Weighing = (
            ArrowWeighing(self.blend, self._shown) if arrow else BlendWeighing(self.blend, self._rows)
        )

    def use(self, elsewhere: Elsewhere) -> None:
        self._elsewhere = elsewhere
        self._shelf = Shelf(self.blend, elsewhere)

    @property
    def shelf(self) -> Shelf:
        if (why := self._fixed) is not None:
            raise RefusedError(Refused.conflict, f"{why}: none come or go")
        return self._shelf

    @property
    def _fixed(self) -> str | None:
        """Why the experts stay those that they are; None: they come and go."""
        if self.blend.route is not None:
            return "a trained head decides among the experts that it was trained with"
        # NOTE Arrow chooses among all experts of the blend: no request can keep to those that it began with.
        if self.blend.router is BlendRouter.arrow:
            return "with router=arrow each token chooses among all experts, also in answers under way"
        return None

    @property
    def mixable(self) -> Mixable:
        decides = self.blend.router in (BlendRouter.arrow, BlendRouter.encoder)
        return Mixable(
            names=list(self._shelf.current),
            own_weights=None if decides else dict(self._own),
            by_request=self.blend.router not in WITHOUT_WEIGHTS,
            changes=self._fixed is None,
        )

    async def hold(self, request: Request) -> Held:
        held = await self._held(request)
        if request.expert_weights or held.given is not None:
            held.shown = {version.key: name for name, version in held.versions.items()}
        return held

    async def _held(self, request: Request) -> Held:
        mixture, kind = request.mixture, self.blend.router
        if mixture is not None and kind in WITHOUT_WEIGHTS:
            raise RefusedError(
                Refused.invalid, f"this server runs router={kind}, which takes no weights from requests", "experts"
            )
        if kind is BlendRouter.arrow:
            versions = await self._shelf.hold(self._shelf.current)
            return Held(given=Given() if request.load else None, versions=versions)
        if mixture is None and kind is BlendRouter.encoder:
            return await self._by_prompt(request)
        weights = {name: float(weight) for name, weight in (self._own if mixture is None else mixture).items()}
        versions = await self._shelf.hold(weights)
        by_key = {versions[name].key: weight for name, weight in weights.items() if abs(weight) >= SILENT}
        return Held(weights=weights, row=RowWeights.of(by_key), versions=versions)

    async def _by_prompt(self, request: Request) -> Held:
        versions = await self._shelf.hold(self._shelf.current)
        names = {version.key: name for name, version in versions.items()}
        try:
            with refusing():
                row, answer = await self._elsewhere(lambda: self._decided(request, list(names)), alone=True)
        except BaseException:
            self._shelf.release(versions.values())
            raise
        weights = {names[key]: weight for key, weight in answer.items()}
        return Held(weights=weights, row=row, versions=versions)

    @torch.no_grad()
    def _decided(self, request: Request, keys: list[str]) -> tuple[RowWeights, dict[str, float]]:
        """What the blend's router says of a prompt, in the names of the blend; while no batch runs."""
        ids = torch.tensor([list(request.prompt)], device=self.model.device)
        if (route := self.blend.route) is None:
            weights = self.blend.weights_of_prompt(ids, keys)
            return RowWeights.of(weights), weights
        prompt, answer = route.of_prompt(self.model, ids, _answers(request, self.model))
        weights = answer.routing_weights[0, 0].float().cpu()
        row = RowWeights(tuple(route.names), weights, prompt.routing_weights[0].float().cpu())
        return row, dict(zip(route.names, weights.tolist(), strict=True))

    def release(self, held: Held) -> None:
        self._shelf.release(held.versions.values())

    def begin(self, request_id: str, held: Held) -> None:
        if held.row is not None:
            self._rows[request_id] = held.row
        if held.shown is not None:
            self._shown[request_id] = held.shown

    def end(self, request_id: str) -> None:
        self._rows.pop(request_id, None)
        self._shown.pop(request_id, None)

    def forward(self, rows: Sequence[RowInBatch]) -> AbstractContextManager[Any]:
        return self._weighing.forward(rows)

    def token_weights(self, rows: Sequence[RowInBatch]) -> Mapping[str, Mapping[str, float]]:
        return _named(self._weighing, rows, self._shown)

    def experts(self) -> Sequence[ExpertState]:
        return self._shelf.states()

    async def sweep(self) -> None:
        await self._shelf.sweep()

    async def rename(self, name: str, new: str) -> None:
        await self.shelf.rename(name, new)
        self._own = {new if other == name else other: weight for other, weight in self._own.items()}
        self.description = self._described()

    async def remove(self, name: str) -> None:
        await self.shelf.remove(name)
        self._own.pop(name, None)  # before anything else: who asks meanwhile must not weigh what is gone
        self.description = self._described()
        await self.shelf.sweep()

    def _described(self) -> str:
        if self.blend.router in (BlendRouter.arrow, BlendRouter.encoder):
            return f"router {self.blend.router}"
        return " + ".join(f"{name}*{weight:g}" for name, weight in self._own.items()) or "the base alone"


class WithoutShelf:
    """What both kinds of mixing share whose experts neither come nor go."""

    WHY: ClassVar[str]
    """They do not."""

    @property
    def shelf(self) -> Shelf:
        raise RefusedError(Refused.conflict, self.WHY)

    def use(self, elsewhere: Elsewhere) -> None:
        self._elsewhere = elsewhere

    def release(self, held: Held) -> None:
        pass

    def experts(self) -> Sequence[ExpertState]:
        return ()

    @property
    def mixable(self) -> Mixable:
        return Mixable(names=(), own_weights={}, by_request=False, changes=False)

    async def sweep(self) -> None:
        pass

    async def rename(self, name: str, new: str) -> None:
        _ = self.shelf

    async def remove(self, name: str) -> None:
        _ = self.shelf


@dataclass(eq=False)
class RunMixing(WithoutShelf):
    """Requests over a trained mixture, whose own routers decide.

    Args:
        model: the whole one.
        domain: of all requests, for moe.router=oracle.
    """

    WHY = "this server runs a trained mixture, whose experts neither come nor go one by one"
    model: PreTrainedModel
    domain: str | None = None
    _routings: dict[str, RowRouting] = field(default_factory=dict)
    _loads: dict[str, Load] = field(default_factory=dict)
    _shown: dict[str, Mapping[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        record: Injected = injected(self.model)
        self.route, self._has_routers = model_route(self.model), record.trace.has_routers
        count = record.injection.num_experts
        known = list(record.expert_names) or list(record.moe.domains or [])
        known = known if len(known) <= count else []
        self.names = [*known, *new_names(known, count)]
        of_model = " of the whole model" if self.route is not None else ""
        self.description = f"router {record.moe.router}{of_model}" if self._has_routers else "the trained adapter"
        self._weighing = RunWeighing(
            self.model, record, self._routings, self._loads, self._shown, self.names, self.domain
        )

    @property
    def mixable(self) -> Mixable:
        names = self.names if self._has_routers else ()
        return Mixable(names=names, own_weights=None if self._has_routers else {}, by_request=False, changes=False)

    async def hold(self, request: Request) -> Held:
        held = await self._held(request)
        if request.expert_weights and self._has_routers:
            held.shown = dict(zip(self.names, self.names, strict=True))
        return held

    async def _held(self, request: Request) -> Held:
        if request.mixture is not None:
            raise RefusedError(
                Refused.invalid,
                "this server runs a trained mixture: its router decides; leave the experts out",
                "experts",
            )
        load = Load() if request.load and self._has_routers else None
        if self.route is None:
            return Held(load=load, names=self.names)
        with refusing():
            prompt, answer = await self._elsewhere(lambda: self._decided(request), alone=True)
        weights = dict(zip(self.names, answer.routing_weights[0, 0].tolist(), strict=True))
        return Held(weights=weights, routing=RowRouting(prompt, answer), load=load, names=self.names)

    @torch.no_grad()
    def _decided(self, request: Request) -> tuple[Routing, Routing]:
        assert self.route is not None
        ids = torch.tensor([list(request.prompt)], device=self.model.device)
        with self._weighing.of_domain():
            return self.route.of_prompt(self.model, ids, _answers(request, self.model))

    def begin(self, request_id: str, held: Held) -> None:
        if held.routing is not None:
            self._routings[request_id] = held.routing
        if held.load is not None:
            self._loads[request_id] = held.load
        if held.shown is not None:
            self._shown[request_id] = held.shown

    def end(self, request_id: str) -> None:
        self._routings.pop(request_id, None)
        self._loads.pop(request_id, None)
        self._shown.pop(request_id, None)

    def forward(self, rows: Sequence[RowInBatch]) -> AbstractContextManager[Any]:
        return self._weighing.forward(rows)

    def token_weights(self, rows: Sequence[RowInBatch]) -> Mapping[str, Mapping[str, float]]:
        return _named(self._weighing, rows, self._shown)


@dataclass(eq=False)
class BaseMixing(WithoutShelf):
    """Requests over a base without experts."""

    WHY = "this server was started without experts; start it with at least one"
    description: str = "the base alone"

    async def hold(self, request: Request) -> Held:
        if request.mixture:
            raise RefusedError(Refused.unknown_expert, "this server runs a base without experts", "experts")
        return Held(weights={})

    def begin(self, request_id: str, held: Held) -> None:
        pass

    def end(self, request_id: str) -> None:
        pass

    def forward(self, rows: Sequence[RowInBatch]) -> AbstractContextManager[Any]:
        return nullcontext()

    def token_weights(self, rows: Sequence[RowInBatch]) -> Mapping[str, Mapping[str, float]]:
        return {}


def _named(
    weighing: Weighing, rows: Sequence[RowInBatch], shown: Mapping[str, Mapping[str, str]]
) -> dict[str, dict[str, float]]:
    """Weights at the last tokens of the rows that are shown, by the names that people know."""
    # NOTE the event loop lets go of requests meanwhile.
    names = {row.request_id: found for row in rows if (found := shown.get(row.request_id)) is not None}
    if not names:
        return {}
    found = weighing.at_last_tokens([row for row in rows if row.request_id in names])
    return {
        request_id: {names[request_id][key]: weight for key, weight in weights.items() if key in names[request_id]}
        for request_id, weights in found.items()
    }


def _answers(request: Request, model: PreTrainedModel) -> torch.Tensor | None:
    """(1, T) bool tokens of earlier answers, or None."""
    if request.earlier_answers is None or not any(request.earlier_answers):
        return None
    return torch.tensor([list(request.earlier_answers)], device=model.device)
