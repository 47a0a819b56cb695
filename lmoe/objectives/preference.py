"""What preference objectives share: answers, their log-probabilities, a reference, pairs and their figures.

Shapes: N sequences of T tokens, of which B pairs are 2B: the chosen answers, and then the rejected ones.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor
from transformers import PreTrainedModel

from lmoe.config.run import TaskConfig
from lmoe.data.collate import Collate
from lmoe.data.encoded import EncodedRow, EncodedRows
from lmoe.data.pack import PackedRows
from lmoe.errors import CheckpointError
from lmoe.injection.adapter_copy import AdapterCopy
from lmoe.injection.evaluating import evaluating
from lmoe.injection.record import RECORD
from lmoe.injection.tracing import adapters_off, adapters_on
from lmoe.objectives.known_answers import KnownAnswers, answer_key
from lmoe.objectives.objective import Batch, Losses
from lmoe.objectives.of_labels import OfLabels
from lmoe.ops.labels import IGNORE
from lmoe.rules.objectives import MEASURES
from lmoe.vocabulary import Reference, RowKind

MARGIN, ACCURACY = "reward_margin", "reward_accuracy"
CHOSEN, REJECTED = "chosen_reward", "rejected_reward"
KEYS = "answer_keys"
"""What a batch calls the numbers by which the answers of its rows are found."""


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

    It keeps a copy of the adapters when its phase begins, and a checkpoint keeps it too: the reference with
    task.reference=start, and what routing is compared with.
    """

    layout: Callable[[Collate], Callable[[Sequence[EncodedRow]], Batch]]
    """Class that makes a batch of rows, by what lays out sequences."""

    def __init__(self, task: TaskConfig) -> None:
        super().__init__(task)
        self.start: AdapterCopy | None = None
        """The adapters as they were when the phase began."""
        self.known: KnownAnswers | None = None
        """What the reference says of the rows of the phase, where it was computed before."""

    @property
    def more_forwards(self) -> int:
        """Returns 1 for a reference that was not computed before, else 0."""
        return int(self.task.reference is not None and not self.task.precompute_reference)

    def collate(self, *, pad_token_id: int, max_length: int, packed: bool) -> Callable[[Sequence[EncodedRow]], Batch]:
        """Batches in the layout of the objective."""
        assert not packed
        return self.layout(Collate(pad_token_id=pad_token_id, max_length=max_length, packed=False))

    def units(self, samples: EncodedRows | PackedRows) -> Tensor:
        """(N,) int64 ones: each row counts once."""
        return torch.ones(len(samples), dtype=torch.long)

    def begin(self, model: PreTrainedModel) -> None:
        """Keep the adapters."""
        self.known = None
        self.start = AdapterCopy.of(model)

    def state(self) -> dict[str, Tensor]:
        """The adapters as they were when the phase began."""
        return {} if self.start is None else self.start.tensors

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take the adapters that a checkpoint has kept.

        Raises:
            CheckpointError: there are none.
        """
        if not state:
            raise CheckpointError(f"the checkpoint keeps no adapters of the start of a phase of {self.task.name}")
        self.start = AdapterCopy(state) if self.start is None else self.start.replaced_by(state)

    def answers(self, model: PreTrainedModel, batch: Batch) -> Answers:
        """Log-probabilities of the answers of a batch by a model as it is."""
        labels = batch["labels"][:, 1:]
        losses = self.label_losses(model)(self.inputs(model, batch), labels)
        return Answers(-losses.sum(1), (labels != IGNORE).sum(1))

    def reference_answers(self, model: PreTrainedModel, batch: Batch) -> Answers:
        """The same by the reference, without gradients. NOTE before those of the policy, see `AdapterCopy.in_place`."""
        if self.known is not None and KEYS in batch:
            log_probs = self.known(batch[KEYS]).T.flatten()[: len(batch["labels"])]
            return Answers(log_probs, (batch["labels"][:, 1:] != IGNORE).sum(1))
        with untraced(model), self.as_reference(model):
            return self.answers(model, batch)

    def learn_known(self, model: PreTrainedModel, batches: Iterable[Batch]) -> KnownAnswers:
        """Log-probabilities by the reference of all answers of some batches, whose contexts the caller has entered."""
        self.known = None
        return KnownAnswers.of(self._keyed(model, batch) for batch in batches)

    def _keyed(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
        keys = batch[KEYS]
        found = self.reference_answers(model, batch).log_probs.view(-1, len(keys)).T
        return keys, torch.cat([found, torch.zeros_like(found)], 1)[:, :2]

    @property
    def reference_digest(self) -> str:
        """Digest of the adapters that are the reference; "" for the base."""
        if self.task.reference is not Reference.start or self.start is None:
            return ""
        digest = xxhash.xxh3_128()
        for name, tensor in sorted(self.start.tensors.items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @contextmanager
    def as_reference(self, model: PreTrainedModel) -> Iterator[None]:
        """A block in which the model is the reference, whatever of it is switched off outside."""
        if self.task.reference is not Reference.start or self.start is None:
            with adapters_off(model):
                yield
        else:
            with adapters_on(model), self.start.in_place(model):
                yield


class ComparesAnswers(PreferenceObjective, ABC):
    """The part of an objective whose losses follow from the log-probabilities of answers, by a policy and by a
    reference."""

    def losses(self, model: PreTrainedModel, batch: Batch) -> Losses:
        """The losses of a batch, with gradients; without a reference the policy stands in its place."""
        if self.task.reference is None:
            policy = self.answers(model, batch)
            return self.compared(policy, policy, batch)
        reference = self.reference_answers(model, batch)
        return self.compared(self.answers(model, batch), reference, batch)

    @abstractmethod
    def compared(self, policy: Answers, reference: Answers, batch: Batch) -> Losses:
        """The losses of a batch, from what policy and reference say of its answers."""


class CollatePairs:
    """Batches of B pairs as 2B sequences (see `Collate`): the chosen answers, and then the rejected ones of the pairs.

    Beside what Collate gives, answer_mask (2B, T) bool marks the tokens of the answers, and answer_keys (B,) int64 are
    what answers are found by that were computed before.
    """

    def __init__(self, collate: Collate) -> None:
        self.collate = collate

    def __call__(self, items: Sequence[EncodedRow]) -> Batch:
        chosen, rejected = zip(*(item.pair() for item in items), strict=True)
        batch = self.collate([*chosen, *rejected])
        keys = torch.tensor([answer_key(item) for item in items])
        return batch | {"answer_mask": batch["labels"] != IGNORE, KEYS: keys}


class PairObjective(PreferenceObjective):
    """The part of an objective that learns from pairs."""

    unit = "pair"
    measure = MEASURES[RowKind.pairs]
    sequences = 2
    figures = (MARGIN, ACCURACY, CHOSEN, REJECTED)
    layout = CollatePairs

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


def rightness(margin: Tensor) -> Tensor:
    """1 where a margin is above 0, one half where it is 0, else 0; float32."""
    return (margin > 0).float() + 0.5 * (margin == 0).float()


@contextmanager
def untraced(model: PreTrainedModel) -> Iterator[None]:
    """Forwards inside the block have no gradients, no dropout and no noise, and leave nothing in the model's routing
    trace."""
    record = getattr(model, RECORD, None)
    with evaluating(model), torch.no_grad(), nullcontext() if record is None else record.trace.paused():
        yield
