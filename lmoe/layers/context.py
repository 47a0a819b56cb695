"""What routers read beside the hidden states of their site: facts about the batch, and the dials that training turns.

Shapes: B sequences of T tokens, P rows packed into one sequence.
"""

import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lmoe.errors import RoutingError
from lmoe.layers.per_call import PerCall
from lmoe.layers.routing import Routing, Silenced
from lmoe.ops.gating import Gate
from lmoe.ops.prompt_hash import prompt_hashes
from lmoe.ops.prompt_turns import turns
from lmoe.ops.router_targets import RowTargets
from lmoe.vocabulary import Decide

SiteDecisions = dict[str, tuple[Tensor, Gate]]
"""Logits and gate, (B, 1, E), by site."""


@dataclass(slots=True, frozen=True)
class PromptRows:
    """Which tokens belong to the prompt of which row.

    Args:
        prompt: (B, P, T) bool: the prompt tokens of each row.
        row_ids: (B, T) int64 row of each token, from 0 to P - 1.
        hashes: (B, P) int64 of the ids of each row's prompt tokens, see `prompt_hashes`; None: nobody asks for them, or
            the ids are not known.
        turn: (B, P) int64, where a turn of a conversation counts as a row: which one of its conversation it is; None:
            each conversation is one row.
    """

    prompt: Tensor
    row_ids: Tensor
    hashes: Tensor | None = None
    turn: Tensor | None = None

    @classmethod
    def single(cls, prompt: Tensor) -> "PromptRows":
        """One row a sequence.

        Args:
            prompt: (B, T) bool.
        """
        return cls(prompt.unsqueeze(1), torch.zeros(prompt.shape, dtype=torch.long, device=prompt.device))

    @classmethod
    def of_turns(cls, answers: Tensor, row_ids: Tensor, valid: Tensor) -> "PromptRows":
        """A row for each turn (`turns`).

        Args:
            answers: (B, T) bool, tokens of answers.
            row_ids: (B, T) int64 conversation of each token.
            valid: (B, T) bool, False for padding.
        """
        found = turns(answers, row_ids, valid)
        return cls(found.prompt, found.ids, turn=found.number)

    @classmethod
    def awaiting_answer(cls, answers: Tensor, valid: Tensor, decide: Decide) -> "PromptRows":
        """The prompts of conversations that are to be answered once more, by which training decided for them.

        Args:
            answers: (B, T) bool, tokens of earlier answers.
            valid: (B, T) bool, False for padding, which is on the left.
            decide: by the first prompt of each, or for each turn by its own.
        """
        if decide is Decide.first:
            return cls.single(valid & ((answers & valid).long().cumsum(-1) == 0))
        # The next answer's first token, so that the last prompt is a turn.
        answers, valid = (torch.nn.functional.pad(mask, (0, 1), value=True) for mask in (answers, valid))
        rows = cls.of_turns(answers, torch.zeros_like(answers, dtype=torch.long), valid)
        return replace(rows, prompt=rows.prompt[..., :-1], row_ids=rows.row_ids[:, :-1])

    def in_generate(self, repeats: int, following: int) -> "PromptRows":
        """The same in a forward of `generate` that began with these tokens.

        Args:
            repeats: how often each sequence stands in the batch, one behind the other: beams, several answers.
            following: tokens behind them, which belong to the last row.
        """
        every = (self.prompt, self.row_ids, self.hashes, self.turn)
        prompt, row_ids, hashes, turn = (None if t is None else t.repeat_interleave(repeats, 0) for t in every)
        assert prompt is not None and row_ids is not None
        last = row_ids[:, -1:].expand(-1, following)
        prompt = torch.nn.functional.pad(prompt, (0, following))
        return PromptRows(prompt, torch.cat([row_ids, last], 1), hashes, turn)

    @property
    def last_turn(self) -> int:
        """The highest number of a turn; 0 where each conversation is one row."""
        return 0 if self.turn is None else int(self.turn.max())

    def prompts_of_turn(self, number: int) -> Tensor:
        """(B, P, T) bool: the prompts of the turns of one number, the others empty."""
        return self.prompt if self.turn is None else self.prompt & (self.turn == number).unsqueeze(-1)

    def with_hashes(self, input_ids: Tensor) -> "PromptRows":
        """The same with the hashes of the prompts.

        Args:
            input_ids: (B, T).
        """
        return replace(self, hashes=prompt_hashes(input_ids, self.prompt))


