"""Which domain a prompt is of, told by the base: a linear classifier on its mean-pooled last hidden states.

Shapes: N prompts, D hidden, C domains.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lmoe.backbones.mean_states import prompt_states
from lmoe.data.encoded import EncodedRows, opening
from lmoe.evaluate.subject import Subject
from lmoe.injection.tracing import adapters_off

PENALTY = 1e-2
"""Of the mean squared weight, against overfitting to a hundred prompts a domain."""
ITERATIONS = 100


@dataclass(slots=True, frozen=True)
class PromptClassifier:
    """softmax((x - mean) / std W^T + b), fitted by L-BFGS on the mean cross-entropy plus PENALTY sum(W^2) / C.

    Args:
        names: C domains.
        mean, std: (D,) of the prompts that it was fitted on.
        weight: (C, D).
        bias: (C,).
    """

    names: tuple[str, ...]
    mean: Tensor
    std: Tensor
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
        states = states_of_rows(subject, rows).double()
        targets = torch.tensor([names.index(name) for name in domains])
        mean, std = states.mean(0), states.std(0, correction=0).clamp(min=1e-6)
        weight = torch.zeros(len(names), states.shape[1], dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(len(names), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")
        inputs = (states - mean) / std

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = cross_entropy(inputs @ weight.t() + bias, targets) + PENALTY * weight.square().sum() / len(names)
            loss.backward()
            return loss

        optimizer.step(closure)
        return cls(names, mean, std, weight.detach(), bias.detach())

    def classify(self, subject: Subject, rows: EncodedRows) -> list[str]:
        """The domain of each row's prompt."""
        inputs = (states_of_rows(subject, rows).double() - self.mean) / self.std
        return [self.names[i] for i in (inputs @ self.weight.t() + self.bias).argmax(1).tolist()]


def states_of_rows(subject: Subject, rows: EncodedRows) -> Tensor:
    """(N, D) float32 on the CPU: what the base, with the adapters off, makes of the prompt of each row."""
    prompts = [row.input_ids[: opening(row)] for row in rows]
    with adapters_off(subject.model):
        return prompt_states(subject.model, prompts, subject.batch_size)
