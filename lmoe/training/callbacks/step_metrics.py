"""Metrics of each optimizer step.

Logs: train/loss, train/load_balancing_loss, train/router_z_loss, train/relu_l1, train/diversity_penalty,
train/router_target_loss, train/phase, lr/<role>, grad_norm/<role>, throughput/{tokens,tokens_per_second},
routing/{entropy,cv,max_vio,dead,dead_share,effective,load_entropy,information}, routing/<site>/{load,importance}/<e>,
routing/<site>/{entropy,cv,max_vio,effective,load_entropy,information}.
"""

import time
from collections.abc import Callable

from lightning.pytorch import Trainer

from lmoe.metrics.routing import routing_rows, routing_summary
from lmoe.training.module import AdapterModule
from lmoe.training.step import Stage, StepCallback, StepRecord


def record(trainer: Trainer, metrics: dict[str, float]) -> None:
    """One row in every logger, at the number of optimizer steps done."""
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.global_step)


class StepMetrics(StepCallback):
    """Logs a row every n optimizer steps.

    Args:
        every_n_steps: optimizer steps between rows; the first and the last step always make one.
        on_step: told of every step: (optimizer steps done, phase name, loss).
    """

    stage = Stage.measure

    def __init__(self, every_n_steps: int, on_step: Callable[[int, str, float], None]) -> None:
        self.every_n_steps, self.on_step = every_n_steps, on_step
        self._tokens, self._since = 0, time.perf_counter()

    def on_train_start(self, trainer: Trainer, pl_module: AdapterModule) -> None:
        self._tokens, self._since = 0, time.perf_counter()

    def before_step(self, trainer: Trainer, module: AdapterModule, step: StepRecord, optimizer) -> None:
        step.learning_rates = {group["name"]: group["lr"] for group in optimizer.param_groups}

    def after_step(self, trainer: Trainer, module: AdapterModule, step: StepRecord) -> None:
        self._tokens += step.tokens_of_all
        done = trainer.global_step
        self.on_step(done, module.current.name, step.losses["train/loss"])
        if done % self.every_n_steps and done not in (1, trainer.max_steps):
            return
        now, tokens = time.perf_counter(), float(self._tokens)
        step.routing = module.step_routing.compute() if module.step_routing.update_called else {}
        module.step_routing.reset()
        record(
            trainer,
            {
                **step.losses,
                "train/phase": float(module.phase),
                "throughput/tokens": tokens,
                "throughput/tokens_per_second": tokens / (now - self._since),
                **{f"lr/{role}": lr for role, lr in step.learning_rates.items()},
                **{f"grad_norm/{role}": float(norm) for role, norm in step.gradient_norms.items()},
                **routing_summary(step.routing),
                **routing_rows(step.routing),
            },
        )
        self._tokens, self._since = 0, now
