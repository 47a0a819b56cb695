"""One decision for a prompt, which stands while the answer is generated.

Shapes: B sequences of T tokens, P rows packed into one sequence, D hidden, E experts.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lmoe.errors import RoutingError
from lmoe.layers.context import PromptDecisions, PromptRows, RoutingContext, RunningForward
from lmoe.layers.prompt import ForwardInputs, PromptedGenerate, cache_of, decision_in, keep_with
from lmoe.layers.routers.base import Router
from lmoe.layers.routers.token import TopKRouter
from lmoe.layers.routing import Routing
from lmoe.ops.gating import Gate
from lmoe.ops.prompt_states import mean_of_prompts
from lmoe.ops.router_targets import targets_of_rows
from lmoe.vocabulary import Decide


class PromptRouter(Router):
    """One decision for each row's prompt, the same for all tokens of the row.

    The prompt is all that comes before the first label, in `generate` its input, and else what fills the KV cache. The
    decision travels with that cache: later forwards with it, or with a copy, keep it. Prompt tokens see later prompt
    tokens through it, answers see nothing that a user would not have at that time.
    """

    name: str
    """Of the router in a config."""

    @abstractmethod
    def decide(self, x: Tensor, rows: PromptRows) -> tuple[Tensor, Gate]:
        """Logits (B, P, E) and gate of the prompts.

        Args:
            x: (B, T, D) hidden states.
        """

    def route(self, x: Tensor, router_logits: Tensor | None) -> Routing:
        if x.dim() != 3:
            raise RoutingError(
                f"moe.router={self.name} needs (B, T, D) hidden states at {self.site}, got {tuple(x.shape)}"
            )
        forward = self.context.current_forward(training=self.training)
        if forward is not None and forward.cached is not None:
            whose, where = f"moe.router={self.name}", f" at {self.site}"
            logits, gate = self.context.decided(forward.cached, self.site, x.shape[0], whose, where)
            row_ids = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
        else:
            rows = self.context.rows(training=self.training)
            if rows is None or rows.row_ids.shape != x.shape[:2]:
                raise RoutingError(
                    f"moe.router={self.name} does not know the prompts of the {tuple(x.shape[:2])} tokens at "
                    f"{self.site}; call the whole model, or wrap its parts in `with lmoe.trace(model, "
                    "attention_mask=…)`"
                )
            logits, gate = self.decide(x, rows)
            row_ids = rows.row_ids
            if forward is not None and keeps_decision(self.training) and rows.prompt.shape[1] == 1:
                forward.new.sites[self.site] = detached(logits, gate)
        return of_rows(logits, gate, row_ids.to(logits.device))


class SequenceRouter(PromptRouter, TopKRouter):
    """top_k of the mean hidden state of a row's prompt tokens."""

    name = "sequence"

    def decide(self, x: Tensor, rows: PromptRows) -> tuple[Tensor, Gate]:
        logits = self.logits(mean_of_prompts(x, rows.prompt))
        targets = self.context.targets(training=self.training)
        ids = None if targets is None else targets_of_rows(targets.ids, rows.row_ids, logits.shape[1])
        return logits, self.gated(logits, x, ids)

    def reads_every_token(self) -> bool:
        return False


class PromptReader:
    """Reads from a model's inputs, before each forward, which tokens are the prompt, or what was decided for it.

    Args:
        context: the model's, which it writes to.
        router: the name of its routers, for messages.
        by_ids: whether they decide by the ids of the prompt's tokens; of a text without a prompt by those of its
            opening, because many texts begin with the same token.
    """

    def __init__(self, context: RoutingContext, router: str, *, by_ids: bool) -> None:
        self.context, self.router, self.by_ids = context, router, by_ids

    def attach(self, model: nn.Module) -> None:
        """Read before each forward of the whole model, and leave the decision with its KV cache after it."""
        model.register_forward_pre_hook(self.begin, with_kwargs=True)
        model.register_forward_hook(self.end, with_kwargs=True, always_call=True)
        PromptedGenerate(model, self.context.prompt).attach()

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the whole model.

        Raises:
            RoutingError: the prompts of these inputs cannot be told.
        """
        context, inputs = self.context, ForwardInputs.of(model, args, kwargs)
        context.forget_last_batch_info()
        new = PromptDecisions(masked=context.masked, model_id=context.model_id)
        if (standing := context.standing.get()) is not None:
            held = PromptDecisions(standing, context.masked, context.model_id)
            context.begin_forward(RunningForward(None, held, new), training=model.training)
            return
        cached_tokens = inputs.cached_tokens
        if inputs.cache is not None and cached_tokens:
            cached = decision_in(inputs.cache, cached_tokens)
            cached = cached if isinstance(cached, PromptDecisions) else PromptDecisions()
            context.begin_forward(RunningForward(None, cached, new), training=model.training)
            return
        rows = None
        if inputs.tokens is not None:
            told, stated = context.batch_info.rows, context.prompt.get()
            whose = f"moe.router={self.router}"
            rows = inputs.prompt_rows(told, stated, Decide.first, whose, openings=self.by_ids)
        ids = inputs.ids if self.by_ids else None
        if ids is not None and rows is not None and rows.hashes is None and rows.row_ids.shape == ids.shape:
            rows = rows.with_hashes(ids)
        context.begin_forward(RunningForward(rows, None, new), training=model.training)

    def end(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A forward hook of the whole model, called also after a forward that failed."""
        forward = self.context.end_forward()
        cache = cache_of(output)
        if forward is not None and forward.cached is None and forward.new.sites and cache is not None:
            inputs = ForwardInputs.of(model, args, kwargs)
            keep_with(cache, forward.new, inputs.prompt_length(self.context.prompt.get()))


def of_rows(logits: Tensor, gate: Gate, row_ids: Tensor) -> Routing:
    """The decisions of rows, (B, P, E), as those of their tokens, (B, T, E), by the row (B, T) of each."""
    where = row_ids.unsqueeze(-1)

    def spread(values: Tensor) -> Tensor:
        return values.gather(1, where.expand(-1, -1, values.shape[-1]))

    return Routing.of(spread(logits), _map(gate, spread))


def keeps_decision(training: bool) -> bool:
    """Whether a decision is left with the KV cache of its forward: not in a step of training, which goes on with none.
    `generate` has no gradients, in training mode too."""
    return not training or not torch.is_grad_enabled()


def detached(logits: Tensor, gate: Gate) -> tuple[Tensor, Gate]:
    """What a KV cache keeps of a decision."""
    return logits.detach(), _map(gate, Tensor.detach)


def _map(gate: Gate, function: Callable[[Tensor], Tensor]) -> Gate:
    indices = gate.expert_indices
    return Gate(
        function(gate.probs),
        function(gate.weights),
        function(gate.assignment),
        None if indices is None else function(indices),
    )
