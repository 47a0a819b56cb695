"""What the prompt of a forward is, and what was decided for it, which travels with the KV cache.

Shapes: B sequences of T tokens.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from lmoe.errors import RoutingError
from lmoe.layers.context import PromptRows
from lmoe.layers.method_replacement import MethodReplacement
from lmoe.layers.per_call import PerCall
from lmoe.ops.labels import IGNORE
from lmoe.ops.lengths import OPENING
from lmoe.vocabulary import Decide


def valid_tokens(mask: object, given: Tensor, cached: int = 0) -> Tensor:
    """Returns which tokens are valid, (B, T) bool.

    `generate` makes a mask of queries and keys where a cache has a fixed size, and one for each kind of layer where
    there are several kinds. In each of them a token may look at itself, and padding may not.

    Args:
        mask: attention_mask as the model gets it: None, (B, T), (B or 1, heads or 1, T, keys) of bool or of the floats
            that are added to the scores, or a dict of such. NOTE whole numbers mean nothing there: one attention
            refuses them, and another adds 0 and 1 to the scores, which hides no token.
        given: (B, T) input_ids, or inputs_embeds (B, T, D), of a forward.
        cached: tokens that its KV cache holds already, which a mask says something of too.

    Raises:
        RoutingError: a mask of another kind.
    """
    rows, length = given.shape[:2]
    if isinstance(mask, Mapping):
        mask = next((value for value in mask.values() if value is not None), None)
    if mask is None:
        return torch.ones(rows, length, dtype=torch.bool, device=given.device)
    if isinstance(mask, Tensor) and mask.shape == (rows, cached + length):
        return mask[:, cached:].bool()
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[2] == length <= mask.shape[3] - cached:
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise RoutingError(
                f"attention_mask {tuple(mask.shape)} holds {mask.dtype}, which attention does not read as what may be "
                "seen: give one of bool, of floats that are added to the scores, or of (rows, tokens)"
            )
        itself = mask[:, 0, :, cached : cached + length].diagonal(dim1=1, dim2=2)
        return (itself if itself.dtype == torch.bool else itself == 0).expand(rows, length)
    found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    raise RoutingError(
        f"attention_mask {found} does not say which of {rows} x {cached + length} tokens are padding; give one of "
        "(rows, tokens)"
    )


DECISION = "lmoe_decision"
"""Attribute of a KV cache."""


@dataclass(slots=True, frozen=True, kw_only=True)
class ForwardInputs:
    """What a forward of a whole causal language model was given, by name or by place.

    Args:
        tokens: input_ids (B, T), or inputs_embeds (B, T, D).
        attention_mask: in any of the forms that `valid_tokens` reads.
        labels: (B, T).
        cache: the KV cache, empty or filled.
        position_ids: (B, T), or what a family has in its place.
        flattened: rows lie one behind the other in one sequence, as in continuous batching.
    """

    tokens: Tensor | None
    attention_mask: object
    labels: Tensor | None
    cache: Cache | None
    position_ids: Tensor | None
    flattened: bool

    @classmethod
    def of(cls, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "ForwardInputs":
        """The inputs of a model's forward, by what they are.

        Args:
            model: whose forward gets them.
            args, kwargs: as a forward pre-hook gets them.
        """
        given = kwargs
        if args:
            given = {**dict(zip(inspect.signature(model.forward).parameters, args, strict=False)), **kwargs}
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        return cls(
            tokens=embeds if ids is None else ids,
            attention_mask=given.get("attention_mask"),
            labels=given.get("labels"),
            cache=given.get("past_key_values"),
            position_ids=given.get("position_ids"),
            flattened=given.get("cu_seq_lens_q") is not None,
        )

    @property
    def ids(self) -> Tensor | None:
        """(B, T) input_ids; None where the forward has embeddings in their place."""
        return None if self.tokens is None or self.tokens.is_floating_point() else self.tokens

    @property
    def cached_tokens(self) -> int:
        """How many tokens the KV cache holds before this forward."""
        return 0 if self.cache is None else int(self.cache.get_seq_length())

    def prompt_length(self, stated: Tensor | None) -> int:
        """How many of the tokens, padding included, are the prompt, of a forward that begins with an empty cache.

        Args:
            stated: what `generate` was given, (B, T) or (B, T, D); None: all that comes is the prompt. It counts where
                the tokens begin with it: classifier-free guidance and code of the user read other prompts meanwhile.

        Raises:
            RoutingError: the stated prompt in pieces.
        """
        if self.tokens is None:
            return 0
        length = self.tokens.shape[1]
        if stated is None or not _begins_alike(self.tokens, stated):
            return length
        if length < stated.shape[1]:
            raise RoutingError(
                f"the prompt of {stated.shape[1]} tokens comes in pieces, the first of {length}, and the decision "
                "needs all of it at once: leave prefill_chunk_size out"
            )
        return stated.shape[1]

    def known_rows(self, rows: PromptRows | None, stated: Tensor | None) -> PromptRows | None:
        """The prompts that a block around this forward has set, as they lie in its tokens; None: it has set none, or
        they are those of `generate` and this forward reads another prompt meanwhile.

        Args:
            rows: of the block.
            stated: as of `prompt_length`; the rows are then of its tokens.

        Raises:
            RoutingError: rows of other tokens, or the stated prompt in pieces.
        """
        if rows is None or self.tokens is None:
            return None
        shape, known = tuple(self.tokens.shape[:2]), tuple(rows.row_ids.shape)
        if stated is None and shape != known:
            raise RoutingError(
                f"a block around this forward says the prompts of {known} rows and tokens, and it has {shape}: give "
                "lmoe.trace a prompt_mask of the tokens that the model gets"
            )
        if stated is None:
            return rows
        if known != tuple(stated.shape[:2]) or not _begins_alike(self.tokens, stated):
            return None
        return rows.in_generate(shape[0] // known[0], shape[1] - self.prompt_length(stated))

    def prompt_rows(
        self, told: PromptRows | None, stated: Tensor | None, decide: Decide, whose: str, *, openings: bool = False
    ) -> PromptRows:
        """The prompts of a forward that begins with an empty cache: those that a block has set, or what its inputs say.

        The first token of a text is a prompt even where it carries a label, because nothing predicts it.

        Args:
            told: rows of the block, as of `known_rows`.
            stated: as of `prompt_length`.
            decide: whether a turn of a conversation counts as a row.
            whose: decision it is, for the message.
            openings: take what stands for the prompt of a text whose first token has a label (`opening_length`).

        Raises:
            RoutingError: the prompts cannot be told.
        """
        if (rows := self.known_rows(told, stated)) is not None:
            return rows
        if self.flattened:
            raise RoutingError(
                f"{whose} does not know the prompts of rows that lie one behind the other (continuous batching, "
                "padding-free batches): call the model, or generate, with one row a sequence"
            )
        prompt = self.prompt(stated)
        if self.labels is None:
            return PromptRows.single(prompt)
        places, answers = prompt.long().cumsum(-1), self.labels != IGNORE
        if openings:
            is_text = (answers & prompt & (places == 1)).any(-1, keepdim=True)
            answers = answers & ~(is_text & (places <= (places[:, -1:] // 2).clamp(max=OPENING)))
        answers = answers & (places > 1)
        if decide is Decide.first:
            return PromptRows.single(prompt & (answers.long().cumsum(-1) == 0))
        return PromptRows.of_turns(answers, torch.zeros_like(self.labels), prompt)

    def prompt(self, stated: Tensor | None) -> Tensor:
        """(B, T) bool: the tokens of the prompt, of a forward that begins with an empty cache.

        Args:
            stated: as of `prompt_length`.

        Raises:
            RoutingError: a prompt in pieces, packed rows, or an attention mask that does not tell the padding.
        """
        assert self.tokens is not None
        valid, length = valid_tokens(self.attention_mask, self.tokens), self.prompt_length(stated)
        if self.position_ids is not None and self.position_ids.shape == valid.shape:
            steps_back = self.position_ids[:, 1:] < self.position_ids[:, :-1]
            if (steps_back & valid[:, 1:] & valid[:, :-1]).any():
                raise RoutingError(
                    "position_ids begin anew inside a sequence: rows that lie one behind the other, whose prompts "
                    "cannot be told; call the model with one row a sequence"
                )
        return valid & (torch.arange(self.tokens.shape[1], device=valid.device) < length)


def _begins_alike(tokens: Tensor, stated: Tensor) -> bool:
    """Whether a forward reads a stated prompt, or the first piece of it; beams and several answers repeat its rows."""
    common = min(tokens.shape[1], stated.shape[1])
    if tokens.dim() != stated.dim() or tokens.shape[0] % stated.shape[0]:
        return False
    repeated = stated[:, :common].repeat_interleave(tokens.shape[0] // stated.shape[0], 0)
    return torch.equal(tokens[:, :common].to(repeated.device, repeated.dtype), repeated)


@dataclass(slots=True, frozen=True)
class Decision:
    """What was decided for the prompts that a KV cache begins with.

    Args:
        value: the decision, of B rows.
        prompt_length: tokens of the cache, padding included, that it was made from.
    """

    value: Any
    prompt_length: int


def decision_in(cache: Cache, cached_tokens: int) -> Any:
    """The decision that a filled KV cache, or the one that it is a copy of, came with; None where it has none.

    Raises:
        RoutingError: the cache was cut inside the prompt.
    """
    decision = getattr(cache, DECISION, None)
    if decision is None:
        return None
    if cached_tokens < decision.prompt_length:
        raise RoutingError(
            f"the KV cache was cut to {cached_tokens} tokens, and a routing decision was made from the first "
            f"{decision.prompt_length}: start with an empty cache"
        )
    return decision.value


def decision_of(cache: Cache) -> Any:
    """The decision that lies with a KV cache, whatever the cache holds."""
    decision = getattr(cache, DECISION, None)
    return None if decision is None else decision.value


def keep_with(cache: Cache, value: Any, prompt_length: int) -> None:
    """Let a decision travel with the KV cache that its prompt has filled; copies of the cache take it along."""
    setattr(cache, DECISION, Decision(value, prompt_length))


def cache_of(output: Any) -> Cache | None:
    """The KV cache that a forward returns."""
    found = getattr(output, "past_key_values", None)
    if found is None and isinstance(output, tuple):
        found = next((part for part in output if isinstance(part, Cache)), None)
    return found


class PromptedGenerate(MethodReplacement):
    """`generate` of a model that decides by prompt: its input is the prompt, however its forwards read that.

    Assisted decoding hands the candidates over together with the prompt, and generation without a cache the answer so
    far; a forward cannot tell them apart.

    Args:
        model: with `generate`.
        prompt: gets what it was given, while it generates.
    """

    METHOD = "generate"

    def __init__(self, model: nn.Module, prompt: PerCall[Tensor]) -> None:
        super().__init__(model)
        self.prompt = prompt

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
        given = kwargs.get("inputs_embeds")
        given = ids if given is None else given
        with self.prompt.holding(given if isinstance(given, Tensor) and given.dim() > 1 and given.numel() else None):
            return self.original(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.model, self.prompt)
