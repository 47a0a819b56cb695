"""Supervised fine-tuning: cross-entropy of the tokens that carry a label, which are those of the assistant."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmoe.config.data import DataConfig
from lmoe.data.collate import Collate
from lmoe.data.encoded import EncodedRows
from lmoe.data.pack import PackedRows
from lmoe.data.prepare import PreparedData, prepare
from lmoe.metrics.language import DomainLoss, token_losses
from lmoe.objectives.objective import Batch, Losses
from lmoe.ops.labels import IGNORE

MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


def predicted_losses(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Loss of each predicted token, (B, T - 1) nats, and its labels, (B, T - 1)."""
    inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    logits = model(**inputs, use_cache=False).logits
    labels = batch["labels"][:, 1:]
    return token_losses(logits[:, :-1], labels), labels


class SupervisedFineTuning:
    """The objective `task=sft`."""

    unit = "label token"
    measure = "nats per label token"
    title = "Validation loss"

    def prepare(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        bundled: Path,
        packing_model_type: str | None,
    ) -> PreparedData:
        """Conversations with the assistant's tokens labelled."""
        return prepare(config, tokenizer, seed=seed, bundled=bundled, packing_model_type=packing_model_type)

    def units(self, samples: EncodedRows | PackedRows) -> Tensor:
        """(N,) int64 label tokens of each row or packed sequence."""
        return samples.label_counts

    def collate(self, *, pad_token_id: int, max_length: int, packed: bool) -> Collate:
        """Batches of tokens, labels and masks."""
        return Collate(pad_token_id=pad_token_id, max_length=max_length, packed=packed)

    def losses(self, model: PreTrainedModel, batch: Batch) -> Losses:
        """Cross-entropy of each predicted token: three tensors (B, T - 1), values in nats."""
        values, labels = predicted_losses(model, batch)
        return Losses(values, labels != IGNORE, batch["domain_ids"][:, 1:])

    def meter(self, domains: Sequence[str]) -> DomainLoss:
        """Mean loss of each domain and over all tokens."""
        return DomainLoss(list(domains))

    def metric_names(self, domains: Sequence[str]) -> list[str]:
        """Returns val/loss and val/<domain>/loss of each domain."""
        return ["val/loss", *(f"val/{domain}/loss" for domain in domains)]

    def logits_bytes(self, tokens: int, vocabulary: int, compute_bytes: int) -> float:
        """Bytes of the float32 logits, their gradient, and its copy in the compute type."""
        return float(tokens * vocabulary * (4 + 4 + compute_bytes))
