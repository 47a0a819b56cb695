"""Simple preference optimisation: the mean log-probability of a token is the reward, without a reference."""

from lmoe.objectives.objective import Batch, Losses
from lmoe.objectives.preference import Answers, ComparesAnswers, PairObjective
from lmoe.ops.preference_losses import simpo_loss


class SimplePreference(ComparesAnswers, PairObjective):
    """The objective `task=simpo` (2405.14734)."""

    def compared(self, policy: Answers, reference: Answers, batch: Batch) -> Losses:
        """The loss of each pair, (B,); rewards are beta times the mean log p of a token. There is no use for a
        reference."""
        task = self.task
        assert task.beta is not None and task.gamma is not None
        means = policy.means
        chosen, rejected = means.chunk(2)
        return self.of_pairs(simpo_loss(chosen, rejected, beta=task.beta, gamma=task.gamma), task.beta * means, batch)
