"""What routers are taught: the target of each row, and the experts that are dealt to it.

Shapes: B sequences of T tokens, C targets (domains or clusters), E experts, N tokens of any leading dimensions, S sites
of the same E, which may stand in front.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lmoe.ops.gating import Gate
from lmoe.ops.routing_losses import masked_mean

NO_TARGET = -1
"""Of a token whose row has none: padding, or a row of a domain that no target is."""


class RowTargets(NamedTuple):
    """The target of each token's row.

    ids: (B, T) int64, NO_TARGET where there is none.
    count: C.
    """

    ids: Tensor
    count: int


def target_of_expert(num_experts: int, count: int, device: torch.device | None = None) -> Tensor:
    """(E,) the target that each expert is dealt to: e mod C, so that no target has two experts more than another."""
    return torch.arange(num_experts, device=device) % count


def dealt_head(head: Tensor, of_targets: Tensor) -> Tensor:
    """Rows of a router's weight or bias that tell targets apart as a classifier of the targets does, and the experts of
    one target among themselves as before: each row is that of its target, plus what sets it apart from the mean of the
    rows of this target.

    Args:
        head: (E, ...) as it is.
        of_targets: (C, ...) of the classifier.

    Returns:
        (E, ...) in the type of the classifier.
    """
    count = of_targets.shape[0]
    dealt = target_of_expert(head.shape[0], count, head.device)
    sums = torch.zeros_like(of_targets).index_add_(0, dealt, head.to(of_targets.dtype))
    sizes = torch.bincount(dealt, minlength=count).to(sums.dtype).view(-1, *(1,) * (sums.dim() - 1))
    return of_targets[dealt] + head - (sums / sizes)[dealt]


def target_log_probs(logits: Tensor, count: int) -> Tensor:
    """ln sum over the experts of a target of softmax(z)_e.

    Args:
        logits: (..., E) router logits z.
        count: C, at most E.

    Returns:
        (..., C) in float32, or float64 for float64 logits.
    """
    log_p = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
    experts = log_p.shape[-1]
    if experts == count:
        return log_p
    rounds = -(-experts // count)
    dealt = torch.nn.functional.pad(log_p, (0, rounds * count - experts), value=-torch.inf)
    return torch.logsumexp(dealt.unflatten(-1, (rounds, count)), dim=-2)


def router_target_loss(logits: Tensor, targets: RowTargets, valid: Tensor) -> Tensor:
    """-mean_t ln sum_{e of c_t} softmax(z_t)_e: the cross-entropy of the target c_t of each token's row.

    On the logits before the temperature. Tokens without a target add 0, and count in the mean, so that the loss of a
    batch is the sum of its parts' by their shares of the valid tokens.

    Args:
        logits: (*N, E) or (S, *N, E) router logits z.
        targets: of the tokens.
        valid: (*N,) bool, False for padding.

    Returns:
        () or (S,) in float32, or float64 for float64 logits.
    """
    ids = targets.ids.to(logits.device)
    counts = valid.to(logits.device).bool() & (ids != NO_TARGET)
    # NOTE padding may hold anything, and its gradient would be NaN although its loss does not count.
    log_p = target_log_probs(torch.where(counts.unsqueeze(-1), logits, 0), targets.count)
    index = ids.clamp(min=0).unsqueeze(-1).expand(*log_p.shape[:-1], 1)
    of_target = log_p.gather(-1, index)
    return -masked_mean(torch.where(counts.unsqueeze(-1), of_target, 0), valid).squeeze(-1)


def experts_of_targets(ids: Tensor, count: int, num_experts: int) -> Tensor:
    """(..., E) bool: the experts that are dealt to the target of each token; all where it has none.

    Args:
        ids: (...) int64.
        count: C.
        num_experts: E.
    """
    dealt = target_of_expert(num_experts, count, ids.device)
    return (ids.unsqueeze(-1) == dealt) | (ids == NO_TARGET).unsqueeze(-1)


def targets_of_rows(ids: Tensor, row_ids: Tensor, rows: int) -> Tensor:
    """(B, P) target of each row, NO_TARGET for a row without tokens.

    Args:
        ids: (B, T) target of each token, NO_TARGET on padding.
        row_ids: (B, T) row of each token, from 0 to P - 1.
        rows: P.
    """
    found = torch.full((ids.shape[0], rows), NO_TARGET, dtype=ids.dtype, device=ids.device)
    return found.scatter_reduce(1, row_ids.to(ids.device), ids, "amax")


def restricted(gate: Gate, allowed: Tensor) -> Gate:
    """The gate of logits that were -inf for experts that are not allowed, with a weight of exactly 0 for these.

    A gate that takes a fixed number of experts takes some of them where fewer are allowed.

    Args:
        gate: with (..., E) tensors.
        allowed: (..., E) bool.
    """
    assignment = gate.assignment * allowed
    share = assignment.sum(-1, keepdim=True).clamp(min=torch.finfo(assignment.dtype).tiny)
    return Gate(gate.probs, gate.weights * allowed, assignment / share, gate.expert_indices)
