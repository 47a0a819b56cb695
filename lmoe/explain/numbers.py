"""The numbers of one text, with nothing silenced, with each expert silenced over the text, and for one token alone.

Shapes: T tokens, E experts, B rows of a batch, V vocabulary.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from lmoe.backbones.label_losses import LabelLosses
from lmoe.explain.explanation import ExplainedText, TextTokens
from lmoe.explain.subjects import ExplainedModel

ROWS_AT_ONCE = 17
"""Rows of a step: sixteen experts, and the token with nothing silenced."""
Progress = Callable[[int], object]
"""Told how many tokens have gone through the model since the last call."""


@dataclass(slots=True, frozen=True, kw_only=True)
class Work:
    """What explaining texts costs.

    Args:
        tokens: of all texts.
        passes: forwards of each whole text.
        stepped: forwards of one token, with its prefix in the KV cache.
    """

    tokens: int
    passes: int
    stepped: int

    @classmethod
    def of(cls, texts: Sequence[TextTokens], experts: int) -> "Work":
        """What `explained` does with them."""
        passes = 2 if not experts else experts + 3
        stepped = sum(max(len(text) - 1, 0) for text in texts) * (experts + 1) if experts else 0
        return cls(tokens=sum(map(len, texts)), passes=passes, stepped=stepped)

    @property
    def total(self) -> int:
        """Tokens that go through the model."""
        return self.tokens * self.passes + self.stepped

    @property
    def line(self) -> str:
        """The same in words."""
        return (
            f"{self.tokens:,} tokens: {self.passes} passes over the text and {self.stepped:,} steps of one token, "
            f"{self.total:,} tokens through the model"
        )


@torch.no_grad()
def explained(
    subject: ExplainedModel, text: TextTokens, losses: LabelLosses, progress: Progress = lambda tokens: None
) -> ExplainedText:
    """All numbers of one text.

    Args:
        losses: of the subject's model; one for all texts.
        progress: told as it goes.

    Raises:
        RoutingError: a domain that the router has no expert for.
    """
    subject.check(text)
    count = len(subject.experts)

    def whole() -> Tensor:
        found = log_probabilities(subject, text, losses)
        progress(len(text))
        return found

    with subject.off():
        base = whole()
    none, text_TE = base, torch.full((len(text), count), math.nan)
    if count:
        with subject.silenced(range(count)):
            none = whole()
    silenced = []
    for expert in range(count):
        with subject.silenced([expert]):
            silenced.append(whole())
    mixture = whole()  # the last, so that its routing is what `step` and `weights` find
    if silenced:
        text_TE = torch.stack([found - mixture for found in silenced], 1)
    weights = subject.weights(text)
    return ExplainedText(
        tokens=text,
        mixture=mixture,
        base=base,
        none=none,
        text=text_TE,
        token=token_changes(subject, text, weights, progress),
        weights=weights,
    )


@torch.no_grad()
def log_probabilities(subject: ExplainedModel, text: TextTokens, losses: LabelLosses) -> Tensor:
    """(T,) log-probability of each token after those before it, from one forward; NaN for the first."""
    ids = text.ids[None].to(subject.model.device)
    found = torch.full((len(text),), math.nan)
    with subject.reading(text):
        found[1:] = -losses({"input_ids": ids}, ids[:, 1:])[0].float().cpu()
    return found


@torch.no_grad()
def token_changes(
    subject: ExplainedModel, text: TextTokens, weights: dict[str, Tensor], progress: Progress = lambda tokens: None
) -> Tensor:
    """(T, E) change of each token's log-probability where an expert is silenced only while that token is predicted.

    log p(x_t | x_<t) with w_e = 0 at position t - 1 at all sites, less the same with w_e as it is. The KV cache of the
    positions before t - 1 is that of the text with nothing silenced, and so are decisions for prompts. One token after
    the other goes through the model, as a batch whose first row has nothing silenced and each other row one expert.
    An expert whose weight is 0 at the position at all sites changes nothing, and is not computed.

    Args:
        weights: (T, E) routing weights by site; `subject` has just read the whole text.
    """
    length, count = len(text), len(subject.experts)
    changes = torch.zeros(length, count)
    changes[:1] = math.nan
    if length < 2 or not count:
        return changes
    steps = _Steps(subject, text)
    for position in range(length - 1):
        acting = _acting(weights, position, count)
        if subject.by_row:
            first, *others = _batches(acting)
        else:
            first, others = [None], [[expert] for expert in acting]
        kept = copy.deepcopy(steps.cache) if others else None
        whole, changed = steps.forward(position, first)
        found = dict(zip(first[1:], changed, strict=True))
        after = steps.cache
        for batch in others:
            steps.cache = copy.deepcopy(kept)
            before, changed = steps.forward(position, batch)
            if batch[0] is None:
                found |= {expert: value - before + whole for expert, value in zip(batch[1:], changed, strict=True)}
            else:
                found[batch[0]] = before
        steps.cache = after
        for expert, value in found.items():
            assert expert is not None
            changes[position + 1, expert] = value - whole
        progress(count + 1)
    return changes


class _Steps:
    """One token after the other through a model, with a KV cache of one row in between.

    Args:
        subject: that has just read the whole text.
        text: whose tokens go through.
    """

    def __init__(self, subject: ExplainedModel, text: TextTokens) -> None:
        self.subject, self.text = subject, text
        self.ids = text.ids.to(subject.model.device)
        self.cache: Cache | None = None

    def forward(self, position: int, rows: Sequence[int | None]) -> tuple[float, list[float]]:
        """Log-probability of the next token in the first row, and in each other; the cache is then that of the first.

        Args:
            rows: of the batch: the expert that is silenced in each.
        """
        here = torch.arange(len(rows), device=self.ids.device)
        if self.cache is not None and len(rows) > 1:
            self.cache.reorder_cache(torch.zeros_like(here))  # type: ignore[arg-type]
        ids = self.ids[position].expand(len(rows), 1)
        with self.subject.step(self.text, position, rows):
            output: Any = self.subject.model(input_ids=ids, past_key_values=self.cache, use_cache=True)
        self.cache = output.past_key_values
        if len(rows) > 1 and self.cache is not None:
            self.cache.reorder_cache(here[:1])  # type: ignore[arg-type]
        wide = torch.promote_types(output.logits.dtype, torch.float32)
        logs = output.logits[:, -1].to(wide).log_softmax(-1)[:, self.ids[position + 1]]
        first, *others = logs.tolist()
        return first, others


def _acting(weights: dict[str, Tensor], position: int, count: int) -> list[int]:
    """Experts with a weight at a token."""
    acting = torch.zeros(count, dtype=torch.bool)
    for values in weights.values():
        acting[: values.shape[1]] |= values[position] != 0
    return acting.nonzero().flatten().tolist()


def _batches(experts: Sequence[int]) -> list[list[int | None]]:
    """Rows of each forward: None, and some experts."""
    size = ROWS_AT_ONCE - 1
    parts = [experts[first : first + size] for first in range(0, len(experts), size)]
    return [[None, *part] for part in parts] or [[None]]
