"""The model as the LM evaluation harness asks it, where a router decides by prompts. Needs lm-eval."""

from collections.abc import Sequence

import torch
from lm_eval.models.huggingface import HFLM

from lmoe.data.collate import Collate
from lmoe.data.encoded import EncodedRow
from lmoe.injection.batch_info import batch_info
from lmoe.injection.record import injected
from lmoe.objectives.model_inputs import ModelInputs

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""Context and continuation as text, under which the harness keeps an answer (None: a window of a text), and the tokens
of each."""
Likelihood = tuple[float, bool]
"""Log-likelihood of a continuation in nats, and whether greedy decoding would write it."""


# pyright: reportAttributeAccessIssue=false
# The decorator with which lm-eval registers HFLM hides its properties from the type checker.
class ByPrompt(HFLM):
    """Tells the model of each request that its context is the prompt, as `lmoe evaluate` does of its rows; what has no
    context, and each window of a text whose perplexity is measured, is a plain text.

    The harness itself gives context and continuation as one text, padded without a mask.
    """

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Likelihood]:
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        size, found = int(self.batch_size), {}
        for first in range(0, len(order), size):
            chosen = order[first : first + size]
            scores = self._likelihoods([requests[i] for i in chosen])
            for i, score in zip(chosen, scores, strict=True):
                found[i], texts = score, requests[i][0]
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, score)
        return [found[i] for i in range(len(requests))]

    @torch.no_grad()
    def _likelihoods(self, requests: Sequence[Request]) -> list[Likelihood]:
        """The inputs of one batch; what does not fit in the context is cut on the left."""
        rows, starts = [], []
        for texts, context, continuation in requests:
            tokens = (context + continuation)[-(self.max_length + 1) :]
            starts.append(len(tokens) - len(continuation))
            # NOTE nothing is predicted from the last token, but it counts for how much of a text is its opening
            ids = torch.tensor(tokens[: self.max_length], dtype=torch.int32)
            is_text = texts is None or not texts[0]
            rows.append(EncodedRow(ids, torch.arange(len(ids)) >= (0 if is_text else starts[-1]), 0))
        pad = int(self.tokenizer.pad_token_id or 0)  # type: ignore[arg-type]
        batch = Collate(pad_token_id=pad, max_length=self.max_length, packed=False)(rows)
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        with batch_info(injected(self.model), batch, [""]):
            logits = self.model(**ModelInputs(self.model)(batch)).logits
        scores = []
        for number, ((_, _, continuation), start) in enumerate(zip(requests, starts, strict=True)):
            chosen = torch.tensor(continuation, device=logits.device).unsqueeze(-1)
            told = logits[number, start - 1 : start - 1 + len(continuation)].float().log_softmax(-1)
            is_greedy = torch.equal(told.argmax(-1, keepdim=True), chosen)
            scores.append((float(told.gather(-1, chosen).sum()), is_greedy))
        return scores
