"""What objectives share whose losses are made of the log-probabilities of labels."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmoe.backbones.label_losses import LabelLosses
from lmoe.config.data import DataConfig
from lmoe.config.run import TaskConfig
from lmoe.data.prepare import PreparedData, prepare
from lmoe.errors import CheckpointError
from lmoe.metrics.language import DomainLoss
from lmoe.objectives.model_inputs import ModelInputs
from lmoe.objectives.objective import Batch
from lmoe.ops.log_probabilities import LOGITS_AT_ONCE
from lmoe.rules.objectives import OBJECTIVES


class OfLabels:
    """The part of an objective that asks a model for log-probabilities, and needs nothing of its past.

    Args:
        task: its settings, without null.
    """

    title = "Validation loss"
    sequences = 1
    figures: tuple[str, ...] = ()
    """Names of what is averaged beside the loss."""

    def __init__(self, task: TaskConfig) -> None:
        self.task = task
        self._label_losses: LabelLosses | None = None
        self._model_inputs: ModelInputs | None = None

    @property
    def more_forwards(self) -> int:
        """None beside the one that is learnt from."""
        return 0

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
        """Rows of the kind that the objective learns from; only answers are packed.

        Raises:
            DataError: rows that cannot be had, or that `check_rows` refuses.
        """
        prepared = prepare(
            config,
            tokenizer,
            seed=seed,
            bundled=bundled,
            packing_model_type=packing_model_type,
            num_embeddings=num_embeddings,
            kind=OBJECTIVES[self.task.name].rows,
        )
        self.check_rows(prepared)
        return prepared

    def check_rows(self, prepared: PreparedData) -> None:
        """Refuse rows that the objective cannot learn from together; it can from any."""

    def label_losses(self, model: PreTrainedModel) -> LabelLosses:
        """Computes the losses at label positions of a model, and is kept for as long as it is asked for that model."""
        if self._label_losses is None or self._label_losses.model is not model:
            self._label_losses = LabelLosses(model)
        return self._label_losses

    def inputs(self, model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
        """What a model gets of a batch."""
        if self._model_inputs is None or self._model_inputs.model is not model:
            self._model_inputs = ModelInputs(model)
        return self._model_inputs(batch)

    def begin(self, model: PreTrainedModel) -> None:
        """Keep nothing."""

    def state(self) -> dict[str, Tensor]:
        """Return nothing."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Refuse what another objective has kept.

        Raises:
            CheckpointError: there is something.
        """
        if state:
            raise CheckpointError(f"the checkpoint keeps the start of a phase, and task.name={self.task.name} none")

    def logit_change(
        self, model: PreTrainedModel, batch: Batch, without: Callable[[], AbstractContextManager]
    ) -> float:
        """Root mean square over the valid tokens of what the logits are without something."""
        losses = self.label_losses(model)
        return losses.mean_square_change(self.inputs(model, batch), batch["valid_mask"], without) ** 0.5

    def notes(self, model: PreTrainedModel) -> list[str]:
        """Says it where the logits of all tokens are made, which takes more memory."""
        reason = self.label_losses(model).all_logits_because
        return [] if reason is None else [f"the loss makes the logits of all tokens: {reason}"]

    def meter(self, domains: Sequence[str]) -> DomainLoss:
        """Mean loss of each domain and over all units, and of the figures."""
        return DomainLoss(list(domains), self.figures)

    def metric_names(self, domains: Sequence[str]) -> list[str]:
        """Returns val/loss and val/<domain>/loss of each domain, and the same of each figure."""
        names = ("loss", *self.figures)
        return [f"val/{name}" for name in names] + [f"val/{domain}/{name}" for domain in domains for name in names]

    def logits_bytes(self, tokens: int, vocabulary: int, compute_bytes: int) -> float:
        """Bytes of one tile of logits, in float32 and in the compute type."""
        return float(min(tokens * vocabulary, LOGITS_AT_ONCE) * (4 + compute_bytes))
