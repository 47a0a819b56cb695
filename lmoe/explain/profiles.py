"""What each expert does on validation rows: its tokens, its domains, and what is lost without it.

Shapes: T tokens, E experts.
"""

import heapq
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lmoe.backbones.label_losses import LabelLosses
from lmoe.explain.explanation import ExpertProfile, Profiles, SeenToken, TextTokens, mean_weights
from lmoe.explain.numbers import Progress, log_probabilities
from lmoe.explain.subjects import ExplainedModel

MOST_TOKENS_SEEN = 20
"""Tokens of each expert."""
BEFORE, AFTER = 8, 4
"""Tokens around each of them."""
Losses = Mapping[int, Mapping[str, float]]
"""Change of each domain's loss where an expert is silenced, by its number."""


@torch.no_grad()
def profiles_of(
    subject: ExplainedModel,
    texts: Sequence[TextTokens],
    losses: LabelLosses,
    *,
    rows: str,
    known: Losses | None = None,
    progress: Progress = lambda tokens: None,
) -> Profiles:
    """What the experts do on some texts.

    Args:
        texts: validation rows, each with its domain.
        losses: of the subject's model.
        rows: what they are called.
        known: what the run's own evaluation found by silencing each expert; None: it is measured on these texts.
        progress: told as it goes.
    """
    count = len(subject.experts)
    weights: list[Tensor] = []
    intact: list[Tensor] = []
    for text in texts:
        subject.check(text)
        intact.append(log_probabilities(subject, text, losses))
        weights.append(mean_weights(subject.weights(text), len(text), count))
        progress(len(text))
    changes = known
    if changes is None:
        changes = {}
        for expert in range(count):
            silenced = []
            for text in texts:
                with subject.silenced([expert]):
                    silenced.append(log_probabilities(subject, text, losses))
                progress(len(text))
            changes[expert] = _loss_changes(texts, intact, silenced)
    by_domain = _by_domain(texts, weights)
    every = torch.cat(weights) if weights else torch.zeros(1, count)
    return Profiles(
        experts=tuple(
            ExpertProfile(
                weight=float(every[:, expert].mean()),
                by_domain={name: float(values[expert]) for name, values in by_domain.items()},
                loss_without=dict(changes.get(expert, {})),
                tokens=_most(texts, weights, expert),
            )
            for expert in range(count)
        ),
        rows=rows,
        losses="measured on these rows" if known is None else "from the run's own validation",
    )


def _by_domain(texts: Sequence[TextTokens], weights: Sequence[Tensor]) -> dict[str, Tensor]:
    """(E,) mean over the tokens of each domain."""
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for text, values in zip(texts, weights, strict=True):
        parts[text.domain or ""].append(values)
    return {name: torch.cat(parts[name]).mean(0) for name in sorted(parts)}


def _loss_changes(
    texts: Sequence[TextTokens], intact: Sequence[Tensor], silenced: Sequence[Tensor]
) -> dict[str, float]:
    """Change of the loss of each domain, nats per label token."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for text, before, after in zip(texts, intact, silenced, strict=True):
        label = text.answer.clone()
        label[:1] = False
        total = sums[text.domain or ""]
        total[0] += float((before - after)[label].double().sum())
        total[1] += int(label.sum())
    return {name: change / labels for name, (change, labels) in sorted(sums.items()) if labels}


def _most(texts: Sequence[TextTokens], weights: Sequence[Tensor], expert: int) -> tuple[SeenToken, ...]:
    """The tokens that an expert gets most of; of equal ones the first. Special tokens and parts of characters are left
    out."""

    def candidates() -> Iterable[tuple[float, int, int]]:
        for row, (text, values) in enumerate(zip(texts, weights, strict=True)):
            for position, weight in enumerate(values[:, expert].tolist()):
                if weight > 0 and text.texts[position] and not text.special[position]:
                    yield weight, -row, -position

    return tuple(
        _seen(texts[-row], -row, -at, weight) for weight, row, at in heapq.nlargest(MOST_TOKENS_SEEN, candidates())
    )


def _seen(text: TextTokens, row: int, position: int, weight: float) -> SeenToken:
    return SeenToken(
        before="".join(text.texts[max(0, position - BEFORE) : position]),
        text=text.texts[position],
        after="".join(text.texts[position + 1 : position + 1 + AFTER]),
        domain=text.domain or "",
        row=row,
        weight=weight,
    )
