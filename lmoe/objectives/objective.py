"""The seam between a run and its task: what the run asks of an objective, and nothing else of it.

The LightningModule owns phases, optimizer, accumulation window and state; the objective owns rows, batches and losses.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmoe.config.data import DataConfig
from lmoe.config.run import TaskConfig
from lmoe.data.encoded import EncodedRows
from lmoe.data.pack import PackedRows
from lmoe.data.prepare import PreparedData
from lmoe.metrics.language import DomainLoss
from lmoe.rules.objectives import OBJECTIVES, with_defaults

Batch = dict[str, Tensor]


class Losses(NamedTuple):
    """The losses of one batch, one for each unit of the objective (a label token, a pair of answers, …).

    values: (...) float32, each in the objective's measure, 0 where it does not count.
    counted: (...) bool, which of them count.
    domain_ids: (...) int64, the domain that each belongs to.
    figures: (...) float32 by name, what is averaged beside the loss; without gradient.
    """

    values: Tensor
    counted: Tensor
    domain_ids: Tensor
    figures: Mapping[str, Tensor] = MappingProxyType({})


class Objective(Protocol):
    """One task.

    Attributes:
        task: its settings.
        unit: what a loss belongs to, in the singular, such as "label token"; a step weighs each unit alike.
        measure: what a loss is measured in, such as "nats per label token".
        title: of the validation loss in tables and pictures.
        sequences: of one sample, which are in memory at the same time.
        more_forwards: without gradients, of as many tokens each, beside the one that is learnt from.
    """

    task: TaskConfig
    unit: str
    measure: str
    title: str
    sequences: int

    @property
    def more_forwards(self) -> int: ...

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
        """Rows of the run, read, tokenised, split and packed (see `lmoe.data.prepare.prepare`)."""
        ...

    def begin(self, model: PreTrainedModel) -> None:
        """A phase of this objective begins: keep what it needs of the model as it is now."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What `begin` has kept, which a resumed run needs again; by name."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` has given, in place of what `begin` has kept.

        Raises:
            CheckpointError: it is of another objective or model.
        """
        ...

    def units(self, samples: EncodedRows | PackedRows) -> Tensor:
        """(N,) int64, how many units each sample holds: with them a step knows what its losses are divided by."""
        ...

    def collate(self, *, pad_token_id: int, max_length: int, packed: bool) -> Callable[[Sequence[Any]], Batch]:
        """Makes a batch of samples. It must hold input_ids, valid_mask and domain_ids, each (B, T)."""
        ...

    def losses(self, model: PreTrainedModel, batch: Batch) -> Losses:
        """Losses of a batch, with gradients; the routers have been told of it (`batch_info`)."""
        ...

    def logit_change(
        self, model: PreTrainedModel, batch: Batch, without: Callable[[], AbstractContextManager]
    ) -> float:
        """Root mean square of the change of the logits of a batch by something, such as the adapters.

        Args:
            model: in evaluation mode.
            batch: with one valid token at least.
            without: makes a block inside which the model computes without it.
        """
        ...

    def notes(self, model: PreTrainedModel) -> list[str]:
        """What a user should know of how the losses of this model are computed, once there have been some."""
        ...

    def meter(self, domains: Sequence[str]) -> DomainLoss:
        """Gathers losses by domain; a subclass may compute more figures from what it is given."""
        ...

    def metric_names(self, domains: Sequence[str]) -> list[str]:
        """Names under which a validation of rows of these domains logs what `meter` computes."""
        ...

    def logits_bytes(self, tokens: int, vocabulary: int, compute_bytes: int) -> float:
        """Bytes that the losses of so many tokens take in passing, beside what the layers keep."""
        ...


def objective_of(task: TaskConfig) -> Objective:
    """The objective that a config chooses, its own defaults in place of null."""
    module, _, implementation = OBJECTIVES[task.name].implementation.rpartition(".")
    return getattr(import_module(module), implementation)(with_defaults(task))
