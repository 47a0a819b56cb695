"""Metrics of each optimizer step.

Logs: train/loss, train/load_balancing_loss, train/router_z_loss, train/relu_l1, train/diversity_penalty, train/phase,
lr/<role>, grad_norm/<role>, throughput/tokens_per_second,
routing/{entropy,cv,max_vio,dead,dead_share,effective,load_entropy,information}, routing/<site>/{load,importance}/<e>,
routing/<site>/{entropy,cv,max_vio,effective,load_entropy,information}.
"""

import time
from collections.abc import Callable

import torch
from lightning.pytorch import Callback, Trainer

from lmoe.metrics.routing import routing_rows, routing_summary
from lmoe.training.ranks import over_ranks
from lmoe.training.sft_module import SftModule


def record(trainer: Trainer, metrics: dict[str, float]) -> None:
    """One row in every logger, at the number of optimizer steps done."""
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.global_step)


def finished_step(trainer: Trainer, batch_idx: int) -> bool:
    """Whether the micro-batch just done completed an optimizer step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


class StepMetrics(Callback):
    """Logs a row every n optimizer steps.

    Args:
        every_n_steps: optimizer steps between rows; the first and the last step always make one.
        on_step: told of every step: (optimizer steps done, phase name, loss).
    """

    def __init__(self, every_n_steps: int, on_step: Callable[[int, str, float], None]) -> None:
        self.every_n_steps, self.on_step = every_n_steps, on_step
        self._lrs: dict[str, float] = {}
        self._tokens, self._since = 0, time.perf_counter()

    def on_train_start(self, trainer: Trainer, pl_module: SftModule) -> None:
        self._tokens, self._since = 0, time.perf_counter()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: SftModule, optimizer) -> None:
        self._lrs = {group["name"]: group["lr"] for group in optimizer.param_groups}

    def on_train_batch_end(self, trainer: Trainer, pl_module: SftModule, outputs, batch, batch_idx: int) -> None:
        self._tokens += int(batch["valid_mask"].sum()) * trainer.world_size
        if not finished_step(trainer, batch_idx):
            return
        shares, step = pl_module.window.take(), trainer.global_step
        losses = {name: float(over_ranks(trainer, torch.tensor(v))) for name, v in shares.items()}
        pl_module.last_loss = losses["train/loss"]
        self.on_step(step, pl_module.current.name, pl_module.last_loss)
        if step % self.every_n_steps and step not in (1, trainer.max_steps):
            return
        now = time.perf_counter()
        sites = pl_module.step_routing.compute() if pl_module.step_routing.update_called else {}
        pl_module.step_routing.reset()
        record(
            trainer,
            {
                **losses,
                "train/phase": float(pl_module.phase),
                "throughput/tokens_per_second": self._tokens / (now - self._since),
                **{f"lr/{role}": lr for role, lr in self._lrs.items()},
                **{f"grad_norm/{role}": float(norm) for role, norm in pl_module.grad_norms.items()},
                **routing_summary(sites),
                **routing_rows(sites),
            },
        )
        self._tokens, self._since = 0, now
