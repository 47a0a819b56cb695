"""Accuracy of choices by their log-likelihood, and what it is to be compared with."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True, frozen=True)
class Accuracy:
    """Share of questions answered rightly.

    Args:
        value: 0 to 1.
        stderr: standard error of the share over questions, sqrt(p (1 - p) / (n - 1)); None for a single question.
    """

    value: float
    stderr: float | None

    @classmethod
    def of(cls, right: Sequence[bool]) -> "Accuracy":
        """The accuracy of one or more answers."""
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
