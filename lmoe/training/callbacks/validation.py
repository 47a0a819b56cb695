"""Validate before the first step with adapters off, every n steps of a phase, and at the end of each phase.

Logs: val/loss, val/<domain>/loss, init/logit_change.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from lightning.pytorch import Callback, Trainer

from lmoe.injection.apply import adapters_off
from lmoe.training.callbacks.step_metrics import finished_step, record
from lmoe.training.sft_module import SftModule


@dataclass(slots=True)
class ValidationResults:
    """What the report needs.

    Args:
        before: losses by name with the adapters off, e.g. {"loss": …, "code/loss": …}.
        after: the latest losses.
        site_load: load of each expert by site in the latest validation.
        domain_load: likewise by domain and site.
    """

    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    site_load: dict[str, list[float]] = field(default_factory=dict)
    domain_load: dict[str, dict[str, list[float]]] = field(default_factory=dict)


class Validation(Callback):
    """Runs the module's evaluation.

    Args:
        every_n_steps: optimizer steps between validations, counted from the start of the phase; 0: only at the end
            of the run.
        announce: told of each result, in words.
    """

    def __init__(self, every_n_steps: int, announce: Callable[[str], None]) -> None:
        self.every_n_steps, self.announce = every_n_steps, announce
        self.results = ValidationResults()

    def state_dict(self) -> dict:
        return {"before": self.results.before}

    def load_state_dict(self, state_dict: dict) -> None:
        self.results.before = state_dict["before"]

    def on_train_start(self, trainer: Trainer, pl_module: SftModule) -> None:
        if trainer.global_step:
            return
        loader = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
        with adapters_off(pl_module.model):
            losses, _ = pl_module.evaluate(loader)
        self.results.before = losses.compute()
        change = self._logit_change(trainer, pl_module, loader)
        record(trainer, {f"val/{k}": v for k, v in self.results.before.items()} | {"init/logit_change": change})
        self.announce(f"validation loss {self.results.before['loss']:.3f} with the adapters off")

    def on_train_batch_end(self, trainer: Trainer, pl_module: SftModule, outputs, batch, batch_idx: int) -> None:
        if finished_step(trainer, batch_idx) and self.due(trainer.global_step, pl_module):
            pl_module.log_dict(self.run(trainer, pl_module), logger=False)
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                callback.on_validation_end(trainer, pl_module)  # early stopping and the best checkpoint watch it

    def due(self, step: int, pl_module: SftModule) -> bool:
        """Whether a validation follows optimizer step `step` (counted from 1)."""
        phase = pl_module.current
        if step == phase.end:
            return bool(self.every_n_steps) or step == pl_module.schedule.phases[-1].end
        return bool(self.every_n_steps) and (step - phase.start) % self.every_n_steps == 0

    def run(self, trainer: Trainer, pl_module: SftModule) -> dict[str, float]:
        """Evaluate and log.

        Returns:
            The losses under their metric names.
        """
        losses, routing = pl_module.evaluate(trainer.datamodule.val_dataloader())  # type: ignore[attr-defined]
        self.results.after = losses.compute()
        self.results.site_load = {site: value.load for site, value in routing.compute().items()}
        self.results.domain_load = routing.load_by_domain()
        metrics = {f"val/{name}": value for name, value in self.results.after.items()}
        record(trainer, metrics)
        self.announce(f"validation loss {self.results.after['loss']:.3f} after step {trainer.global_step}")
        return metrics

    def _logit_change(self, trainer: Trainer, pl_module: SftModule, loader) -> float:
        """Root mean square of the change that fresh adapters make to the logits of one batch."""
        batch = pl_module.transfer_batch_to_device(next(iter(loader)), pl_module.device, 0)
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
        training = pl_module.model.training
        pl_module.model.eval()
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            with adapters_off(pl_module.model):
                base = pl_module.model(**inputs).logits.float()
            change = (pl_module.model(**inputs).logits.float() - base)[batch["valid_mask"]]
        pl_module.model.train(training)
        return float(change.square().mean().sqrt())
