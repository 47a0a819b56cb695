"""One decision for a prompt, which stands while the answer is generated.

Shapes: B sequences of T tokens, P rows packed into one sequence, D hidden, E experts.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lmoe.errors import RoutingError
from lmoe.layers.context import RoutingContext, Rows
from lmoe.layers.routers.linear import TopKRouter
from lmoe.layers.token_mask import valid_tokens
from lmoe.layers.trace import Routing
from lmoe.ops.gating import Gate
from lmoe.ops.labels import IGNORE


class SequenceRouter(TopKRouter):
    """top_k of the mean hidden state of a row's prompt tokens, the same for all tokens of the row.

    The prompt is all that comes before the first label, and in generation what the KV cache starts with; later
    forwards with that cache keep the decision. Prompt tokens see later prompt tokens through it, answers see nothing
    that a user would not have at that time.
    """

    def route(self, x: Tensor, router_logits: Tensor | None) -> Routing:
        if x.dim() != 3:
            raise RoutingError(
                f"moe.router=sequence needs (B, T, D) hidden states at {self.site}, got {tuple(x.shape)}"
            )
        if self.context.going_on:
            logits, gate = self._decided(x.shape[0])
            row_ids = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
        else:
            rows = self.context.rows(training=self.training)
            if rows is None or rows.row_ids.shape != x.shape[:2]:
                raise RoutingError(
                    f"moe.router=sequence does not know the prompts of the {tuple(x.shape[:2])} tokens at {self.site}; "
                    "call the whole model, or wrap its parts in `with lmoe.trace(model, attention_mask=…)`"
                )
            logits = self.logits(_pooled(x, rows.prompt))
            gate = self.gate(self.perturbed(logits, x))
            row_ids = rows.row_ids
            if not self.training and rows.prompt.shape[1] == 1:
                self.context.decided[self.site] = (logits.detach(), _map(gate, Tensor.detach))
        spread = row_ids.unsqueeze(-1)
        return Routing.of(_of_row(logits, spread), _map(gate, lambda values: _of_row(values, spread)))

    def reads_every_token(self) -> bool:
        return False

    def _decided(self, batch: int) -> tuple[Tensor, Gate]:
        kept = self.context.decided.get(self.site)
        if kept is None or kept[0].shape[0] != batch:
            raise RoutingError(
                f"moe.router=sequence has no decision for these {batch} sequences at {self.site}: the forward that "
                "filled the KV cache must run on the same model, just before"
            )
        return kept


class PromptReader:
    """Reads from a model's inputs which tokens are the prompt, before each forward.

    Args:
        context: the model's, which it writes to.
    """

    def __init__(self, context: RoutingContext) -> None:
        self.context = context

    def read(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the whole model."""
        self.context.forget_before()
        past = kwargs.get("past_key_values")
        self.context.going_on = past is not None and int(past.get_seq_length()) > 0
        if self.context.going_on or self.context.known.rows is not None:
            return
        self.context.decided.clear()
        given = next((t for t in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if t is not None), None)
        if given is None:
            return
        prompt, labels = valid_tokens(kwargs.get("attention_mask"), given).clone(), kwargs.get("labels")
        if labels is not None:
            prompt &= before_labels(labels)
        self.context.read_rows = Rows.single(prompt)


def before_labels(labels: Tensor) -> Tensor:
    """(B, T) bool: tokens before the first label of their sequence; all of them where there is no label."""
    return (labels != IGNORE).long().cumsum(-1) == 0


def _pooled(x: Tensor, prompt: Tensor) -> Tensor:
    """(B, P, D): mean of each row's prompt tokens, in float32; 0 for a row without any."""
    share = prompt.float()
    share = share / share.sum(-1, keepdim=True).clamp(min=1)
    # NOTE padding may hold anything, and 0 * NaN is NaN.
    inside = prompt.any(1).unsqueeze(-1)
    return share @ x.float().masked_fill(~inside, 0)


def _of_row(values: Tensor, row_ids: Tensor) -> Tensor:
    """(B, P, E) to (B, T, E) by the row (B, T, 1) of each token."""
    return values.gather(1, row_ids.expand(-1, -1, values.shape[-1]))


def _map(gate: Gate, function: Callable[[Tensor], Tensor]) -> Gate:
    indices = gate.expert_indices
    return Gate(
        function(gate.probs),
        function(gate.weights),
        function(gate.assignment),
        None if indices is None else function(indices),
    )
