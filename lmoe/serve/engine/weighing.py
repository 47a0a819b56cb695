"""What each token of a batch weighs: the mixtures of its requests, over a blend or a trained mixture.

Shapes: T tokens of a forward, P of a prompt, E experts.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmoe.blend.blend import Blend
from lmoe.blend.linear import Setting
from lmoe.injection.record import Injected, model_route
from lmoe.injection.tracing import domain as of_domain
from lmoe.layers.routing import Routing
from lmoe.serve.engine.paged import RowInBatch


@dataclass(slots=True, frozen=True)
class RowWeights:
    """What the experts of a blend weigh in a request.

    Args:
        names: of the experts.
        answer: (E,) at the tokens behind the prompt.
        prompt: (P, E) at those of the prompt; None: as behind it.
    """

    names: tuple[str, ...]
    answer: Tensor
    prompt: Tensor | None = None

    @classmethod
    def of(cls, weights: Mapping[str, float]) -> "RowWeights":
        """The same at all tokens."""
        return cls(tuple(weights), torch.tensor(list(weights.values())))

    def at(self, row: RowInBatch) -> Tensor:
        """(tokens, E) or, the same at all of them, (1, E)."""
        if self.prompt is None or row.first >= len(self.prompt):
            return self.answer.unsqueeze(0)
        inside = self.prompt[row.first : row.first + row.tokens]
        return torch.cat([inside, self.answer.expand(row.tokens - len(inside), -1)])


@dataclass(slots=True, frozen=True)
class RowRouting:
    """What the router of a whole model has decided for a request.

    Args:
        prompt: (1, P, E).
        answer: (1, 1, E).
    """

    prompt: Routing
    answer: Routing

    def at(self, row: RowInBatch) -> Routing:
        """Returns the routing of a row's tokens, (1, tokens, E)."""
        length = self.prompt.probs.shape[1]
        inside = self.prompt.tokens(row.first, row.first + row.tokens)
        behind = row.tokens - max(0, min(length - row.first, row.tokens))
        return Routing.joined([inside, *[self.answer] * behind])


class Weighing(Protocol):
    """Lets a forward of many requests compute with what each of them weighs."""

    def forward(self, rows: Sequence[RowInBatch]) -> AbstractContextManager[object]:
        """A block around the forward."""
        ...

    def at_last_tokens(self, rows: Sequence[RowInBatch]) -> dict[str, dict[str, float]]:
        """What each expert of the model weighs at the last token of each row, the mean over all sites, by the request's
        id; inside the block, behind the forward.

        Args:
            rows: of the forward, whose requests were to be watched when it began.
        """
        ...


class BlendWeighing:
    """Over a blend; rows of equal weights cost what one setting costs.

    Args:
        blend: whose experts are weighed.
        of_request: what a request weighs, by its id; of one that is not there any more, nothing.
    """

    def __init__(self, blend: Blend, of_request: Mapping[str, RowWeights]) -> None:
        self.blend, self.of_request = blend, of_request
        self._last: tuple[object, Setting] | None = None

    def forward(self, rows: Sequence[RowInBatch]) -> AbstractContextManager[None]:
        """A block in which the blend weighs each token as its request does."""
        known = [self.of_request.get(row.request_id) for row in rows]
        whole = all(row is None or row.prompt is None for row in known)
        key = tuple((row.request_id, row.tokens, 0 if whole else row.first) for row in rows)
        if self._last is None or self._last[0] != key:
            self._last = (key, self._setting(rows, known))
        return self.blend.reading(self._last[1])

    def at_last_tokens(self, rows: Sequence[RowInBatch]) -> dict[str, dict[str, float]]:
        """What was set: it is the same at all sites."""
        known = [(row, self.of_request.get(row.request_id)) for row in rows]
        return {
            row.request_id: dict(zip(weights.names, weights.at(row)[-1].tolist(), strict=True))
            for row, weights in known
            if weights is not None
        }

    def _setting(self, rows: Sequence[RowInBatch], known: Sequence[RowWeights | None]) -> Setting:
        names = tuple(dict.fromkeys(name for row in known if row is not None for name in row.names))
        parts = []
        for row, weights in zip(rows, known, strict=True):
            part = torch.zeros(1, len(names))
            if weights is not None:
                at = weights.at(row)
                part = torch.zeros(len(at), len(names))
                part[:, [names.index(name) for name in weights.names]] = at
            parts.append(part)
        alike = all(len(part) == 1 and torch.equal(part, parts[0]) for part in parts)
        if alike:
            return self.blend.token_setting(parts[0].unsqueeze(0), names)
        every = [part.expand(row.tokens, -1) for part, row in zip(parts, rows, strict=True)]
        return self.blend.token_setting(torch.cat(every).unsqueeze(0), names)


