"""The model as the LM evaluation harness asks it, where a router decides by prompts. Needs lm-eval."""

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from lmoe.data.collate import Collate
from lmoe.data.encoded import EncodedRow
from lmoe.injection.batch_info import batch_info
from lmoe.injection.record import injected
from lmoe.objectives.model_inputs import ModelInputs

Request = tuple[Any, list[int], list[int]]
"""What the harness keeps an answer under, the tokens of a context, and those of its continuation."""
Likelihood = tuple[float, bool]
"""Log-likelihood of a continuation in nats, and whether greedy decoding would write it."""


# pyright: reportAttributeAccessIssue=false
# The decorator with which lm-eval registers HFLM hides its properties from the type checker.
class ByPrompt(HFLM):
    """Tells the model of each request that its context is the prompt, as `lmoe evaluate` does of its rows.

    The harness itself gives context and continuation as one text, padded without a mask.
    """

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Likelihood]:
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        size, found = int(self.batch_size), {}
        for first in range(0, len(order), size):
            chosen = order[first : first + size]
            scores = self._likelihoods([(requests[i][1], requests[i][2]) for i in chosen])
            for i, score in zip(chosen, scores, strict=True):
                found[i] = score
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], score)
        return [found[i] for i in range(len(requests))]

    @torch.no_grad()
    def _likelihoods(self, requests: Sequence[tuple[list[int], list[int]]]) -> list[Likelihood]:
        """The inputs of one batch; what does not fit in the context is cut on the left."""
        rows, starts = [], []
        for context, continuation in requests:
            ids = torch.tensor((context + continuation)[-(self.max_length + 1) : -1], dtype=torch.int32)
            starts.append(len(ids) + 1 - len(continuation))
            rows.append(EncodedRow(ids, torch.arange(len(ids)) >= starts[-1], 0))
        pad = int(self.tokenizer.pad_token_id or 0)  # type: ignore[arg-type]
        batch = Collate(pad_token_id=pad, max_length=self.max_length, packed=False)(rows)
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        with batch_info(injected(self.model), batch, [""]):
            logits = self.model(**ModelInputs(self.model)(batch)).logits
        scores = []
        for number, ((_, continuation), start) in enumerate(zip(requests, starts, strict=True)):
            chosen = torch.tensor(continuation, device=logits.device).unsqueeze(-1)
            told = logits[number, start - 1 : start - 1 + len(continuation)].float().log_softmax(-1)
            is_greedy = torch.equal(told.argmax(-1, keepdim=True), chosen)
            scores.append((float(told.gather(-1, chosen).sum()), is_greedy))
        return scores
