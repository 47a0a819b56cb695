"""How far routing has settled: the experts that a token chose then and chooses now.

Shapes: B rows (or packed sequences) of T tokens, N valid tokens, S sites, E experts, Y = ceil(E / 8) bytes.
"""

from collections.abc import Mapping
from typing import TypedDict

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lmoe.metrics.site_stack import stacked_sites

BITS_SET = torch.tensor([value.bit_count() for value in range(256)])


class Choices(TypedDict):
    """What every token chose; plain tensors and numbers, so that a checkpoint can hold it.

    num_experts: E of each site, by site name.
    chosen: (N, Y) uint8 of each site; expert e is bit e % 8 of byte e // 8.
    """

    num_experts: dict[str, int]
    chosen: dict[str, Tensor]


class ChosenExperts(Metric):
    """The chosen experts of every valid token, one bit an expert, for `routing_saturation`.

    An expert is chosen where its assignment is above 0. The tokens come in the order of the updates (and of the ranks,
    one after the other): two recordings can be compared if both saw the same rows in the same batches.

    Args:
        num_experts: E of each site, by site name, in order.
    """

    full_state_update = False
    bits: list[Tensor]

    def __init__(self, num_experts: dict[str, int]) -> None:
        super().__init__(sync_on_compute=False)  # every rank validates all rows
        self.num_experts = dict(num_experts)
        self._index = {site: i for i, site in enumerate(num_experts)}
        self.add_state("bits", [], dist_reduce_fx="cat")

    def update(self, assignment: Mapping[str, Tensor], valid: Tensor) -> None:
        """Add one batch.

        Args:
            assignment: (B, T, E) of every site, as a Routing holds it, by site name.
            valid: (B, T) bool, False for padding.

        Raises:
            ValueError: a site is missing, unknown or has other experts.
        """
        kept = valid.reshape(-1)
        shape = (int(kept.sum()), len(self.num_experts), _bytes(max(self.num_experts.values())))
        bits_NSY = torch.zeros(shape, dtype=torch.uint8, device=valid.device)
        for sites, a_SNE in stacked_sites(assignment, self.num_experts, valid):
            packed_SNY = _packed(a_SNE[:, kept] > 0)
            bits_NSY[:, [self._index[site] for site in sites], : packed_SNY.shape[-1]] = packed_SNY.transpose(0, 1)
        self.bits.append(bits_NSY)

    def compute(self) -> Choices:
        """All tokens so far."""
        shape = (0, len(self.num_experts), _bytes(max(self.num_experts.values())))
        bits_NSY = dim_zero_cat(self.bits) if len(self.bits) else torch.zeros(shape, dtype=torch.uint8)
        return {
            "num_experts": dict(self.num_experts),
            "chosen": {
                site: bits_NSY[:, i, : _bytes(experts)].contiguous()
                for i, (site, experts) in enumerate(self.num_experts.items())
            },
        }


def routing_saturation(earlier: Choices, later: Choices) -> dict[str, float]:
    """Share of the experts chosen later that the same token had chosen earlier, by site.

    mean_t |S_t ∩ S'_t| / |S_t|, S the later and S' the earlier choice (OLMoE, 2409.02060, section 5.1, where
    |S_t| = k), over tokens with a later choice. 1: nothing has changed; k / E: what unrelated choices of k would share.
    A soft router chooses every expert always, so it has 1.

    Args:
        earlier, later: what two ChosenExperts computed on the same tokens.

    Raises:
        ValueError: other sites, experts or tokens, or no tokens at all.
    """
    if earlier["num_experts"] != later["num_experts"]:
        raise ValueError(
            f"the earlier choices are of sites and experts {earlier['num_experts']}, the later of "
            f"{later['num_experts']}: compare checkpoints of one run"
        )
    shares = {}
    for site, experts in later["num_experts"].items():
        # NOTE torchmetrics squeezes a tensor of one element, which reshape undoes.
        now, then = (c["chosen"][site].cpu().reshape(-1, _bytes(experts)) for c in (later, earlier))
        if now.shape != then.shape or not len(now):
            raise ValueError(
                f"{len(then)} tokens chose experts at {site} earlier, {len(now)} later: record both on the same "
                "validation rows in the same order (data.val_path, data.packing and data.max_length unchanged)"
            )
        count_N, kept_N = (BITS_SET[bits.long()].sum(-1).double() for bits in (now, now & then))
        chose = count_N > 0
        shares[site] = float((kept_N[chose] / count_N[chose]).mean()) if bool(chose.any()) else 0.0
    return shares


def _bytes(experts: int) -> int:
    return -(-experts // 8)


def _packed(chosen: Tensor) -> Tensor:
    """(..., E) bool to (..., Y) uint8."""
    experts = chosen.shape[-1]
    padded = torch.nn.functional.pad(chosen.to(torch.uint8), (0, 8 * _bytes(experts) - experts))
    value = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=chosen.device)
    return (padded.unflatten(-1, (-1, 8)) * value).sum(-1, dtype=torch.uint8)
