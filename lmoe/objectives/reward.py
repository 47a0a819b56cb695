"""A reward model: a number for an answer, the higher the more it is preferred to others."""

from transformers import PreTrainedModel

from lmoe.injection.reward_head import rewards_of
from lmoe.objectives.objective import Batch, Losses
from lmoe.objectives.preference import PairObjective
from lmoe.ops.preference_losses import preference_loss


class RewardModel(PairObjective):
    """The objective `task=reward`: Bradley-Terry, P(chosen is preferred) = s(r_chosen - r_rejected).

    The loss is that of InstructGPT (2203.02155, equation 1) with one pair a prompt; r = w . h, h what the output layer
    is given for the last token of prompt and answer. There is no reference, and with the adapters off the head stays.
    """

    def losses(self, model: PreTrainedModel, batch: Batch) -> Losses:
        """-log s(r_chosen - r_rejected) of each pair, (B,), from one forward."""
        rewards = rewards_of(model, self.inputs(model, batch), batch["valid_mask"])
        chosen, rejected = rewards.chunk(2)
        return self.of_pairs(preference_loss(chosen - rejected, beta=1.0), rewards, batch)

    def notes(self, model: PreTrainedModel) -> list[str]:
        """Nothing: no logits are made."""
        return []

    def logits_bytes(self, tokens: int, vocabulary: int, compute_bytes: int) -> float:
        """None: no logits are made."""
        return 0.0