class ArrowWeighing:
    """Over a blend whose tokens decide for themselves.

    Args:
        blend: whose experts they are.
        watched: ids of requests whose tokens somebody wants the weights of.
    """

    def __init__(self, blend: Blend, watched: Collection[str]) -> None:
        self.blend, self.watched = blend, watched
        self._seen: Callable[[], dict[str, Tensor]] = dict

    @contextmanager
    def forward(self, rows: Sequence[RowInBatch]):
        """A block that needs to be told nothing, and looks at what is decided where somebody asks."""
        if not any(row.gives_token and row.request_id in self.watched for row in rows):
            yield
            return
        with self.blend.watched_by_token(sum(row.tokens for row in rows)) as self._seen:
            yield

    def at_last_tokens(self, rows: Sequence[RowInBatch]) -> dict[str, dict[str, float]]:
        """What the tokens have decided."""
        seen = self._seen()
        return {
            row.request_id: {name: float(weights[row.last_place]) for name, weights in seen.items()} for row in rows
        }


class RunWeighing:
    """Over a trained mixture: its routers decide by token, or have decided for each request.

    Args:
        model: the whole one.
        record: what was put into it.
        of_request: what was decided for a request, with a router of the whole model.
        counted: gets each expert's share of the tokens of the requests that want it, (tokens, E) by id.
        watched: ids of requests whose tokens somebody wants the weights of.
        names: of the experts.
        domain: of all requests, for moe.router=oracle.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        record: Injected,
        of_request: Mapping[str, RowRouting],
        counted: Mapping[str, "Load"],
        watched: Collection[str],
        names: Sequence[str],
        domain: str | None,
    ) -> None:
        self.model, self.record, self.route, self.domain = model, record, model_route(model), domain
        self.of_request, self.counted, self.watched, self.names = of_request, counted, watched, names

    @contextmanager
    def forward(self, rows: Sequence[RowInBatch]):
        """A block in which the routers know what they need, and are counted where somebody asks."""
        with self.of_domain(), self._given(rows):
            wanted = [row for row in rows if row.request_id in self.counted or row.request_id in self.watched]
            if not wanted or not self.record.trace.has_routers:
                yield
                return
            valid = torch.ones(1, sum(row.tokens for row in rows), dtype=torch.bool)
            with self.record.trace.recording(valid) as trace:
                yield
                self._count(rows, [routing.assignment for routing in trace.routing.values()])
                trace.clear()

    def at_last_tokens(self, rows: Sequence[RowInBatch]) -> dict[str, dict[str, float]]:
        """What the routers have decided; nothing where the model has none."""
        routings = list(self.record.trace.routing.values())
        if not routings:
            return {}
        places = torch.tensor([row.last_place for row in rows], device=self.model.device)
        total = torch.zeros(len(rows), len(self.names), device=places.device)
        for routing in routings:
            weights = routing.acting_weights.flatten(0, -2)
            total[:, : weights.shape[-1]] += weights[places.to(weights.device)].to(total)
        means = (total / len(routings)).tolist()
        return {row.request_id: dict(zip(self.names, mean, strict=True)) for row, mean in zip(rows, means, strict=True)}

    def of_domain(self) -> AbstractContextManager[None]:
        """A block in which all tokens are of the domain that is served."""
        return nullcontext() if self.domain is None else of_domain(self.model, self.domain)

    def _given(self, rows: Sequence[RowInBatch]) -> AbstractContextManager[None]:
        if self.route is None:
            return nullcontext()
        known = [(row, self.of_request.get(row.request_id)) for row in rows]
        some = next((routing for _, routing in known if routing is not None), None)
        if some is None:
            return nullcontext()
        nothing = replace(some.answer, routing_weights=torch.zeros_like(some.answer.routing_weights))
        parts = [[nothing] * row.tokens if routing is None else [routing.at(row)] for row, routing in known]
        return self.route.given(Routing.joined([part for row in parts for part in row]))

    def _count(self, rows: Sequence[RowInBatch], assignments: Sequence[Tensor]) -> None:
        first = 0
        for row in rows:
            if (load := self.counted.get(row.request_id)) is not None:
                for assignment in assignments:
                    flat = assignment.reshape(-1, assignment.shape[-1])
                    load.add(flat[first : first + row.tokens].sum(0))
            first += row.tokens


class Load:
    """Share of each expert of the routed tokens of a request."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def add(self, counts: Tensor) -> None:
        """Add (E,) assignments of some tokens at one site."""
        counts = counts.detach().double().cpu()
        self.total = counts if self.total is None else self.total + counts

    def shares(self, names: Sequence[str]) -> dict[str, float]:
        """Returns them by name; nothing where nothing was routed."""
        if self.total is None or not float(self.total.sum()):
            return {}
        return dict(zip(names, (self.total / self.total.sum()).tolist(), strict=True))
