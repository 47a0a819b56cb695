"""The next token of each row of a batch, each chosen in its own request's way.

Shapes: N rows, V tokens of the vocabulary.
"""

import secrets

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lmoe.serve.request import SamplingSettings, Token


class Sampler:
    """Chooses the tokens of one request.

    Args:
        settings: how.
        prompt: its token ids.
        top_logprobs: how many of the likeliest come with each; None: no log-probabilities.
        device: of the scores.
    """

    def __init__(
        self, settings: SamplingSettings, prompt: list[int], top_logprobs: int | None, device: torch.device
    ) -> None:
        self.settings, self.top_logprobs = settings, top_logprobs
        self.prompt = prompt
        self.answer: list[int] = []
        self.greedy = settings.temperature == 0
        self.warpers = LogitsProcessorList()
        if settings.repetition_penalty != 1:
            self.warpers.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
        if not self.greedy:
            if settings.temperature != 1:
                self.warpers.append(TemperatureLogitsWarper(settings.temperature))
            if settings.top_k:
                self.warpers.append(TopKLogitsWarper(settings.top_k))
            if settings.top_p < 1:
                self.warpers.append(TopPLogitsWarper(settings.top_p))
        self.counts: Tensor | None = None
        self.bias = [(token, value) for token, value in settings.logit_bias.items() if value]
        self.generator = torch.Generator(device)
        seed = secrets.randbits(63) if settings.seed is None else settings.seed
        self.generator.manual_seed(seed % 2**64)

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is taken, as it comes from the model."""
        penalties = self.settings.presence_penalty or self.settings.frequency_penalty
        return self.greedy and not self.warpers and not self.bias and not penalties

    def choose(self, scores: Tensor, likeliest: int) -> Token:
        """The next token, which is remembered.

        Args:
            scores: (V,) in float32, which may be written.
            likeliest: their largest.

        Raises:
            ValueError: scores that are no numbers.
        """
        logs = None if self.top_logprobs is None else scores.log_softmax(-1)
        chosen = likeliest if self.plain else self._chosen(scores)
        token = Token(chosen)
        if logs is not None:
            best = logs.topk(min(self.top_logprobs or 0, len(logs)))
            top = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
            token = Token(chosen, float(logs[chosen]), top)
        self.answer.append(chosen)
        if self.counts is not None:
            self.counts[chosen] += 1
        return token

    def _chosen(self, scores: Tensor) -> int:
        settings = self.settings
        if settings.presence_penalty or settings.frequency_penalty:
            if self.counts is None:
                self.counts = torch.zeros_like(scores)
            penalty = settings.presence_penalty * (self.counts > 0) + settings.frequency_penalty * self.counts
            scores = scores - penalty
        for token, value in self.bias:
            scores[token] += value
        if self.warpers:
            ids = torch.tensor([self.prompt + self.answer], device=scores.device)
            scores = self.warpers(ids, scores.unsqueeze(0))[0]  # type: ignore[arg-type]
        if self.greedy:
            return int(scores.argmax())
        shares = scores.softmax(-1)
        if not bool(torch.isfinite(shares).all()):
            raise ValueError("the model's scores are no numbers")
        return int(torch.multinomial(shares, 1, generator=self.generator))
