"""What routers know beside the hidden states of their site, and the dials that training turns.

Shapes: B sequences of T tokens, P rows packed into one sequence.
"""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lmoe.layers.per_call import PerCall
from lmoe.ops.gating import Gate

SiteDecisions = dict[str, tuple[Tensor, Gate]]
"""Logits and gate, (B, 1, E), by site."""


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


@dataclass(slots=True, frozen=True)
class PromptDecisions:
    """What a sequence router decided for the prompts of one forward, at every site.

    Args:
        sites: by site; filled while the forward runs.
        masked: experts that were left out by then, see `masked_experts`.
        model_id: whose routers decided.
    """

    sites: SiteDecisions = field(default_factory=dict)
    masked: frozenset[int] = frozenset()
    model_id: int = 0


@dataclass(slots=True, frozen=True)
class RunningForward:
    """What a sequence router reads of the forward that it is in; made once, before the forward.

    Args:
        rows: the prompts; None: the model's inputs do not tell them.
        kept: the decisions that the KV cache came with, which stand; None: a new prompt.
        made: gets the decisions of a new prompt.
    """

    rows: Rows | None
    kept: PromptDecisions | None
    made: PromptDecisions


@dataclass(slots=True)
class RoutingContext:
    """Shared by the routers of one model. What a block or a forward says holds for the thread that it runs in.

    Args:
        temperature: divides the router logits.
        router_noise: standard deviation of the noise on the logits, in training.
        expert_dropout: probability with which an expert is left out of a row, in training.
        silenced: expert whose weight is set to 0, by site.
        masked: experts that `masked_experts` leaves out now.
        off: how many blocks keep the adapters off now.
        model_id: of no other model but its copies.
        prompt: what `generate` was given, in this thread.
        compiled: what the block opened last says, for compiled code, which serves one thread.
        known_before: what the last block says or has said: NOTE activation checkpointing runs a forward again in the
            backward pass, when its block is over, and on a GPU in another thread. Only a router in training mode may
            fall back on it, where a layer is not checkpointed by Transformers' function, see `SameCall`.
        forward_before: sequence: the last forward in training, for the same reason.
    """

    temperature: float = 1.0
    router_noise: float = 0.0
    expert_dropout: float = 0.0
    silenced: dict[str, int] = field(default_factory=dict)
    masked: frozenset[int] = frozenset()
    off: int = 0
    model_id: int = field(default_factory=lambda: secrets.randbits(62))
    compiled: Known = Known()
    known_before: Known = Known()
    forward_before: RunningForward | None = None
    prompt: PerCall[Tensor] = field(default_factory=PerCall)
    _said: PerCall[Known] = field(default_factory=PerCall)
    _forward: PerCall[RunningForward] = field(default_factory=PerCall)

    @property
    def known(self) -> Known:
        """What the innermost block of this thread says."""
        return self.compiled if torch.compiler.is_compiling() else self._said.get() or Known()

    @property
    def call(self) -> tuple[Known, RunningForward | None]:
        """What this thread knows of the forward that it is in."""
        return self.known, self._forward.get()

    @contextmanager
    def in_call(self, call: tuple[Known, RunningForward | None]) -> Iterator[None]:
        """The inside of the block belongs to the forward that `call` was asked in."""
        with self._said.holding(call[0]), self._forward.holding(call[1]):
            yield

    @contextmanager
    def about(self, *, expert_of_token: Tensor | None = None, rows: Rows | None = None) -> Iterator[None]:
        """What is known of the tokens of the forwards inside the block; what is left out stays as it was."""
        before = self.known
        known = Known(
            before.expert_of_token if expert_of_token is None else expert_of_token,
            before.rows if rows is None else rows,
        )
        self.compiled = self.known_before = known
        try:
            with self._said.holding(known):
                yield
        finally:
            self.compiled, self.known_before = self.known, known

    def forget_before(self, *model_inputs: object) -> None:
        """A forward pre-hook of the whole model: what an earlier block said is not about this forward."""
        self.known_before = self.known

    def expert_of_token(self, *, training: bool) -> Tensor | None:
        """What the oracle goes by."""
        known = self.known.expert_of_token
        return self.known_before.expert_of_token if known is None and training else known

    def running(self, *, training: bool) -> RunningForward | None:
        """The forward of the whole model that a sequence router is in."""
        forward = self._forward.get()
        return self.forward_before if forward is None and training else forward

    def begin(self, forward: RunningForward, *, training: bool) -> None:
        """A forward of the whole model begins."""
        self.forward_before = forward if training else None
        self._forward.set(forward)

    def end(self) -> RunningForward | None:
        """End the running forward, and return it."""
        forward = self._forward.get()
        self._forward.set(None)
        return forward

    def rows(self, *, training: bool) -> Rows | None:
        """What a sequence router goes by: the block's word, or what the model's inputs say."""
        if self.known.rows is not None:
            return self.known.rows
        if training and self.known_before.rows is not None:
            return self.known_before.rows
        forward = self.running(training=training)
        return None if forward is None else forward.rows

    @contextmanager
    def silence(self, experts: dict[str, int]) -> Iterator[None]:
        """Take one expert of some sites out of the mixture inside the block; the other weights stay."""
        before, self.silenced = self.silenced, experts
        try:
            yield
        finally:
            self.silenced = before
