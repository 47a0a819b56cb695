"""Losses of a model over batches: the one way, for validation in training and for evaluation afterwards."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from transformers import PreTrainedModel

from lmoe.injection.batch_info import batch_info
from lmoe.injection.evaluating import evaluating
from lmoe.injection.record import RECORD, Injected
from lmoe.layers.routing import Routing
from lmoe.metrics.language import DomainLoss
from lmoe.objectives.objective import Batch, Losses, Objective


def measured(
    objective: Objective,
    model: PreTrainedModel,
    batches: Iterable[Batch],
    domains: Sequence[str],
    *,
    device: torch.device,
    routing: Callable[[dict[str, Routing], Batch], None] | None = None,
    between: Callable[[], None] = lambda: None,
) -> DomainLoss:
    """Losses over batches, by domain.

    Args:
        objective, model, batches, domains, routing: see `batch_losses`.
        device: of the batches.
        between: called after each batch; may raise to break off.
    """
    loss = objective.meter(domains).to(device)
    for losses in batch_losses(objective, model, batches, domains, routing=routing):
        loss.update(*losses)
        between()
    return loss


def batch_losses(
    objective: Objective,
    model: PreTrainedModel,
    batches: Iterable[Batch],
    domains: Sequence[str],
    *,
    routing: Callable[[dict[str, Routing], Batch], None] | None = None,
) -> Iterator[Losses]:
    """The losses of each batch, without gradients and dropout; the model's mode is put back at the end.

    Args:
        objective: whose losses.
        model: bare or injected.
        batches: on the device.
        domains: names, in the order of the batches' domain ids.
        routing: gets the routing of each batch; a bare model has none.
    """
    record = getattr(model, RECORD, None)
    with evaluating(model):
        try:
            for batch in batches:
                with torch.no_grad(), nullcontext() if record is None else _routed_and_recorded(record, batch, domains):
                    losses = objective.losses(model, batch)
                if record is not None and routing is not None:
                    routing(record.trace.routing, batch)
                yield losses
        finally:
            if record is not None:
                record.trace.clear()


@contextmanager
def _routed_and_recorded(record: Injected, batch: Batch, domains: Sequence[str]) -> Iterator[None]:
    """What the routers have to know of the batch, and their decisions recorded."""
    with batch_info(record, batch, domains), record.trace.recording(batch["valid_mask"]):
        yield
