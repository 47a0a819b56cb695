"""Which domain a prompt is of, told by the base: a linear classifier on its mean-pooled last hidden states.

Shapes: N prompts, D hidden, C domains.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmoe.backbones.mean_states import prompt_states
from lmoe.data.encoded import EncodedRows, opening
from lmoe.evaluate.subject import Subject
from lmoe.injection.tracing import adapters_off
from lmoe.ops.softmax_regression import softmax_regression


@dataclass(slots=True, frozen=True)
class PromptClassifier:
    """softmax(x W^T + b), see `softmax_regression`.

    Args:
        names: C domains.
        weight: (C, D).
        bias: (C,).
    """

    names: tuple[str, ...]
    weight: Tensor
    bias: Tensor

    @classmethod
    def fitted(cls, subject: Subject, rows: EncodedRows, domains: Sequence[str]) -> "PromptClassifier":
        """Fit to the prompts of rows.

        Args:
            subject: whose base reads the prompts, with the adapters off.
            domains: of each row.
        """
        names = tuple(sorted(set(domains)))
        targets = torch.tensor([names.index(name) for name in domains])
        return cls(names, *softmax_regression(states_of_rows(subject, rows), targets, len(names)))

    def classify(self, subject: Subject, rows: EncodedRows) -> list[str]:
        """The domain of each row's prompt."""
        states = states_of_rows(subject, rows).double()
        return [self.names[i] for i in (states @ self.weight.t() + self.bias).argmax(1).tolist()]


def states_of_rows(subject: Subject, rows: EncodedRows) -> Tensor:
    """(N, D) float32 on the CPU: what the base, with the adapters off, makes of the prompt of each row."""
    prompts = [row.input_ids[: opening(row)] for row in rows]
    with adapters_off(subject.model):
        return prompt_states(subject.model, prompts, subject.batch_size)
