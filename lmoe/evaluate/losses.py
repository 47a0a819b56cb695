"""Loss and perplexity of each domain, with the adapters off and on."""

import math
from collections.abc import Callable

from torch import Tensor

from lmoe.evaluate.loss_rows import EvaluationRows
from lmoe.evaluate.results import DomainLosses
from lmoe.evaluate.subject import Subject
from lmoe.injection.tracing import adapters_off
from lmoe.layers.trace import Routing
from lmoe.metrics.language import DomainLoss
from lmoe.training.measure import measured

ALL_TOKENS, MEAN = "(all tokens)", "(domain mean)"
"""In brackets: a domain may be called anything else."""


SeenRouting = Callable[[dict[str, Routing], dict[str, Tensor]], None]
"""Gets the routing of each batch, and the batch."""


def domain_losses(subject: Subject, data: EvaluationRows, routing: SeenRouting | None = None) -> list[DomainLosses]:
    """A row for each domain that has label tokens, one for all tokens, and with several domains their mean.

    Args:
        routing: told what the routers do, with the adapters on.
    """

    def losses(routing: SeenRouting | None = None) -> DomainLoss:
        batches = (batch for _, batch in subject.batches(data.rows))
        device = subject.model.device
        return measured(subject.objective, subject.model, batches, data.domains, device=device, routing=routing)

    with adapters_off(subject.model):
        off = losses().compute()
    on = losses(routing)
    tokens, after = dict(zip(data.domains, on.unit_sum.int().tolist(), strict=True)), on.compute()
    there = [name for name in data.domains if tokens[name]]
    rows = [_row(name, tokens[name], off[f"{name}/loss"], after[f"{name}/loss"]) for name in there]
    total = sum(tokens.values())
    rows.append(_row(ALL_TOKENS, total, off["loss"], after["loss"]))
    if len(there) > 1:
        means = [sum(values[f"{name}/loss"] for name in there) / len(there) for values in (off, after)]
        rows.append(_row(MEAN, total, *means))
    return rows


def perplexity(loss: float) -> float:
    """exp(loss); infinity where a float cannot hold it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _row(domain: str, tokens: int, off: float, on: float) -> DomainLosses:
    return DomainLosses(
        domain=domain,
        label_tokens=tokens,
        off_loss=off,
        on_loss=on,
        off_perplexity=perplexity(off),
        on_perplexity=perplexity(on),
    )
