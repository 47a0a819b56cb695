"""A run that a rule of its own has ended stays ended when it is resumed. Logs nothing."""

from collections.abc import Callable

from lightning.pytorch import Trainer

from lmoe.training.step import Stage, StepCallback, StepRecord


class EndedEarly(StepCallback):
    """NOTE after what may end a run by what it has seen, and before RunCheckpoint; what ends by time goes on.

    Args:
        rules: what may end the run, in any wording; a run that goes on with others is not ended by the old ones.
        say: told that there is nothing to train.
    """

    stage = Stage.save

    def __init__(self, rules: str, say: Callable[[str], None]) -> None:
        self.rules, self.say = rules, say
        self._ended_by: str | None = None

    def state_dict(self) -> dict:
        return {"ended_by": self._ended_by}

    def load_state_dict(self, state_dict: dict) -> None:
        self._ended_by = state_dict["ended_by"]

    def on_train_start(self, trainer: Trainer, pl_module) -> None:
        if self._ended_by == self.rules:
            trainer.should_stop = True
            self.say(
                f"the run was ended after step {trainer.global_step} by its callbacks or trainer.stop_on_collapse; "
                "it goes on with others, such as callbacks=none"
            )

    def after_step(self, trainer: Trainer, module, step: StepRecord) -> None:
        self._look(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module) -> None:
        self._look(trainer)  # before best.ckpt is written

    def _look(self, trainer: Trainer) -> None:
        self._ended_by = self.rules if trainer.should_stop else None
