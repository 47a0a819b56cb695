"""One decision for all sites, from hidden states of the prompt.

Shapes: B sequences, P rows packed into one sequence, D hidden, E experts.
"""

import torch
from torch import Tensor

from lmoe.layers.routers.token import TopKRouter
from lmoe.layers.trace import Routing
from lmoe.ops.gating import Gate
from lmoe.ops.prompt_states import unit_rms


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
            read = unit_rms(states.detach().float())
            logits = self.logits(read)
            return logits, self.gated(logits, read, targets)

    def seen(self, routing: Routing) -> Routing:
        """The routing of a forward's tokens as the sites get it; recorded.

        Args:
            routing: (B, T, E) of what was decided.
        """
        silenced = self.context.silenced.get(self.site)
        if silenced is not None:
            routing = routing.without(silenced)
        self.record(routing)
        return routing

    def reads_every_token(self) -> bool:
        return False
