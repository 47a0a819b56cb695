"""Multiple choice by the log-likelihood of each choice, with the adapters off and on."""

import torch

from lmoe.evaluate.choice_scores import Accuracy, likeliest, likeliest_by_length, majority_accuracy, random_accuracy
from lmoe.evaluate.encode_questions import EncodedChoices
from lmoe.evaluate.results import ChoiceAccuracy
from lmoe.evaluate.subject import Subject
from lmoe.injection.facts import facts
from lmoe.injection.record import injected
from lmoe.injection.tracing import adapters_off
from lmoe.training.measure import predicted_losses


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
    record, sums = injected(subject.model), [0.0] * len(encoded.rows)
    for indices, batch in subject.batches(encoded.rows):
        with facts(record, batch, [domain]):
            losses, _ = predicted_losses(subject.model, batch)
        for index, loss in zip(indices, losses.double().sum(1).tolist(), strict=True):
            sums[index] = -loss
    scores = iter(sums)
    return [[next(scores) for _ in question.choices] for question in encoded.questions]
