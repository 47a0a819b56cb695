"""Models whose experts can be silenced, whatever they are: mixtures, one adapter, blends, and a base without any.

Shapes: B rows of a batch, T tokens, E experts.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmoe.blend.blend import Blend
from lmoe.blend.linear import Setting
from lmoe.blend.routers import BlendRouter
from lmoe.errors import ConfigError
from lmoe.explain.explanation import ExplainedSite, TextTokens
from lmoe.injection.plan import SiteKind
from lmoe.injection.record import BLEND, RECORD, injected
from lmoe.injection.tracing import adapters_off, expert_of, trace
from lmoe.injection.tracing import domain as of_domain
from lmoe.layers.context import SiteDecisions
from lmoe.layers.model_route import MODEL
from lmoe.layers.routing import Routing, Silenced
from lmoe.ops.gating import Gate
from lmoe.rules.routers import needs_domain, needs_prompt, reads_openings
from lmoe.rules.strategies import STRATEGIES
from lmoe.vocabulary import Decide, RouterScope

LAYER = re.compile(r"\.(\d+)\.")
"""Where a module path names its decoder layer."""
WHOLE_BLOCKS = (SiteKind.expert_ffn, SiteKind.native_experts)
"""Sites whose experts are more than the branch that training has put beside them."""


class ExplainedModel:
    """A base without experts, and what all others share with it.

    Args:
        model: in evaluation mode.

    Attributes:
        experts: names.
        sites: where they are.
        kind: what the model is made of, in words.
        notes: what a reader must know of it.
        by_row: whether rows of one batch may each have another expert silenced.
    """

    by_row = False

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.experts: tuple[str, ...] = ()
        self.sites: tuple[ExplainedSite, ...] = ()
        self.kind = "the base alone"
        self.notes: list[str] = ["there are no experts: the text has log-probabilities alone"]

    def check(self, text: TextTokens) -> None:
        """Refuse a text that this model cannot be asked about.

        Raises:
            RoutingError: its domain is not one that the router knows.
        """

    def reading(self, text: TextTokens) -> AbstractContextManager[None]:
        """A block whose forwards of the whole text know its prompts and its domain."""
        return nullcontext()

    def weights(self, text: TextTokens) -> dict[str, Tensor]:
        """(T, E) routing weights by site, as the last forward inside `reading` had them."""
        return {}

    def off(self) -> AbstractContextManager[None]:
        """A block in which the base alone computes."""
        return nullcontext()

    def silenced(self, experts: Collection[int]) -> AbstractContextManager[None]:
        """A block in which these experts are silenced; the others keep their weights."""
        return nullcontext()

    def step(self, text: TextTokens, position: int, rows: Sequence[int | None]) -> AbstractContextManager[None]:
        """A block for a forward of one token of the text, with what was decided for it in the forward of the whole.

        Args:
            position: of the token.
            rows: of the batch, all the same token: the expert that is silenced in each, or None.
        """
        return nullcontext()


class OneAdapter(ExplainedModel):
    """A model with one adapter, which is the only expert, and always on.

    Args:
        model: injected with dense_lora.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.experts = ("adapter",)
        self.sites = tuple(
            ExplainedSite(
                name=site.path, layer=site.layer, part=_part(site.path, site.layer), modules=(site.path,), experts=1
            )
            for site in injected(model).plan.sites
        )
        self.kind = f"{injected(model).injection.strategy}: one adapter, which is the only expert"
        self.notes = ["one adapter without routers: its weight is 1 everywhere, and silencing it leaves the base"]

    def weights(self, text: TextTokens) -> dict[str, Tensor]:
        return {site.name: torch.ones(len(text), 1) for site in self.sites}

    def off(self) -> AbstractContextManager[None]:
        return adapters_off(self.model)

    def silenced(self, experts: Collection[int]) -> AbstractContextManager[None]:
        return adapters_off(self.model) if experts else nullcontext()

    def step(self, text: TextTokens, position: int, rows: Sequence[int | None]) -> AbstractContextManager[None]:
        return nullcontext() if rows[0] is None else adapters_off(self.model)


