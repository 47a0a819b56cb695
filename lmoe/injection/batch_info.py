"""What a batch tells the routers of its tokens."""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from lmoe.injection.record import Injected
from lmoe.injection.tracing import expert_of
from lmoe.layers.context import PromptRows
from lmoe.rules.routers import needs_domain, needs_prompt, needs_prompt_ids


def batch_info(record: Injected, batch: dict[str, Tensor], domains: Sequence[str]) -> AbstractContextManager[None]:
    """A context in which forwards know what their router needs of the batch: domains, or prompts.

    Args:
        record: of the model.
        batch: as `Collate` describes it.
        domains: names, in the order of the batch's domain ids, which need not be that of the oracle's experts.

    Raises:
        RoutingError: the oracle has no expert for one of the domains.
    """
    return record.context.with_batch_info(
        expert_of_token=_experts(record, batch["domain_ids"], domains) if needs_domain(record.moe) else None,
        rows=_prompts(record, batch) if needs_prompt(record.moe) else None,
    )


def _prompts(record: Injected, batch: dict[str, Tensor]) -> PromptRows:
    rows = PromptRows(batch["prompt_mask"], batch["row_ids"])
    return rows.with_hashes(batch["input_ids"]) if needs_prompt_ids(record.moe) else rows


def _experts(record: Injected, domain_ids: Tensor, domains: Sequence[str]) -> Tensor:
    experts = [expert_of(record.moe, name) for name in domains]
    return torch.tensor(experts, device=domain_ids.device)[domain_ids]
