"""What a batch tells the routers of its tokens."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from lmoe.config.moe import MoeConfig
from lmoe.injection.record import BLEND, RECORD, Injected
from lmoe.injection.tracing import expert_of
from lmoe.layers.context import PromptRows, RoutingContext
from lmoe.ops.labels import IGNORE
from lmoe.ops.router_targets import NO_TARGET, RowTargets
from lmoe.rules.routers import needs_domain, needs_prompt, needs_prompt_ids, reads_openings, target_count
from lmoe.vocabulary import Decide, RouterTarget


def batch_info(record: Injected, batch: dict[str, Tensor], domains: Sequence[str]) -> AbstractContextManager[None]:
    """A context in which forwards know what their router needs of the batch: domains, prompts, or what it is taught.

    Args:
        record: of the model.
        batch: as `Collate` describes it.
        domains: names, in the order of the batch's domain ids, which need not be that of the oracle's experts.

    Raises:
        RoutingError: the oracle has no expert for one of the domains.
    """
    return record.context.with_batch_info(
        expert_of_token=_experts(record, batch, domains) if needs_domain(record.moe) else None,
        rows=_prompts(record, batch) if needs_prompt(record.moe) else None,
        targets=row_targets(record.moe, batch, domains),
    )


def whole_rows(model: nn.Module) -> AbstractContextManager[None]:
    """A context for forwards of other answers to the prompts of a batch, inside its `batch_info`: they may reach into
    what is its padding, and all of a row is for the row's expert."""
    record = getattr(model, RECORD, None)
    experts = None if record is None else record.context.batch_info.expert_of_token
    if record is None or experts is None:
        return nullcontext()
    of_row = experts.amax(-1, keepdim=True)
    return record.context.with_batch_info(expert_of_token=of_row.expand_as(experts).contiguous())


def reads_prompts(model: nn.Module) -> bool:
    """Whether a model decides by the prompts of a conversation."""
    return _by_prompts(model) is not None


def conversations(model: nn.Module, answers: Tensor | None, valid: Tensor) -> AbstractContextManager[None]:
    """A context in which `generate` decides for conversations by the prompts that training decided by.

    Args:
        model: to which nothing is told where it does not go by prompts.
        answers: (B, T) bool, tokens of earlier answers; None: there are none, and all tokens are the prompt.
        valid: (B, T) bool, False for padding.
    """
    found = _by_prompts(model)
    if answers is None or found is None:
        return nullcontext()
    context, decide = found
    return context.with_batch_info(rows=PromptRows.awaiting_answer(answers, valid, decide))


def _by_prompts(model: nn.Module) -> tuple[RoutingContext, Decide] | None:
    """What the routers of a model read, and which prompts they decide for; None: they do not go by prompts."""
    record, blend = getattr(model, RECORD, None), getattr(model, BLEND, None)
    if record is not None:
        return (record.context, record.moe.decide) if needs_prompt(record.moe) else None
    return None if blend is None else blend.prompt_context


def row_targets(moe: MoeConfig, batch: dict[str, Tensor], domains: Sequence[str]) -> RowTargets | None:
    """What the routers are taught of each token of a batch; None: nothing.

    Args:
        moe: with the names of its targets in moe.domains.
        batch, domains: as of `batch_info`.
    """
    count = target_count(moe)
    if not count:
        return None
    valid = batch["valid_mask"]
    if moe.router_target is RouterTarget.cluster:
        ids = batch.get("cluster_ids")
        return None if ids is None else RowTargets(ids.masked_fill(~valid, NO_TARGET), count)
    place = {name: target for target, name in enumerate(moe.domains or [])}
    known = [place.get(name, NO_TARGET) for name in domains]
    return RowTargets(_by_domain(known, batch["domain_ids"]).masked_fill(~valid, NO_TARGET), count)


def _prompts(record: Injected, batch: dict[str, Tensor]) -> PromptRows:
    openings = batch.get("opening_mask") if reads_openings(record.moe) else None
    if record.moe.decide is Decide.turn:
        answers = batch["labels"] != IGNORE
        if openings is not None:
            answers = answers & ~openings.any(1)
        return PromptRows.of_turns(answers, batch["row_ids"], batch["valid_mask"])
    prompt = batch["prompt_mask"]
    rows = PromptRows(prompt if openings is None else prompt | openings, batch["row_ids"])
    return rows.with_hashes(batch["input_ids"]) if needs_prompt_ids(record.moe) else rows


def _experts(record: Injected, batch: dict[str, Tensor], domains: Sequence[str]) -> Tensor:
    """NOTE padding is of no domain, whatever its id: the expert of a row is that of its own tokens."""
    by_domain = _by_domain([expert_of(record.moe, name) for name in domains], batch["domain_ids"])
    return by_domain.masked_fill(~batch["valid_mask"], NO_TARGET)


def _by_domain(values: list[int], domain_ids: Tensor) -> Tensor:
    """The value of each token's domain."""
    return torch.tensor(values).to(domain_ids.device, non_blocking=True)[domain_ids]  # NOTE the host need not wait