class RoutedMixture(ExplainedModel):
    """A model whose experts are weighed by routers.

    Args:
        model: injected, with routers.
    """

    by_row = True

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.record = injected(model)
        moe, injection, plan = self.record.moe, self.record.injection, self.record.plan
        self._counts = dict(plan.routers)
        count = max(self._counts.values())
        by_name = self.record.expert_names or (moe.domains or () if needs_domain(moe) else ())
        self.experts = tuple(by_name[e] if e < len(by_name) else str(e) for e in range(count))
        self.sites = tuple(self._site(name) for name in self._counts)
        own = STRATEGIES[injection.strategy].own_routers
        by = f"moe.router={moe.router}, moe.router_scope={moe.router_scope}" if own else "the backbone's own routers"
        self.kind = f"{injection.strategy}: {count} experts, {by}"
        self.notes = self._notes()
        self._routing: dict[str, Routing] = {}

    def _site(self, name: str) -> ExplainedSite:
        modules = [site for site in self.record.plan.sites if site.router == name]
        layers = {site.layer for site in modules}
        layer = layers.pop() if name != MODEL and len(layers) == 1 else None
        return ExplainedSite(
            name=name,
            layer=layer,
            part=name if layer is None else _part(name, layer),
            modules=tuple(site.path for site in modules),
            experts=self._counts[name],
        )

    def _notes(self) -> list[str]:
        record, notes = self.record, []
        if any(site.kind in WHOLE_BLOCKS for site in record.plan.sites):
            notes.append(
                "an expert here is a feed-forward block with its LoRA: silencing it takes the block's share away too, "
                "so all experts silenced are not the base"
            )
        others = [site for site in record.plan.sites if not site.router or site.shared_lora_r]
        if others:
            notes.append(
                "beside the routed experts the model has LoRA that is always on (attention, or a shared expert): it "
                "stays where all experts are silenced, and is off in the base"
            )
        if record.moe.router_scope is RouterScope.model and not record.moe.prompt_experts:
            notes.append("experts do not act on prompts: there, and at the first token of an answer, nothing changes")
        if record.trained_base:
            notes.append("the run also trained weights of the backbone itself, which work in the base too")
        return notes

    def check(self, text: TextTokens) -> None:
        if needs_domain(self.record.moe):
            expert_of(self.record.moe, text.domain or "")

    @contextmanager
    def reading(self, text: TextTokens) -> Iterator[None]:
        moe, device = self.record.moe, self.model.device
        prompt = None
        if needs_prompt(moe):
            prompt = text.prompts(of_all_turns=moe.decide is Decide.turn, openings=reads_openings(moe))
        with trace(
            self.model,
            attention_mask=torch.ones(1, len(text), dtype=torch.bool, device=device),
            domains=[text.domain or ""] if needs_domain(moe) else None,
            prompt_mask=None if prompt is None else prompt[None].to(device),
        ) as seen:
            yield
        self._routing = dict(seen.routing)

    def weights(self, text: TextTokens) -> dict[str, Tensor]:
        found = {}
        for site, routing in self._routing.items():
            found[site] = routing.acting_weights.float().reshape(len(text), -1).cpu()
        return {site.name: found[site.name] for site in self.sites if site.name in found}

    def off(self) -> AbstractContextManager[None]:
        return adapters_off(self.model)

    def silenced(self, experts: Collection[int]) -> AbstractContextManager[None]:
        return self.record.context.silence(self._masks([tuple(experts)]))

    @contextmanager
    def step(self, text: TextTokens, position: int, rows: Sequence[int | None]) -> Iterator[None]:
        moe, context = self.record.moe, self.record.context
        with ExitStack() as block:
            if needs_prompt(moe):
                block.enter_context(context.standing.holding(self._decisions(position, len(rows))))
            elif needs_domain(moe):
                block.enter_context(of_domain(self.model, text.domain or ""))
            if any(row is not None for row in rows):
                masks = self._masks([() if row is None else (row,) for row in rows])
                block.enter_context(context.silence(masks))
            yield

    def _masks(self, rows: Sequence[Collection[int]]) -> dict[str, Silenced]:
        """A mask (B, 1, E) of the silenced experts of each row, by site."""
        masks: dict[str, Silenced] = {}
        for site, count in self._counts.items():
            mask = torch.zeros(len(rows), 1, count, dtype=torch.bool)
            for row, experts in enumerate(rows):
                mask[row, 0, [e for e in experts if e < count]] = True
            masks[site] = mask.to(self.model.device)
        return masks

    def _decisions(self, position: int, rows: int) -> SiteDecisions:
        """What was decided for the prompt of a token, as that of all rows of a batch; where no expert acts, nothing."""
        found: SiteDecisions = {}
        for site, routing in self._routing.items():
            if routing.acting is not None and not bool(routing.acting[0, position]):
                continue
            logits, *parts = (
                None if values is None else values[:, position : position + 1].expand(rows, -1, -1)
                for values in (
                    routing.router_logits,
                    routing.probs,
                    routing.routing_weights,
                    routing.assignment,
                    routing.expert_indices,
                )
            )
            assert logits is not None
            found[site] = (logits, Gate(*parts))  # type: ignore[arg-type]
        return found


