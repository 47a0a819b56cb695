"""Supervised fine-tuning: cross-entropy of the tokens that carry a label, which are those of the assistant."""

from torch import Tensor
from transformers import PreTrainedModel

from lmoe.config.run import TaskConfig
from lmoe.data.collate import Collate
from lmoe.data.encoded import EncodedRows
from lmoe.data.pack import PackedRows
from lmoe.objectives.objective import Batch, Losses
from lmoe.objectives.of_labels import OfLabels
from lmoe.ops.labels import IGNORE
from lmoe.vocabulary import NATS


class SupervisedFineTuning(OfLabels):
    """The objective `task=sft`."""

    unit = "label token"
    measure = NATS

    def __init__(self, task: TaskConfig | None = None) -> None:
        super().__init__(task or TaskConfig())

    def units(self, samples: EncodedRows | PackedRows) -> Tensor:
        """(N,) int64 label tokens of each row or packed sequence."""
        return samples.label_counts

    def collate(self, *, pad_token_id: int, max_length: int, packed: bool) -> Collate:
        """Batches of tokens, labels and masks."""
        return Collate(pad_token_id=pad_token_id, max_length=max_length, packed=packed)

    def losses(self, model: PreTrainedModel, batch: Batch) -> Losses:
        """Cross-entropy of each predicted token: three tensors (B, T - 1), values in nats."""
        labels = batch["labels"][:, 1:]
        values = self.label_losses(model)(self.inputs(model, batch), labels)
        return Losses(values, labels != IGNORE, batch["domain_ids"][:, 1:])
