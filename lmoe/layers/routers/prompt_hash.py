"""An expert for each prompt by chance, which stands while the answer is generated.

Shapes: B sequences of T tokens, P rows packed into one sequence, D hidden, E experts.
"""

import torch
from torch import Tensor

from lmoe.errors import RoutingError
from lmoe.layers.context import PromptRows
from lmoe.layers.routers.sequence import PromptRouter
from lmoe.ops.gating import Gate, oracle_gate


class PromptHashRouter(PromptRouter):
    """The expert that a hash of the ids of a row's prompt tokens gives (`prompt_hashes`), at every site the same."""

    name = "prompt_hash"

    def decide(self, x: Tensor, rows: PromptRows) -> tuple[Tensor, Gate]:
        hashes = self._hashes(rows)
        if hashes is None:
            raise RoutingError(
                f"moe.router={self.name} does not know the ids of the prompt's tokens at {self.site}, by which it "
                "decides: call the whole model, with input_ids in place of inputs_embeds"
            )
        experts = self.settings.num_experts
        gate = oracle_gate(hashes.to(x.device).remainder(experts), experts, self.settings.dtype)
        return torch.zeros_like(gate.probs), gate

    def _hashes(self, rows: PromptRows) -> Tensor | None:
        """Hashes of the rows; of rows named by a block, which knows no tokens, those that the forward has read."""
        if rows.hashes is not None:
            return rows.hashes
        forward = self.context.current_forward(training=self.training)
        if forward is None or forward.rows is None or forward.rows.prompt is not rows.prompt:
            return None
        return forward.rows.hashes
