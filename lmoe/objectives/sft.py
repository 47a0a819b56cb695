"""Supervised fine-tuning: cross-entropy of the tokens that carry a label, which are those of the assistant."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmoe.backbones.label_losses import LabelLosses
from lmoe.config.data import DataConfig
from lmoe.data.collate import Collate
from lmoe.data.encoded import EncodedRows
from lmoe.data.pack import PackedRows
from lmoe.data.prepare import PreparedData, prepare
from lmoe.metrics.language import DomainLoss
from lmoe.objectives.objective import Batch, Losses
from lmoe.ops.labels import IGNORE
from lmoe.ops.log_probabilities import LOGITS_AT_ONCE

MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


def model_inputs(batch: Batch) -> Batch:
    """What the model itself gets of a batch."""
    return {name: batch[name] for name in MODEL_INPUTS if name in batch}


class SupervisedFineTuning:
    """The objective `task=sft`."""

    unit = "label token"
    measure = "nats per label token"
    title = "Validation loss"

    def __init__(self) -> None:
        self._label_losses: LabelLosses | None = None

    def prepare(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        bundled: Path,
        packing_model_type: str | None,
        num_embeddings: int | None = None,
    ) -> PreparedData:
        """Conversations with the assistant's tokens labelled."""
        return prepare(
            config,
            tokenizer,
            seed=seed,
            bundled=bundled,
            packing_model_type=packing_model_type,
            num_embeddings=num_embeddings,
        )

    def units(self, samples: EncodedRows | PackedRows) -> Tensor:
        """(N,) int64 label tokens of each row or packed sequence."""
        return samples.label_counts

    def collate(self, *, pad_token_id: int, max_length: int, packed: bool) -> Collate:
        """Batches of tokens, labels and masks."""
        return Collate(pad_token_id=pad_token_id, max_length=max_length, packed=packed)

    def losses(self, model: PreTrainedModel, batch: Batch) -> Losses:
        """Cross-entropy of each predicted token: three tensors (B, T - 1), values in nats."""
        labels = batch["labels"][:, 1:]
        values = self.label_losses(model)(model_inputs(batch), labels)
        return Losses(values, labels != IGNORE, batch["domain_ids"][:, 1:])

    def label_losses(self, model: PreTrainedModel) -> LabelLosses:
        """Computes the losses at label positions of a model, and is kept for as long as it is asked for that model."""
        if self._label_losses is None or self._label_losses.model is not model:
            self._label_losses = LabelLosses(model)
        return self._label_losses

    def logit_change(
        self, model: PreTrainedModel, batch: Batch, without: Callable[[], AbstractContextManager]
    ) -> float:
        """Root mean square over the valid tokens of what the logits are without something."""
        losses = self.label_losses(model)
        return losses.mean_square_change(model_inputs(batch), batch["valid_mask"], without) ** 0.5

    def notes(self, model: PreTrainedModel) -> list[str]:
        """Says it where the logits of all tokens are made, which takes more memory."""
        reason = self.label_losses(model).all_logits_because
        return [] if reason is None else [f"the loss makes the logits of all tokens: {reason}"]

    def meter(self, domains: Sequence[str]) -> DomainLoss:
        """Mean loss of each domain and over all tokens."""
        return DomainLoss(list(domains))

    def metric_names(self, domains: Sequence[str]) -> list[str]:
        """Returns val/loss and val/<domain>/loss of each domain."""
        return ["val/loss", *(f"val/{domain}/loss" for domain in domains)]

    def logits_bytes(self, tokens: int, vocabulary: int, compute_bytes: int) -> float:
        """Bytes of one tile of logits, in float32 and in the compute type."""
        return float(min(tokens * vocabulary, LOGITS_AT_ONCE) * (4 + compute_bytes))
