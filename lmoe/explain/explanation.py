"""What is found out about a text: routing weights, log-probabilities, and what silencing each expert does to them.

Shapes: T tokens, E experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(slots=True, frozen=True, kw_only=True)
class ExplainedSite:
    """Where experts are weighed.

    Args:
        name: of the router, or of the Linear where experts have none.
        layer: index of its decoder layer; None: it stands for the whole model.
        part: its path within the layer.
        modules: paths of the modules that its weights act on.
        experts: their number.
    """

    name: str
    layer: int | None
    part: str
    modules: tuple[str, ...]
    experts: int


@dataclass(slots=True, frozen=True, kw_only=True)
class TextTokens:
    """A text as tokens.

    Args:
        name: of the text, for people.
        ids: (T,) int64.
        texts: the characters of each token; of a character of several tokens the first has it.
        special: whether each is a special token.
        answer: (T,) bool: tokens of answers; the others are prompts.
        opening: so many of the first tokens stand for the prompt of a text that has none; 0: it has one.
        generated: whether the model that is explained has written the answer just now.
        domain: of the text; None: not known.
        cut: tokens that are left out at its end.
    """

    name: str
    ids: Tensor
    texts: tuple[str, ...]
    special: tuple[bool, ...]
    answer: Tensor
    opening: int = 0
    generated: bool = False
    domain: str | None = None
    cut: int = 0

    def __len__(self) -> int:
        return len(self.texts)

    def prompts(self, *, of_all_turns: bool, openings: bool) -> Tensor:
        """(T,) bool: tokens that a router decides by which reads prompts: those before the first answer, or all that
        are no answer. The first token is always one of them, because nothing predicts it.

        Args:
            of_all_turns: of all that are no answer.
            openings: to this router the opening of a text stands for its prompt.
        """
        prompt = ~self.answer if of_all_turns else self.answer.long().cumsum(0) == 0
        return prompt | (torch.arange(len(prompt)) < max(1, self.opening if openings else 0))


@dataclass(slots=True, frozen=True, kw_only=True)
class ExplainedText:
    """One text. Log-probabilities are natural, each of a token after those before it; NaN for the first token.

    Args:
        tokens: the text.
        mixture: (T,) log-probabilities with all experts.
        base: (T,) with the adapters off.
        none: (T,) with every routed expert silenced; the base, unless something else is in the model.
        text: (T, E) change of `mixture` where one expert is silenced over the whole text.
        token: (T, E) change of `mixture` where it is silenced only while this token is predicted.
        weights: (T, E of the site) routing weights by site; 0 where no routed expert acts.
    """

    tokens: TextTokens
    mixture: Tensor
    base: Tensor
    none: Tensor
    text: Tensor
    token: Tensor
    weights: dict[str, Tensor]

    def mean_weights(self, experts: int) -> Tensor:
        """(T, E) mean over the sites."""
        return mean_weights(self.weights, len(self.tokens), experts)


def mean_weights(weights: Mapping[str, Tensor], tokens: int, experts: int) -> Tensor:
    """(T, E) mean over the sites of routing weights; an expert that a site does not have counts as 0 there."""
    total = torch.zeros(tokens, experts)
    for of_site in weights.values():
        total[:, : of_site.shape[1]] += of_site
    return total / max(len(weights), 1)


@dataclass(slots=True, frozen=True, kw_only=True)
class SeenToken:
    """A token of a validation row that an expert gets much of.

    Args:
        before, text, after: the token and what stands around it.
        domain: of its row.
        row: its number among the rows that were looked at, from 0.
        weight: mean routing weight over the sites.
    """

    before: str
    text: str
    after: str
    domain: str
    row: int
    weight: float


@dataclass(slots=True, frozen=True, kw_only=True)
class ExpertProfile:
    """What an expert does on validation rows.

    Args:
        weight: mean routing weight over tokens and sites.
        by_domain: the same of each domain.
        loss_without: change of each domain's loss when it is silenced, in nats per label token; above 0: it is needed.
        tokens: those that it gets most of, the most first.
    """

    weight: float
    by_domain: dict[str, float]
    loss_without: dict[str, float]
    tokens: tuple[SeenToken, ...]


@dataclass(slots=True, frozen=True, kw_only=True)
class Profiles:
    """What the experts do on validation rows.

    Args:
        experts: in their order.
        rows: what was looked at, in words.
        losses: where loss_without is from, in words.
    """

    experts: tuple[ExpertProfile, ...]
    rows: str
    losses: str


@dataclass(slots=True, frozen=True, kw_only=True)
class Explanation:
    """What a model does with some texts.

    Args:
        model: the base by its name, for people.
        name: of what is explained: the run, or the weights of a blend.
        kind: what it is made of, in words.
        experts: their names, in their order; () where there is none.
        sites: in the order of the model.
        texts: what was explained.
        notes: what a reader must know to read the numbers.
        profiles: of the experts; None: no validation rows were looked at.
        other: another model on the same tokens; None: nothing is compared.
    """

    model: str
    name: str
    kind: str
    experts: tuple[str, ...]
    sites: tuple[ExplainedSite, ...]
    texts: tuple[ExplainedText, ...]
    notes: tuple[str, ...] = ()
    profiles: Profiles | None = None
    other: "Explanation | None" = field(default=None)
