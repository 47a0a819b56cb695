"""What preference objectives share: answers, their log-probabilities, a reference, pairs and their figures.

Shapes: N sequences of T tokens, of which B pairs are 2B: the chosen answers, and then the rejected ones.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmoe.config.data import DataConfig
from lmoe.config.run import TaskConfig
from lmoe.data.collate import Collate
from lmoe.data.encoded import EncodedRow, EncodedRows
from lmoe.data.pack import PackedRows
from lmoe.data.prepare import PreparedData, prepare
from lmoe.errors import CheckpointError
from lmoe.injection.adapter_copy import AdapterCopy
from lmoe.injection.record import RECORD
from lmoe.injection.tracing import adapters_off, adapters_on
from lmoe.objectives.objective import Batch, Losses
from lmoe.objectives.of_labels import OfLabels, model_inputs
from lmoe.ops.labels import IGNORE
from lmoe.rules.objectives import OBJECTIVES
from lmoe.vocabulary import Reference

MARGIN, ACCURACY = "reward_margin", "reward_accuracy"
CHOSEN, REJECTED = "chosen_reward", "rejected_reward"


class Answers(NamedTuple):
    """What a model says of the answers of a batch.

    Args:
        log_probs: (N,) float32 log p of each answer, in nats.
        tokens: (N,) int64 label tokens of each.
    """

    log_probs: Tensor
    tokens: Tensor

    @property
    def means(self) -> Tensor:
        """(N,) log p, mean of a token."""
        return self.log_probs / self.tokens


class PreferenceObjective(OfLabels):
    """The part of an objective that prefers answers.

    With task.reference=start it keeps a copy of the adapters when its phase begins, and a checkpoint keeps it too.
    """

    def __init__(self, task: TaskConfig) -> None:
        super().__init__(task)
        self._start: AdapterCopy | None = None

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
        """Rows of the kind that the objective learns from, their answers labelled; they are never packed."""
        return prepare(
            config,
            tokenizer,
            seed=seed,
            bundled=bundled,
            packing_model_type=None,
            num_embeddings=num_embeddings,
            kind=OBJECTIVES[self.task.name].rows,
        )

    def units(self, samples: EncodedRows | PackedRows) -> Tensor:
        """(N,) int64 ones: each row counts once."""
        return torch.ones(len(samples), dtype=torch.long)

    def begin(self, model: PreTrainedModel) -> None:
        """Keep the adapters, where they are the reference."""
        self._start = AdapterCopy.of(model) if self.task.reference is Reference.start else None

    def state(self) -> dict[str, Tensor]:
        """The adapters that are the reference."""
        return {} if self._start is None else self._start.tensors

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take the adapters of a checkpoint for the reference.

        Raises:
            CheckpointError: they are missing, or there are some and the reference is the base.
        """
        if self.task.reference is not Reference.start:
            super().restore(state)
        elif state:
            self._start = AdapterCopy(state) if self._start is None else self._start.replaced_by(state)
        else:
            raise CheckpointError(f"the checkpoint keeps no adapters for task.reference={self.task.reference}")

    def answers(self, model: PreTrainedModel, batch: Batch) -> Answers:
        """Log-probabilities of the answers of a batch by a model as it is."""
        labels = batch["labels"][:, 1:]
        losses = self.label_losses(model)(model_inputs(batch), labels)
        return Answers(-losses.sum(1), (labels != IGNORE).sum(1))

    def reference_answers(self, model: PreTrainedModel, batch: Batch) -> Answers:
        """The same by the reference, without gradients. NOTE before those of the policy, see `AdapterCopy.in_place`."""
        if (known := batch.get("reference_log_probs")) is not None:
            return Answers(known, (batch["labels"][:, 1:] != IGNORE).sum(1))
        with untraced(model), self.as_reference(model):
            return self.answers(model, batch)

    @contextmanager
    def as_reference(self, model: PreTrainedModel) -> Iterator[None]:
        """A block in which the model is the reference, whatever of it is switched off outside."""
        if self._start is None:
            with adapters_off(model):
                yield
        else:
            with adapters_on(model), self._start.in_place(model):
                yield


class PairObjective(PreferenceObjective):
    """The part of an objective that learns from pairs."""

    unit = "pair"
    measure = "loss per pair"
    sequences = 2
    figures = (MARGIN, ACCURACY, CHOSEN, REJECTED)

    def collate(self, *, pad_token_id: int, max_length: int, packed: bool) -> "CollatePairs":
        """Batches of the chosen answers and then the rejected ones."""
        assert not packed
        return CollatePairs(Collate(pad_token_id=pad_token_id, max_length=max_length, packed=False))

    def of_pairs(self, values: Tensor, rewards: Tensor, batch: Batch) -> Losses:
        """Losses of pairs with their figures.

        Args:
            values: (B,).
            rewards: (2B,) what the objective takes for the reward of each answer.
        """
        chosen, rejected = rewards.detach().chunk(2)
        margin = chosen - rejected
        figures = {MARGIN: margin, ACCURACY: rightness(margin), CHOSEN: chosen, REJECTED: rejected}
        every = torch.ones_like(values, dtype=torch.bool)
        return Losses(values, every, batch["domain_ids"][: len(values), 0], figures)


class CollatePairs:
    """Batches of B pairs as 2B sequences (see `Collate`): the chosen answers, and then the rejected ones of the pairs.

    Beside what Collate gives, answer_mask (2B, T) bool marks the tokens of the answers, and where the rows know them,
    reference_log_probs (2B,) float32 are log p of the answers by the reference.
    """

    def __init__(self, collate: Collate) -> None:
        self.collate = collate

    def __call__(self, items: Sequence[EncodedRow]) -> Batch:
        chosen, rejected = zip(*(item.pair() for item in items), strict=True)
        batch = self.collate([*chosen, *rejected])
        return batch | {"answer_mask": batch["labels"] != IGNORE}


def rightness(margin: Tensor) -> Tensor:
    """1 where a margin is above 0, one half where it is 0, else 0; float32."""
    return (margin > 0).float() + 0.5 * (margin == 0).float()


@contextmanager
def untraced(model: PreTrainedModel) -> Iterator[None]:
    """Forwards inside the block have no gradients, no dropout and no noise, and leave nothing in the model's routing
    trace."""
    record, training = getattr(model, RECORD, None), model.training
    model.eval()
    try:
        with torch.no_grad(), nullcontext() if record is None else record.trace.paused():
            yield
    finally:
        model.train(training)
