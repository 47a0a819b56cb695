"""Simple preference optimisation: the mean log-probability of a token is the reward, without a reference."""

from transformers import PreTrainedModel

from lmoe.objectives.objective import Batch, Losses
from lmoe.objectives.preference import PairObjective
from lmoe.ops.preference_losses import simpo_loss


class SimplePreference(PairObjective):
    """The objective `task=simpo` (2405.14734)."""

    def losses(self, model: PreTrainedModel, batch: Batch) -> Losses:
        """The loss of each pair, (B,); rewards are beta times the mean log p of a token."""
        task = self.task
        assert task.beta is not None and task.gamma is not None
        means = self.answers(model, batch).means
        chosen, rejected = means.chunk(2)
        return self.of_pairs(simpo_loss(chosen, rejected, beta=task.beta, gamma=task.gamma), task.beta * means, batch)
