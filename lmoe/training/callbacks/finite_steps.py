"""Never let the weights take a step that is no number.

Logs: train/skipped_steps (only at steps that are skipped).
"""

import math
from collections.abc import Callable

from lightning.pytorch import Trainer

from lmoe.errors import DivergedError
from lmoe.training.callbacks.step_metrics import record
from lmoe.training.module import AdapterModule
from lmoe.training.step import Stage, StepCallback, StepRecord
from lmoe.vocabulary import NonFinite

SKIPPED_IN_A_ROW = 10
"""So many skipped steps one after the other end a run: it does not learn any more."""


class FiniteSteps(StepCallback):
    """Stops or skips where gradients or a loss are no numbers; NOTE after ReadStep, which finds it out. With 16-mixed
    precision gradients overflow now and then, and its scaler skips those steps.

    Args:
        policy: what to do.
        say: told of each skipped step.
    """

    stage = Stage.guard

    def __init__(self, policy: NonFinite, say: Callable[[str], None]) -> None:
        self.policy, self.say = policy, say
        self.skipped, self._in_a_row = 0, 0

    def state_dict(self) -> dict:
        return {"skipped": self.skipped, "in_a_row": self._in_a_row}

    def load_state_dict(self, state_dict: dict) -> None:
        self.skipped, self._in_a_row = state_dict["skipped"], state_dict["in_a_row"]

    def before_step(self, trainer: Trainer, module: AdapterModule, step: StepRecord, optimizer) -> None:
        if step.finite:
            self._in_a_row = 0
            return
        reason = _what_is_wrong(trainer, step)
        if self.policy is NonFinite.stop or self._in_a_row + 1 >= SKIPPED_IN_A_ROW:
            times = f" for the {SKIPPED_IN_A_ROW}th time in a row" if self.policy is NonFinite.skip else ""
            raise DivergedError(
                f"{reason}{times}: stopped before the weights took it. Lower optim.lr, check trainer.gradient_clip_val "
                "and the data, or use trainer.precision=32-true; what checkpoints/ holds is good"
            )
        step.skipped = True
        self.skipped += 1
        self._in_a_row += 1
        if trainer.precision != "16-mixed":  # its scaler finds the same gradients, and expects some
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None  # AdamW leaves a parameter without gradient, and its moments, as they are
        record(trainer, {"train/skipped_steps": float(self.skipped)})
        self.say(f"skipped a step: {reason}; {self.skipped} so far")


def _what_is_wrong(trainer: Trainer, step: StepRecord) -> str:
    if not step.window.finite():
        return f"a loss of step {trainer.global_step} is not finite ({step.window})"
    if trainer.precision != "16-mixed" and not all(math.isfinite(norm) for norm in step.gradient_norms.values()):
        return f"a gradient of step {trainer.global_step} is not finite"
    return f"a loss of step {trainer.global_step} is not finite on another rank"
