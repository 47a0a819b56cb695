"""What routers know beside the hidden states of their site, and the dials that training turns.

Shapes: B sequences of T tokens, P rows packed into one sequence.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lmoe.ops.gating import Gate


@dataclass(slots=True, frozen=True)
class Rows:
    """Which tokens belong to the prompt of which row.

    Args:
        prompt: (B, P, T) bool: the prompt tokens of each row.
        row_ids: (B, T) int64 row of each token, from 0 to P - 1.
    """

    prompt: Tensor
    row_ids: Tensor

    @classmethod
    def single(cls, prompt: Tensor) -> "Rows":
        """One row a sequence.

        Args:
            prompt: (B, T) bool.
        """
        return cls(prompt.unsqueeze(1), torch.zeros(prompt.shape, dtype=torch.long, device=prompt.device))


@dataclass(slots=True, frozen=True)
class Known:
    """What a block says of the tokens of its forwards.

    Args:
        expert_of_token: oracle: int64 expert of each token, (B, T) or (B, 1), or () for all of them.
        rows: sequence: the prompts of the rows.
    """

    expert_of_token: Tensor | None = None
    rows: Rows | None = None


@dataclass(slots=True)
class RoutingContext:
    """Shared by the routers of one model; set around a forward, never by a forward.

    Args:
        temperature: divides the router logits.
        router_noise: standard deviation of the noise on the logits, in training.
        expert_dropout: probability with which an expert is left out of a row, in training.
        known: what the block around this forward says of its tokens.
        known_before: what the last block said: NOTE activation checkpointing runs a forward again in the backward pass,
            when its block is over. Only a router in training mode may fall back on it.
        read_rows: sequence: the prompts as the model's own inputs tell them.
        going_on: sequence: whether this forward goes on from a KV cache, so that the decision stands.
        decided: sequence: logits and gate, (B, 1, E), of each site for the generation that goes on.
        silenced: expert whose weight is set to 0, by site.
    """

    temperature: float = 1.0
    router_noise: float = 0.0
    expert_dropout: float = 0.0
    known: Known = Known()
    known_before: Known = Known()
    read_rows: Rows | None = None
    going_on: bool = False
    decided: dict[str, tuple[Tensor, Gate]] = field(default_factory=dict)
    silenced: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def about(self, *, expert_of_token: Tensor | None = None, rows: Rows | None = None) -> Iterator[None]:
        """What is known of the tokens of the forwards inside the block; what is left out stays as it was."""
        before = self.known
        self.known = Known(
            before.expert_of_token if expert_of_token is None else expert_of_token,
            before.rows if rows is None else rows,
        )
        try:
            yield
        finally:
            self.known, self.known_before = before, self.known

    def forget_before(self, *model_inputs: object) -> None:
        """A forward pre-hook of the whole model: what an earlier block said is not about this forward."""
        self.known_before = Known()

    def expert_of_token(self, *, training: bool) -> Tensor | None:
        """What the oracle goes by."""
        again = self.known_before.expert_of_token if training else None
        return again if self.known.expert_of_token is None else self.known.expert_of_token

    def rows(self, *, training: bool) -> Rows | None:
        """What a sequence router goes by: the block's word, or what the model's inputs say."""
        if self.known.rows is not None:
            return self.known.rows
        return self.known_before.rows if training and self.known_before.rows is not None else self.read_rows

    @contextmanager
    def silence(self, experts: dict[str, int]) -> Iterator[None]:
        """Take one expert of some sites out of the mixture inside the block; the other weights stay."""
        before, self.silenced = self.silenced, experts
        try:
            yield
        finally:
            self.silenced = before