@dataclass(slots=True, frozen=True)
class BatchInfo:
    """What routers must know of the tokens of a batch, and cannot read from hidden states.

    Args:
        expert_of_token: for the oracle: int64 expert of each token, (B, T) or (B, 1), or () for all of them; NO_TARGET
            on padding.
        rows: for sequence routers: the prompts of the rows.
        targets: what the routers are taught of each token.
    """

    expert_of_token: Tensor | None = None
    rows: PromptRows | None = None
    targets: RowTargets | None = None


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
        cached: the decisions that the KV cache came with, which stand; None: a new prompt.
        new: gets the decisions of a new prompt.
        of_model: with a router of the whole model, what it has decided for each token; None: no routed expert acts.
    """

    rows: PromptRows | None
    cached: PromptDecisions | None
    new: PromptDecisions
    of_model: Routing | None = None


@dataclass(slots=True, frozen=True)
class CallState:
    """What one thread holds while a forward of the whole model runs, for a part of it that runs again later.

    Args:
        batch_info: of the innermost block.
        forward: None: no sequence router is in the model, or no forward runs.
    """

    batch_info: BatchInfo
    forward: RunningForward | None


@dataclass(slots=True)
class RoutingContext:
    """What the routers of one model share. Facts about a batch or a forward hold for the thread that set them.

    Args:
        temperature: divides the router logits.
        router_noise: standard deviation of the noise on the logits, in training.
        noise: whether routers with noise of their own draw it, in training.
        expert_dropout: probability with which an expert is left out of a row, in training.
        by_target: in training the experts that are dealt to a row's target are the only ones that act.
        routers_rest: by target, routers do not learn in this step, and need not read what they do not decide.
        silenced: experts whose weights are set to 0, by site.
        masked: experts that `masked_experts` leaves out now.
        off: how many blocks keep the adapters off now.
        model_id: a number that only this model and its copies have.
        prompt: the input of the `generate` that runs in this thread.
        standing: decisions for prompts, by site, that hold in the forwards of this thread whatever their inputs and KV
            cache say; a site without one has no routed expert.
        moving_temperature, moving_router_noise: (), what compiled code reads in place of a dial that is another one at
            each step, and for which it would be compiled anew; None: the dial stands still.
        compiled_batch_info: that of the block opened last, for compiled code, which serves one thread.
        compiled_forward: the forward of the layer that runs, for the same reason.
        last_batch_info: that of the block opened last, kept when the block is over: NOTE activation checkpointing runs
            a forward again in the backward pass, after its block, and on a GPU in another thread. Only a router in
            training mode may fall back on it, where a layer is not checkpointed by Transformers' function, see
            `CheckpointInContext`.
        last_forward: that of a sequence router in training, kept for the same reason.
    """

    temperature: float = 1.0
    router_noise: float = 0.0
    noise: bool = True
    expert_dropout: float = 0.0
    by_target: bool = False
    routers_rest: bool = False
    silenced: Mapping[str, Silenced] = field(default_factory=dict)
    masked: frozenset[int] = frozenset()
    off: int = 0
    model_id: int = field(default_factory=lambda: secrets.randbits(62))
    moving_temperature: Tensor | None = None
    moving_router_noise: Tensor | None = None
    compiled_batch_info: BatchInfo = BatchInfo()
    compiled_forward: RunningForward | None = None
    last_batch_info: BatchInfo = BatchInfo()
    last_forward: RunningForward | None = None
    prompt: PerCall[Tensor] = field(default_factory=PerCall)
    standing: PerCall[SiteDecisions] = field(default_factory=PerCall)
    _batch_info: PerCall[BatchInfo] = field(default_factory=PerCall)
    _forward: PerCall[RunningForward] = field(default_factory=PerCall)

    def __deepcopy__(self, memo: dict) -> "RoutingContext":
        """The same dials for a copy of the model. What a forward has left is not copied, and its graph cannot be."""
        own = {name: PerCall() for name in ("prompt", "standing", "_batch_info", "_forward")}
        nothing = {name: BatchInfo() for name in ("compiled_batch_info", "last_batch_info")}
        nowhere = {"last_forward": None, "compiled_forward": None}
        twin = replace(self, silenced=dict(self.silenced), **own, **nothing, **nowhere)
        memo[id(self)] = twin
        return twin

    @property
    def temperature_now(self) -> float | Tensor:
        """The temperature; in compiled code as a tensor, where it moves."""
        moving = self.moving_temperature
        return self.temperature if moving is None or not torch.compiler.is_compiling() else moving

    @property
    def router_noise_now(self) -> float | Tensor:
        """The noise; in compiled code as a tensor, where it moves. NOTE a tensor of 0 draws noise all the same."""
        moving = self.moving_router_noise
        return self.router_noise if moving is None or not torch.compiler.is_compiling() else moving

    @property
    def batch_info(self) -> BatchInfo:
        """The facts that the innermost `with_batch_info` of this thread has set; empty outside of one."""
        if torch.compiler.is_compiling():
            return self.compiled_batch_info
        return self._batch_info.get() or BatchInfo()

    @property
    def call_state(self) -> CallState:
        """The facts and the forward of this thread now, to be restored by `in_call`."""
        return CallState(self.batch_info, self._forward.get())

    @contextmanager
    def in_call(self, state: CallState) -> Iterator[None]:
        """Restore inside the block what another moment, perhaps in another thread, had as its `call_state`."""
        before = self.compiled_batch_info, self.compiled_forward
        self.compiled_batch_info, self.compiled_forward = state.batch_info, state.forward
        try:
            with self._batch_info.holding(state.batch_info), self._forward.holding(state.forward):
                yield
        finally:
            self.compiled_batch_info, self.compiled_forward = before

    @contextmanager
    def with_batch_info(
        self,
        *,
        expert_of_token: Tensor | None = None,
        rows: PromptRows | None = None,
        targets: RowTargets | None = None,
    ) -> Iterator[None]:
        """Set facts about the tokens of the forwards inside the block; what is left out stays as it was outside."""
        outside = self.batch_info
        inside = BatchInfo(
            outside.expert_of_token if expert_of_token is None else expert_of_token,
            outside.rows if rows is None else rows,
            outside.targets if targets is None else targets,
        )
        self.compiled_batch_info = self.last_batch_info = inside
        try:
            with self._batch_info.holding(inside):
                yield
        finally:
            self.compiled_batch_info, self.last_batch_info = self.batch_info, inside

    def forget_last_batch_info(self, *model_inputs: object) -> None:
        """Drop what an earlier block has set, which is not about the forward that begins; a forward pre-hook of the
        whole model."""
        self.last_batch_info = self.batch_info

    def decided(self, cached: object, site: str, batch: int, whose: str, where: str = "") -> tuple[Tensor, Gate]:
        """Logits and gate, (B, 1, E), that a KV cache came with for a site.

        Args:
            cached: what lies with the cache.
            site: of the router.
            batch: B, the sequences of the forward that goes on with it.
            whose: decision it is, for the message.
            where: it acts, for the message too.

        Raises:
            RoutingError: there is none for them, by routers of this model, or of a copy, with the experts that are
                there now.
        """
        if isinstance(cached, PromptDecisions) and (cached.masked, cached.model_id) == (self.masked, self.model_id):
            decision = cached.sites.get(site)
            if decision is not None and decision[0].shape[0] == batch:
                return decision
        raise RoutingError(
            f"{whose} has no decision for these {batch} sequences{where}: the KV cache must have been filled by a "
            "forward of the same sequences through this model, with the same experts"
        )

    def expert_of_token(self, *, training: bool) -> Tensor | None:
        """Expert of each token, by which the oracle decides; None where nothing says it."""
        known = self.batch_info.expert_of_token
        return self.last_batch_info.expert_of_token if known is None and training else known

    def targets(self, *, training: bool) -> RowTargets | None:
        """What the routers are taught of each token; None where nothing says it."""
        known = self.batch_info.targets
        return self.last_batch_info.targets if known is None and training else known

    def current_forward(self, *, training: bool) -> RunningForward | None:
        """The forward of the whole model that a sequence router is in."""
        forward = self._running()
        return self.last_forward if forward is None and training else forward

    def _running(self) -> RunningForward | None:
        """The forward of this thread."""
        return self.compiled_forward if torch.compiler.is_compiling() else self._forward.get()

    def begin_forward(self, forward: RunningForward, *, training: bool) -> None:
        """Note that a forward of the whole model begins in this thread."""
        self.last_forward = forward if training else None
        self._forward.set(forward)

    def end_forward(self) -> RunningForward | None:
        """End the running forward, and return it."""
        forward = self._forward.get()
        self._forward.set(None)
        return forward

    def rows(self, *, training: bool) -> PromptRows | None:
        """The prompts by which a sequence router decides: those of the running forward, or of the block."""
        running = self._running()
        if running is not None and running.rows is not None:
            return running.rows
        if self.batch_info.rows is not None:
            return self.batch_info.rows
        if training and self.last_batch_info.rows is not None:
            return self.last_batch_info.rows
        forward = self.current_forward(training=training)
        return None if forward is None else forward.rows

    @contextmanager
    def silence(self, experts: Mapping[str, Silenced]) -> Iterator[None]:
        """Take experts of some sites out of the mixture inside the block; the other weights stay."""
        before, self.silenced = self.silenced, experts
        try:
            yield
        finally:
            self.silenced = before
