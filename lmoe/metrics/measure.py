"""Losses of an injected model over batches: the one way, for validation in training and for evaluation afterwards."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmoe.injection.facts import facts
from lmoe.injection.record import injected
from lmoe.layers.trace import Routing
from lmoe.metrics.language import DomainLoss, token_losses

MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")
Batch = dict[str, Tensor]


def predicted_losses(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Loss of each predicted token, (B, T - 1) nats, and its labels, (B, T - 1)."""
    inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    logits = model(**inputs, use_cache=False).logits
    labels = batch["labels"][:, 1:]
    return token_losses(logits[:, :-1], labels), labels


def measured(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    domains: Sequence[str],
    *,
    device: torch.device,
    routing: Callable[[dict[str, Routing], Batch], None] | None = None,
    between: Callable[[], None] = lambda: None,
) -> DomainLoss:
    """Losses over batches, without gradients and dropout; the model's mode is put back.

    Args:
        model: an injected model.
        batches: on the device.
        domains: names, in the order of the batches' domain ids.
        device: of the batches.
        routing: gets the routing of each batch.
        between: called after each batch; may raise to break off.
    """
    loss = DomainLoss(list(domains)).to(device)
    training, record = model.training, injected(model)
    model.eval()
    with torch.no_grad():
        for batch in batches:
            with facts(record, batch, domains), record.trace.recording(batch["valid_mask"]):
                losses, labels = predicted_losses(model, batch)
            loss.update(losses, labels, batch["domain_ids"][:, 1:])
            if routing is not None:
                routing(record.trace.routing, batch)
            between()
    record.trace.clear()
    model.train(training)
    return loss
