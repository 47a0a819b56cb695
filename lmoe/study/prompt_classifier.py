"""Which domain a prompt is of, told by the base: a linear classifier on its mean-pooled last hidden states.

Shapes: N prompts, D hidden, C domains.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from lmoe.blend.encoder import encoded
from lmoe.data.encoded import EncodedRows
from lmoe.evaluate.samples import opening
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
        states = prompt_states(subject, rows).double()
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
        inputs = (prompt_states(subject, rows).double() - self.mean) / self.std
        return [self.names[i] for i in (inputs @ self.weight.t() + self.bias).argmax(1).tolist()]


@torch.no_grad()
def prompt_states(subject: Subject, rows: EncodedRows) -> Tensor:
    """(N, D) float32 on the CPU: the mean of the base's last hidden states over the prompt of each row."""
    model, found = subject.model, []
    prompts = [row.input_ids[: opening(row)].long() for row in rows]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    with adapters_off(model):
        for first in range(0, len(order), subject.batch_size):
            batch = [prompts[i] for i in order[first : first + subject.batch_size]]
            ids = pad_sequence(batch, batch_first=True).to(model.device)
            mask = pad_sequence([torch.ones_like(prompt) for prompt in batch], batch_first=True).to(model.device)
            found.append(encoded(model, mask, input_ids=ids).cpu())
    return torch.cat(found)[torch.tensor(order).argsort()]
