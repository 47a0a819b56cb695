"""One decision for all sites, from hidden states of the prompt, or by the domain.

Shapes: B sequences, P rows packed into one sequence, D hidden, E experts.
"""

import torch
from torch import Tensor

from lmoe.layers.routers.token import OracleRouter, TopKRouter
from lmoe.ops.gating import Gate, oracle_gate
from lmoe.ops.prompt_states import unit_rms
from lmoe.ops.router_targets import NO_TARGET, targets_of_rows


class ModelRouter(TopKRouter):
    """top_k of the mean hidden state of a row's prompt, brought to a root mean square of 1; the states are constants.

    It is no part of any layer: `ModelRoute` hands it the states, and its decision to the sites.
    """

    def decide(self, states: Tensor, targets: Tensor | None) -> tuple[Tensor, Gate]:
        """Logits and gate (B, P, E), without autocast.

        Args:
            states: (B, P, D) means over the prompts.
            targets: (B, P) int64, what the router is taught of each row; None: nothing.
        """
        with torch.autocast(states.device.type, enabled=False):
            read = self.read(states)
            logits = self.logits(read)
            return logits, self.gated(logits, read, targets)

    def decide_unread(self, targets: Tensor, there: Tensor) -> tuple[Tensor, Gate] | None:
        """What `decide` gives by target whatever the states are, while routers rest; None: the states count.

        Where each row has a target with one expert, that one has the weight 1, and the logits no gradient through it.

        Args:
            targets: (B, P) int64, what the router is taught of each row.
            there: (B, P) bool, False for a row without tokens.
        """
        known = self.dealing_targets() if self.context.routers_rest else None
        if known is None or known.count < self.settings.num_experts or bool((there & (targets == NO_TARGET)).any()):
            return None
        return self.decide(torch.zeros(*targets.shape, self.weight.shape[1], device=self.weight.device), targets)

    def read(self, states: Tensor) -> Tensor:
        """(..., D) float32: what the weights are multiplied with, of means over prompts (..., D)."""
        return unit_rms(states.detach().float())

    def reads_every_token(self) -> bool:
        return False


class ModelOracle(OracleRouter):
    """The expert of a row's domain, for all sites: what a router of the whole model would decide that is always right.

    It reads no prompt.
    """

    def decide(self, row_ids: Tensor, rows: int) -> tuple[Tensor, Gate]:
        """Logits, which are 0, and gate (B, P, E).

        Args:
            row_ids: (B, T) int64 row of each token.
            rows: P.

        Raises:
            RoutingError: nothing says the domains.
        """
        experts = targets_of_rows(self.experts(row_ids.shape, row_ids.device), row_ids, rows).clamp(min=0)
        gate = oracle_gate(experts, self.settings.num_experts, self.settings.dtype)
        return torch.zeros_like(gate.probs), gate
