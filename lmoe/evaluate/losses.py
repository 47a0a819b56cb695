"""Loss and perplexity of each domain, with the adapters off and on."""

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from lmoe.evaluate.loss_rows import EvaluationRows
from lmoe.evaluate.results import ALL_TOKENS, MEAN, DomainLosses
from lmoe.evaluate.subject import Subject
from lmoe.injection.tracing import adapters_off
from lmoe.layers.routing import Routing
from lmoe.metrics.language import DomainLoss
from lmoe.training.measure import measured

SeenRouting = Callable[[dict[str, Routing], dict[str, Tensor]], None]
"""Gets the routing of each batch, and the batch."""


def domain_losses(subject: Subject, data: EvaluationRows, routing: SeenRouting | None = None) -> list[DomainLosses]:
    """A row for each domain that has label tokens, one for all tokens, and with several domains their mean.

    Args:
        routing: told what the routers do, with the adapters on.
    """
    with adapters_off(subject.model):
        off = measured_losses(subject, data)
    on = measured_losses(subject, data, routing)
    return [_row(name, tokens, *losses) for name, tokens, losses in by_domain(data.domains, off, on)]


def measured_losses(subject: Subject, data: EvaluationRows, routing: SeenRouting | None = None) -> DomainLoss:
    """The losses of a model as it is now; `routing` is told what its routers do."""
    batches = (batch for _, batch in subject.batches(data.rows))
    device = subject.model.device
    return measured(subject.objective, subject.model, batches, data.domains, device=device, routing=routing)


def by_domain(domains: Sequence[str], *measured: DomainLoss) -> list[tuple[str, int, list[float]]]:
    """Name, label tokens and losses of each domain that has some, of all tokens, and of the mean of several domains.

    Args:
        domains: names.
        measured: of the same rows.
    """
    values = [loss.compute() for loss in measured]
    tokens = dict(zip(domains, measured[-1].unit_sum.int().tolist(), strict=True))
    there, total = [name for name in domains if tokens[name]], sum(tokens.values())
    found = [(name, tokens[name], [losses[f"{name}/loss"] for losses in values]) for name in there]
    found.append((ALL_TOKENS, total, [losses["loss"] for losses in values]))
    if len(there) > 1:
        means = [sum(losses[f"{name}/loss"] for name in there) / len(there) for losses in values]
        found.append((MEAN, total, means))
    return found


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
