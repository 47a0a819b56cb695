"""The decision of a router for the whole model: what it reads, when it decides, and on which tokens experts act.

Shapes: B sequences of T tokens, P rows packed into one sequence (with decide=turn: turns of rows), D hidden, E experts.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lmoe.errors import RoutingError
from lmoe.layers.context import PromptDecisions, PromptRows, RunningForward, SiteDecisions
from lmoe.layers.per_call import PerCall
from lmoe.layers.prompt import ForwardInputs, PromptedGenerate, cache_of, decision_in, keep_with, valid_tokens
from lmoe.layers.prompt_reading import DecoderPlace, ReadInputs, StateReader
from lmoe.layers.routers.model import ModelOracle, ModelRouter
from lmoe.layers.routers.sequence import detached, keeps_decision, of_rows
from lmoe.layers.routing import Routing
from lmoe.ops.gating import Gate
from lmoe.ops.prompt_states import mean_of_prompts
from lmoe.ops.router_targets import targets_of_rows
from lmoe.vocabulary import Decide

MODEL = "model"
"""Name of the site that stands for all of them."""
Decision = tuple[Tensor, Gate]
"""Logits and gate, (B, P, E)."""


@dataclass(slots=True, frozen=True)
class RouteSettings:
    """How a model decides.

    Args:
        place: whose hidden states are read.
        prompt_experts: experts act on the prompt too.
        decide: for the first prompt of a conversation, or for each turn.
    """

    place: DecoderPlace
    prompt_experts: bool
    decide: Decide


class ModelRoute:
    """Decides once for all sites of a model, before a forward of it or while a prompt runs through it.

    A prompt is read without routed experts, and what it decides holds for what follows. Where a forward has both, the
    prompts run first, alone and without gradients, unless the targets of the rows decide by themselves and the router
    rests (`RoutingContext.routers_rest`). Where experts do not act on prompts, and a forward is a prompt and
    nothing else, as the first one of `generate`, that forward itself is read, and its KV cache is kept.

    Args:
        router: of the model.
        settings: how it decides.
    """

    NAME = "moe.router_scope=model"
    """For messages."""

    def __init__(self, router: ModelRouter | ModelOracle, settings: RouteSettings) -> None:
        self.router, self.settings, self.context = router, settings, router.context
        self.states = StateReader(settings.place)
        self._given: PerCall[Routing] = PerCall()

    def attach(self, model: nn.Module) -> None:
        """Decide with each forward of a model."""
        self.states.attach(model)
        model.register_forward_pre_hook(self.begin, with_kwargs=True)
        model.register_forward_hook(self.end, with_kwargs=True, always_call=True)
        PromptedGenerate(model, self.context.prompt).attach()

    def decision(self, device: torch.device) -> Routing | None:
        """What the experts of this forward do at each token, (B, T, E); None: no routed expert acts.

        Raises:
            RoutingError: outside of a forward of the whole model, or without the gradients that it began with.
        """
        routing = self._forward().of_model
        if routing is not None and routing.routing_weights.requires_grad and not torch.is_grad_enabled():
            raise RoutingError(
                "moe.router_scope=model decided with gradients, and this layer runs without, so it would not train the "
                "router: gradient checkpointing needs use_reentrant=False"
            )
        return routing if routing is None or routing.routing_weights.device == device else routing.to(device)

    def acts(self) -> bool:
        """Whether routed experts act in this forward: not on a prompt that is to decide.

        Raises:
            RoutingError: outside of a forward of the whole model.
        """
        return self._forward().of_model is not None

    def _undecided(self) -> RunningForward:
        """A forward in which no routed expert acts yet."""
        return RunningForward(None, None, PromptDecisions(masked=self.context.masked, model_id=self.context.model_id))

    def _forward(self) -> RunningForward:
        forward = self.context.current_forward(training=self.router.training)
        if forward is None:
            raise RoutingError(f"{self.NAME} decides in forwards of the whole model: call it, not one of its parts")
        return forward

    @torch.no_grad()
    def of_prompt(self, model: nn.Module, ids: Tensor, answers: Tensor | None = None) -> tuple[Routing, Routing]:
        """Decide for a prompt that later forwards of somebody else's making go on with, as in continuous batching.

        Args:
            model: the whole one.
            ids: (1, T) tokens of the prompt.
            answers: (1, T) bool, tokens of earlier answers; None: there are none.

        Returns:
            The routing of the prompt's tokens, (1, T, E), with weights of 0 where no routed expert acts, and that of
            all that follows, (1, 1, E).
        """
        context, valid = self.context, torch.ones_like(ids, dtype=torch.bool)
        empty = self._undecided()
        decide = self.settings.decide
        rows = PromptRows.single(valid) if answers is None else PromptRows.awaiting_answer(answers, valid, decide)
        acting = self._acting(rows)
        context.begin_forward(empty, training=False)
        try:
            if isinstance(self.router, ModelOracle):
                decision = self.router.decide(rows.row_ids, rows.prompt.shape[1])
            else:
                read = ReadInputs.of(model, self._decoder(model), (), {"input_ids": ids})
                decision = self._decide(model, read, rows, acting, empty)
        finally:
            context.end_forward()
        prompt, last = self._of_tokens(decision, rows), rows.row_ids[:, -1:].to(decision[0].device)
        return prompt if acting is None else _where(prompt, acting), of_rows(*decision, last)

    @torch.no_grad()
    def read_prompts(self, model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, D) float32: what the router multiplies its weights with, of prompts that nothing follows.

        Args:
            model: the whole one.
            ids: (B, T) tokens.
            mask: (B, T) 1 for valid tokens, which come first.
        """
        assert isinstance(self.router, ModelRouter)
        self.context.begin_forward(self._undecided(), training=False)
        try:
            read = ReadInputs.of(model, self._decoder(model), (), {"input_ids": ids, "attention_mask": mask})
            means = mean_of_prompts(self._read(model, read), mask.bool().unsqueeze(1))
        finally:
            self.context.end_forward()
        return self.router.read(means[:, 0])

    @contextmanager
    def given(self, routing: Routing) -> Iterator[None]:
        """Take this routing, (1, T, E), for the tokens of the forwards of this thread inside the block, and decide
        nothing."""
        with self._given.holding(routing):
            yield

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the whole model.

        Raises:
            RoutingError: the prompts of these inputs cannot be told, or the KV cache came without a decision.
        """
        context, inputs = self.context, ForwardInputs.of(model, args, kwargs)
        context.forget_last_batch_info()
        empty = self._undecided()
        context.begin_forward(empty, training=model.training)
        if context.off or inputs.tokens is None:
            return
        if (given := self._given.get()) is not None:
            context.begin_forward(replace(empty, of_model=self.router.seen(given)), training=False)
            return
        if (standing := context.standing.get()) is not None:
            context.begin_forward(self._standing(standing, inputs.tokens, empty), training=model.training)
            return
        read = partial(ReadInputs.of, model, self._decoder(model), args, kwargs)
        if inputs.cache is not None and inputs.cached_tokens:
            forward = self._after_cached(model, inputs, read, empty)
        else:
            forward = self._from_the_start(model, inputs, read, empty)
        context.begin_forward(forward, training=model.training)

    def end(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A forward hook of the whole model, called also after a forward that failed."""
        forward, states = self.context.end_forward(), self.states.heard()
        if forward is None or output is None:
            return
        if states is not None and forward.rows is not None:
            rows = forward.rows
            decision = self._decided(mean_of_prompts(states, rows.prompt), rows)
            nowhere = torch.zeros_like(rows.row_ids, dtype=torch.bool)
            self._seen(decision, rows, nowhere)
            self._keep(decision, rows, forward)
        if forward.new.sites and (cache := cache_of(output)) is not None:
            stated, inputs = self.context.prompt.get(), ForwardInputs.of(model, args, kwargs)
            if forward.cached is None or stated is None:
                length = inputs.prompt_length(stated)
            else:  # of a turn more
                length = stated.shape[1]
            keep_with(cache, forward.new, length)

    def _from_the_start(
        self, model: nn.Module, inputs: ForwardInputs, read: Callable[[], ReadInputs], empty: RunningForward
    ) -> RunningForward:
        """A forward with an empty KV cache, or without one."""
        assert inputs.tokens is not None
        told, stated = self.context.batch_info.rows, self.context.prompt.get()
        rows = inputs.prompt_rows(told, stated, self.settings.decide, self.NAME, openings=True)
        one_prompt = self._is_one_prompt(inputs) and not self.settings.prompt_experts
        if isinstance(self.router, ModelOracle):
            return self._told(self.router, model, rows, empty, one_prompt=one_prompt)
        if one_prompt:
            if model.training and torch.is_grad_enabled():
                raise RoutingError(
                    "moe.router_scope=model takes all of these tokens for a prompt, on which no expert acts, so none "
                    "would learn: give the model labels, or mark the prompt in `lmoe.trace(model, …, prompt_mask=…)`"
                )
            self.states.listen()
            return replace(empty, rows=rows)
        acting = self._acting(rows)
        decision = self._unread(rows)
        if decision is None:
            decision = self._decide(model, read(), rows, acting, empty)
        forward = replace(empty, rows=rows, of_model=self._seen(decision, rows, acting))
        if keeps_decision(model.training):
            self._keep(decision, rows, forward)
        return forward

    def _told(
        self, oracle: ModelOracle, model: nn.Module, rows: PromptRows, empty: RunningForward, *, one_prompt: bool
    ) -> RunningForward:
        """The forward of an oracle, which reads nothing before it decides."""
        decision = oracle.decide(rows.row_ids, rows.prompt.shape[1])
        routing = self._seen(decision, rows, self._acting(rows))
        forward = replace(empty, rows=rows, of_model=None if one_prompt else routing)
        if keeps_decision(model.training):
            self._keep(decision, rows, forward)
        return forward

    def _standing(self, standing: SiteDecisions, tokens: Tensor, empty: RunningForward) -> RunningForward:
        """A forward with a decision that stands for all of its tokens, or without one: no routed expert acts."""
        if MODEL not in standing:
            return empty
        here = PromptRows.single(torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device))
        return replace(empty, of_model=self._seen(standing[MODEL], here, None))

    def _acting(self, rows: PromptRows) -> Tensor | None:
        """(B, T) bool: tokens on which experts act; None: all."""
        return None if self.settings.prompt_experts else ~rows.prompt.any(1)

    def _after_cached(
        self, model: nn.Module, inputs: ForwardInputs, read: Callable[[], ReadInputs], empty: RunningForward
    ) -> RunningForward:
        """A forward with a filled KV cache: what was decided stands, or a new turn of the user decides anew.

        Raises:
            RoutingError: nothing was decided for this cache.
        """
        assert inputs.cache is not None and inputs.tokens is not None
        cached = decision_in(inputs.cache, inputs.cached_tokens)
        batch, length = inputs.tokens.shape[:2]
        decided = self.context.decided(cached, MODEL, batch, self.NAME)
        stated = self.context.prompt.get()
        is_turn = stated is not None and stated.shape[1] == inputs.cached_tokens + length
        if self.settings.decide is Decide.first or not is_turn:
            here = PromptRows.single(torch.ones(batch, length, dtype=torch.bool, device=inputs.tokens.device))
            return replace(empty, cached=cached, of_model=self._seen(decided, here, None))
        rows = PromptRows.single(valid_tokens(inputs.attention_mask, inputs.tokens, inputs.cached_tokens))
        if not self.settings.prompt_experts:
            self.states.listen()
            return replace(empty, rows=rows, cached=cached)
        decision = self._decided(mean_of_prompts(self._read(model, read()), rows.prompt), rows)
        forward = replace(empty, rows=rows, cached=cached, of_model=self._seen(decision, rows, None))
        self._keep(decision, rows, forward)
        return forward

    def _is_one_prompt(self, inputs: ForwardInputs) -> bool:
        """Whether the tokens of a forward are a prompt and nothing else."""
        assert inputs.tokens is not None
        stated = self.context.prompt.get()
        told = inputs.labels is not None or inputs.known_rows(self.context.batch_info.rows, stated) is not None
        return not told and inputs.prompt_length(stated) == inputs.tokens.shape[1]

    def _decide(
        self, model: nn.Module, read: ReadInputs, rows: PromptRows, acting: Tensor | None, empty: RunningForward
    ) -> Decision:
        """The decision for each prompt; one turn is read after the other, because it follows earlier answers."""
        first = read.prompts_alone(rows)
        decision = self._decided(mean_of_prompts(self._read(model, first), first.prompt), rows)
        for number in range(1, rows.last_turn + 1):
            assert rows.turn is not None
            here = read.up_to(rows.prompts_of_turn(number))
            known = rows.turn < number
            of_tokens = known.gather(1, rows.row_ids)
            acts = of_tokens if acting is None else of_tokens & acting
            with torch.no_grad():
                inside = _where(self._of_tokens(decision, rows), acts).tokens(0, here.prompt.shape[-1])
            self.context.begin_forward(replace(empty, rows=rows, of_model=inside), training=False)
            later = self._decided(mean_of_prompts(self._read(model, here), here.prompt), rows)
            decision = _one_or_other(known, decision, later)
        return decision

    @torch.no_grad()
    def _read(self, model: nn.Module, inputs: ReadInputs) -> Tensor:
        """(B, T, D) states of a forward of the decoder that is there only to be read.

        Raises:
            RoutingError: the decoder did not come by the place that is read.
        """
        states = self.states.read(self._decoder(model), {**inputs.of_a_copied_cache(), "use_cache": inputs.cached})
        if states is None:
            raise RoutingError(f"{type(model).__name__}: no hidden states at {self.settings.place}")
        return states

    def _unread(self, rows: PromptRows) -> Decision | None:
        """The decision, where it does not depend on what the prompts say; else None."""
        assert isinstance(self.router, ModelRouter)
        if (targets := self._targets(rows)) is None:
            return None
        device = self.router.weight.device
        return self.router.decide_unread(targets.to(device), rows.prompt.any(-1).to(device))

    def _decided(self, means: Tensor, rows: PromptRows) -> Decision:
        assert isinstance(self.router, ModelRouter)
        return self.router.decide(means.to(self.router.weight.device), self._targets(rows))

    def _targets(self, rows: PromptRows) -> Tensor | None:
        """(B, P) int64, what the router is taught of each row; None: nothing."""
        known = self.context.targets(training=self.router.training)
        return None if known is None else targets_of_rows(known.ids, rows.row_ids, rows.prompt.shape[1])

    def _seen(self, decision: Decision, rows: PromptRows, acting: Tensor | None) -> Routing:
        """The routing of the tokens as the sites get it, after the trace has got it."""
        routing = self.router.seen(replace(self._of_tokens(decision, rows), acting=acting))
        return routing if acting is None else _where(routing, acting)

    def _of_tokens(self, decision: Decision, rows: PromptRows) -> Routing:
        return of_rows(*decision, rows.row_ids.to(decision[0].device))

    def _keep(self, decision: Decision, rows: PromptRows, forward: RunningForward) -> None:
        """Have the decision for the last row of each sequence travel with the KV cache."""
        logits, gate = decision
        if logits.shape[1] > 1:
            last = rows.row_ids[:, -1:].to(logits.device)
            of_last = of_rows(logits, gate, last)
            logits = of_last.router_logits
            gate = Gate(of_last.probs, of_last.routing_weights, of_last.assignment, of_last.expert_indices)
        forward.new.sites[MODEL] = detached(logits, gate)

    def _decoder(self, model: nn.Module) -> nn.Module:
        return model.get_submodule(self.settings.place.decoder)


def _one_or_other(first: Tensor, one: Decision, other: Decision) -> Decision:
    """The one decision for the rows of `first`, (B, P) bool, and the other for the rest."""
    first = first.to(one[0].device).unsqueeze(-1)

    def chosen(mine: Tensor | None, yours: Tensor | None) -> Tensor:
        assert mine is not None and yours is not None  # top_k has indices
        return torch.where(first, mine, yours)

    gate = Gate(*(chosen(*parts) for parts in zip(one[1], other[1], strict=True)))
    return chosen(one[0], other[0]), gate


def _where(routing: Routing, acting: Tensor) -> Routing:
    """The routing with weights of 0 for tokens on which no expert acts."""
    acting = acting.to(routing.routing_weights.device)
    return replace(routing, routing_weights=routing.routing_weights * acting.unsqueeze(-1), acting=acting)
