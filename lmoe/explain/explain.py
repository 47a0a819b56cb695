"""Explain texts: put them through a model with each expert silenced in turn."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmoe.backbones.label_losses import LabelLosses
from lmoe.backbones.load import context_length
from lmoe.errors import ConfigError, DataError
from lmoe.explain.explanation import Explanation, TextTokens
from lmoe.explain.numbers import Progress, Work, explained
from lmoe.explain.profiles import Losses, profiles_of
from lmoe.explain.subjects import explained_model
from lmoe.explain.texts import MOST_TOKENS, prompted
from lmoe.generate.generate import Turn
from lmoe.injection.evaluating import evaluating
from lmoe.injection.tracing import domain as of_domain
from lmoe.vocabulary import TrainOn

MOST_WEIGHTS = 8_000_000
"""Routing weights that a page is made of; more would not open in a browser."""


class Explainer:
    """Explains texts with one model.

    Args:
        model: injected, blending, or bare.
        name: what it is called: the run, or the blend's weights.

    Raises:
        ConfigError: a blend whose router decides by itself.
    """

    def __init__(self, model: PreTrainedModel, name: str = "") -> None:
        self.model, self.name = model, name
        self.subject = explained_model(model)
        self._losses = LabelLosses(model)

    def work(self, texts: Sequence[TextTokens]) -> Work:
        """What explaining these texts costs.

        Raises:
            DataError: a text that is longer than the backbone's context, or so many tokens, sites and experts that no
                page could show them.
        """
        limit = context_length(self.model)
        for text in texts:
            if limit is not None and len(text) > limit:
                raise DataError(
                    f"{text.name} has {len(text):,} tokens; the backbone's context holds {limit:,}. Shorten it, or "
                    "give a lower `max_tokens`"
                )
        work = Work.of(texts, len(self.subject.experts))
        numbers = work.tokens * sum(site.experts for site in self.subject.sites)
        if numbers > MOST_WEIGHTS:
            raise DataError(
                f"{work.tokens:,} tokens at {len(self.subject.sites)} sites have {numbers:,} routing weights, and a "
                f"page holds at most {MOST_WEIGHTS:,}; give fewer or shorter texts, or a lower `max_tokens`"
            )
        return work

    def explain(self, texts: Sequence[TextTokens], progress: Progress = lambda tokens: None) -> Explanation:
        """What the model does with texts.

        Args:
            progress: told how many tokens have gone through the model since the last call; `work` says of how many.

        Raises:
            RoutingError: a domain that the router has no expert for.
            DataError: as `work`.
        """
        self.work(texts)
        with evaluating(self.model):
            found = tuple(explained(self.subject, text, self._losses, progress) for text in texts)
        subject = self.subject
        cut = [f"{text.name}: {text.cut:,} tokens at its end are left out" for text in texts if text.cut]
        return Explanation(
            model=str(self.model.name_or_path),
            name=self.name,
            kind=subject.kind,
            experts=subject.experts,
            sites=subject.sites,
            texts=found,
            notes=(*subject.notes, *cut),
        )

    def with_profiles(
        self,
        explanation: Explanation,
        texts: Sequence[TextTokens],
        *,
        rows: str,
        known: Losses | None = None,
        progress: Progress = lambda tokens: None,
    ) -> Explanation:
        """An explanation with what its experts do on validation rows; see `profiles_of`."""
        with evaluating(self.model):
            found = profiles_of(self.subject, texts, self._losses, rows=rows, known=known, progress=progress)
        return replace(explanation, profiles=found)


def explain_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Turn],
    *,
    max_new_tokens: int = 32,
    domain: str | None = None,
    max_tokens: int = MOST_TOKENS,
    train_on: str | TrainOn = TrainOn.assistant,
) -> Explanation:
    """What each expert does to a prompt and to the answer that the model gives (docs/EXPLAIN.md).

    Args:
        model: injected, blending with weights, or bare.
        prompt: what the user says, or a conversation, for the chat template.
        max_new_tokens: longest answer, greedy; 0: the prompt alone.
        domain: of the prompt, for moe.router=oracle.
        max_tokens: longest prompt with its answer.
        train_on: the turns of a conversation that the model has learnt, data.train_on of its run; with last or all a
            router that decides by prompts takes earlier answers for a part of the prompt.

    Raises:
        DataError: the prompt is empty, holds something that is no turn, is longer than max_tokens or than the
            backbone's context, or is refused by the chat template.
        RoutingError: the router has no expert for the domain.
        ConfigError: a blend whose router decides by itself, or a `train_on` that is none.
    """
    if train_on not in list(TrainOn):
        raise ConfigError(f"train_on={train_on!r}; allowed: {', '.join(TrainOn)}")
    explainer = Explainer(model)
    with evaluating(model), nullcontext() if domain is None else of_domain(model, domain):
        text = prompted(
            model,
            tokenizer,
            prompt,
            max_new_tokens=max_new_tokens,
            most=max_tokens,
            domain=domain,
            train_on=TrainOn(train_on),
        )
    return explainer.explain([text])
