"""Direct preference optimisation: chosen answers gain more on their reference than rejected ones."""

from lmoe.objectives.objective import Batch, Losses
from lmoe.objectives.preference import Answers, ComparesAnswers, PairObjective
from lmoe.ops.preference_losses import preference_loss
from lmoe.vocabulary import PreferenceLoss


class DirectPreference(ComparesAnswers, PairObjective):
    """The objective `task=dpo` (2305.18290), with the losses of hinge and IPO."""

    def compared(self, policy: Answers, reference: Answers, batch: Batch) -> Losses:
        """The loss of each pair, (B,); rewards are beta (log p - log p_ref)."""
        task = self.task
        assert task.beta is not None and task.loss_type is not None and task.label_smoothing is not None
        gained = policy.log_probs - reference.log_probs
        compared = gained / policy.tokens if task.loss_type is PreferenceLoss.ipo else gained
        chosen, rejected = compared.chunk(2)
        values = preference_loss(
            chosen - rejected, beta=task.beta, loss_type=task.loss_type, label_smoothing=task.label_smoothing
        )
        return self.of_pairs(values, task.beta * gained, batch)
