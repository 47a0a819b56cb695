"""Answer many prompts in batches, each row as it is answered alone.

Shapes: B rows of T tokens, padding on the left included; V tokens in the vocabulary.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from random import Random

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lmoe.adapter.answer_end import end_tokens
from lmoe.errors import BackboneError
from lmoe.generate.generate import Sampling, generated, room_for_answer
from lmoe.injection.tracing import domain

BATCH_SIZE = 8
"""Prompts in a batch, unless the user says otherwise."""


@dataclass(slots=True, frozen=True)
class Answer:
    """What follows a prompt.

    Args:
        ids: (N,) the new tokens, with the one that ends the answer.
        ended: the answer came to its end; False: max_new_tokens or the context cut it off.
    """

    ids: Tensor
    ended: bool


@dataclass(slots=True, kw_only=True)
class BatchAnswers:
    """Answers prompts in batches, padded on the left.

    The shorter prompts of a batch have more room in the context than the longest. No row grows beyond it, finished ones
    included, so that a row that the batch's room has cut is answered again, beside rows of its length.

    Args:
        model: trained, blended or plain; its routers see each row's own tokens alone.
        sampling: how. Above temperature 0 each row draws from numbers of its own, see `RowSampling`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    ends: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.ends = end_tokens(self.model, self.tokenizer)

    def answer(
        self,
        prompts: Sequence[Tensor],
        *,
        numbers: Sequence[int],
        domains: Sequence[str] | None = None,
        answers: Sequence[Tensor | None] | None = None,
    ) -> list[Answer]:
        """The answers to the prompts of one batch, in their order.

        Args:
            prompts: (T,) tokens of each.
            numbers: of the rows, from which they draw at a temperature above 0.
            domains: of the rows, for moe.router=oracle.
            answers: (T,) bool of each, tokens of earlier answers (`earlier_answers`); None: it has none.

        Raises:
            DataError: a prompt is empty, or leaves no room in the backbone's context.
            RoutingError: no expert has a row's domain.
        """
        found: dict[int, Answer] = {}
        before = [None] * len(prompts) if answers is None else answers
        waiting = list(range(len(prompts)))
        while waiting:
            room = min(self._room(prompts[i]) for i in waiting)
            for i, ids in zip(waiting, self._continued(prompts, waiting, room, numbers, domains, before), strict=True):
                answer = self._cut(ids)
                if answer.ended or room == self._room(prompts[i]):
                    found[i] = answer
            waiting = [i for i in waiting if i not in found]
        return [found[i] for i in range(len(prompts))]

    def _room(self, prompt: Tensor) -> int:
        return room_for_answer(self.model, len(prompt), self.sampling.max_new_tokens)

    def _continued(
        self,
        prompts: Sequence[Tensor],
        chosen: list[int],
        room: int,
        numbers: Sequence[int],
        domains: Sequence[str] | None,
        answers: Sequence[Tensor | None],
    ) -> Tensor:
        """(B, N) new tokens of the chosen rows, at most `room`."""
        rows = [prompts[i] for i in chosen]
        ids = pad_sequence(rows, batch_first=True, padding_value=self._padding, padding_side="left")
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
        processors = LogitsProcessorList()
        if self.sampling.temperature > 0:
            processors.append(RowSampling(self.sampling, [numbers[i] for i in chosen]))
        about = nullcontext() if domains is None else domain(self.model, [domains[i] for i in chosen])
        with about:
            return generated(
                self.model,
                self.tokenizer,
                ids,
                mask,
                answers=_beside(prompts, answers, chosen),
                max_new_tokens=room,
                eos_token_id=self.ends or None,
                logits_processor=processors,
                **replace(self.sampling, temperature=0.0, top_p=1.0, top_k=0, seed=0).options(),
            ).cpu()

    @property
    def _padding(self) -> int:
        """Any token will do, as the mask leaves it out."""
        return int(self.tokenizer.pad_token_id or 0)  # type: ignore[arg-type]

    def _cut(self, ids: Tensor) -> Answer:
        """A row's answer up to its end, without what stands there while other rows go on."""
        is_end = torch.isin(ids, torch.tensor(self.ends, dtype=ids.dtype))
        ended = bool(is_end.any())
        return Answer(ids[: int(is_end.int().argmax()) + 1] if ended else ids, ended)


def _beside(prompts: Sequence[Tensor], answers: Sequence[Tensor | None], chosen: list[int]) -> Tensor | None:
    """(B, T) bool, tokens of earlier answers in the chosen rows as they are padded; None: no row has any."""
    if all(answers[i] is None for i in chosen):
        return None
    rows = [torch.zeros(len(prompts[i]), dtype=torch.bool) if (a := answers[i]) is None else a for i in chosen]
    return pad_sequence(rows, batch_first=True, padding_value=False, padding_side="left")


class RowSampling(LogitsProcessor):
    """Leaves each row one token, drawn by its own numbers, so that greedy decoding takes it.

    With u uniform in (0, 1], of numbers that follow from the seed and the row's own number alone, the token is the
    first at which the sum of the probabilities reaches u. So a row's answer depends neither on the rows beside it nor
    on their order. (`do_sample=True` draws for all rows from one generator.)

    Args:
        sampling: temperature, top_k and top_p act in the order of Transformers.
        numbers: of the rows.
    """

    def __init__(self, sampling: Sampling, numbers: Sequence[int]) -> None:
        self.warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
        if sampling.top_k:
            self.warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self.warpers.append(TopPLogitsWarper(sampling.top_p))
        self.streams = [Random(f"{sampling.seed} {number}") for number in numbers]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores with one finite entry a row.

        Args:
            input_ids: (B, T) so far.
            scores: (B, V).

        Raises:
            BackboneError: scores that are no numbers.
        """
        reached = self.warpers(input_ids, scores).softmax(-1).cumsum(-1)  # type: ignore[arg-type]
        total = reached[:, -1:]
        if not bool(total.isfinite().all()):
            raise BackboneError("the model's scores of the next token are no numbers (NaN), so that none can be drawn")
        drawn = torch.tensor([[1.0 - stream.random()] for stream in self.streams], dtype=scores.dtype)
        token = torch.searchsorted(reached, drawn.to(scores.device) * total)
        return torch.full_like(scores, -torch.inf).scatter(-1, token, 0.0)  # type: ignore[return-value]


def batches_of(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices of the prompts of each batch: like lengths together, the longest first, so that a lack of memory shows at
    once.

    Args:
        lengths: of the prompts, in tokens.
        batch_size: prompts in a batch, at most.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