class BlendedExperts(ExplainedModel):
    """A base with experts blended over it, with weights that are the same at every token.

    Args:
        model: that blends.

    Raises:
        ConfigError: a blend whose router decides by itself.
    """

    by_row = True

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.blend: Blend = getattr(model, BLEND)
        if self.blend.router not in (BlendRouter.weighted, BlendRouter.static):
            raise ConfigError(
                f"router={self.blend.router} decides by itself, and only blends with weights of your own can be "
                "explained; use router=weighted with weights"
            )
        given = self.blend.weights
        if isinstance(given, list):
            raise ConfigError("the blend has weights by row; give one dict of weights for all")
        self._given = given
        self.experts = tuple(self.blend.names)
        branches = self.blend.branches
        self._at = {path: [path in branches[name] for name in self.experts] for path in self.blend.sites}
        self.sites = tuple(
            ExplainedSite(
                name=path,
                layer=(layer := _layer(path)),
                part=path if layer is None else _part(path, layer),
                modules=(path,),
                experts=len(self.experts),
            )
            for path in self._at
        )
        shown = ", ".join(f"{name}={weight:g}" for name, weight in given.items())
        self.kind = f"a blend: {shown}"
        self.notes = ["a blend has the same weights at every token; silencing an expert sets its weight to 0"]

    def weights(self, text: TextTokens) -> dict[str, Tensor]:
        found = {}
        for path, there in self._at.items():
            own = [self._given[name] if here else 0.0 for name, here in zip(self.experts, there, strict=True)]
            found[path] = torch.tensor(own).expand(len(text), -1)
        return found

    def off(self) -> AbstractContextManager[None]:
        return self.blend.silenced()

    def silenced(self, experts: Collection[int]) -> AbstractContextManager[None]:
        return self.blend.reading(self._setting([tuple(experts)]))

    def step(self, text: TextTokens, position: int, rows: Sequence[int | None]) -> AbstractContextManager[None]:
        return self.blend.reading(self._setting([() if row is None else (row,) for row in rows]))

    def _setting(self, rows: Sequence[Collection[int]]) -> Setting:
        weights = []
        for silenced in rows:
            names = {self.experts[e] for e in silenced}
            weights.append({name: 0.0 if name in names else weight for name, weight in self._given.items()})
        return Setting(weights, len(rows) > 1, experts=self.blend.numbers)


def explained_model(model: PreTrainedModel) -> ExplainedModel:
    """A model by what it carries: routed experts, one adapter, a blend, or nothing.

    Raises:
        ConfigError: a blend whose router decides by itself.
    """
    if getattr(model, RECORD, None) is not None:
        return RoutedMixture(model) if injected(model).plan.routers else OneAdapter(model)
    return BlendedExperts(model) if getattr(model, BLEND, None) is not None else ExplainedModel(model)


def _layer(path: str) -> int | None:
    found = LAYER.search(f"{path}.")
    return None if found is None else int(found[1])


def _part(path: str, layer: int) -> str:
    """What follows the layer in a module path; of the layer itself its own name."""
    _, separator, part = path.partition(f".{layer}.")
    return part if separator else path
