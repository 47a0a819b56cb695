"""Kahneman-Tversky optimisation: answers that are good or bad, without pairs."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmoe.data.collate import Collate
from lmoe.data.encoded import EncodedRow, opening
from lmoe.data.prepare import PreparedData
from lmoe.errors import DataError
from lmoe.injection.batch_info import whole_rows
from lmoe.objectives.known_answers import answer_key
from lmoe.objectives.objective import Batch, Losses
from lmoe.objectives.preference import (
    ACCURACY,
    KEYS,
    MARGIN,
    Answers,
    ComparesAnswers,
    rightness,
    untraced,
)
from lmoe.ops.labels import IGNORE
from lmoe.ops.preference_losses import kto_baseline, kto_loss
from lmoe.rules.objectives import MEASURES
from lmoe.vocabulary import RowKind

MISMATCHED = "mismatched_"
"""Begins the names of what a batch holds of answers behind prompts that they do not belong to."""


class CollateAnswers:
    """Batches as `Collate` makes them, with good (B,) bool, answer_mask (B, T) bool and answer_keys (B,) int64.

    mismatched_… are input_ids, labels and attention_mask (B, T) of each prompt with the answer to another one, see
    `answered_before`; not there in a batch of one row. The prompts are the same tokens in the same places, so what
    routers know of prompts holds for them too.
    """

    def __init__(self, collate: Collate) -> None:
        self.collate = collate

    def __call__(self, items: Sequence[EncodedRow]) -> Batch:
        rows = [replace(item, second=0) for item in items]
        others = [self._with_answer(*both) for both in zip(rows, answered_before(rows), strict=True)]
        others = others if len(rows) > 1 else []
        both = self.collate([*rows, *others])
        batch = {name: value[: len(rows)] for name, value in both.items()}
        batch |= {"good": torch.tensor([row.good for row in rows]), "answer_mask": batch["labels"] != IGNORE}
        batch[KEYS] = torch.tensor([answer_key(row) for row in rows])
        if others:
            named = ("input_ids", "labels", "attention_mask")
            batch |= {f"{MISMATCHED}{name}": both[name][len(rows) :] for name in named}
        return batch

    def _with_answer(self, row: EncodedRow, other: EncodedRow) -> EncodedRow:
        """A row's prompt with another row's answer."""
        mine, theirs = opening(row), opening(other)
        ids = torch.cat([row.input_ids[:mine], other.input_ids[theirs:]])[: self.collate.max_length]
        labels = torch.cat([row.is_label[:mine], other.is_label[theirs:]])[: self.collate.max_length]
        return replace(row, input_ids=ids, is_label=labels)


def answered_before(rows: Sequence[EncodedRow]) -> list[EncodedRow]:
    """Returns for each row the nearest one before it in the batch whose prompt is another, where that of the first row
    is the last; the one before it where all prompts are the same.

    The two answers of a pair often come one behind the other, and neither is a mismatch for the prompt of both.
    """
    prompts = [row.input_ids[: opening(row)] for row in rows]
    found = []
    for index, prompt in enumerate(prompts):
        before = range(index - 1, index - len(rows), -1)
        other = next((at for at in before if not torch.equal(prompts[at], prompt)), index - 1)
        found.append(rows[other])
    return found


class KahnemanTversky(ComparesAnswers):
    """The objective `task=kto` (2402.01306).

    How far the policy is from its reference is measured in each micro-batch, on answers to other prompts.
    """

    unit = "answer"
    measure = MEASURES[RowKind.labelled]
    figures = (MARGIN, ACCURACY)
    layout = CollateAnswers

    @property
    def more_forwards(self) -> int:
        """Policy and reference on answers of other rows, and the reference, unless it was computed before."""
        return 2 + super().more_forwards

    def check_rows(self, prepared: PreparedData) -> None:
        """Refuse answers that are all good, or all bad.

        Raises:
            DataError: all to be trained on are.
        """
        rows = prepared.train_rows
        if rows is not None and len(labels := rows.good.unique().tolist()) == 1:
            one, other = ("good", "false") if labels == [1] else ("bad", "true")
            raise DataError(
                f"data.path: all {len(rows):,} rows to train on are {one} answers, and task.name=kto learns to tell "
                f"good answers from bad ones: add rows with label {other}"
                + (", or learn these with task.name=sft" if labels == [1] else "")
            )

    def losses(self, model: PreTrainedModel, batch: Batch) -> Losses:
        """The loss of each answer, (B,); its margin is beta (r - z) of a good answer, beta (z - r) of a bad one."""
        baseline, reference = self.baseline(model, batch), self.reference_answers(model, batch)
        return self.compared(self.answers(model, batch), reference, batch, baseline)

    def compared(self, policy: Answers, reference: Answers, batch: Batch, baseline: Tensor | None = None) -> Losses:
        """The losses of a batch, from what policy and reference say of its answers.

        Args:
            baseline: () z; None: 0, that of a policy which is its reference.
        """
        task = self.task
        assert task.beta is not None and task.good_weight is not None and task.bad_weight is not None
        baseline = torch.zeros_like(policy.log_probs[0]) if baseline is None else baseline
        reward, good = policy.log_probs - reference.log_probs, batch["good"]
        values = kto_loss(
            reward, good, baseline, beta=task.beta, good_weight=task.good_weight, bad_weight=task.bad_weight
        )
        gained = task.beta * (reward.detach() - baseline)
        margin = torch.where(good, gained, -gained)
        figures = {MARGIN: margin, ACCURACY: rightness(margin)}
        return Losses(values, torch.ones_like(good), batch["domain_ids"][:, 0], figures)

    def baseline(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """() z of a batch; 0 of a single row, beside which there is no other."""
        if f"{MISMATCHED}labels" not in batch:
            return torch.zeros((), device=batch["labels"].device)
        other = {name.removeprefix(MISMATCHED): value for name, value in batch.items() if name.startswith(MISMATCHED)}
        with untraced(model), whole_rows(model):
            policy = self.answers(model, other)
            reference = self.reference_answers(model, other)
        return kto_baseline(policy.log_probs - reference.log_probs)
