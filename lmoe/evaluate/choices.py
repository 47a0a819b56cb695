"""Multiple choice by the log-likelihood of each choice, with the adapters off and on."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lmoe.backbones.label_losses import LabelLosses
from lmoe.evaluate.encode_questions import EncodedChoices
from lmoe.evaluate.results import ChoiceAccuracy
from lmoe.evaluate.subject import Subject
from lmoe.injection.batch_info import batch_info
from lmoe.injection.record import injected
from lmoe.injection.tracing import adapters_off
from lmoe.objectives.model_inputs import ModelInputs


@dataclass(slots=True, frozen=True)
class Accuracy:
    """Share of questions answered rightly, or of pairs told apart.

    Args:
        value: 0 to 1.
        stderr: standard error of the share over questions, sqrt(p (1 - p) / (n - 1)); None for a single question.
    """

    value: float
    stderr: float | None

    @classmethod
    def of(cls, right: Sequence[float]) -> "Accuracy":
        """Returns the accuracy over one or more questions, each from 0 (False) to 1 (True)."""
        n, p = len(right), sum(right) / len(right)
        return cls(p, math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None)


def likeliest(loglikelihoods: Sequence[float]) -> int:
    """Index of the choice with the highest log-likelihood; the first of equals."""
    return max(range(len(loglikelihoods)), key=loglikelihoods.__getitem__)


def likeliest_by_length(loglikelihoods: Sequence[float], choices: Sequence[str]) -> int:
    """Index of the choice with the highest log-likelihood a character, as acc_norm of the LM evaluation harness.

    Characters rather than tokens: models with different tokenizers are then compared by the same rule.
    """
    return likeliest([value / len(choice) for value, choice in zip(loglikelihoods, choices, strict=True)])


def random_accuracy(sizes: Sequence[int]) -> float:
    """Expected accuracy of guessing among so many choices of each question."""
    return sum(1 / size for size in sizes) / len(sizes)


def majority_accuracy(answers: Sequence[int]) -> float:
    """Accuracy of always giving the index that is right most often."""
    return Counter(answers).most_common(1)[0][1] / len(answers)


def choice_accuracy(subject: Subject, task: str, encoded: EncodedChoices, domain: str = "") -> ChoiceAccuracy:
    """Accuracies of one task.

    Args:
        task: name for the result.
        encoded: its questions.
        domain: of all questions, for an oracle; no other router asks.
    """
    questions = encoded.questions
    with adapters_off(subject.model):
        off = loglikelihoods(subject, encoded, domain)
    on = loglikelihoods(subject, encoded, domain)
    results: dict[str, float | None] = {}
    for side, found in (("off", off), ("on", on)):
        normalised = [likeliest_by_length(s, q.choices) == q.answer for s, q in zip(found, questions, strict=True)]
        plain = [likeliest(s) == q.answer for s, q in zip(found, questions, strict=True)]
        for name, accuracy in (("normalised", Accuracy.of(normalised)), ("plain", Accuracy.of(plain))):
            results |= {f"{side}_{name}": accuracy.value, f"{side}_{name}_stderr": accuracy.stderr}
    return ChoiceAccuracy(
        task=task,
        questions=len(questions),
        too_long=encoded.too_long,
        random=random_accuracy([len(question.choices) for question in questions]),
        majority=majority_accuracy([question.answer for question in questions]),
        **results,  # type: ignore[arg-type]
    )


@torch.no_grad()
def loglikelihoods(subject: Subject, encoded: EncodedChoices, domain: str = "") -> list[list[float]]:
    """Log-likelihood in nats of each choice of each question, given what stands before it."""
    record = injected(subject.model)
    inputs, label_losses = ModelInputs(subject.model), LabelLosses(subject.model)
    sums = [0.0] * len(encoded.rows)
    for indices, batch in subject.batches(encoded.rows):
        with batch_info(record, batch, [domain]):
            losses = label_losses(inputs(batch), batch["labels"][:, 1:])
        for index, loss in zip(indices, losses.double().sum(1).tolist(), strict=True):
            sums[index] = -loss
    scores = iter(sums)
    return [[next(scores) for _ in question.choices] for question in encoded.questions]
