"""Begin a phase when a metric no longer falls. Logs nothing; train/phase shows it."""

import math
from collections.abc import Callable

from lightning.pytorch import Trainer

from lmoe.config.phase import PlateauConfig
from lmoe.rules.phase_options import TRAIN_LOSS
from lmoe.training.module import AdapterModule
from lmoe.training.phases import Phase
from lmoe.training.step import Stage, StepCallback, StepRecord


class PlateauStart(StepCallback):
    """Watches the metric that the next phase waits for; NOTE before Validation, which ends a phase with a look.

    A look at train/loss is the mean of some steps, one at another metric its value in each validation.

    Args:
        say: told when a phase begins.
    """

    stage = Stage.decide

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self._forget(-1)

    def state_dict(self) -> dict:
        return {"phase": self._phase, "best": self._best, "bad": self._bad, "losses": self._losses}

    def load_state_dict(self, state_dict: dict) -> None:
        self._phase, self._best, self._bad = state_dict["phase"], state_dict["best"], state_dict["bad"]
        self._losses = list(state_dict["losses"])

    def after_step(self, trainer: Trainer, module: AdapterModule, step: StepRecord) -> None:
        waiting = self._waiting(module)
        if waiting is None or waiting[1].monitor != TRAIN_LOSS:
            return
        if math.isfinite(step.losses[TRAIN_LOSS]):  # else the step was skipped
            self._losses.append(step.losses[TRAIN_LOSS])
        if len(self._losses) == waiting[1].every_n_steps:
            mean = sum(self._losses) / len(self._losses)
            self._losses = []
            self._look(trainer, module, *waiting, mean)

    def on_validation_end(self, trainer: Trainer, pl_module: AdapterModule) -> None:
        waiting = self._waiting(pl_module)
        if waiting is not None and waiting[1].monitor != TRAIN_LOSS and trainer.global_step:
            self._look(trainer, pl_module, *waiting, float(trainer.callback_metrics[waiting[1].monitor]))

    def _look(
        self, trainer: Trainer, pl_module: AdapterModule, following: Phase, plateau: PlateauConfig, value: float
    ) -> None:
        if self._best is None and not math.isfinite(value):
            return  # nothing would ever fall below NaN
        if self._best is None or value < self._best - plateau.min_delta:
            self._best, self._bad = value, 0
            return
        self._bad += 1
        step = trainer.global_step
        if self._bad >= plateau.patience and pl_module.current.start < step < following.start:
            current = pl_module.current
            pl_module.begin_phases({following.name: step})
            if (handoff := current.handoff) is not None and (done := step - current.start) < handoff.steps:
                self.say(
                    f"phase {current.name} ends after {done} of the {handoff.steps} steps of its handoff: the scale "
                    f"stays at {handoff.scale(done - 1):.3g}"
                )
            self.say(
                f"phase {following.name} begins after step {step}: {plateau.monitor} has not fallen below "
                f"{self._best:.4g} in {self._bad} looks"
            )

    def _waiting(self, pl_module: AdapterModule) -> tuple[Phase, PlateauConfig] | None:
        """The next phase and what it waits for; what was seen in another phase is forgotten."""
        if pl_module.phase != self._phase:
            self._forget(pl_module.phase)
        phases = pl_module.schedule.phases
        following = phases[pl_module.phase + 1] if pl_module.phase + 1 < len(phases) else None
        return None if following is None or following.waits_for is None else (following, following.waits_for)

    def _forget(self, phase: int) -> None:
        self._phase, self._best, self._bad = phase, None, 0
        self._losses: list[float] = []
