"""How well a model tells preferred answers from others, beside its base and what needs no training.

Shapes: N rows, of which a batch has B; a row is a pair of answers, or one answer that is a good or a bad one.
"""

import math
from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor

from lmoe.evaluate.choices import Accuracy
from lmoe.evaluate.loss_rows import EvaluationRows
from lmoe.evaluate.losses import SeenRouting
from lmoe.evaluate.results import ALL_ANSWERS, ALL_PAIRS, MEAN, PreferenceFigures
from lmoe.evaluate.subject import Subject
from lmoe.injection.batch_info import batch_info
from lmoe.injection.record import injected
from lmoe.injection.tracing import adapters_off
from lmoe.objectives.kto import KahnemanTversky
from lmoe.objectives.objective import Batch, Losses
from lmoe.objectives.preference import (
    ACCURACY,
    MARGIN,
    Answers,
    ComparesAnswers,
    PairObjective,
    PreferenceObjective,
    rightness,
)

ACCURACIES = ("off_accuracy", "on_accuracy", "shorter", "base_log_prob", "base_mean_log_prob")
MARGINS = ("off_margin", "on_margin")
STDERR = {"shorter": "length_stderr"}
"""Where the standard error of a figure has another name than <figure>_stderr."""


def preference_figures(
    subject: Subject, data: EvaluationRows, lesson: str, routing: SeenRouting | None = None
) -> list[PreferenceFigures]:
    """A row for each domain, one for all rows, and with several domains their mean.

    Args:
        subject: with an objective that compares answers, whose reference is the base.
        data: rows of its kind.
        lesson: what the objective is called.
        routing: told what the routers do, with the adapters on.
    """
    figures = row_figures(subject, data, routing)
    of_domain = {name: data.rows.domains == number for number, name in enumerate(data.domains)}
    there = {name: _of(figures, chosen) for name, chosen in of_domain.items() if bool(chosen.any())}
    everything = torch.ones(len(data.rows), dtype=torch.bool)
    found = [(name, int(of_domain[name].sum()), values) for name, values in there.items()]
    everyone = ALL_PAIRS if isinstance(subject.objective, PairObjective) else ALL_ANSWERS
    found.append((everyone, len(data.rows), _of(figures, everything)))
    if len(there) > 1:
        found.append((MEAN, len(data.rows), _mean(list(there.values()))))
    names = {spec.name for spec in fields(PreferenceFigures)}
    return [
        PreferenceFigures(
            **dict.fromkeys(names) | {"lesson": lesson, "domain": name, "pairs": pairs} | values  # type: ignore[arg-type]
        )
        for name, pairs, values in found
    ]


@torch.no_grad()
def row_figures(subject: Subject, data: EvaluationRows, routing: SeenRouting | None = None) -> dict[str, Tensor]:
    """(N,) float64 of each figure, in the order of the rows.

    Args:
        subject, data, routing: see `preference_figures`.
    """
    objective, model, record = subject.objective, subject.model, injected(subject.model)
    assert isinstance(objective, PreferenceObjective)
    found: dict[str, Tensor] = {}
    for indices, batch in subject.batches(data.rows):
        with batch_info(record, batch, data.domains):
            with adapters_off(model):
                base = objective.answers(model, batch)
                off = None if isinstance(objective, ComparesAnswers) else objective.losses(model, batch)
            with record.trace.recording(batch["valid_mask"]):
                policy = objective.answers(model, batch) if off is None else objective.losses(model, batch)
            if routing is not None:
                routing(record.trace.routing, batch)
            record.trace.clear()
            if isinstance(objective, ComparesAnswers):
                assert isinstance(policy, Answers)
                off, policy = objective.compared(base, base, batch), _compared(objective, subject, policy, base, batch)
            assert off is not None and isinstance(policy, Losses)
        of_batch = _sides(off, policy)
        if isinstance(objective, PairObjective):
            of_batch |= untrained_choices(base)
        for name, values in of_batch.items():
            empty = torch.full((len(data.rows),), math.nan, dtype=torch.float64)
            found.setdefault(name, empty)[indices] = values.double().cpu()
    return found


def untrained_choices(base: Answers) -> dict[str, Tensor]:
    """(B,) float32 how rightly each pair is told apart by lengths, and by what the base says of its answers.

    Args:
        base: of the chosen answers, and then of the rejected ones.
    """
    scores = {
        "shorter": -base.tokens.float(),
        "base_log_prob": base.log_probs,
        "base_mean_log_prob": base.means,
    }
    return {name: rightness(torch.sub(*score.chunk(2))) for name, score in scores.items()}


def _compared(objective: ComparesAnswers, subject: Subject, policy: Answers, base: Answers, batch: Batch) -> Losses:
    if isinstance(objective, KahnemanTversky):
        return objective.compared(policy, base, batch, objective.baseline(subject.model, batch))
    return objective.compared(policy, base, batch)


def _sides(off: Losses, on: Losses) -> dict[str, Tensor]:
    """(B,) loss, margin and accuracy with the adapters off and on."""
    found = {}
    for side, losses in (("off", off), ("on", on)):
        found |= {
            f"{side}_loss": losses.values,
            f"{side}_margin": losses.figures[MARGIN],
            f"{side}_accuracy": losses.figures[ACCURACY],
        }
    return found


def _of(figures: dict[str, Tensor], chosen: Tensor) -> dict[str, float | None]:
    """The mean of each figure over some rows, with its standard error.

    Args:
        chosen: (N,) bool.
    """
    found: dict[str, float | None] = {}
    for name, values in figures.items():
        of_rows = values[chosen]
        found[name] = float(of_rows.mean())
        if name in ACCURACIES:
            found[_stderr(name)] = Accuracy.of(of_rows.tolist()).stderr
        elif name in MARGINS:
            found[_stderr(name)] = float(of_rows.std()) / math.sqrt(len(of_rows)) if len(of_rows) > 1 else None
    return _with_longer(found)


def _mean(of_domains: Sequence[dict[str, float | None]]) -> dict[str, float | None]:
    """The mean over domains of each figure, and the standard error of this mean."""
    found: dict[str, float | None] = {}
    for name in of_domains[0]:
        values = [values[name] for values in of_domains]
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            found[name] = None
        elif name.endswith("_stderr"):
            found[name] = math.hypot(*known) / len(known)
        else:
            found[name] = math.fsum(known) / len(known)
    return _with_longer(found)


def _with_longer(found: dict[str, float | None]) -> dict[str, float | None]:
    shorter = found.get("shorter")
    return found | {"longer": None if shorter is None else 1 - shorter}


def _stderr(name: str) -> str:
    return STDERR.get(name, f"{name}_stderr")
