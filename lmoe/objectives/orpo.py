"""Odds ratio preference optimisation: chosen answers are learnt, and made likelier than rejected ones, in one loss."""

from lmoe.objectives.objective import Batch, Losses
from lmoe.objectives.preference import Answers, ComparesAnswers, PairObjective
from lmoe.ops.preference_losses import odds_ratio_loss


class OddsRatio(ComparesAnswers, PairObjective):
    """The objective `task=orpo` (2403.07691)."""

    def compared(self, policy: Answers, reference: Answers, batch: Batch) -> Losses:
        """The loss of each pair, (B,): -log p of a token of the chosen answer, and beta times the odds ratio's loss;
        rewards are beta times the mean log p of a token. There is no use for a reference."""
        beta = self.task.beta
        assert beta is not None
        means = policy.means
        chosen, rejected = means.chunk(2)
        return self.of_pairs(-chosen + beta * odds_ratio_loss(chosen, rejected), beta * means, batch)
